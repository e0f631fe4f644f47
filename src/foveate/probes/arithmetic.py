"""Arithmetic: which heads fetch the numbers of a sum, and which MLPs make its result?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.claims import Claim, Finding, claim, random_others
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.attention import Call, replaced_attention
from foveate.models.patching import Site, ablated, activation_patching, head_sites, recorded
from foveate.probes.base import Data, Probe, Reading, clear_heads, counted, named, probe
from foveate.probes.watch import in_blocks
from foveate.tasks.base import Bench

LEAST = 0.3
"""Of the answer's probability: what is lost with one unit of another sum for its part to be called clear."""
SUMS = tuple((a, b) for a in range(1, 9) for b in range(1, 10 - a))
"""All sums of two digits that come to one digit: the answer is one token, and small models know most of them."""


@dataclass(frozen=True)
class Sum:
    """A prompt such as `3+1=4`, `2+6=8`, ..., `5+2=`, a line each.

    Attributes:
        ids: LongTensor (1, token), on the CPU.
        answer: the result's token.
        marks: positions of the first number, the plus and the second number that are asked.
    """

    ids: Tensor
    answer: int
    marks: tuple[int, int, int]


def sums(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[int, int]], shots: Sequence[tuple[int, int]]
) -> list[Sum]:
    """Prompts that ask for sums, with the same solved ones before each; all of the same length.

    Raises:
        FoveateError: a tokenizer that doesn't give digits and signs a token each.

    Example:
        >>> import foveate as fv
        >>> [asked] = sums(fv.tiny_tokenizer(), [(1, 2)], [(3, 4), (2, 2)])
        >>> fv.tiny_tokenizer().decode(asked.ids[0]), asked.marks
        ('3+4=7\\n2+2=4\\n1+2=', (12, 13, 14))
    """
    head = "".join(f"{a}+{b}={a + b}\n" for a, b in shots)
    start = tokens(head, tokenizer).shape[1] if head else 0
    found = []
    for a, b in asked:
        ids, solved = tokens(f"{head}{a}+{b}=", tokenizer), tokens(f"{head}{a}+{b}={a + b}", tokenizer)
        if ids.shape[1] != start + 4 or solved.shape[1] != start + 5 or not torch.equal(solved[:, :-1], ids):
            raise FoveateError(
                "this tokenizer doesn't give each digit and sign of a sum a token of its own, which the probe "
                "arithmetic needs: leave it out for this model."
            )
        found.append(Sum(ids, int(solved[0, -1]), (start, start + 1, start + 2)))
    return found


@torch.no_grad()
def right(model: PreTrainedModel, asked: Sequence[Sum]) -> list[float]:
    """For each sum of one length whether the likeliest token is its result, 1.0 or 0.0."""
    ids = torch.cat([each.ids for each in asked]).to(model.device)
    best = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
    return [float(token == each.answer) for token, each in zip(best, asked, strict=True)]


def examples(seed: int, of: Sequence[tuple[int, int]] = SUMS, count: int = 4) -> list[tuple[int, int]]:
    """Sums to be shown solved: drawn without replacement."""
    return random.Random(seed).sample(list(of), count)


@dataclass(frozen=True)
class Effects:
    """What is lost of answers' probability with one unit's output of another sum, at the prompt's last token.

    Attributes:
        heads: (layers, heads); mlps: (layers, 1): means over pairs, float64.
        looks: (layers, heads): attention from the last token to the numbers and the plus that are asked.
        pairs: how many pairs of sums were used; 0 where the model knew too few.
        accuracy: of the model on all sums that it was asked.
    """

    heads: Tensor
    mlps: Tensor
    looks: Tensor
    pairs: int
    accuracy: Metric


@torch.no_grad()
def effects(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    of: Sequence[tuple[int, int]] = SUMS,
    pairs: int = 6,
    seed: int = 0,
    progress: Callable[[float], None] = lambda done: None,
) -> Effects:
    """Each head's and MLP's effect on sums that the model knows.

    Two sums with other numbers and another result stand after the same solved ones. A unit's output at the last token
    is taken from the other sum: what the right answer loses in probability is its effect (others are left to react).

    Args:
        model, tokenizer: who adds.
        of: the sums that are asked and shown.
        pairs: of sums, at most.
        seed: which.
        progress: called with the fraction done.
    """
    parts = anatomy(model)
    layers = len(parts.layers)
    shown = examples(seed, of)
    asked = sums(tokenizer, [each for each in of if each not in shown], shown)
    hits = right(model, asked)
    known = [each for each, hit in zip(asked, hits, strict=True) if hit]
    random.Random(seed).shuffle(known)
    chosen: list[tuple[Sum, Sum]] = []
    for one in known:
        fitting = [
            other
            for other in known
            if other.answer != one.answer
            and all(one.ids[0, at] != other.ids[0, at] for at in (one.marks[0], one.marks[2]))
        ]
        if fitting and len(chosen) < pairs:
            chosen.append((one, fitting[len(chosen) % len(fitting)]))
    if len(chosen) < 2:
        nothing = torch.zeros(layers, parts.heads, dtype=torch.float64)
        return Effects(nothing, torch.zeros(layers, 1, dtype=torch.float64), nothing, 0, mean(hits))
    ids = torch.cat([one.ids for one, _ in chosen]).to(model.device)
    others = torch.cat([other.ids for _, other in chosen]).to(model.device)
    goals = torch.tensor([one.answer for one, _ in chosen], device=model.device)

    def chance(logits: Tensor) -> Tensor:
        return logits[:, -1].float().softmax(-1).gather(1, goals[:, None])[:, 0]

    sites = [*head_sites(parts), *(Site("mlp", layer) for layer in range(layers))]
    with recorded(model, sites) as values:
        model(others, use_cache=False, logits_to_keep=1)
    whole = chance(model(ids, use_cache=False, logits_to_keep=1).logits).double().cpu()
    last = [ids.shape[1] - 1]
    after = activation_patching(model, ids, values, sites, chance, positions=last, progress=progress)
    lost = (1 - after / whole).mean(1)
    looks = torch.zeros(layers, parts.heads, dtype=torch.float64)
    marks = list(chosen[0][0].marks)

    def show(layer: int, start: int, weights: Tensor, call: Call) -> None:
        looks[layer] += weights[:, -1, marks].sum(-1).double().cpu() / len(ids)

    with replaced_attention(model, in_blocks(show), "arithmetic"):
        for row in ids:
            model(row[None], use_cache=False, logits_to_keep=1)
    heads = layers * parts.heads
    return Effects(lost[:heads].view(layers, parts.heads), lost[heads:, None], looks, len(chosen), mean(hits))


@probe("arithmetic")
class Arithmetic(Probe):
    """Which heads fetch the numbers of a sum, and which MLPs make its result?

    The model reads four solved sums of one-digit numbers and is asked for a fifth. One unit at a time says, at the last
    token, what it says on another sum. Scores "arithmetic" (heads) and "arithmetic mlp" (MLPs): the share of the right
    answer's probability that is lost, on sums that the model knows.

    Fields:
        pairs: of sums, at most.

    Source: Interpreting and Improving Large Language Models in Arithmetic Calculation (2024), section 3. The paper
    patches single paths to the output; here a unit's whole effect is taken (ours), and sums are as easy as small models
    need them.

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama")
        >>> Arithmetic().measure(model, Data.of(model, fv.tiny_tokenizer())).summary
        'The model gets 0% of sums such as 3+4= right: too few to see how it adds.'
    """

    paper: ClassVar[Paper | None] = Paper(
        "Interpreting and Improving Large Language Models in Arithmetic Calculation",
        2024,
        "https://arxiv.org/abs/2409.01659",
    )
    claim: ClassVar[str] = "under 5% of a model's heads fetch the numbers that it calculates with"
    title: ClassVar[str] = "Which heads and MLPs add numbers?"

    pairs: int = 6

    def check(self, model: PreTrainedModel, data: Data) -> None:
        super().check(model, data)
        if self.pairs < 2:
            raise FoveateError(f"arithmetic on {self.pairs} pairs of sums was asked for: give at least 2.")
        longest = sums(data.tokenizer, SUMS[:1], examples(data.seed))[0].ids.shape[1]
        if longest > anatomy(model).max_positions:
            raise FoveateError(
                f"arithmetic: its prompts have {longest} tokens, and this model has {anatomy(model).max_positions} "
                "positions: take another model."
            )

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        parts = anatomy(model)
        return 28.0 * (len(SUMS) + self.pairs * len(parts.layers) * (parts.heads + 1))

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        self.check(model, data)
        training = model.training
        model.eval()
        try:
            found = effects(model, data.tokenizer, pairs=self.pairs, seed=data.seed, progress=data.progress)
        finally:
            model.train(training)
        scores = {
            "arithmetic": UnitScores("head", found.heads.float()),
            "arithmetic mlp": UnitScores("mlp", found.mlps.float()),
            "looks at the sum": UnitScores("head", found.looks.float()),
        }
        setting = {"pairs": found.pairs, "seed": data.seed, "least": LEAST}
        metrics = {"sums right": found.accuracy}
        if not found.pairs:
            summary = (
                f"The model gets {found.accuracy.value:.0%} of sums such as 3+4= right: too few to see how it adds."
            )
            return Reading("arithmetic", self.title, summary, metrics, scores, [], [], setting)
        heads = clear_heads(
            scores["arithmetic"],
            LEAST,
            "fetches numbers",
            lambda s: f"With what it says on another sum, the right result loses {s:.0%} of its probability.",
        )
        mlps = clear_heads(
            scores["arithmetic mlp"],
            LEAST,
            "makes the result",
            lambda s: f"With what this layer's MLP says on another sum, the right result loses {s:.0%}.",
        )
        summary = (
            f"The model gets {found.accuracy.value:.0%} of sums such as 3+4= right. Heads without which a result is "
            f"another: {len(heads)}"
            + (f" ({named(heads)})" if heads else "")
            + f"; MLPs: {len(mlps)}"
            + (f" ({named(mlps)})." if mlps else ".")
        )
        return Reading("arithmetic", self.title, summary, metrics, scores, [*heads, *mlps], [], setting)


# ---- the claim ------------------------------------------------------------------------------------------------------

TURNS, PAIRS = 6, 6
"""Sets of solved sums under which each judged sum is asked; pairs of sums that heads are chosen on."""


@claim("arithmetic")
class FewHeadsAdd(Claim):
    statement: ClassVar[str] = (
        "under 5% of heads are pivotal in calculating: without them accuracy collapses, while without as many random "
        "heads it stays (abstract, section 4)"
    )
    setting: ClassVar[str] = (
        "sums a+b of two digits that come to one digit, after four solved ones; heads chosen by 6 pairs of half of the "
        "sums, accuracy on the other half under 6 sets of solved ones; 5% of heads set to zero, against three random "
        "sets of as many; the paper's tuning of those heads alone is not tried"
    )

    def run(self, bench: Bench) -> Finding:
        model, parts = bench.model, anatomy(bench.model)
        # A sum and its mirror (2+5, 5+2) lie on the same side.
        pairs = sorted({tuple(sorted(each)) for each in SUMS})
        random.Random(0).shuffle(pairs)
        first = set(pairs[: len(pairs) // 2])
        choosing = [each for each in SUMS if tuple(sorted(each)) in first]
        judging = [each for each in SUMS if each not in choosing]
        found = effects(
            model, bench.tokenizer, of=choosing, pairs=PAIRS, seed=1, progress=lambda done: bench.progress(done * 0.8)
        )
        if not found.pairs:
            raise FoveateError(
                "the model knows too few sums of one-digit numbers to try the claim: take another model."
            )
        total = found.heads.numel()
        count = max(1, round(0.05 * total))
        best = found.heads.flatten().argsort(descending=True)[:count]
        chance = [torch.tensor(random_others(total, count, best.tolist(), seed)) for seed in range(3)]
        prompts = [sums(bench.tokenizer, judging, examples(turn, choosing)) for turn in range(TURNS)]
        hits = []
        for done, heads in enumerate([best[:0], best, *chance]):
            with ablated(model, [divmod(int(head), parts.heads) for head in heads]):
                rows = torch.tensor([right(model, asked) for asked in prompts])
            hits.append(rows.mean(0).tolist())  # a case is a sum, under all sets of solved ones
            bench.progress(0.8 + 0.2 * (done + 1) / 5)
        whole, without, *others = (mean(rows) for rows in hits)
        lost = [mean([a - b for a, b in zip(hits[0], rows, strict=True)]) for rows in hits[1:]]
        return Finding(
            {
                "sums right, whole model": whole,
                f"without the {counted(count, 'head')} that matter most": without,
                **{f"without {count} random heads, set {i + 1}": each for i, each in enumerate(others)},
                "lost without them": lost[0],
                **{f"lost without random heads, set {i + 1}": each for i, each in enumerate(lost[1:])},
            },
            {
                "without them less than half of the accuracy is left": without.high < 0.5 * whole.value,
                "without as many random heads most stays, in all three sets": all(
                    each.value < 0.25 * whole.value for each in lost[1:]
                ),
            },
        )
