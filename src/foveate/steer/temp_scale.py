"""Temp-scale: sharper attention, so that long texts do not all come to look alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean, perplexity_ratio
from foveate.methods import Paper, Target, apply, method
from foveate.models.anatomy import Anatomy, anatomy
from foveate.steer.base import AttentionSteer, AttentionView
from foveate.tasks.base import Bench, passages, surprisal


@method("temp-scale")
class TempScale(AttentionSteer):
    """Divide the logits of attention by a temperature: below one, attention is sharper, and mixes tokens less.

    Attention averages over tokens, and so takes out what differs between them, the more so the longer the text. The
    paper makes it sharper in embedding models, in all layers and heads, without training. Weights are made new from
    the old ones, w ** (1 / temperature) over its sum, which is the softmax of the logits over the temperature; where a
    family caps its logits (Gemma 2), the capped ones are divided. The default is ours.

    Fields:
        temperature: what logits are divided by; 1 changes nothing.

    Source: TempScale (abstract).

    Example:
        >>> import foveate as fv, torch
        >>> model, text = fv.tiny("llama"), torch.arange(1, 33).unsqueeze(0)
        >>> with fv.apply(model, "temp-scale:temperature=0.5"):
        ...     sharper = model(text).logits
        >>> torch.equal(sharper, model(text).logits)
        False
    """

    paper: ClassVar[Paper | None] = Paper(
        "Length-Induced Embedding Collapse in Transformer-based Models", 2024, "https://arxiv.org/abs/2410.24200"
    )
    claim: ClassVar[str] = "sharper attention keeps the embeddings of long texts apart, without training"

    temperature: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise FoveateError(
                f"temp-scale: temperature={self.temperature} must be a positive number, which logits are divided by: "
                "below one attention is sharper, above one flatter."
            )

    def heads(self, target: Target, parts: Anatomy) -> Tensor:
        there = torch.tensor([layer.q is not None or layer.qkv is not None for layer in parts.layers])
        return (there & (self.temperature != 1))[:, None].repeat(1, parts.heads)

    def adjust(self, view: AttentionView) -> Tensor:
        return (view.weights.log() / self.temperature).softmax(dim=-1)


@claim("temp-scale")
class SharperAttentionKeepsApart(Claim):
    statement: ClassVar[str] = (
        "the longer the texts, the more alike their embeddings, since attention takes out what differs; a temperature "
        "below one in all softmaxes lessens that, without training (abstract)"
    )
    setting: ClassVar[str] = (
        "16 passages of evaluation text, the first 32 and all 512 tokens; embeddings are the mean of the last layer's "
        "states after the final norm, alike by their mean cosine to the other 15; temperatures of 0.8 and, as the "
        "control, 1.25, against 1; the paper's models are trained to embed, this one is not"
    )

    passages: ClassVar[int] = 16
    lengths: ClassVar[tuple[int, int]] = (32, 512)
    temperatures: ClassVar[tuple[float, ...]] = (1.0, 0.8, 1.25)

    def run(self, bench: Bench) -> Finding:
        short, long = self.lengths
        rows = passages(bench, self.passages, long)
        metrics: dict[str, Metric] = {}
        rise: dict[float, Tensor] = {}
        tokens: dict[float, Tensor] = {}
        inside_long: dict[float, Tensor] = {}
        nats: dict[float, list[float]] = {}
        for done, temperature in enumerate(self.temperatures):
            with apply(bench.model, TempScale(temperature=temperature)):
                states, nats[temperature] = _states(bench.model, rows)
            alike = {n: _alike(states[:, :n].mean(1)) for n in self.lengths}
            inside = {n: torch.stack([_alike(row[:n]).mean() for row in states]) for n in self.lengths}
            rise[temperature], tokens[temperature] = alike[long] - alike[short], inside[long] - inside[short]
            inside_long[temperature] = inside[long]
            at = f"at temperature {temperature:g}"
            for n in self.lengths:
                metrics[f"cosine of texts of {n} tokens, {at}"] = mean(alike[n].tolist())
                metrics[f"cosine of the tokens of a text of {n}, {at}"] = mean(inside[n].tolist())
            metrics[f"what length adds to that of texts, {at}"] = mean(rise[temperature].tolist())
            bench.progress((done + 1) / len(self.temperatures))
        whole, sharp, flat = self.temperatures
        sharper, flatter = (mean((rise[t] - rise[whole]).tolist()) for t in (sharp, flat))
        apart, closer = (mean((inside_long[t] - inside_long[whole]).tolist()) for t in (sharp, flat))
        counts = [long - 1] * len(rows)
        for t, change, within in ((sharp, sharper, apart), (flat, flatter, closer)):
            at = f"at temperature {t:g}"
            metrics[f"cosine of the tokens of a text of {long}, {at} less at 1"] = within
            metrics[f"what length adds for texts, {at} less at 1"] = change
            metrics[f"what length adds for tokens, {at} less at 1"] = mean((tokens[t] - tokens[whole]).tolist())
            metrics[f"perplexity, {at} over at 1"] = perplexity_ratio(nats[t], nats[whole], counts)
        return Finding(
            metrics,
            {
                "longer texts are more alike": mean(rise[whole].tolist()).low > 0,
                "sharper attention lessens that": sharper.high < 0,
                "flatter attention does not": flatter.low > 0,
                "the tokens of a long text are less alike with sharper attention": apart.high < 0,
                "and more with flatter": closer.low > 0,
            },
        )


@torch.no_grad()
def _states(model: PreTrainedModel, rows: list[Tensor]) -> tuple[Tensor, list[float]]:
    """Each text's states after the final norm, float32 (text, token, hidden), and the summed nats of its tokens."""
    states, nats = [], []
    with _final(model) as final:
        for row in rows:
            logits = model(row, use_cache=False).logits
            states.append(final[-1][0].float().cpu())
            final.clear()
            nats.append(float(surprisal(logits[:, :-1], row[:, 1:]).sum()))
    return torch.stack(states), nats


@contextmanager
def _final(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What the final norm gives in each forward; what enters the output map, in models without one."""
    norm = anatomy(model).final_norm
    found: list[Tensor] = []

    def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output.detach())

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].detach())

    if norm is not None:
        handle = norm.register_forward_hook(leave)
    else:
        handle = model.get_output_embeddings().register_forward_pre_hook(enter)
    try:
        yield found
    finally:
        handle.remove()


def _alike(vectors: Tensor) -> Tensor:
    """Each vector's mean cosine to the others, (vector, width) to (vector,)."""
    units = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return (units @ units.sum(0) - 1) / (len(units) - 1)
