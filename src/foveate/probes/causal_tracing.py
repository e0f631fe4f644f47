"""Causal tracing: where in the layers does a fact pass, and does that say where to change it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.data.facts import FACTS, Prompt, by_length, known_facts
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.patching import Patch, Site, at, patched, recorded
from foveate.probes.base import Data, Lines, Probe, Reading, Role, counted, probe
from foveate.probes.editing import chances, covariances, edited, keys_of, values_for
from foveate.tasks.base import Bench

LEAST = 0.5
"""Of what noise takes from the answer: what a layer's MLPs must bring back for their part to be called clear."""
PLACES = ("subject, before its last token", "subject, last token", "after the subject", "last token")


def places(prompt: Prompt) -> list[list[int]]:
    """The positions of each of `PLACES` in a prompt; empty where it has none there."""
    last_of_subject = prompt.end - 1
    return [
        list(range(prompt.start, last_of_subject)),
        [last_of_subject],
        list(range(prompt.end, prompt.last)),
        [prompt.last],
    ]


@dataclass(frozen=True)
class Trace:
    """What noise took, and what came back.

    Attributes:
        clean, noised: the answer's probability without and with noise on the subject, float64 (fact,).
        effects: how much probability comes back where a layer is restored, float64 (fact, place, layer); NaN where a
            prompt has no such place.
    """

    clean: Tensor
    noised: Tensor
    effects: Tensor

    @property
    def shares(self) -> Tensor:
        """Effects as shares of what noise took from all facts together: (place, layer)."""
        lost = (self.clean - self.noised)[:, None, None].expand_as(self.effects)
        there = ~self.effects.isnan()  # of the facts that have such a place
        took = (lost * there).sum(0) / there.sum(0).clamp(min=1)
        # Where noise takes nothing, nothing can come back.
        return torch.where(took > 1e-4, self.effects.nanmean(0) / took.clamp(min=1e-4), self.effects.nanmean(0) * 0)


@torch.no_grad()
def traced(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    kind: Literal["residual", "mlp"] = "residual",
    *,
    layers: Sequence[int] | None = None,
    where: Sequence[int] = (0, 1, 2, 3),
    window: int = 1,
    noise: float = 3.0,
    draws: int = 3,
    seed: int = 0,
    progress: Callable[[float], None] = lambda done: None,
) -> Trace:
    """The answer's probability with noise on the subject, and how much of it one layer brings back.

    Args:
        model: the model.
        prompts: facts that it knows.
        kind: what is restored to its value without noise: "residual", the stream as it leaves a layer; "mlp", what the
            MLPs of a window of layers around it put out.
        layers: which layers; None: all.
        where: which of `PLACES`, one after the other; all tokens of one are restored at once (ours).
        window: how many layers, of "mlp".
        noise: in standard deviations of what stands at subjects as it enters the first layer. That is the embedding, in
            the scale in which a family uses it (ours: the paper takes the embeddings' own).
        draws: of the noise, for each fact.
        seed: of the noise.
        progress: called with the fraction done.

    Source: Locating and Editing Factual Associations in GPT (2022), section 2.1, which Does Localization Inform
    Editing? (2023), section 3, follows.

    Example:
        >>> import foveate as fv
        >>> from foveate.data.facts import prompt_of
        >>> trace = traced(fv.tiny("llama"), [prompt_of(FACTS[0], fv.tiny_tokenizer())], draws=1)
        >>> trace.effects.shape
        torch.Size([1, 4, 4])
    """
    parts = anatomy(model)
    chosen = list(range(len(parts.layers))) if layers is None else list(layers)
    clean, noised = (torch.zeros(len(prompts), dtype=torch.float64) for _ in range(2))
    effects = torch.full((len(prompts), len(PLACES), len(chosen)), torch.nan, dtype=torch.float64)
    groups = by_length(prompts)
    entering = Site("residual", 0)
    spread = noise * _spread(model, prompts, groups)
    for done, group in enumerate(groups):
        first = prompts[group[0]]
        ids = torch.cat([prompts[i].ids for i in group]).repeat_interleave(draws, 0).to(model.device)
        answers = torch.tensor([prompts[i].answer for i in group]).repeat_interleave(draws).to(model.device)
        generator = torch.Generator().manual_seed(seed + done)
        shape = len(ids), first.end - first.start, parts.hidden
        added = spread * torch.randn(shape, generator=generator).to(model.device)

        def disturbed(value: Tensor, first: Prompt = first, added: Tensor = added) -> Tensor:
            new = value.clone()
            new[:, first.start : first.end] += added.to(new)
            return new

        def chance(
            patches: dict[Site, Patch], ids: Tensor = ids, answers: Tensor = answers, group: list[int] = group
        ) -> Tensor:
            with patched(model, patches):
                return chances(model, ids, answers).view(len(group), draws).mean(1)

        per_layer = [_sites(kind, layer, window, len(parts.layers)) for layer in chosen]
        with recorded(model, {site for sites in per_layer for site in sites}) as values:
            clean[group] = chance({})
        noised[group] = chance({entering: disturbed})
        for place in where:
            positions = places(first)[place]
            for turn, sites in enumerate(per_layer):
                if positions:
                    restored: dict[Site, Patch] = {site: at(positions, values[site]) for site in sites}
                    effects[group, place, turn] = chance({entering: disturbed, **restored}) - noised[group]
            progress((done + (list(where).index(place) + 1) / len(where)) / len(groups))
    return Trace(clean, noised, effects)


def _sites(kind: str, layer: int, window: int, layers: int) -> list[Site]:
    if kind == "residual":
        return [Site("residual", layer + 1)]
    first = layer - (window - 1) // 2
    return [Site("mlp", each) for each in range(max(0, first), min(layers, first + window))]


def _spread(model: PreTrainedModel, prompts: Sequence[Prompt], groups: list[list[int]]) -> float:
    """The standard deviation of what stands at the subjects' tokens as it enters the first layer."""
    found = []
    for group in groups:
        first = prompts[group[0]]
        with recorded(model, [Site("residual", 0)]) as values:
            model(torch.cat([prompts[i].ids for i in group]).to(model.device), use_cache=False, logits_to_keep=1)
        found.append(values[Site("residual", 0)][:, first.start : first.end].float().flatten())
    return float(torch.cat(found).std())


@probe("causal-tracing")
class CausalTracing(Probe):
    """Where does a fact pass that the model knows: which layers, restored, bring the answer back after noise?

    The subject of a known fact gets noise, so that the answer is lost. Then the value of one layer at one place is put
    back as it was: what comes back of the answer's probability says how much of the fact passes there. Scores
    "tracing": the stream as it leaves the layer, at the subject's last token.

    Fields:
        facts: how many, at most.
        draws: of the noise, for each fact.
        noise: in standard deviations (see `traced`).
        window: MLPs restored together; 0: a fifth of the layers (10 of 48 in the paper).

    Source: Does Localization Inform Editing? (2023), section 3. The places are ours: the paper tells the subject's
    first, middle and last token apart, and many of our subjects are one token.

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama")
        >>> CausalTracing().measure(model, Data.of(model, fv.tiny_tokenizer())).summary
        'The model completes none of the facts rightly, so no fact could be traced.'
    """

    paper: ClassVar[Paper | None] = Paper(
        "Does Localization Inform Editing? Surprising Differences in Causality-Based Localization vs. Knowledge "
        "Editing in Language Models",
        2023,
        "https://arxiv.org/abs/2301.04213",
    )
    claim: ClassVar[str] = "where a fact is traced to does not say in which layer it is best edited"
    title: ClassVar[str] = "Through which layers does a fact pass?"

    facts: int = 8
    draws: int = 3
    noise: float = 3.0
    window: int = 0

    def check(self, model: PreTrainedModel, data: Data) -> None:
        super().check(model, data)
        if self.facts < 1 or self.draws < 1 or self.window < 0 or not self.noise > 0:
            raise FoveateError(
                f"causal tracing of {self.facts} facts with {self.draws} draws of noise of {self.noise} deviations and "
                f"windows of {self.window} layers was asked for: give at least 1 fact and 1 draw, noise above 0 and a "
                "window of 0 or more."
            )

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        # Prompts have about 8 tokens; four places of the stream, two of the MLPs.
        return 8.0 * (len(FACTS) + self.facts * self.draws * 6 * len(anatomy(model).layers))

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        self.check(model, data)
        count = len(anatomy(model).layers)
        window = self.window or max(1, round(count / 5))
        setting = {"facts": self.facts, "draws": self.draws, "noise": self.noise, "window": window, "least": LEAST}
        training = model.training
        model.eval()
        try:
            prompts = known_facts(model, data.tokenizer, FACTS, most=self.facts)
            if not prompts:
                nothing = {"tracing": UnitScores("layer", torch.zeros(count, 1))}
                summary = "The model completes none of the facts rightly, so no fact could be traced."
                return Reading("causal-tracing", self.title, summary, scores=nothing, setting=setting)
            given = {"draws": self.draws, "noise": self.noise, "seed": data.seed}
            stream = traced(model, prompts, progress=lambda done: data.progress(done * 2 / 3), **given)  # type: ignore[arg-type]
            mlps = traced(  # type: ignore[call-overload]
                model,
                prompts,
                "mlp",
                where=(1, 3),
                window=window,
                progress=lambda done: data.progress((2 + done) / 3),
                **given,  # type: ignore[arg-type]
            )
        finally:
            model.train(training)
        lost = [float(x) for x in stream.clean - stream.noised]
        roles = [
            Role(
                "layer",
                layer,
                0,
                "fact",
                float(share),
                f"With its MLP and those around it as they were, {share:.0%} of what noise took comes back.",
            )
            for layer, share in enumerate(mlps.shares[1].tolist())
            if share >= LEAST and mean(lost).low > 0
        ]
        best, late = int(mlps.shares[1].argmax()), stream.shares[3].tolist()
        over = next((layer for layer, share in enumerate(late) if share >= 0.5), count - 1)
        summary = (
            f"Of {counted(len(prompts), 'known fact')}, noise on the subject takes {mean(lost).value:.0%} points of "
            f"the answer's probability. "
        )
        if mean(lost).low > 0:
            summary += (
                f"MLPs at the subject bring {float(mlps.shares[1, best]):.0%} of it back around layer {best}, and from "
                f"layer {over} on half of it has come over to the last token."
            )
        else:
            summary += "That is too little to say where it would come back."
        panels = [
            _lines("Stream restored as it leaves a layer", stream.shares, (0, 1, 2, 3)),
            _lines(f"MLPs of {window} layers restored", mlps.shares, (1, 3)),
        ]
        metrics = {"answer's probability": mean(stream.clean.tolist()), "of it, lost to noise": mean(lost)}
        scores = {
            "tracing": UnitScores("layer", stream.shares[1][:, None].float()),
            "tracing of MLPs": UnitScores("layer", mlps.shares[1][:, None].float()),
        }
        return Reading("causal-tracing", self.title, summary, metrics, scores, roles, list(panels), setting)


def _lines(title: str, shares: Tensor, where: Sequence[int]) -> Lines:
    series = {
        PLACES[place]: [(float(layer), float(y)) for layer, y in enumerate(shares[place].tolist())]
        for place in where
        if not shares[place].isnan().all()
    }
    return Lines(title, "layer", "share of the lost probability that comes back", series)


# ---- the claim ------------------------------------------------------------------------------------------------------

COUNT, EDITS = 12, 6
"""Facts, and layers spread over the depth, that the claim edits."""


@claim("causal-tracing")
class TracingDoesNotSayWhereToEdit(Claim):
    statement: ClassVar[str] = (
        "causal tracing gives no insight into which layer's MLP is best to edit: it explains almost nothing of how "
        "well an edit works beyond which layer is edited, and the layer explains far more (abstract, section 5)"
    )
    setting: ClassVar[str] = (
        "12 known facts, 6 layers spread over the depth, without the last; the stream at the "
        "subject's last token restored, 4 draws of noise of 3 deviations; rank-one edits to another fact's "
        "answer, 20 steps; least squares on layers and "
        "effects, against effects of other facts (5 shuffles in each layer); intervals over facts"
    )

    def run(self, bench: Bench) -> Finding:
        model, parts = bench.model, anatomy(bench.model)
        prompts = known_facts(model, bench.tokenizer, FACTS, most=COUNT)
        if len(prompts) < 4:
            raise FoveateError(f"the model knows {len(prompts)} of the facts, and edits need at least 4: take another.")
        # Not the last: after it no attention takes anything from the subject to the end, so no edit could work there.
        layers = np.linspace(0, len(parts.layers) - 2, EDITS).round().astype(int).tolist()
        trace = traced(model, prompts, layers=layers, where=(1,), draws=4)
        bench.progress(0.2)
        effects, data = trace.effects[:, 1].numpy(), Data(bench.tokenizer, bench.text, length=512, passages=8)
        known = covariances(model, data.stream("mine", model), layers)
        # Another answer of the same relation, where there is one.
        targets = [
            next(
                (
                    o.answer
                    for o in [*prompts[i + 1 :], *prompts[:i]]
                    if o.answer != p.answer and o.fact.relation == p.fact.relation
                ),
                prompts[i - 1].answer,
            )
            for i, p in enumerate(prompts)
        ]
        success = np.zeros((len(prompts), len(layers)))
        for turn, layer in enumerate(layers):
            values, keys = values_for(model, prompts, targets, layer), keys_of(model, prompts, layer)
            for i, prompt in enumerate(prompts):
                ids, goal = prompt.ids.to(model.device), torch.tensor([targets[i]], device=model.device)
                before = float(chances(model, ids, goal))
                with edited(model, layer, keys[i], values[i], known[layer]):
                    success[i, turn] = (float(chances(model, ids, goal)) - before) / (1 - before)
            bench.progress(0.2 + 0.8 * (turn + 1) / len(layers))
        by_layer, beyond = _explained(success, effects)
        rng = np.random.default_rng(0)
        shuffled = [_explained(success, rng.permuted(effects, axis=0))[1] for _ in range(5)]
        draws = [
            _explained(success[rows], effects[rows]) for rows in rng.integers(0, len(prompts), (1000, len(prompts)))
        ]
        ends = np.percentile(np.array(draws), [2.5, 97.5], axis=0)
        layer_part = Metric(by_layer, float(ends[0, 0]), float(ends[1, 0]))
        tracing_part = Metric(beyond, float(ends[0, 1]), float(ends[1, 1]))
        return Finding(
            {
                "rewrite score, all edits": mean(success.mean(1).tolist()),
                **{f"rewrite score, layer {n}": mean(success[:, j].tolist()) for j, n in enumerate(layers)},
                **{f"tracing effect, layer {n}": mean(effects[:, j].tolist()) for j, n in enumerate(layers)},
                "R-squared of the layer": layer_part,
                "R-squared that tracing adds": tracing_part,
                "R-squared that tracing of other facts adds": mean(shuffled),
            },
            {
                "tracing adds less than 0.05 (upper end)": tracing_part.high < 0.05,
                "the layer explains more than five times what tracing adds": by_layer > 5 * beyond,
                "edits work in the best layer": bool(success.mean(0).max() > 0.5),
            },
        )


def _explained(success: np.ndarray, effects: np.ndarray) -> tuple[float, float]:
    """R-squared of (fact, layer) `success` from layers as categories, and what a line through `effects` adds to it.

    Example:
        >>> success = np.array([[0.0, 1.0], [0.2, 1.2]])
        >>> [round(x, 2) for x in _explained(success, success)]
        [0.96, 0.04]
    """
    total = ((success - success.mean()) ** 2).sum()
    left = success - success.mean(0)
    line = effects - effects.mean(0)
    along = (line * left).sum() ** 2 / max((line**2).sum(), 1e-12)
    return float(1 - (left**2).sum() / max(total, 1e-12)), float(along / max(total, 1e-12))
