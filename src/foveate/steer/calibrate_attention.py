"""Attention calibration: sinks beyond the first token give up attention to the other tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.claims import Claim, Finding, claim
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean, perplexity_ratio
from foveate.methods import CALIBRATION_TOKENS, Paper, Target, UnitScores, method
from foveate.models.anatomy import Anatomy, anatomy
from foveate.steer.base import AttentionSteer, AttentionView
from foveate.tasks.base import Bench, passages, read, surprisal


@method("calibrate-attention")
class CalibrateAttention(AttentionSteer):
    """Find tokens beyond the first that receive too much attention, and give some of it to the other tokens.

    A token is a sink of a head if the mean attention that it received there, over all queries that could see it, is
    above alpha / N, where N is the number of tokens: `alpha` times what it would be if attention were even. In the
    chosen heads each sink keeps `beta` of its attention, and what is freed is spread over the tokens that are no sinks
    (the first token among them), in proportion to the attention that they have. So rows still sum to one.

    The paper takes the mean over the whole input. Here each query's sinks come from the queries up to it, so that no
    token is influenced by what follows it; at the last token both are the same. The first two layers and the last are
    left alone, as in the paper's released code.

    The paper tries one head after the other on labelled questions, and chooses those that answer more of them when
    calibrated. Here calibration text takes the place of the questions, its loss that of the accuracy, and no labels are
    needed. A head is chosen if calibrating it lowers the loss on each of four pieces of the text.

    Fields:
        alpha: how many times the even share makes a token a sink.
        beta: the fraction of its attention that a sink keeps, in [0, 1]; 1 changes nothing.
        choose: "slope": heads are chosen by the slope of the loss as a head goes from uncalibrated to calibrated; it
            costs one forward and one backward of the calibration text. "each": by the loss with that head alone
            calibrated, as in the paper; a forward for each head. "all": all heads of these layers.

    Source: section 4 (definition of a sink, calibration, head filtering); alpha=5, beta=0.4 are its settings.

    Example:
        >>> import foveate as fv, torch
        >>> model, text = fv.tiny("llama"), torch.arange(1, 65).unsqueeze(0)
        >>> with fv.apply(model, "calibrate-attention:alpha=2,choose=all"):
        ...     calibrated = model(text).logits
        >>> torch.equal(calibrated, model(text).logits)
        False
    """

    paper: ClassVar[Paper | None] = Paper(
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
        "Attention Calibration",
        2024,
        "https://arxiv.org/abs/2406.15765",
    )
    claim: ClassVar[str] = "attention taken from sinks beyond the first token, in chosen heads, raises accuracy"

    alpha: float = 5.0
    beta: float = 0.4
    choose: str = "slope"

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise FoveateError(f"{self.name}: alpha={self.alpha} must be positive: it is a multiple of the even share.")
        if not 0 <= self.beta <= 1:
            raise FoveateError(f"{self.name}: beta={self.beta} is outside [0, 1]: it is the fraction that sinks keep.")
        if self.choose not in ("slope", "each", "all"):
            raise FoveateError(f"{self.name}: choose={self.choose} is not one of slope, each, all.")

    def sinks(self, view: AttentionView) -> Tensor:
        """Which entries are sinks, for each query: bool (batch, head, query, entry)."""
        return (view.received > self.alpha / view.seen) & ~view.first

    def adjust(self, view: AttentionView) -> Tensor:
        sinks = self.sinks(view) & (view.weights > 0)
        held = (view.weights * sinks).sum(-1, keepdim=True)
        others = (view.weights * ~sinks).sum(-1, keepdim=True)
        # Where all attention is on sinks there is nobody to give it to: they keep it.
        kept = torch.where(others > 0, self.beta, 1.0)
        return view.weights * torch.where(sinks, kept, 1 + (1 - kept) * held / others.clamp(min=1e-30))

    def heads(self, target: Target, parts: Anatomy) -> Tensor:
        if self.beta == 1:
            return torch.zeros(len(parts.layers), parts.heads, dtype=torch.bool)
        if self.choose == "all":
            return self.candidates(parts)
        return (self.score(target, parts).scores > 0).cpu()

    def candidates(self, parts: Anatomy) -> Tensor:
        """The heads that may be chosen, bool (layer, head)."""
        there = torch.tensor([layer.q is not None or layer.qkv is not None for layer in parts.layers])
        there[:2] = there[-1] = False
        return there[:, None].repeat(1, parts.heads)

    def score(self, target: Target, parts: Anatomy, pieces: int = 4) -> UnitScores:
        """By how much calibrating a head lowers the loss on the piece of calibration text where it helps least."""
        ids = target.calibration()
        text = [piece for piece in ids.chunk(pieces, dim=1) if piece.shape[1] > 1]
        candidates = self.candidates(parts)
        measured = self._slopes if self.choose == "slope" else self._changes
        change = torch.stack([measured(parts, piece, candidates) for piece in text]).amax(0)
        return UnitScores("head", (-change).masked_fill(~candidates, torch.nan))

    def _slopes(self, parts: Anatomy, piece: Tensor, candidates: Tensor) -> Tensor:
        """d loss / d gate of each head, at gate 0: weights are (1 - gate) * old + gate * calibrated."""
        with torch.enable_grad():
            gates = torch.zeros(candidates.shape, device=piece.device, requires_grad=True)

            def mixed(view: AttentionView) -> Tensor:
                gate = gates[view.layer, view.heads][:, None, None]
                return view.weights + gate * (self.adjust(view) - view.weights).detach()

            with self.steering(parts, _by_layer(candidates), mixed):
                return torch.autograd.grad(_loss(parts, piece), gates)[0].cpu()

    @torch.no_grad()
    def _changes(self, parts: Anatomy, piece: Tensor, candidates: Tensor) -> Tensor:
        """The loss with one head calibrated, less the loss with none."""
        before, change = float(_loss(parts, piece)), torch.zeros(candidates.shape)
        for layer, head in candidates.nonzero().tolist():
            with self.steering(parts, {layer: torch.tensor([head])}, self.adjust):
                change[layer, head] = float(_loss(parts, piece)) - before
        return change


def _by_layer(heads: Tensor) -> dict[int, Tensor]:
    return {index: row.nonzero()[:, 0] for index, row in enumerate(heads) if row.any()}


def _loss(parts: Anatomy, ids: Tensor) -> Tensor:
    """Mean next-token loss of token ids (1, length)."""
    logits = parts.model(ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@dataclass(frozen=True, kw_only=True)
class _RandomTokens(CalibrateAttention):
    """The control, for the claim: as many tokens give up attention, but any tokens beyond the first."""

    def sinks(self, view: AttentionView) -> Tensor:
        count = super().sinks(view).sum(-1, keepdim=True)
        generator = torch.Generator().manual_seed(view.layer)
        order = torch.rand(view.weights.shape[-1], generator=generator).to(view.weights.device)
        order = order.expand_as(view.weights).masked_fill(view.first | (view.weights == 0), 2.0)
        return order.argsort(-1).argsort(-1) < count


@claim("calibrate-attention")
class SinksCanGiveWay(Claim):
    statement: ClassVar[str] = (
        "attention sinks stand also beyond the first token; taking attention from them in chosen heads raises accuracy "
        "(abstract: by up to 7.3% on the average of several data sets, Llama-30B)"
    )
    setting: ClassVar[str] = (
        "sinks: 4 passages of 256 tokens of evaluation text, attention averaged over all heads of all layers, tokens "
        "that at least 32 queries saw; accuracy: 160 questions, which of four pieces of 6 tokens goes on a passage of "
        "96, the other three being what follows it, by likelihood; heads chosen on 2,048 tokens of calibration text"
    )

    questions: ClassVar[int] = 160
    prompt: ClassVar[int] = 96
    answer: ClassVar[int] = 6

    def run(self, bench: Bench) -> Finding:
        parts, calibrated, random = anatomy(bench.model), CalibrateAttention(), _RandomTokens()
        beyond, off = self.sinks(bench, parts, calibrated)
        heads = _by_layer(calibrated.heads(self.target(bench), parts))
        whole = self.answers(bench)
        bench.progress(0.5)
        with calibrated.steering(parts, heads, calibrated.adjust):
            ours = self.answers(bench)
        bench.progress(0.75)
        with random.steering(parts, heads, random.adjust):
            control = self.answers(bench)
        over_whole = mean([a - b for a, b in zip(ours.right, whole.right, strict=True)])
        over_control = mean([a - b for a, b in zip(ours.right, control.right, strict=True)])
        return Finding(
            {
                "sinks beyond the first token, a passage": beyond,
                "heads chosen": Metric.exact(sum(map(len, heads.values()))),
                "accuracy, model as it is": mean(whole.right),
                "accuracy, calibrated": mean(ours.right),
                "accuracy, random tokens": mean(control.right),
                "accuracy, calibrated less as it is": over_whole,
                "accuracy, calibrated less random tokens": over_control,
                "perplexity of the right answers, calibrated over as it is": self.ratio(ours, whole),
                "perplexity of the right answers, random tokens over as it is": self.ratio(control, whole),
            },
            {
                "some token beyond the first is a sink": beyond.low > 0,
                "rows sum to one (to 1e-5)": off < 1e-5,
                "accuracy is higher than the model's": over_whole.low > 0,
                "and than with random tokens": over_control.low > 0,
            },
        )

    def target(self, bench: Bench) -> Target:
        ids = tokens(bench.text.calibration, bench.tokenizer, CALIBRATION_TOKENS).to(bench.model.device)
        return Target(bench.model, None, lambda length=0: ids, lambda: bench.tokenizer)

    @torch.no_grad()
    def sinks(self, bench: Bench, parts: Anatomy, technique: CalibrateAttention) -> tuple[Metric, float]:
        """Sinks beyond the first token in the mean attention of a passage; how far a row's sum is off one at most."""
        everywhere = {i: torch.arange(parts.heads) for i in range(len(parts.layers))}
        counts, off = [], 0.0
        for ids in passages(bench, 4, 256):
            total = torch.zeros(ids.shape[1])

            def look(view: AttentionView, total: Tensor = total) -> Tensor:
                nonlocal off
                adjusted = technique.adjust(view)
                off = max(off, float((adjusted.sum(-1) - 1).abs().max()))
                total += view.received[0, :, -1].mean(0).cpu() / len(parts.layers)
                return view.weights  # only looked at

            with technique.steering(parts, everywhere, look):
                bench.model(ids, use_cache=False)
            counts.append(float((total[1:-31] > technique.alpha / len(total)).sum()))
        return mean(counts), off

    def answers(self, bench: Bench) -> _Answers:
        """Each question's result, and the nats of its right answer."""
        found = _Answers([], [])
        for text in passages(bench, self.questions, self.prompt + 4 * self.answer):
            # Wrong answers: what stands a little later in the same text.
            pieces = text[0, self.prompt :].view(4, self.answer)
            logits, cache = read(bench.model, text[:, : self.prompt], last=1)
            cache.batch_repeat_interleave(4)
            more, _ = read(bench.model, pieces, cache)
            nats = surprisal(torch.cat([logits.expand(4, -1, -1), more[:, :-1]], dim=1), pieces).sum(-1)
            found.right.append(float(nats.argmin() == 0))
            found.nats.append(float(nats[0]))
        return found

    def ratio(self, a: _Answers, b: _Answers) -> Metric:
        return perplexity_ratio(a.nats, b.nats, [self.answer] * len(a.nats))


@dataclass
class _Answers:
    """For each question: 1 if it was answered rightly; nats of the right answer."""

    right: list[float]
    nats: list[float]
