"""Copying: heads that say again what they look at, read off their weights."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.measure.bootstrap import Metric, mean
from foveate.measure.ranks import rank_correlation
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import Anatomy, anatomy
from foveate.models.circuits import folded, folded_maps, require_plain_widths
from foveate.models.patching import Site
from foveate.probes.base import Data, Probe, Reading, Role, Rows, counted, named, probe
from foveate.probes.induction import LEAST as INDUCTION
from foveate.probes.induction import Induction
from foveate.probes.watch import Seen, Through, Watch, Watcher, watch_all
from foveate.tasks.base import Bench

LEAST = 0.5
"""Of the eigenvalues' sum in absolute value: from here on a head's role is called clear, if chance gives less."""

MOST = 65536
"""Tokens that are looked at; of a larger vocabulary, every second, third ... one."""

TURNS = 2
"""Random pairings of what a head reads and what it writes, that tell what chance gives."""


@probe("copying")
class Copying(Probe):
    """Does a head raise the very token that it looks at? Nothing runs through the model: only its weights are read.

    A head's circuit from the token looked at to the next token's logits is a map: embedding, value, output,
    unembedding. Where its eigenvalues are positive, tokens raise themselves. "copying" is the sum of the eigenvalues'
    real parts over that of their absolute values, from -1 to 1. "own token" is how far a token's logit is above that
    of all tokens, in standard deviations, on the average over tokens.

    Source: A Mathematical Framework for Transformer Circuits (2021), "Detecting copying behavior". The map of vocab x
    vocab is never made: its nonzero eigenvalues are those of one of head_dim x head_dim. Ours: embedding and
    unembedding have their means over the vocabulary taken off (what raises all tokens alike copies nothing), norms'
    gains are folded in, and a role is given only where the score is above that of every head when what it reads is
    paired at random with what it writes.

    Example:
        >>> import foveate as fv
        >>> model = fv.planted()
        >>> reading = Copying().measure(model, Data.of(model, fv.tiny_tokenizer()))
        >>> sorted(reading.of_role("copying"))
        [(1, 3), (2, 2)]
    """

    paper: ClassVar[Paper | None] = Paper(
        "A Mathematical Framework for Transformer Circuits",
        2021,
        "https://transformer-circuits.pub/2021/framework/index.html",
    )
    claim: ClassVar[str] = "a head's weights tell whether it copies what it looks at"
    title: ClassVar[str] = "Which heads say again what they look at?"
    default: ClassVar[bool] = False  # what it says of weights is not what heads do in text: see its claim

    def check(self, model: PreTrainedModel, data: Data) -> None:
        parts = anatomy(model)
        require_plain_widths("copying", parts)
        for layer in parts.layers:
            folded_maps(parts, layer.index)

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        return 0.0

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        start, parts = time.perf_counter(), anatomy(model)
        tokens = data.ordinary(model)
        circuits = Circuits(parts, tokens[:: 1 + len(tokens) // MOST])
        copying, own, chance = [], [], []
        generator = torch.Generator().manual_seed(data.seed)
        for layer in parts.layers:
            values, outputs = circuits.of(layer.index)
            copying.append(positive(values @ outputs))
            own.append(circuits.own(layer.index))
            for _ in range(TURNS):
                turn = torch.linalg.qr(torch.randn(outputs.shape[0], *2 * outputs.shape[-1:], generator=generator))[0]
                chance.append(positive(values @ outputs @ turn.to(outputs)))
            data.progress((layer.index + 1) / len(parts.layers))
        scores, raised = UnitScores("head", torch.stack(copying)), UnitScores("head", torch.stack(own))
        null = torch.cat(chance)
        least = max(LEAST, float(null.max()))
        there = (scores.scores >= least).nonzero().tolist()
        roles = [
            Role(
                "head",
                layer,
                head,
                "copying",
                float(scores.scores[layer, head]),
                "It raises the token that it looks at: that token's own score goes up by "
                f"{float(raised.scores[layer, head]):.1f} standard deviations.",
            )
            for layer, head in there
        ]
        roles.sort(key=lambda role: -role.score)
        total = scores.scores.numel()
        summary = (
            f"{counted(len(roles), 'head')} of {total} "
            + ("is" if len(roles) == 1 else "are")
            + " made to say again what they look at, by their weights"
            + (f": {named(roles)}." if roles else ".")
        )
        metrics = {
            "share of heads that copy clearly": Metric.exact(len(roles) / total),
            "mean copying score": mean(scores.scores.flatten().tolist()),
            "mean copying score, paired at random": mean(null.tolist()),
            "highest copying score, paired at random": Metric.exact(float(null.max())),
        }
        panel = Rows(
            "The heads that copy most",
            ["head", "copying, -1 to 1", "own token, standard deviations"],
            [[r.name, round(r.score, 3), round(float(raised.scores[r.layer, r.unit]), 2)] for r in roles[:20]],
        )
        setting = {"least": least, "random pairings": TURNS, "seed": data.seed}
        found = {"copying": scores, "own token": raised}
        seconds = time.perf_counter() - start
        return Reading("copying", self.title, summary, metrics, found, roles, [panel], setting, seconds)


class Circuits:
    """Circuits of heads from the token looked at to logits, as factors that are small.

    Args:
        parts: the model.
        tokens: LongTensor (n,): the tokens that count.
    """

    def __init__(self, parts: Anatomy, tokens: Tensor):
        self.parts = parts
        embedded = _rows(parts.embedding, tokens)
        self.embedded = embedded - embedded.mean(0)
        raising = folded(_rows(parts.head, tokens), parts.final_norm)
        self.raising = raising - raising.mean(0)  # what raises all tokens alike changes no probability
        self.between = self.embedded.T @ self.raising
        self.spread = self.raising.T @ self.raising / len(tokens)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Of a layer's heads what they read of tokens, times the unembedding, and what they write.

        Returns:
            (head, head_dim, hidden) and (head, hidden, head_dim), float64 on the CPU: their product has the circuit's
            nonzero eigenvalues.
        """
        maps = folded_maps(self.parts, layer)
        return (maps.v @ self.between).double().cpu(), maps.o.double().cpu()

    def own(self, layer: int) -> Tensor:
        """How far a token's own logit is above those of all, in their standard deviations, on the average: (head,)."""
        maps = folded_maps(self.parts, layer)
        some = slice(None, None, max(1, len(self.embedded) // 1000))
        given = self.embedded[some] @ maps.v.transpose(1, 2)  # (head, token, head_dim)
        return self.raised(given, maps.o, self.raising[some]).mean(-1).cpu()

    def raised(self, given: Tensor, outputs: Tensor, raising: Tensor) -> Tensor:
        """How far a token's logit is raised above the others', in their standard deviations.

        Args:
            given: (head, token, head_dim): what heads give for it.
            outputs: (head, hidden, head_dim): their output maps.
            raising: (token, hidden) or (head, token, hidden): the token's unembedding, of `self.raising`.
        """
        spread = outputs.transpose(1, 2) @ self.spread @ outputs
        size = ((given @ spread) * given).sum(-1).clamp(min=0).sqrt()
        up = (given * (raising @ outputs)).sum(-1)
        return torch.where(size > 0, up / size.clamp(min=1e-30), 0.0)


def positive(matrices: Tensor) -> Tensor:
    """The sum of eigenvalues' real parts over that of their absolute values; 0 where all are zero.

    Example:
        >>> positive(torch.diag(torch.tensor([2.0, 1.0, -1.0])))
        tensor(0.5000)
    """
    values = torch.linalg.eigvals(matrices)
    size = values.abs().sum(-1)
    return torch.where(size > 0, values.real.sum(-1) / size.clamp(min=1e-300), 0.0).float()


def _rows(module: torch.nn.Module, tokens: Tensor) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()[tokens.to(weight.device)].float()


@claim("copying")
class WeightsTellWhoCopies(Claim):
    statement: ClassVar[str] = (
        "positive eigenvalues of a head's circuit from embedding to unembedding tell that it copies what it looks at; "
        "induction heads have the most positive ones (Detecting copying behavior; Induction heads)"
    )
    setting: ClassVar[str] = (
        "copying scores of all heads, by weights alone; induction heads by their attention in random tokens that come "
        "twice; on 4 passages of 256 tokens of other text, how far each head raises, by what it writes, the logit of "
        "the token that it looks at most"
    )

    def run(self, bench: Bench) -> Finding:
        model = bench.model
        weights = Copying().measure(
            model, Data(bench.tokenizer, bench.text, progress=lambda done: bench.progress(0.3 * done))
        )
        copying = weights.scores["copying"].scores.flatten()
        repeats = Data(bench.tokenizer, bench.text, length=256, passages=4, seed=1)
        continues = Induction().measure(model, repeats).scores["induction"].scores.flatten() >= INDUCTION
        bench.progress(0.5)
        judged = replace(bench.text, calibration=bench.text.evaluation)  # a claim judges on what no probe has read
        text = Data(bench.tokenizer, judged, length=256, passages=4, progress=lambda d: bench.progress(0.5 + 0.5 * d))
        done = watch_all(model, text, [_Writes()])[0].scores["raised"].scores.flatten()
        those, rest = copying[continues].double(), copying[~continues].double()
        draw = torch.Generator().manual_seed(0)
        chance = [
            float(copying[torch.randperm(len(copying), generator=draw)[: len(those)]].mean()) for _ in range(1000)
        ]
        mean_those = float(those.mean()) if len(those) else float("nan")
        above = sum(each >= mean_those for each in chance) / len(chance) if len(those) else 1.0
        alike = rank_correlation(copying, done)
        own = rank_correlation(weights.scores["own token"].scores.flatten(), done)
        clear = copying >= weights.setting["least"]
        return Finding(
            {
                "induction heads": Metric.exact(float(len(those))),
                "copying score of induction heads": mean(those.tolist() or [float("nan")]),
                "of the other heads": mean(rest.tolist()),
                "of all heads, paired at random": weights.metrics["mean copying score, paired at random"],
                "share of as many random heads that score as high on the average": Metric.exact(above),
                "share of heads with a positive score": mean((copying > 0).double().tolist()),
                "share of heads that copy clearly": mean(clear.double().tolist()),
                "in text, heads that copy clearly raise what they look at by (standard deviations)": mean(
                    done[clear].tolist() or [float("nan")]
                ),
                "in text, the other heads": mean(done[~clear].tolist()),
                "rank correlation of copying score and what is raised in text": Metric.exact(alike or 0.0),
                "rank correlation of own token and what is raised in text": Metric.exact(own or 0.0),
            },
            {
                "induction heads copy more than random sets of heads": above < 0.05,
                "the higher the score, the more a head raises what it looks at in text": (alike or 0.0) > 0.5,
            },
        )


class _Writes(Watcher):
    """How far each head raises the logit of the token that it looks at most, by what it writes."""

    title: ClassVar[str] = "What do heads raise?"
    streams: ClassVar[tuple[str, ...]] = ("mine",)

    def watch(self, model: PreTrainedModel, data: Data) -> Watch:
        return _Raised(model, data)


class _Raised(Watch):
    def __init__(self, model: PreTrainedModel, data: Data):
        self.parts = anatomy(model)
        tokens = data.ordinary(model)
        self.circuits = Circuits(self.parts, tokens)
        self.place = torch.full((self.parts.vocab,), -1).index_copy(0, tokens, torch.arange(len(tokens)))
        self.most: dict[int, list[Tensor]] = {layer.index: [] for layer in self.parts.layers}
        self.sums = torch.zeros(len(self.parts.layers), self.parts.heads, dtype=torch.float64)
        self.counts = torch.zeros_like(self.sums)

    def sites(self) -> list[Site]:
        return [Site("head", layer.index, head) for layer in self.parts.layers for head in range(self.parts.heads)]

    def attention(self, seen: Seen) -> None:
        self.most[seen.layer].append(seen.weights.argmax(-1).cpu())

    def through(self, passage: Through) -> None:
        for layer, blocks in self.most.items():
            most, maps = torch.cat(blocks, dim=1), folded_maps(self.parts, layer)
            blocks.clear()
            looked = self.place[passage.ids.cpu()[most]]  # (head, token)
            # Where a head rests on the first token, it looks at nothing.
            there = (most > 0) & (looked >= 0)
            given = torch.stack([passage.values[site] for site in self.sites() if site.layer == layer]).float()
            raising = self.circuits.raising[looked.clamp(min=0).to(self.circuits.raising.device)]
            raised = self.circuits.raised(given, maps.o, raising).double().cpu()
            self.sums[layer] += torch.where(there, raised, 0.0).sum(-1)
            self.counts[layer] += there.sum(-1)

    def reading(self) -> Reading:
        return Reading(
            "writes", _Writes.title, "", scores={"raised": UnitScores("head", self.sums / self.counts.clamp(min=1))}
        )
