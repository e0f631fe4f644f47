"""Channels: what an early head writes and a later head reads, found in their weights; and a function to edit them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.claims import Claim, Finding, claim
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.circuits import folded_maps, head_maps, norms_around, require_plain_queries
from foveate.models.patching import Patch, Site, patched
from foveate.probes.base import Data, Probe, Reading, Role, Rows, counted, probe
from foveate.probes.copying import LEAST as COPIES
from foveate.probes.copying import Copying
from foveate.probes.induction import LEAST as INDUCTION
from foveate.probes.induction import Induction
from foveate.tasks.base import Bench, surprisal
from foveate.tasks.copying import NOUNS

Through = Literal["query", "key", "value"]
CHANCE = 0.01
"""The chance that noise gives a single clear channel in a whole model, at most."""


@dataclass(frozen=True)
class Channel:
    """One direction that a head writes, and how much of it a later head reads.

    Attributes:
        sender, receiver: (layer, head).
        through: whether the receiver's query, key or value reads it.
        component: which singular component of the sender's output-value map, 0 the largest.
        score: what the receiver reads of it, over what it reads of a random direction (squares): 1 is chance.
        log_chance: bound on the natural logarithm of the chance that a random direction scores as high.
    """

    sender: tuple[int, int]
    receiver: tuple[int, int]
    through: Through
    component: int
    score: float
    log_chance: float


class Wiring:
    """What the heads of a model write, and how the later ones read it. Weights only.

    Args:
        model: the model.
        components: singular components of each head's output-value map that are looked at, the largest.

    Attributes:
        written: of each layer, (head, hidden, component): unit vectors.
        scores: of each layer and each way in, (receiver, earlier layer, sender, component), as `Channel.score`.
        log_chances: the same, as `Channel.log_chance`.

    Example:
        >>> import foveate as fv
        >>> best = Wiring(fv.planted()).strongest(1)[0]
        >>> best.sender, best.receiver, best.through
        ((0, 1), (1, 3), 'key')
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, components: int = 8):
        parts = anatomy(model)
        self.written: list[Tensor] = []
        self.scores: list[dict[Through, Tensor]] = []
        self.log_chances: list[dict[Through, Tensor]] = []
        for layer in parts.layers:
            maps = folded_maps(parts, layer.index)
            # A product of maps is read by the small square factor of its first one: |A B x| = |R B x| where A = Q R.
            ways: dict[Through, Tensor] = {
                "query": _factor(maps.k.transpose(1, 2)) @ maps.q,
                "key": _factor(maps.q.transpose(1, 2)) @ maps.k,
                "value": _factor(maps.o) @ maps.v,
            }
            scores, chances = {}, {}
            before = torch.cat([w.transpose(1, 2).flatten(0, 1) for w in self.written]) if self.written else None
            for way, reads in ways.items() if before is not None else ():
                assert before is not None
                powers = torch.linalg.eigvalsh((reads @ reads.transpose(1, 2)).double()).clamp(min=0).cpu()
                whole = powers.sum(-1, keepdim=True)
                heard = (reads @ before.T).square().sum(1).double().cpu()
                found = torch.where(whole > 0, heard * parts.hidden / whole.clamp(min=1e-300), 0.0)
                shape = (parts.heads, layer.index, parts.heads, -1)
                scores[way] = found.view(shape)
                chances[way] = _log_chance(found, powers / whole.clamp(min=1e-300)).view(shape)
            self.scores.append(scores)
            self.log_chances.append(chances)
            self.written.append(_writes(maps.v, maps.o, components))

    def of(self, sender: tuple[int, int], receiver: tuple[int, int], through: Through) -> list[Channel]:
        """The channels between two heads, the highest score first."""
        at = (receiver[1], sender[0], sender[1])
        scores, chances = (each[receiver[0]][through][at] for each in (self.scores, self.log_chances))
        order = scores.argsort(descending=True).tolist()
        return [Channel(sender, receiver, through, i, float(scores[i]), float(chances[i])) for i in order]

    def strongest(self, count: int, ways: Sequence[Through] = get_args(Through)) -> list[Channel]:
        """The highest component of each pair of heads and way in; of those, the least likely ones."""
        found = []
        for layer, chances in enumerate(self.log_chances):
            for way in ways if chances else ():
                best = chances[way].amin(-1)
                low = best.flatten().topk(min(count, best.numel()), largest=False)
                for value, flat in zip(low.values.tolist(), low.indices.tolist(), strict=True):
                    receiver, rest = divmod(flat, best[0].numel())
                    found.append((value, divmod(rest, best.shape[-1]), (layer, receiver), way))
        found = sorted((each for each in found if each[0] < 0), key=lambda each: each[0])  # 0: nothing is read at all
        return [self.of(sender, receiver, way)[0] for _, sender, receiver, way in found[:count]]

    @property
    def tests(self) -> int:
        """Channels that were looked at."""
        return sum(each.numel() for layer in self.scores for each in layer.values())


@probe("channels")
class Channels(Probe):
    """Which later heads read what a head writes, by their weights alone; nothing runs through the model.

    A head's output-value map is cut into singular components. Each of the largest ones writes one direction; the score
    is how much of it a later head's query-key map (through its query or its key) or output-value map (through its
    value) reads, against a random direction. `edited` scales a channel, or takes it away.

    Source: Talking Heads: Understanding Inter-layer Communication in Transformer Language Models (2024): composition
    scores of single singular components. Ours: norms' gains are folded in, rotary positions are left out of query-key
    maps, and chance is a bound for random directions, for all channels of the model together.

    Fields:
        components: singular components of each head that are looked at, the largest.
        most: channels that are listed.

    Example:
        >>> import foveate as fv
        >>> model = fv.planted()
        >>> reading = Channels().measure(model, Data.of(model, fv.tiny_tokenizer()))
        >>> reading.of_role("sender"), reading.of_role("receiver")
        ([(0, 1)], [(1, 3)])
    """

    paper: ClassVar[Paper | None] = Paper(
        "Talking Heads: Understanding Inter-layer Communication in Transformer Language Models",
        2024,
        "https://arxiv.org/abs/2406.09519",
    )
    claim: ClassVar[str] = "heads of different layers talk through a few directions, which weights alone tell"
    title: ClassVar[str] = "Which heads listen to which?"

    components: int = 8
    most: int = 20

    def __post_init__(self) -> None:
        if self.components < 1 or self.most < 1:
            raise FoveateError(f"{self.name}: components={self.components}, most={self.most}: give at least 1 of each.")

    def check(self, model: PreTrainedModel, data: Data) -> None:
        parts = anatomy(model)
        require_plain_queries("channels", parts)
        for layer in parts.layers:
            head_maps(parts, layer.index)

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        return 0.0

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        start, parts = time.perf_counter(), anatomy(model)
        wiring = Wiring(model, self.components)
        data.progress(0.9)
        least = math.log(CHANCE / max(1, wiring.tests))
        clear = [each for each in wiring.strongest(self.most) if each.log_chance < least]
        roles: list[Role] = []
        for each in clear:  # the clearest first: a head is named by its clearest channel
            (a, b), (c, d) = each.sender, each.receiver
            reads = f"the {each.through} of head {c}.{d}"
            for layer, unit, role, words in (
                (a, b, "sender", f"What it writes is read by {reads}: {each.score:.0f} times as much as by chance."),
                (
                    c,
                    d,
                    "receiver",
                    f"Its {each.through} reads what head {a}.{b} writes: {each.score:.0f} times chance.",
                ),
            ):
                if not any((r.layer, r.unit, r.role) == (layer, unit, role) for r in roles):
                    roles.append(Role("head", layer, unit, role, each.score, words))
        sends, hears = (torch.zeros(len(parts.layers), parts.heads) for _ in range(2))
        above = 0
        for layer, ways in enumerate(wiring.scores):
            for way, scores in ways.items():
                sends[:layer] = sends[:layer].maximum(scores.amax((0, 3)).float())
                hears[layer] = hears[layer].maximum(scores.amax((1, 2, 3)).float())
                above += int((wiring.log_chances[layer][way] < least).sum())
        summary = f"{above / max(1, wiring.tests):.1%} of what later heads could read of earlier ones is above chance"
        if clear:
            (a, b), (c, d) = clear[0].sender, clear[0].receiver
            summary += f"; the clearest channel goes from head {a}.{b} to the {clear[0].through} of head {c}.{d}"
        data.progress(1.0)
        return Reading(
            "channels",
            self.title,
            summary + ".",
            {
                "share of components and readers above chance": Metric.exact(above / max(1, wiring.tests)),
                "highest score, times chance": Metric.exact(float(sends.max())),
            },
            {"sends": UnitScores("head", sends), "hears": UnitScores("head", hears)},
            roles,
            [
                Rows(
                    f"The {counted(len(clear), 'channel')} that chance explains least",
                    [
                        "from head",
                        "to head",
                        "through its",
                        "component",
                        "times chance",
                        "log10 of its chance, at most",
                    ],
                    [
                        ["{}.{}".format(*each.sender), "{}.{}".format(*each.receiver), each.through, each.component]
                        + [round(each.score, 1), round(each.log_chance / math.log(10), 1)]
                        for each in clear
                    ],
                )
            ],
            {"components": self.components, "chance": CHANCE, "channels looked at": wiring.tests},
            time.perf_counter() - start,
        )


# ---- editing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """A subspace of what a sender writes, and who is to hear it changed.

    Attributes:
        sender: (layer, head).
        basis: (hidden, rank), orthonormal: the subspace of the residual stream.
        scale: what is written there is multiplied by this; 0 takes it away.
        receivers: (layer, head, through) of the later heads that hear the change; none named: all that comes later.
            Key and value of a KV head are heard by all query heads that it serves.
    """

    sender: tuple[int, int]
    basis: Tensor
    scale: float = 0.0
    receivers: tuple[tuple[int, int, Through], ...] = ()


@contextmanager
def edited(model: PreTrainedModel, edits: Sequence[Edit]) -> Iterator[None]:
    """While in force, what heads write into some subspaces is scaled, for all that comes later or for some heads only.

    Raises:
        FoveateError: a head that the model does not have, a receiver that comes no later than its sender, a basis of
            another width, or a model that normalises what its attention puts out.

    Example:
        >>> import foveate as fv, torch
        >>> model, ids = fv.planted(), torch.tensor([[7, 8, 9, 7]])
        >>> wiring = Wiring(model, components=260)
        >>> basis = wiring.written[0][1]                       # all that head 0.1 writes
        >>> with edited(model, [Edit((0, 1), basis, 0.0, ((1, 3, "key"),))]):
        ...     without = model(ids).logits
        >>> int(model(ids).logits[0, -1].argmax()), int(without[0, -1].argmax()) == 8
        (8, False)
    """
    parts = anatomy(model)
    group = parts.heads // parts.kv_heads
    noted: dict[Site, Tensor] = {}
    changes: dict[Site, list[tuple[Site, float, Tensor]]] = {}  # where it is heard: sender, by how much, its basis

    def noting(site: Site) -> Patch:
        def note(value: Tensor) -> Tensor:
            noted[site] = value
            return value

        return note

    sites: dict[Site, Patch] = {}
    for edit in edits:
        layer, head = edit.sender
        sender = Site("head", layer, head)
        sites[sender] = noting(sender)
        if 0 <= layer < len(parts.layers) and norms_around(parts.layers[layer])[1] is not None:
            raise FoveateError(
                f"channel {layer}.{head}: a {parts.family} model normalises what all heads write together, so that one "
                "head's part of it can't be edited: take a model without a norm after its attention."
            )
        if edit.basis.dim() != 2 or len(edit.basis) != parts.hidden:
            raise FoveateError(
                f"channel {layer}.{head}: the basis is {tuple(edit.basis.shape)}, and the model has {parts.hidden} "
                "channels: give (hidden, rank)."
            )
        if wrong := [r for r in edit.receivers if r[0] <= layer]:
            raise FoveateError(
                f"channel {layer}.{head}: head {wrong[0][0]}.{wrong[0][1]} comes no later, so it can't hear: name "
                "heads of later layers."
            )
        for at in [Site("attention", layer)] * (not edit.receivers) + [
            Site(way, to, unit if way == "query" else unit // group) for to, unit, way in edit.receivers
        ]:
            heard = changes.setdefault(at, [])
            if not any(s == sender and b is edit.basis for s, _, b in heard):  # two query heads of one KV head
                heard.append((sender, edit.scale - 1.0, edit.basis))

    def change(at: Site) -> Patch:
        def patch(value: Tensor) -> Tensor:
            delta = torch.zeros(())
            for sender, by, basis in changes[at]:
                out = head_maps(parts, sender.layer).o[cast(int, sender.head)]
                basis = basis.to(out)
                delta = delta.to(out) + by * (noted[sender].float() @ out.T @ basis) @ basis.T
            if at.kind == "attention":
                return value + delta.to(value)
            residual = noted[Site("residual", at.layer)]
            norm = norms_around(parts.layers[at.layer])[0] or torch.nn.Identity()
            maps = head_maps(parts, at.layer)
            unit = cast(int, at.head) * (1 if at.kind == "query" else group)
            weight = {"query": maps.q, "key": maps.k, "value": maps.v}[at.kind][unit]
            moved = norm(residual + delta.to(residual)).float() - norm(residual).float()
            return value + (moved @ weight.T).to(value)

        return patch

    for at in changes:
        if at.kind != "attention":
            sites[Site("residual", at.layer)] = noting(Site("residual", at.layer))
        sites[at] = change(at)
    with patched(model, sites):
        yield


# ---- the numbers ----------------------------------------------------------------------------------------------------


def _factor(maps: Tensor) -> Tensor:
    """R of Q R, for maps (head, long, short): (head, short, short)."""
    return torch.linalg.qr(maps, mode="r")[1]


def _writes(values: Tensor, outputs: Tensor, components: int) -> Tensor:
    """The directions that heads write, of their largest singular components: (head, hidden, component)."""
    q, r = torch.linalg.qr(outputs)
    left, size, _ = torch.linalg.svd(r @ _factor(values.transpose(1, 2)).transpose(1, 2))
    written = q @ left[..., : min(components, left.shape[-1])]
    least = 1e-6 * size.amax(-1, keepdim=True).clamp(min=1e-12)
    there = (size > least)[:, None, : written.shape[-1]]  # a head that gives nothing writes no direction
    return torch.where(there, written, 0.0)


def _log_chance(scores: Tensor, powers: Tensor) -> Tensor:
    """A bound on the log-chance that a random direction scores as high.

    A random direction's score is a sum of squared normal numbers with these weights; Chernoff's bound holds for it.

    Args:
        scores: (head, direction).
        powers: (head, n): the weights, which sum to 1.
    """
    best = torch.zeros_like(scores)
    top = powers.amax(-1, keepdim=True).clamp(min=1e-300)
    for part in torch.linspace(0.02, 0.98, 25).tolist():
        tilt = part / (2 * top)
        best = best.minimum(-tilt * scores - 0.5 * torch.log1p(-2 * tilt * powers).sum(-1, keepdim=True))
    return best


def any_basis(model: PreTrainedModel, sender: tuple[int, int], rank: int, seed: int) -> Tensor:
    """A random subspace of all that a head can write, (hidden, rank), orthonormal: the control for a channel's.

    Example:
        >>> import foveate as fv
        >>> any_basis(fv.tiny("llama"), (0, 1), 2, seed=0).shape
        torch.Size([64, 2])
    """
    out = head_maps(anatomy(model), sender[0]).o[sender[1]].cpu()
    return torch.linalg.qr(out @ torch.randn(out.shape[1], rank, generator=torch.Generator().manual_seed(seed)))[0]


# ---- the claim ------------------------------------------------------------------------------------------------------

RANK = 3
ITEMS = 5
CANDIDATES = 8
PASSAGES, SELECTION, VERDICT = 16, 16, 48


@claim("channels")
class HeadsTalkThroughFewDirections(Claim):
    statement: ClassVar[str] = (
        "weights alone tell which heads talk to each other; editing the few directions that they talk through changes "
        "what the model does, and improves its recall from a list by over 20% (abstract)"
    )
    setting: ClassVar[str] = (
        "channels from heads that look at the token before to the keys of induction heads, both chosen by their "
        "attention, among all earlier heads' channels to the same keys; their 3 directions taken away for those keys, "
        "judged on 16 other passages of 64 random tokens and the same again, against 3 random directions of what the "
        "same heads can write; then lists of 5 things of which 4 are taken: of the 8 clearest channels to queries of "
        "copying heads, taken away or doubled, the best on 16 lists is judged on 48 lists of other words"
    )

    @torch.no_grad()
    def run(self, bench: Bench) -> Finding:
        model, parts = bench.model, anatomy(bench.model)
        seen = Induction().measure(model, Data(bench.tokenizer, bench.text, length=256, passages=4, seed=1))
        wiring = Wiring(model)
        bench.progress(0.2)
        scores = seen.scores
        early = (scores["previous"].scores >= INDUCTION).nonzero().tolist()
        late = (scores["induction"].scores >= INDUCTION).nonzero().tolist()
        ranks = []
        for layer, head in late:
            of_all = wiring.scores[layer]["key"][head].amax(-1) if layer else torch.zeros(0, parts.heads)
            ranks += [float((of_all < of_all[a, b]).double().mean()) for a, b in early if a < layer]
        metrics = {
            "heads that look at the token before": Metric.exact(len(early)),
            "induction heads": Metric.exact(len(late)),
            "share of earlier heads with a weaker channel to the same key": mean(ranks or [float("nan")]),
        }
        ids = Data(bench.tokenizer, bench.text, length=128, passages=PASSAGES, seed=2).stream("repeat", model)
        kept = [_saved(model, ids, [])]
        for seed in (None, "weakest", 0, 1, 2):
            edits = []
            for layer, head in early:
                hear: tuple[tuple[int, int, Through], ...] = tuple((a, b, "key") for a, b in late if a > layer)
                if not hear:
                    continue
                if isinstance(seed, int):
                    basis = any_basis(model, (layer, head), RANK, seed)
                else:
                    loud = torch.stack([wiring.scores[a]["key"][b, layer, head] for a, b, _ in hear]).mean(0)
                    chosen = loud.argsort(descending=seed is None)[:RANK].to(wiring.written[layer].device)
                    basis = wiring.written[layer][head][:, chosen]
                edits.append(Edit((layer, head), basis, 0.0, hear))
            kept.append(_saved(model, ids, edits))
            bench.progress(0.2 + 0.06 * len(kept))
        lost = [mean([1 - b / a for a, b in zip(kept[0], rows, strict=True)]) for rows in kept[1:]]
        metrics |= {
            "nats that repetition saves, whole model": mean(kept[0]),
            f"of that, lost without the {RANK} loudest directions": lost[0],
            f"of that, lost without the {RANK} least heard of the 8 largest": lost[1],
            **{f"of that, lost without {RANK} random directions, set {i + 1}": each for i, each in enumerate(lost[2:])},
        }
        recall = self._lists(bench, wiring)
        bench.progress(1.0)
        gain = recall["lists, change by the chosen edit"]
        return Finding(
            metrics | recall,
            {
                "heads that look at the token before have stronger channels to induction keys than most heads": bool(
                    ranks
                )
                and metrics["share of earlier heads with a weaker channel to the same key"].low > 0.5,
                "without these directions more of the saving is lost than without random ones, in all three sets": all(
                    lost[0].low > each.high for each in lost[2:]
                ),
                "an edit improves recall from lists by more than a fifth": gain.value > 0.2 and gain.low > 0,
            },
        )

    def _lists(self, bench: Bench, wiring: Wiring) -> dict[str, Metric]:
        """Recall from lists: chosen on some words, judged on others."""
        model = bench.model
        copies = Copying().measure(model, Data(bench.tokenizer, bench.text)).scores["copying"].scores >= COPIES
        found = [each for each in wiring.strongest(400, ("query",)) if bool(copies[each.receiver])][:CANDIDATES]
        tried: dict[tuple[int, float], list[float]] = {}
        ids, options = lists(bench.tokenizer, SELECTION, half=0)
        bench.progress(0.6)
        for i, each in enumerate(found):
            for scale in (0.0, 2.0):
                tried[i, scale] = _margins(model, ids, options, [self._edit(wiring, each, scale)])
            bench.progress(0.6 + 0.2 * (i + 1) / len(found))
        ids, options = lists(bench.tokenizer, VERDICT, half=1)
        whole = [float(margin > 0) for margin in _margins(model, ids, options, [])]
        metrics = {"lists, recalled by the whole model": mean(whole)}
        if not tried:
            return metrics | {"lists, change by the chosen edit": Metric.exact(0.0)}
        (best, scale), _ = max(tried.items(), key=lambda each: sum(each[1]))
        channel = found[best]
        edits = [self._edit(wiring, channel, scale)]
        for seed in range(3):
            basis = any_basis(model, channel.sender, RANK, seed)
            edits.append(Edit(channel.sender, basis, scale, edits[0].receivers))
        after = []
        for i, edit in enumerate(edits):
            after.append([float(margin > 0) for margin in _margins(model, ids, options, [edit])])
            bench.progress(0.8 + 0.05 * (i + 1))
        changes = [mean([b - a for a, b in zip(whole, rows, strict=True)]) for rows in after]
        name = "{}.{} to the query of {}.{}, times {:g}".format(*channel.sender, *channel.receiver, scale)
        return metrics | {
            f"lists, recalled with the channel {name}": mean(after[0]),
            "lists, change by the chosen edit": changes[0],
            **{f"lists, change by {RANK} random directions, set {i + 1}": each for i, each in enumerate(changes[1:])},
        }

    def _edit(self, wiring: Wiring, channel: Channel, scale: float) -> Edit:
        loudest = [each.component for each in wiring.of(channel.sender, channel.receiver, channel.through)[:RANK]]
        layer, head = channel.sender
        return Edit(channel.sender, wiring.written[layer][head][:, loudest], scale, ((*channel.receiver, "query"),))


def _saved(model: PreTrainedModel, ids: Tensor, edits: Sequence[Edit]) -> list[float]:
    """The nats a token that repetition saves, passage by passage."""
    half = ids.shape[1] // 2
    with edited(model, edits):
        losses = surprisal(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:])
    return (losses[:, : half - 1].mean(1) - losses[:, half:].mean(1)).tolist()


def _margins(model: PreTrainedModel, ids: Tensor, options: Tensor, edits: Sequence[Edit]) -> list[float]:
    """The logit of the thing that is left, the first of the options, over the highest of the others, list by list."""
    with edited(model, edits):
        logits = model(ids.to(model.device), use_cache=False, logits_to_keep=1).logits[:, -1].float().cpu()
    picked = logits.gather(1, options)
    return (picked[:, 0] - picked[:, 1:].amax(1)).tolist()


def lists(tokenizer: PreTrainedTokenizerBase, count: int, half: int) -> tuple[Tensor, Tensor]:
    """Prompts about a list of things, all but one of which are taken; the one that is left comes next.

    Args:
        tokenizer: the model's.
        count: how many.
        half: 0 or 1: which half of the nouns they are of.

    Returns:
        LongTensor (count, token), and (count, items): the first tokens of the things, first that of the one left.

    Example:
        >>> import foveate as fv
        >>> ids, options = lists(fv.tiny_tokenizer(), 1, half=0)
        >>> ids.shape[0], options.shape
        (1, torch.Size([1, 5]))
    """
    coded = {noun: tokens(f"on the {noun}", tokenizer)[0].tolist() for noun in NOUNS}
    lead = next(i for i, column in enumerate(zip(*coded.values(), strict=False)) if len(set(column)) > 1)
    cut: dict[int, dict[int, str]] = {}  # nouns of as many tokens, so that all prompts are as long; by first token
    for noun, ids in coded.items():
        cut.setdefault(len(ids) - lead, {}).setdefault(ids[lead], noun)
    size, nouns = max(cut.items(), key=lambda each: len(each[1]))
    draw = random.Random(half)
    pool = sorted(nouns.items(), key=lambda each: each[1])[half::2]
    rows, options = [], []
    for _ in range(count):
        things = draw.sample(pool, min(ITEMS, len(pool)))
        left, *taken = draw.sample(things, len(things))
        there, gone = (", ".join(f"the {noun}" for _, noun in each) for each in (things, taken))
        text = (
            f"On the table there are {there}. Then she takes {gone}. The only thing left on the table is the {left[1]}"
        )
        rows.append(tokens(text, tokenizer)[0, :-size])  # all but the tokens of the thing itself
        options.append(torch.tensor([token for token, _ in (left, *taken)]))
    return torch.stack(rows), torch.stack(options)
