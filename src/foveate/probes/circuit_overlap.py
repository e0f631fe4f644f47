"""Circuit overlap: whether two tasks that look different are done by the same heads."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.claims import Claim, Finding, claim
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.patching import Patch, Site, head_sites, patched, recorded
from foveate.probes.base import Data, Probe, Reading, Role, Rows, named, probe
from foveate.tasks.base import Bench

NAMES = (
    "John Mary Tom James Dan Anna Mark Paul Sarah Kate Alex Peter Laura Emily David Michael Robert Steven Kevin Jack "
    "Sam Jane Alice Lisa Lucy Henry Simon Jason Adam Scott Amy Emma Ryan Eric"
)
THINGS = (
    "pen bag ball box hat bottle pencil phone plate spoon ring card coin knife bowl lamp brush shirt shoe rope basket "
    "button candle plant clock doll toy cap coat glove mug jar purse wallet"
)
COLORS = "red blue green yellow black white orange purple brown pink gray gold silver"
SHOWN = "On the table, there is a purple book, a red cup, and a white key. The color of the cup is red.\n"
SHARE = 0.05
"""Of all heads: so many, those with the largest effect, are called a task's circuit."""


@dataclass(frozen=True)
class Pairs:
    """Prompts of a task, each with one that differs where it is said what is asked for. All have the same length.

    Attributes:
        ids, other: LongTensor (prompt, token); equal up to `start`.
        right: LongTensor (prompt,): the answer's first token.
        wrong: LongTensor (prompt, n): those of the other candidates.
        spots: LongTensor (prompt, n): where these stand in `ids`, the last time.
        start: the first token at which any prompt differs from its other.
    """

    ids: Tensor
    other: Tensor
    right: Tensor
    wrong: Tensor
    spots: Tensor
    start: int


def ioi(rng: random.Random, pools: dict[str, list[str]]) -> tuple[str, str, list[str]]:
    """Indirect object identification: whoever was named only once is given something.

    The other prompt names a third person as the giver, so that nobody is named twice. (The paper of the task changes
    all three names; that is a choice of ours, so that both tasks' prompts change alike.)
    """
    one, two, third = rng.sample(pools["names"], 3)
    both = f"{one} and {two}" if rng.random() < 0.5 else f"{two} and {one}"
    before, after = f"When {both} went to the store,", f"gave a {rng.choice(pools['things'])} to"
    return f"{before} {two} {after}", f"{before} {third} {after}", [one, two]


def colored_objects(rng: random.Random, pools: dict[str, list[str]]) -> tuple[str, str, list[str]]:
    """Colored Objects: three things of three colors, and a question for the color of one; an example goes before.

    The other prompt asks for a thing that isn't on the table. Wording and example are ours.
    """
    things, colors, asked = rng.sample(pools["things"], 4), rng.sample(pools["colors"], 3), rng.randrange(3)
    each = [f"a {color} {thing}" for color, thing in zip(colors, things, strict=False)]
    before = f"{SHOWN}On the table, there is {each[0]}, {each[1]}, and {each[2]}. The color of the"
    right = colors.pop(asked)
    return f"{before} {things[asked]} is", f"{before} {things[3]} is", [right, *colors]


TASKS: dict[str, Callable[[random.Random, dict[str, list[str]]], tuple[str, str, list[str]]]] = {
    "ioi": ioi,
    "colored objects": colored_objects,
}
_CALLED = {"ioi": "who is given something (indirect object identification)", "colored objects": "which color it has"}


def pairs(task: str, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> Pairs:
    """Prompts of a task, from words that the tokenizer cuts alike.

    Args:
        task: "ioi" or "colored objects".
        tokenizer: the model's. Where candidates begin with the same tokens, these go into the prompt.
        count: how many.
        seed: which names, things and colors.

    Raises:
        FoveateError: the tokenizer cuts the words too unevenly.
    """

    def cut(text: str) -> list[int]:
        ids: list[int] = tokens(text, tokenizer)[0].tolist()
        return ids

    pools = {}
    for kind, words in (("names", NAMES), ("things", THINGS), ("colors", COLORS)):
        listed = words.split()
        sizes = [len(cut(f"so {word}")) for word in listed]
        usual = max(sorted(set(sizes)), key=sizes.count)
        pools[kind] = [word for word, size in zip(listed, sizes, strict=True) if size == usual]
    rng, groups = random.Random(f"{task} {seed}"), {}  # type: ignore[var-annotated]
    for _ in range(40 * count if min(map(len, pools.values())) > 3 else 0):
        text, changed, options = TASKS[task](rng, pools)
        ends = [cut(f"{text} {option}") for option in options]
        length = len(commonprefix(ends))
        ids, other = ends[0][:length], cut(f"{changed} {options[0]}")
        if (
            len(other) != len(ends[0])
            or len({len(end) for end in ends}) > 1
            or len({e[length] for e in ends}) < len(ends)
        ):
            continue
        first = [end[length] for end in ends]
        spots = [max((i for i, token in enumerate(ids) if token == each), default=0) for each in first[1:]]
        group = groups.setdefault(length, [])
        group.append((ids, other[:length], first[0], first[1:], spots))
        if len(group) == count:
            given, said, right, wrong, spot = (torch.tensor(column) for column in zip(*group, strict=True))
            start = int((given != said).any(0).nonzero()[0])
            return Pairs(given, said, right, wrong, spot, start)
    raise FoveateError(
        f"{count} prompts of the task {task} of equal length were asked for, but this tokenizer cuts names, things and "
        "colors too unevenly: ask for fewer prompts, or take another model."
    )


class Runs:
    """What heads' outputs at the end of prompts do to the answers. What stands before is read once, and kept.

    Args:
        model: the model.
        given: the prompts.
        start: the first token that is read again each time, and at which heads may be changed.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, given: Pairs, start: int):
        self.model, self.given, self.start = model, given, start
        self.options = torch.cat([given.right[:, None], given.wrong], 1)
        self.columns, where = self.options.unique(return_inverse=True)
        self.where = where.view_as(self.options)
        self.ids = given.ids.to(model.device)
        self.cache = None
        if start:
            self.cache = model(self.ids[:, :start], use_cache=True, logits_to_keep=1).past_key_values
        self.base = self.logits({})

    @torch.no_grad()
    def logits(self, patches: dict[Site, Patch]) -> Tensor:
        """Of the last token for all candidates of all prompts, float64 (prompt, candidate), on the CPU."""
        cache = copy.deepcopy(self.cache)  # a forward adds to it
        with patched(self.model, patches):
            out = self.model(
                self.ids[:, self.start :], past_key_values=cache, use_cache=cache is not None, logits_to_keep=1
            )
        return out.logits[:, -1, self.columns.to(self.model.device)].double().cpu()

    def margin(self, logits: Tensor, shift: int = 0) -> Tensor:
        """By how much the right answer is ahead of the others' mean, (prompt,); with `shift`, another prompt's."""
        options = logits.gather(1, self.where.roll(shift, 0))
        return options[:, 0] - options[:, 1:].mean(1)

    def accuracy(self, logits: Tensor) -> list[float]:
        """Of each prompt, 1 if the right answer is ahead of all others, else 0."""
        options = logits.gather(1, self.where)
        return (options[:, 0] > options[:, 1:].amax(1)).double().tolist()


@torch.no_grad()
def effects(model: PreTrainedModel, runs: Runs, progress: Callable[[float], None] = lambda done: None) -> Tensor:
    """Logits, as of `Runs.logits`, when one head at a time says what it says in the other prompts: (head, ...).

    Activation patching at all tokens; what comes before the first one that differs is the same in both, and not read
    again.
    """
    sites = head_sites(anatomy(model))
    with recorded(model, sites) as there:
        model(runs.given.other.to(model.device), use_cache=False, logits_to_keep=1)
    found = []
    for done, site in enumerate(sites):
        found.append(runs.logits({site: there[site][:, runs.start :]}))
        progress((done + 1) / len(sites))
    return torch.stack(found)


@probe("circuit-overlap")
class CircuitOverlap(Probe):
    """Which heads decide two tasks, and how many of them decide both.

    One task is to see who is given something ("When Tom and Anna went to the store, Anna gave a ring to"), the other
    to tell the color of one of three things on a table. Each prompt has a twin that differs in the word that decides:
    a giver who wasn't named before, a thing that isn't there. One head after the other says what it says in the twin,
    and its score is by how much the right answer's lead then changes, as a fraction of how much it differs between the
    twins. The 5% of heads with the largest change are the task's circuit; how many two circuits share is held against
    chance (hypergeometric).

    The paper patches paths, backward from the logits in steps, and takes the top 2% of each step; here a head's whole
    effect, along all paths, is measured in one step. A head has a role where both effects are above all that is found
    when each prompt is judged by other prompts' answers, and if the model can do both tasks.

    Fields:
        prompts: of each task.

    Source: Circuit Component Reuse Across Tasks in Transformer Language Models (2023).

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama")
        >>> reading = CircuitOverlap(prompts=4).measure(model, Data.of(model, fv.tiny_tokenizer()))
        >>> reading.scores["ioi"].scores.shape, reading.roles
        (torch.Size([4, 4]), [])
    """

    paper: ClassVar[Paper | None] = Paper(
        "Circuit Component Reuse Across Tasks in Transformer Language Models", 2023, "https://arxiv.org/abs/2310.08744"
    )
    claim: ClassVar[str] = "two tasks that look different are done by much the same heads"
    title: ClassVar[str] = "Do different tasks use the same heads?"

    prompts: int = 16

    def check(self, model: PreTrainedModel, data: Data) -> None:
        if self.prompts < 4:
            raise FoveateError(f"{self.name}: prompts={self.prompts} are too few to tell effects from chance: give 4.")
        limit = anatomy(model).max_positions
        for task in TASKS:
            length = pairs(task, data.tokenizer, self.prompts, data.seed).ids.shape[1]
            if length > limit:
                raise FoveateError(
                    f"{self.name}: the prompts have {length} tokens, and this model has {limit} positions: take a "
                    "model with more of them, or one with another tokenizer."
                )

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        heads, total = len(head_sites(anatomy(model))), 0.0
        for task in TASKS:
            given = pairs(task, data.tokenizer, self.prompts, data.seed)
            total += self.prompts * (2 * given.ids.shape[1] + heads * (given.ids.shape[1] - given.start))
        return total

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        training = model.training
        model.eval()
        try:
            return self._measure(model, data)
        finally:
            model.train(training)

    def _measure(self, model: PreTrainedModel, data: Data) -> Reading:
        parts = anatomy(model)
        shape = len(parts.layers), parts.heads
        metrics, scores, clear, able = {}, {}, torch.ones(shape, dtype=torch.bool), True
        for turn, task in enumerate(TASKS):
            given = pairs(task, data.tokenizer, self.prompts, data.seed)
            runs = Runs(model, given, given.start)
            changed = effects(model, runs, lambda part, turn=turn: data.progress((turn + part) / len(TASKS)))  # type: ignore[misc]
            other = Runs(model, Pairs(given.other, given.ids, given.right, given.wrong, given.spots, 0), 0)
            whole = float((runs.margin(runs.base) - other.margin(other.base)).abs().mean().clamp(min=1e-12))
            sizes = [_sizes(runs, changed, shift) / whole for shift in range(4)]
            scores[task] = UnitScores("head", sizes[0].view(shape))
            clear &= scores[task].scores > torch.stack(sizes[1:]).max()
            lead = mean(runs.margin(runs.base).tolist())
            able &= lead.low > 0
            metrics[f"{task}: right answers"] = mean(runs.accuracy(runs.base))
            metrics[f"{task}: lead of the right answer (logits)"] = lead
        best = [top(scores[task]) for task in TASKS]
        shared = sorted(set(best[0]) & set(best[1]))
        expected = len(best[0]) * len(best[1]) / scores["ioi"].scores.numel()
        chance = at_least(len(shared), len(best[0]), scores["ioi"].scores.numel())
        metrics["heads in both circuits"] = Metric.exact(len(shared))
        metrics["as many by chance (probability)"] = Metric.exact(chance)
        first, second = (scores[task].scores for task in TASKS)
        roles = [
            Role(
                "head",
                layer,
                head,
                "shared circuit",
                min(float(first[layer, head]), float(second[layer, head])),
                f"It makes {float(first[layer, head]):.0%} of the difference in seeing who is given something, and "
                f"{float(second[layer, head]):.0%} in telling a thing's color.",
            )
            for layer, head in shared
            if able and clear[layer, head]
        ]
        roles.sort(key=lambda role: -role.score)
        summary = (
            f"Of the {len(best[0])} heads that matter most for seeing who is given something, {len(shared)} are also "
            f"among the {len(best[1])} that matter most for telling a thing's color"
            + (f" ({named(shared)})" if shared else "")
            + f"; by chance it would be about {expected:.1f}."
            + ("" if able else " But this model can't clearly do both tasks, so that it tells little.")
        )
        rows = [
            [f"{layer}.{head}", *(round(float(scores[task].scores[layer, head]), 3) for task in TASKS)]
            for layer, head in sorted(set(best[0]) | set(best[1]))
        ]
        table = Rows("The heads of both circuits, and how much each matters", ["head", *TASKS], rows)
        return Reading(
            self.name,
            self.title,
            summary,
            metrics,
            scores,
            roles,
            [table],
            setting={"prompts": self.prompts, "share": SHARE, "seed": data.seed},
        )


def _sizes(runs: Runs, changed: Tensor, shift: int) -> Tensor:
    """How much the lead changes with each head, on average over prompts, (head,), whatever its direction."""
    before = runs.margin(runs.base, shift)
    return torch.stack([(before - runs.margin(each, shift)).mean() for each in changed]).abs()


def top(scores: UnitScores) -> list[tuple[int, int]]:
    """The circuit: the `SHARE` of heads with the highest scores, at least one."""
    count = max(1, round(SHARE * scores.scores.numel()))
    best = scores.scores.flatten().argsort(descending=True)[:count]
    return [divmod(int(i), scores.scores.shape[1]) for i in best]


def at_least(shared: int, size: int, heads: int) -> float:
    """The probability that two random sets of `size` of `heads` heads share at least so many.

    Example:
        >>> at_least(1, 1, 10)
        0.1
    """
    ways = sum(math.comb(size, k) * math.comb(heads - size, size - k) for k in range(shared, size + 1))
    return ways / math.comb(heads, size)


# ---- the claim ------------------------------------------------------------------------------------------------------

PROMPTS, JUDGED, REDIRECTED, SETS = 16, 96, 4, 3


@claim("circuit-overlap")
class CircuitsAreReused(Claim):
    statement: ClassVar[str] = (
        "much the same heads do indirect object identification and Colored Objects (abstract: about 78% of the heads, "
        "GPT-2 Medium), and turning four of them to the wrong colors, which they suppress, repairs Colored Objects "
        "(49.6% to 93.7% right)"
    )
    setting: ClassVar[str] = (
        "circuits: the 5% of heads with the largest effect, 16 prompts of each task; repair: of the heads of the IOI "
        "circuit, the four that, looking at the wrong colors alone from the last token, raise the right color's lead "
        "most on those 16 prompts; judged on 96 others, against the best four of three sets of as many random heads "
        "outside the circuit, of the same layers, chosen in the same way"
    )

    def run(self, bench: Bench) -> Finding:
        model, parts = bench.model, anatomy(bench.model)
        data = Data(bench.tokenizer, bench.text, seed=1, progress=lambda part: bench.progress(0.8 * part))
        found = CircuitOverlap(prompts=PROMPTS).measure(model, data)
        circuit = top(found.scores["ioi"])
        rng, sets = random.Random(0), [circuit]
        for _ in range(SETS):
            drawn: list[tuple[int, int]] = []
            for layer, _head in circuit:
                free = [(layer, h) for h in range(parts.heads) if (layer, h) not in (*circuit, *drawn)]
                drawn += rng.sample(free, min(1, len(free)))
            sets.append(drawn)
        learned = Redirected(model, pairs("colored objects", bench.tokenizer, PROMPTS, 1))
        chosen = [_best(learned, heads) for heads in sets]
        bench.progress(0.9)
        judged = Redirected(model, pairs("colored objects", bench.tokenizer, JUDGED, 2))
        before = judged.runs.accuracy(judged.runs.base)
        after = [judged.runs.accuracy(judged.logits(heads)) for heads in chosen]
        gains = [mean([b - a for a, b in zip(before, each, strict=True)]) for each in after]
        over = [mean([b - a for a, b in zip(each, after[0], strict=True)]) for each in after[1:]]
        names = [f"{REDIRECTED} random heads, set {i + 1}" for i in range(SETS)]
        return Finding(
            {
                **found.metrics,
                "Colored Objects on the judged prompts, unchanged": mean(before),
                f"with {named(chosen[0])} at the wrong colors": mean(after[0]),
                **{f"with {name}": mean(each) for name, each in zip(names, after[1:], strict=True)},
                "gained": gains[0],
                **{f"gained with {name}": gain for name, gain in zip(names, gains[1:], strict=True)},
            },
            {
                "the model can do both tasks": all(
                    found.metrics[f"{task}: lead of the right answer (logits)"].low > 0 for task in TASKS
                ),
                "the circuits share more heads than chance would (p < 0.01)": (
                    found.metrics["as many by chance (probability)"].value < 0.01
                ),
                "turning four heads of the IOI circuit raises accuracy": gains[0].low > 0,
                "and more than four random heads, in all sets": all(each.low > 0 for each in over),
            },
        )


class Redirected:
    """Colored Objects with heads that look at the wrong colors alone, half of their attention each, at the end."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, given: Pairs):
        parts = anatomy(model)
        self.runs, group = Runs(model, given, given.ids.shape[1] - 1), parts.heads // parts.kv_heads
        sites = [Site("value", layer.index, head) for layer in parts.layers for head in range(parts.kv_heads)]
        with recorded(model, sites) as values:
            model(self.runs.ids, use_cache=False, logits_to_keep=1)
        rows, spots = torch.arange(len(given.ids))[:, None], given.spots
        looked = {site: value[rows, spots].mean(1, keepdim=True) for site, value in values.items()}
        self.given = {site: looked[Site("value", site.layer, (site.head or 0) // group)] for site in head_sites(parts)}

    def logits(self, heads: Sequence[tuple[int, int]]) -> Tensor:
        return self.runs.logits({Site("head", *head): self.given[Site("head", *head)] for head in heads})


def _best(learned: Redirected, heads: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the heads that, each alone, raise the right color's lead most."""
    leads = {head: float(learned.runs.margin(learned.logits([head])).mean()) for head in heads}
    return sorted(heads, key=lambda head: -leads[head])[:REDIRECTED]
