"""Weaken last: the last layer, which takes answers back, says less."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, Streams, claim
from foveate.data.facts import Prompt, by_length, known_facts
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, Target, apply, method
from foveate.models.anatomy import Anatomy, anatomy
from foveate.models.patching import Site, patched
from foveate.steer.base import Steer
from foveate.steer.memory import remembering
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@method("weaken-last")
class WeakenLast(Steer):
    """Take away a fraction of what the last layer adds to the residual stream.

    The paper finds that the last layer lowers the answers that the layers before have worked out, and weakens it for
    that. The name, and that one fraction holds for every token, are ours. What a sublayer adds is its output, or what a
    norm right after it makes of it; the fraction is taken off at the end of the layer, so that the layer's MLP still
    reads all that its attention has found.

    Fields:
        strength: the fraction taken away, in [0, 1]; 0 changes nothing.
        part: of what: "layer" (all that it adds), "attention" or "mlp".
        heads: numbers of heads, such as "1/4": then it is only of what these heads give to the attention's last map.

    Source: Interpreting Key Mechanisms of Factual Recall (2024), on anti-overconfidence.

    Example:
        >>> import foveate as fv, torch
        >>> model, text = fv.tiny("llama"), torch.arange(1, 65).unsqueeze(0)
        >>> with fv.apply(model, "weaken-last:strength=0.5,part=mlp"):
        ...     weaker = model(text).logits
        >>> torch.equal(weaker, model(text).logits)
        False
    """

    paper: ClassVar[Paper | None] = Paper(
        "Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models",
        2024,
        "https://arxiv.org/abs/2403.19521",
    )
    claim: ClassVar[str] = "the last layer suppresses right answers; weakened, it lets their probability rise"

    strength: float = 0.5
    part: str = "layer"
    heads: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise FoveateError(
                f"{self.name}: strength={self.strength} is outside [0, 1]: it is the fraction that is taken away."
            )
        if self.part not in ("layer", "attention", "mlp"):
            raise FoveateError(f"{self.name}: part={self.part} is not one of layer, attention, mlp.")
        if self.heads and self.part == "mlp":
            raise FoveateError(f"{self.name}: heads={self.heads} are parts of the attention, not of the MLP: drop one.")
        if self.heads and not all(number.isdecimal() for number in self.heads.split("/")):
            raise FoveateError(
                f"{self.name}: heads={self.heads} can't be read: give numbers with / between, such as 1/4."
            )

    def index(self, parts: Anatomy) -> int:
        """The layer that is weakened."""
        return len(parts.layers) - 1

    @contextmanager
    def applied(self, target: Target) -> Iterator[None]:
        parts = anatomy(target.model)
        if self.heads:
            sites = [Site("head", self.index(parts), int(number)) for number in self.heads.split("/")]
            # A cache filled without it belongs to another recipe: `remembering` says so.
            with (
                remembering(parts.model),
                patched(parts.model, {s: lambda old: (1 - self.strength) * old for s in sites}),
            ):
                yield
            return
        layer = parts.layers[self.index(parts)]
        seen: dict[str, Tensor] = {}
        out_of: dict[nn.Module | None, str] = {layer.attention: "attention", layer.mlp or layer.down: "mlp"}
        last: list[tuple[str, Tensor]] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.clear()
            last.clear()
            seen["before"] = args[0] if args else kwargs["hidden_states"]

        def gives(module: nn.Module, args: Any, output: Any) -> None:
            given = output[0] if isinstance(output, tuple) else output
            seen[out_of[module]] = given
            last[:] = [(out_of[module], given)]

        def norm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if (
                last and args and args[0].data_ptr() == last[0][1].data_ptr()
            ):  # a norm right after a sublayer has its last word
                seen[last[0][0]] = output

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            after = output[0] if isinstance(output, tuple) else output
            added = after - seen["before"] if self.part == "layer" else seen.get(self.part)
            seen.clear()
            last.clear()
            if added is None:  # there is no such sublayer here any more
                return output
            weaker = (after - self.strength * added.view_as(after)).to(after.dtype)
            return (weaker, *output[1:]) if isinstance(output, tuple) else weaker

        with ExitStack() as hooks:
            hooks.enter_context(remembering(parts.model))
            hooks.callback(layer.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for module in out_of:
                if module is not None:
                    hooks.callback(module.register_forward_hook(gives).remove)
            for each in layer.norms.values():
                hooks.callback(each.register_forward_hook(norm).remove)
            hooks.callback(layer.module.register_forward_hook(leave).remove)
            yield


# ---- the claim ------------------------------------------------------------------------------------------------------

STRENGTHS, PARTS = (0.25, 0.5, 0.75, 1.0), ("layer", "attention", "mlp")
MOST = 48
PROSE = Perplexity(tokens=1024, chunk=128)


@dataclass(frozen=True, kw_only=True)
class _Other(WeakenLast):
    """The control, for the claim: the same of another layer."""

    layer: int = 0

    def index(self, parts: Anatomy) -> int:
        return self.layer


@claim("weaken-last")
class WeakerLastLayerRecalls(Claim):
    statement: ClassVar[str] = "weakening the last layer's suppression raises the probability of right answers to facts"
    setting: ClassVar[str] = (
        "at most 48 facts that the model knows, in two halves of subjects; strength (0.25, 0.5, 0.75, 1) and part "
        "(layer, attention, mlp, or all heads that alone lower the answer) that raise the mean log-probability of the "
        "answer most on one half, judged on the other; control: the same of three random other layers; beside it, "
        "perplexity on 1,024 tokens of evaluation text"
    )

    def run(self, bench: Bench) -> Finding:
        model, parts = bench.model, anatomy(bench.model)
        count = len(parts.layers)
        facts = known_facts(model, bench.tokenizer, most=MOST)
        # All that is known of one subject is in the same half.
        subjects = sorted({fact.fact.subject for fact in facts})
        learned, judged = ([f for f in facts if subjects.index(f.fact.subject) % 2 == half] for half in (0, 1))
        before = _log_probabilities(model, learned)

        def gained(tried: WeakenLast) -> float:
            with apply(model, tried):
                return float((_log_probabilities(model, learned) - before).mean())

        heads = [head for head in range(parts.heads) if gained(WeakenLast(strength=1.0, heads=str(head))) > 0]
        bench.progress(0.3)
        choices = [WeakenLast(strength=strength, part=part) for strength, part in product(STRENGTHS, PARTS)]
        if heads:
            named = "/".join(map(str, heads))
            choices += [WeakenLast(strength=strength, heads=named) for strength in STRENGTHS]
        best = max(choices, key=gained)
        bench.progress(0.6)
        others = random.Random(0).sample(range(1, count - 1), min(3, max(0, count - 2)))
        given = [
            best,
            *(_Other(strength=best.strength, part=best.part, heads=best.heads, layer=layer) for layer in others),
        ]
        whole, after = _log_probabilities(model, judged), []
        for each in given:
            with apply(model, each):
                after.append(_log_probabilities(model, judged))
        bench.progress(0.8)
        streams = Streams(replace(bench, progress=lambda part: bench.progress(0.8 + 0.2 * part)), PROSE, of=2)
        full, weak = streams.read("full"), streams.read(best)
        gains = [mean((each.exp() - whole.exp()).tolist()) for each in after]
        return Finding(
            {
                "facts, judged": Metric.exact(len(judged)),
                "probability of the right answer, whole model": mean(whole.exp().tolist()),
                f"with {best}": mean(after[0].exp().tolist()),
                "gained": gains[0],
                "gained, in nats": mean((after[0] - whole).tolist()),
                **{f"gained, layer {i} weakened instead": gain for i, gain in zip(others, gains[1:], strict=True)},
                "perplexity on prose, over the whole model's": weak.over(full),
            },
            {
                "the probability of the right answer rises": gains[0].low > 0,
                "more than with another layer weakened": all(gain.high < gains[0].low for gain in gains[1:]),
            },
        )


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, facts: Sequence[Prompt]) -> Tensor:
    """Of each fact's answer, float64 (fact,), on the CPU; prompts of one length are read together."""
    found = torch.zeros(len(facts), dtype=torch.float64)
    for rows in by_length(facts):
        ids = torch.cat([facts[row].ids for row in rows]).to(model.device)
        logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].double().log_softmax(-1).cpu()
        found[rows] = logits[torch.arange(len(rows)), torch.tensor([facts[row].answer for row in rows])]
    return found
