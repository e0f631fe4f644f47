"""Logit lens: at which depth the next token can be read off already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.measure.ranks import rank_correlation
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import Anatomy, anatomy
from foveate.models.circuits import require_plain_widths
from foveate.models.patching import Patch, Site, patched, recorded
from foveate.probes.base import Data, Lines, Panel, Reading, Rows, probe
from foveate.probes.watch import Through, Watch, Watcher
from foveate.tasks.base import Bench, passages

CHUNK = 1 << 24
"""Logits held at a time (64 MiB in float32)."""
SHOWN = 8
"""Places whose readings at several depths are shown."""


@probe("logit-lens")
class LogitLens(Watcher):
    """What each layer would say next: the final norm and the head, applied to the residual stream between layers.

    At every layer this is compared with what the model says in the end: how often both put the same token first, how
    far the distributions are apart (KL divergence from the final one, in nats), and how often the token that really
    comes next is first. "becomes readable" scores a layer by how much it adds to the agreement.

    Early layers may hold the answer in directions that the head does not read yet, so what the lens shows is the
    latest depth at which it is there, not the earliest. Translating each layer before (the tuned lens) is not done.

    Fields: `every`, one token of so many is looked at.

    Source: the logit lens, "interpreting GPT: the logit lens" (nostalgebraist, 2020). How it fails, and prediction
    depth: Eliciting Latent Predictions from Transformers with the Tuned Lens (2023).

    Example:
        >>> import foveate as fv
        >>> model = fv.planted()
        >>> reading = LogitLens().measure(model, Data.of(model, fv.tiny_tokenizer(), length=64, passages=1))
        >>> [round(y, 1) for _, y in reading.panels[0].series["same first token as in the end"]][-1]
        1.0
    """

    paper: ClassVar[Paper | None] = Paper(
        "Eliciting Latent Predictions from Transformers with the Tuned Lens", 2023, "https://arxiv.org/abs/2303.08112"
    )
    claim: ClassVar[str] = "layer by layer, a model's guess of the next token comes closer to its final one"
    title: ClassVar[str] = "At which depth can the next token be read?"
    default: ClassVar[bool] = True

    every: int = 8

    def __post_init__(self) -> None:
        if self.every < 1:
            raise FoveateError(f"logit-lens: every={self.every} is no distance between tokens: give 1 or more.")

    def check(self, model: PreTrainedModel, data: Data) -> None:
        parts = anatomy(model)
        require_plain_widths("logit-lens", parts)

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        parts = anatomy(model)
        head = parts.vocab * parts.hidden / max(1, sum(p.numel() for p in model.parameters()))
        return super().cost(model, data) * (1 + head * len(parts.layers) / self.every)

    def watch(self, model: PreTrainedModel, data: Data) -> Watch:
        return _Watch(model, data, self.every)


class _Watch(Watch):
    attention_wanted = False

    def __init__(self, model: PreTrainedModel, data: Data, every: int):
        self.parts, self.tokenizer, self.every = anatomy(model), data.tokenizer, every
        self.depths = len(self.parts.layers) + 1
        self.seen: list[Lens] = []
        self.shown: list[list[Any]] = []

    def sites(self) -> list[Site]:
        return [Site("residual", at) for at in range(self.depths)]

    def through(self, passage: Through) -> None:
        last = len(passage.ids) - 1
        places = torch.arange(min(self.every, last) - 1, last, self.every, device=passage.ids.device)
        states = [passage.values[site][places] for site in self.sites()]
        self.seen.append(lens(self.parts, states, passage.ids[places + 1]))
        if not self.shown:
            self.shown = self._rows(passage.ids, places)

    def _rows(self, ids: Tensor, places: Tensor) -> list[list[Any]]:
        said = self.seen[0].said
        rows = []
        for at in range(0, len(places), max(1, -(-len(places) // SHOWN))):
            place = int(places[at])
            text = self.tokenizer.decode(ids[max(0, place - 7) : place + 1])
            guesses = [self.tokenizer.decode(said[depth, at]) for depth in self._some_depths()]
            rows.append([text, *guesses, self.tokenizer.decode(ids[place + 1])])
        return rows

    def _some_depths(self) -> list[int]:
        last = self.depths - 1
        return sorted({round(last * part) for part in (0.25, 0.5, 0.75, 0.9, 1)})

    def reading(self) -> Reading:
        found = Lens(*(torch.cat(each, dim=-1) for each in zip(*self.seen, strict=True)))
        agreement = found.agrees().double().mean(1)
        right, apart = found.right.double().mean(1), found.kl.double().mean(1)
        rises = agreement.diff()[:, None]
        half, most = (reached(agreement, share) for share in (0.5, 0.9))
        layers = self.depths - 1
        summary = (
            f"After {half} of {layers} layers, half of this model's guesses of the next token are what they are in "
            f"the end, after {most} layers 90%. The token that really comes is the first guess for "
            f"{right[-1]:.0%} of the places read, and halfway through for {right[layers // 2]:.0%}."
        )
        metrics = {
            "layers until a guess is the final one and stays": mean(found.settled().double().tolist()),
            "layers until half of the guesses are the final ones": Metric.exact(half),
            "layers until 90% are": Metric.exact(most),
            "right at the end": mean(found.right[-1].double().tolist()),
        }
        axis = "layers passed"
        panels: list[Panel] = [
            Lines(
                "What can be read at each depth",
                axis,
                "share of places",
                {
                    "same first token as in the end": list(enumerate(agreement.tolist())),
                    "first token is the one that comes": list(enumerate(right.tolist())),
                },
            ),
            Lines(
                "Distance from the final guess", axis, "KL divergence, nats", {"KL": list(enumerate(apart.tolist()))}
            ),
            Rows(
                "What it would say next",
                ["text before", *(f"after {depth} layers" for depth in self._some_depths()), "what comes"],
                self.shown,
            ),
        ]
        setting = {"every": self.every, "places": found.said.shape[1]}
        scores = {"becomes readable": UnitScores("layer", rises)}
        return Reading("logit-lens", LogitLens.title, summary, metrics, scores, [], panels, setting)


# ---- the lens -------------------------------------------------------------------------------------------------------


class Lens(NamedTuple):
    """What was read at each depth and place, (depth, place) each, on the CPU.

    Attributes:
        said: the token that is first.
        right: bool: it is the token that comes.
        kl: KL divergence from the distribution in the end to the one at this depth, in nats.
    """

    said: Tensor
    right: Tensor
    kl: Tensor

    def agrees(self) -> Tensor:
        """Where the first token is that of the end: bool (depth, place)."""
        return self.said == self.said[-1]

    def settled(self) -> Tensor:
        """The depth from which on the first token is that of the end, at each place: LongTensor (place,)."""
        return len(self.said) - self.agrees().flip(0).long().cumprod(0).sum(0)


@torch.no_grad()
def lens(parts: Anatomy, states: Sequence[Tensor], following: Tensor) -> Lens:
    """Read the residual stream at several depths, the last of which is the end, a chunk of places at a time.

    Args:
        parts: the model's.
        states: at each depth, (place, hidden), as it would enter the final norm.
        following: LongTensor (place,): the tokens that come.

    Example:
        >>> import foveate as fv
        >>> parts = fv.anatomy(fv.tiny("llama"))
        >>> found = lens(parts, [torch.randn(3, 64), torch.ones(3, 64)], torch.tensor([1, 2, 3]))
        >>> found.kl[1].tolist(), found.said.shape
        ([0.0, 0.0, 0.0], torch.Size([2, 3]))
    """
    cap = getattr(parts.model.config, "final_logit_softcapping", None)

    def read(state: Tensor) -> Tensor:
        logits = parts.head(state if parts.final_norm is None else parts.final_norm(state)).float()
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    chunks = []
    for rows in torch.arange(len(following)).split(max(1, CHUNK // parts.vocab)):
        rows = rows.to(following.device)
        end, found = read(states[-1][rows]), []
        for state in states:
            here = read(state[rows])
            said = here.argmax(-1)
            kl = (end.exp() * (end - here)).sum(-1)
            found.append((said.cpu(), (said == following[rows]).cpu(), kl.cpu()))
        chunks.append([torch.stack(each) for each in zip(*found, strict=True)])
    return Lens(*(torch.cat(each, dim=1) for each in zip(*chunks, strict=True)))


def reached(shares: Tensor, share: float) -> int:
    """The first depth from which on all shares (depth,) are at least `share`.

    Example:
        >>> reached(torch.tensor([0.6, 0.2, 0.5, 1.0]), 0.5)
        2
    """
    return len(shares) - int((shares.flip(0) >= share).long().cumprod(0).sum())


# ---- the claim ------------------------------------------------------------------------------------------------------

PASSAGES = 4


@claim("logit-lens")
class GuessesAreRefined(Claim):
    statement: ClassVar[str] = (
        "what the lens reads comes closer to the final guess from layer to layer (nostalgebraist, 2020; tuned "
        "lens), and tokens whose guess is settled early are the easy ones (tuned lens, on prediction depth)"
    )
    setting: ClassVar[str] = (
        "every 4th token of 4 passages of 512 tokens of evaluation text; control: the final guess of another place; "
        "single layers at 60%, 75% and 90% of the depth switched off, for guesses that were settled before them and "
        "those that were not"
    )

    def run(self, bench: Bench) -> Finding:
        model, parts = bench.model, anatomy(bench.model)
        layers = len(parts.layers)
        late = sorted({min(layers - 1, round(layers * part)) for part in (0.6, 0.75, 0.9)})
        texts = passages(bench, PASSAGES, min(512, parts.max_positions))
        sites = [Site("residual", at) for at in range(layers + 1)]
        seen: list[Lens] = []
        changed: dict[int, list[Tensor]] = {layer: [] for layer in late}
        for turn, ids in enumerate(texts):
            places = torch.arange(3, ids.shape[1] - 1, 4, device=ids.device)
            with torch.no_grad(), recorded(model, sites) as values:
                model(ids, use_cache=False, logits_to_keep=1)
            seen.append(lens(parts, [values[site][0, places] for site in sites], ids[0, places + 1]))
            for layer in late:
                off: dict[Site, Patch] = {Site(kind, layer): torch.zeros_like for kind in ("attention", "mlp")}
                with torch.no_grad(), patched(model, off), recorded(model, sites[-1:]) as values:
                    model(ids, use_cache=False, logits_to_keep=1)
                said = lens(parts, [values[sites[-1]][0, places]], ids[0, places + 1]).said[0]
                changed[layer].append(said != seen[-1].said[-1])
            bench.progress((turn + 1) / len(texts))
        found = Lens(*(torch.cat(each, dim=-1) for each in zip(*seen, strict=True)))
        settled, agrees, middle = found.settled(), found.agrees(), layers // 2
        closer = rank_correlation(torch.arange(layers + 1.0), -found.kl.double().mean(1))
        early = settled <= settled.median()
        sure = [mean(found.right[-1][group].double().tolist()) for group in (early, ~early) if group.any()]
        other = mean((found.said[middle] == found.said[-1].roll(len(settled) // 2)).double().tolist())
        half = mean(agrees[middle].double().tolist())
        metrics = {
            "rank correlation of depth and nearness to the end": Metric.exact(closer or 0.0),
            "layers until a guess stays": mean(settled.double().tolist()),
            "guesses as in the end, halfway": half,
            "the same with the final guess of another place": other,
            "right, settled early": sure[0],
            "right, settled late": sure[-1],
        }
        checks = {
            "nearer from layer to layer (rank correlation at least 0.9)": (closer or 0.0) >= 0.9,
            "halfway, guesses are this place's own, not just frequent words": half.low > other.high,
            "early settled guesses are right more often": sure[0].low > sure[-1].high,
        }
        for layer, each in changed.items():
            there, before = torch.cat(each).double(), settled <= layer
            kept, lost = (mean(there[group].tolist() or [0.0]) for group in (before, ~before))
            metrics[f"guesses that change without layer {layer}, settled before it"] = kept
            metrics[f"guesses that change without layer {layer}, not settled"] = lost
            checks[f"without layer {layer}, fewer settled guesses change"] = bool(before.any()) and kept.high < lost.low
        return Finding(metrics, checks)
