"""Explanations: which tokens a prediction rests on, asked in seven ways that need not agree."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper
from foveate.models.anatomy import anatomy
from foveate.models.attention import replaced_attention
from foveate.probes.base import Data, Grid, Marked, Panel, Probe, Reading, Rows, probe, quiet
from foveate.probes.watch import in_blocks
from foveate.tasks.base import Bench, passages

WAYS = (
    "attention",
    "rollout",
    "gradient x input",
    "integrated gradients",
    "gradient SHAP",
    "leave one out",
    "LIME",
)
"""The first two are made of attention; the others are attributions."""
STEPS = 8
"""Points on each path of integrated gradients, and draws of gradient SHAP."""
MASKED = 64
"""Texts with holes that LIME learns from."""
STRONG = 0.5
"""A rank correlation from here on is called strong (ours)."""
TOP = 3
"""Evidence is found where it is among so many highest tokens."""


@probe("explanations")
class Explanations(Probe):
    """How far seven explanations of the same predictions agree, and how often they find evidence that was planted.

    What is explained is the log-probability of the token that the model itself holds most likely after a passage. Each
    way gives every token of the passage a weight, and all are compared by Kendall's tau. Attention is that of the last
    token, as the mean over the last layer's heads, and as rollout through all layers; gradient x input, integrated
    gradients, gradient SHAP and leave one out are Captum's, over the tokens' embeddings; LIME is a ridge regression on
    texts with holes.

    Ours: a language model's predictions in the place of a classifier's; absolute values, as attention has no sign; the
    mean embedding as what stands for a missing token; gradient SHAP starts at the passage's own tokens in other orders;
    and the planted evidence. That is random tokens and the same again: where the model guesses what follows, the guess
    rests on the place where it stood before, and an explanation has found it if that is among its three highest tokens.

    Fields:
        tokens: how many tokens a passage has; the work goes with their square.

    Source: A Song of (Dis)agreement (2022); rollout: Quantifying Attention Flow in Transformers (2020).

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama", num_hidden_layers=1)
        >>> reading = Explanations(tokens=16).measure(model, Data.of(model, fv.tiny_tokenizer(), length=16, passages=1))
        >>> len(reading.panels[0].values)
        7
    """

    paper: ClassVar[Paper | None] = Paper(
        "A Song of (Dis)agreement: Evaluating the Evaluation of Explainable Artificial Intelligence in Natural "
        "Language Processing",
        2022,
        "https://arxiv.org/abs/2205.04559",
    )
    claim: ClassVar[str] = "explanations of a transformer's prediction hardly agree, whether made of attention or not"
    title: ClassVar[str] = "Do explanations of a prediction agree?"

    tokens: int = 20

    def check(self, model: PreTrainedModel, data: Data) -> None:
        if importlib.util.find_spec("captum") is None:
            raise FoveateError("explanations needs the package captum: pip install 'foveate[explain]'.")
        most = min(256, anatomy(model).max_positions)
        if not 16 <= self.tokens <= most:
            raise FoveateError(
                f"explanations: passages of {self.tokens} tokens were asked for: give 16 to {most}, since each token "
                "is taken away once."
            )

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        rows = 2 + 3 * (1 + 2 * STEPS) + self.tokens + MASKED
        return float(2 * data.passages * rows * self.tokens)

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        with quiet(model):
            return self._measure(model, data)

    def _measure(self, model: PreTrainedModel, data: Data) -> Reading:
        self.check(model, data)
        read = replace(data, length=self.tokens).stream("mine", model)
        asked, answers, sources = planted_evidence(model, data, data.passages, self.tokens, data.seed)
        weights = [weights_of_tokens(model, ids, seed=data.seed) for ids in _told(read, data, 0.0)]
        found = recall(model, asked, answers, sources, lambda ids: _told(ids, data, 0.5))
        pairs = {(a, b): _taus(weights, a, b) for a, b in combinations(range(len(WAYS)), 2)}
        taus = {pair: mean(values) for pair, values in pairs.items()}
        grid: list[list[float | None]] = [[1.0] * len(WAYS) for _ in WAYS]
        for (a, b), tau in taus.items():
            grid[a][b] = grid[b][a] = tau.value
        metrics = {
            "tau, attention with attributions": _over(pairs, lambda a, b: a < 2 <= b),
            "tau, attributions with each other": _over(pairs, lambda a, b: a >= 2),
            **{f"planted evidence found by {WAYS[way]}": hits for way, hits in found.items()},
        }
        (a, b), high = max(taus.items(), key=lambda each: each[1].value)
        strong = sum(tau.low >= STRONG for tau in taus.values())
        summary = (
            f"Attention and attributions rank tokens with a correlation of "
            f"{metrics['tau, attention with attributions'].value:.2f} (1 would be the same order, 0 none); most alike "
            f"are {WAYS[a]} and {WAYS[b]}, with {high.value:.2f}, and {strong} of {len(taus)} pairs agree strongly."
        )
        words = [str(data.tokenizer.decode([int(i)])) for i in read[0]]
        order = ", ".join(f"{i} {way}" for i, way in enumerate(WAYS))
        panels: list[Panel] = [
            Grid("Kendall's tau of each two explanations", order, order, grid),
            Rows(
                "Pairs of explanations",
                ["one", "other", "tau", "from", "to"],
                [[WAYS[a], WAYS[b], *(round(x, 3) for x in (t.value, t.low, t.high))] for (a, b), t in taus.items()],
            ),
            *(Marked(f"By {way}", words, (w / w.max().clamp(min=1e-30)).tolist()) for way, w in zip(WAYS, weights[0])),  # noqa: B905
        ]
        setting = {"tokens": self.tokens, "passages": data.passages, "seed": data.seed, "text": data.text.name}
        return Reading("explanations", self.title, summary, metrics, panels=panels, setting={**setting, "top": TOP})


def weights_of_tokens(model: PreTrainedModel, ids: Tensor, *, seed: int = 0) -> Tensor:
    """What each token of a passage weighs in the model's own prediction after it, in each of the ways `WAYS`.

    Args:
        model: the model.
        ids: LongTensor (token,).
        seed: of what is drawn, by gradient SHAP and LIME.

    Returns:
        (way, token), float64 on the CPU, not negative; comparable within a way only.
    """
    from captum.attr import FeatureAblation, GradientShap, InputXGradient, IntegratedGradients

    table: Any = model.get_input_embeddings()
    with torch.no_grad():
        words = table(ids[None].to(model.device)).float()  # Captum's points between are in float32
        nothing = mean_embedding(table).expand_as(words)
        target = int(model(ids[None].to(model.device), use_cache=False, logits_to_keep=1).logits[0, -1].argmax())

    def goal(given: Tensor) -> Tensor:
        logits = model(inputs_embeds=given.to(dtype), use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits.float().log_softmax(-1)[:, target]

    size, dtype = len(ids), table.weight.dtype
    generator = torch.Generator().manual_seed(seed)
    others = torch.cat([words[:, torch.randperm(size, generator=generator)] for _ in range(STEPS)])
    each = torch.arange(size, device=words.device)[None, :, None]
    words.requires_grad_()
    with _seeded(seed):
        by_gradient = [
            InputXGradient(goal).attribute(words),
            IntegratedGradients(goal).attribute(words, baselines=nothing, n_steps=STEPS),
            GradientShap(goal).attribute(words, baselines=others, n_samples=STEPS, stdevs=0.0),
        ]
        ablation = FeatureAblation(goal)
        # It spreads a token's effect on all channels, each of which has all of it.
        out = ablation.attribute(words, nothing, feature_mask=each.expand_as(words), perturbations_per_eval=size)
    made = [
        *_attention(model, ids),
        *(given[0].detach().double().sum(-1).cpu() for given in by_gradient),
        out[0, :, 0].detach().double().cpu(),
        _lime(goal, words, nothing, generator),
    ]
    return torch.stack(made).abs()


@torch.no_grad()
def mean_embedding(table: Any) -> Tensor:
    """The mean over the vocabulary of what the embedding gives, (hidden,), float32."""
    mean: Tensor = table.weight.mean(0, dtype=torch.float32)
    return mean * getattr(table, "embed_scale", 1.0)  # Gemma 3's scales what it looks up


def _attention(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the last token attends to: in the last layer, and by rollout through all. Means over heads, (token,)."""
    rows, rolled = [], torch.eye(len(ids), dtype=torch.float64)
    maps: list[Tensor] = []
    attention = in_blocks(lambda layer, start, weights, call: maps.append(weights.double().mean(0).cpu()))
    with torch.no_grad(), replaced_attention(model, attention, "explanations"):
        model(ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    for each in maps:
        rows.append(each[-1])
        # Half of what a token holds after a layer is taken to be what it held before (the residual stream).
        rolled = (each + torch.eye(len(ids), dtype=torch.float64)) / 2 @ rolled
    return rows[-1], rolled[-1]


@torch.no_grad()
def _lime(goal: Callable[[Tensor], Tensor], words: Tensor, nothing: Tensor, generator: torch.Generator) -> Tensor:
    """The coefficients (token,) of a ridge regression of the goal on which tokens are there, near texts weighing more.

    Number of holes, kernel and penalty are those of the authors' own implementation for texts.
    """
    size = words.shape[1]
    there = torch.ones(MASKED, size, dtype=torch.float64)
    for row in there[1:]:  # the first is the whole text
        holes = int(torch.randint(1, size + 1, (), generator=generator))
        row[torch.randperm(size, generator=generator)[:holes]] = 0
    keep = there.to(words.device)[..., None].bool()
    y = goal(torch.where(keep, words, nothing)).double().cpu()
    far = 100 * (1 - there.mean(1).sqrt())  # the cosine distance to the whole text
    near = (-((far / 25) ** 2) / 2).exp()
    x = there - (near[:, None] * there).sum(0) / near.sum()
    y = y - (near * y).sum() / near.sum()
    return torch.linalg.solve(x.T @ (near[:, None] * x) + torch.eye(size, dtype=torch.float64), x.T @ (near * y))


def kendall(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b of two rankings, (n,) each: 1 the same order, -1 the opposite, 0 none; 0 where all are equal.

    Example:
        >>> kendall(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0]))
        0.333...
    """
    i, j = torch.triu_indices(len(a), len(a), 1)
    one, other = (a[i] - a[j]).sign().double(), (b[i] - b[j]).sign().double()
    untied = math.sqrt(float(one.abs().sum()) * float(other.abs().sum()))
    return float((one * other).sum()) / untied if untied else 0.0


@torch.no_grad()
def planted_evidence(
    model: PreTrainedModel, data: Data, count: int, length: int, seed: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Random tokens, and the same again, cut off somewhere: prompts (count, length), what follows, and its place."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = data.ordinary(model)
    rows, answers, sources = [], [], []
    for _ in range(count):
        period = int(torch.randint(length // 2 + 1, 2 * length // 3 + 1, (), generator=generator))
        once = ordinary[torch.randperm(len(ordinary), generator=generator)[:period]]
        rows.append(torch.cat([once, once])[:length])
        sources.append(length - period)
        answers.append(once[length - period])
    return torch.stack(rows).to(model.device), torch.stack(answers), sources


def recall(
    model: PreTrainedModel,
    prompts: Tensor,
    answers: Tensor,
    sources: Sequence[int],
    told: Callable[[Tensor], Iterator[Tensor]] = iter,
) -> dict[int, Metric]:
    """How often each way has the evidence among its highest tokens, where the model guesses rightly; else nothing."""
    with torch.no_grad():
        guesses = model(prompts, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1).cpu()
    right = (guesses == answers).tolist()
    hits: list[list[bool]] = []
    for ids, source, good in zip(told(prompts), sources, right, strict=True):
        if good:
            best = weights_of_tokens(model, ids).topk(TOP).indices
            hits.append((best == source).any(-1).tolist())
    return {way: mean([float(row[way]) for row in hits]) for way in range(len(WAYS))} if hits else {}


def _taus(weights: Sequence[Tensor], a: int, b: int) -> list[float]:
    return [kendall(each[a], each[b]) for each in weights]


def _weak(tau: Metric) -> bool:
    return max(abs(tau.low), abs(tau.high)) < STRONG


def _over(pairs: dict[tuple[int, int], list[float]], wanted: Callable[[int, int], bool]) -> Metric:
    """The mean of tau over some pairs, with its interval over passages."""
    chosen = [values for (a, b), values in pairs.items() if wanted(a, b)]
    return mean([sum(row) / len(row) for row in zip(*chosen, strict=True)])


def _told(rows: Tensor, data: Data, start: float) -> Iterator[Tensor]:
    for done, row in enumerate(rows):
        yield row
        data.progress(start + 0.5 * (done + 1) / len(rows))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Captum draws from the global generators: they are set, and put back."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


@claim("explanations")
class ExplanationsDisagree(Claim):
    statement: ClassVar[str] = (
        "attention correlates weakly with every attribution method, and on a transformer no two explanations correlate "
        "strongly; which does not make them wrong (abstract)"
    )
    setting: ClassVar[str] = (
        f"12 passages of 20 tokens, the model's own next token explained in {len(WAYS)} ways, Kendall's tau; strong is "
        f"{STRONG} or more, either way; 24 prompts of random tokens repeated, in which the guess rests on a known "
        "token: of the pairs below that, the one that finds it most often in one half of the prompts is judged on the "
        "other half"
    )

    cases: ClassVar[int] = 12
    prompts: ClassVar[int] = 24
    tokens: ClassVar[int] = 20

    def run(self, bench: Bench) -> Finding:
        model, data = bench.model, Data(bench.tokenizer, bench.text)
        Explanations(tokens=self.tokens).check(model, data)
        weights = []
        for done, ids in enumerate(passages(bench, self.cases, self.tokens)):
            weights.append(weights_of_tokens(model, ids[0]))
            bench.progress((done + 1) / (self.cases + self.prompts))
        taus = {(a, b): mean(_taus(weights, a, b)) for a, b in combinations(range(len(WAYS)), 2)}
        halves = []
        for half in range(2):
            count = self.prompts // 2
            given = planted_evidence(model, data, count, self.tokens, 100 + half)
            halves.append(recall(model, *given))
            bench.progress((self.cases + (half + 1) * count) / (self.cases + self.prompts))
        metrics = {f"tau, {WAYS[a]} and {WAYS[b]}": tau for (a, b), tau in taus.items()}
        apart = [pair for pair, tau in taus.items() if _weak(tau)]
        checks = {
            f"attention's tau with every attribution is below {STRONG}": all(
                _weak(tau) for (a, b), tau in taus.items() if a < 2 <= b
            ),
            f"no two explanations have a tau of {STRONG} or more": all(map(_weak, taus.values())),
        }
        chance = TOP / self.tokens
        both = False
        if all(halves) and apart:
            a, b = max(apart, key=lambda pair: min(halves[0][way].value for way in pair))
            both = all(halves[1][way].low > 2 * chance for way in (a, b))
        metrics |= {f"planted evidence found by {WAYS[way]}": hits for way, hits in halves[1].items()}
        checks["two that don't agree both find planted evidence (over twice chance)"] = both
        return Finding({**metrics, "planted evidence found by chance": Metric.exact(chance)}, checks)
