"""Knockout: in which layers does attention carry a fact from its subject to the end of the prompt?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.data.facts import FACTS, Prompt, by_length, known_facts
from foveate.errors import FoveateError
from foveate.measure.bootstrap import mean
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.patching import knocked_out
from foveate.probes.base import Data, Lines, Probe, Reading, Role, counted, probe
from foveate.probes.editing import chances
from foveate.tasks.base import Bench

LEAST = 0.5
"""Of the answer's probability: what is lost without a layer's edges for its part to be called clear."""
KINDS = ("subject to last", "relation to last", "subject to relation", "last to itself", "random edges")


def edges(prompt: Prompt, kind: str, generator: torch.Generator) -> Tensor:
    """The attention edges of a kind in a prompt: bool (query, entry).

    The relation is what is neither subject, nor last token, nor the first one, on which many heads only rest. "random
    edges" are as many as from the subject to the last token, at other tokens, never to the first one and never from a
    token to itself.

    Example:
        >>> import foveate as fv
        >>> from foveate.data.facts import Fact, prompt_of
        >>> prompt = prompt_of(Fact("capital", "F", "ab{}cd", "R"), fv.tiny_tokenizer())
        >>> edges(prompt, "subject to relation", torch.Generator()).nonzero().tolist()
        [[3, 2]]
    """
    n, last = prompt.last + 1, prompt.last
    subject = torch.zeros(n, dtype=torch.bool)
    subject[prompt.start : prompt.end] = True
    relation = ~subject
    relation[0] = relation[last] = False
    ending = torch.arange(n) == last
    if kind == "last to itself":
        return ending[:, None] & ending
    if kind == "random edges":
        there = torch.ones(n, n, dtype=torch.bool).tril(-1)
        there[:, 0] = False
        there &= ~(ending[:, None] & subject)
        options = there.flatten().nonzero().flatten()
        chosen = options[torch.randperm(len(options), generator=generator)[: int(subject.sum())]]
        found = torch.zeros(n * n, dtype=torch.bool)
        found[chosen] = True
        return found.view(n, n)
    entries = relation if kind == "relation to last" else subject
    queries = relation if kind == "subject to relation" else ending
    return (queries[:, None] & entries).tril()


@torch.no_grad()
def dropped(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    kinds: Sequence[str] = KINDS,
    *,
    window: int = 1,
    seed: int = 0,
    progress: Callable[[float], None] = lambda done: None,
) -> Tensor:
    """How much of the answer's probability is gone when edges are blocked in a window of layers around each layer.

    Args:
        model: the model.
        prompts: facts that it knows.
        kinds: of `KINDS`.
        window: how many layers.
        seed: of the random edges; others in every window.
        progress: called with the fraction done.

    Returns:
        1 - probability without the edges / probability with them, float64 (prompt, kind, layer); NaN where a prompt has
        no such edge. Negative: the answer gets likelier.

    Source: Cross-modal Information Flow in Multimodal Large Language Models (2024), section 3, on text instead of
    pictures: the subject stands in the picture's place, the relation in the question's.
    """
    layers = len(anatomy(model).layers)
    generator = torch.Generator().manual_seed(seed)
    found = torch.full((len(prompts), len(kinds), layers), torch.nan, dtype=torch.float64)
    groups = by_length(prompts)
    for done, group in enumerate(groups):
        ids = torch.cat([prompts[i].ids for i in group]).to(model.device)
        answers = torch.tensor([prompts[i].answer for i in group], device=model.device)
        with knocked_out(model, {}):  # the same attention code, so that nothing else differs
            whole = chances(model, ids, answers)
        for turn, kind in enumerate(kinds):
            for layer in range(layers):
                blocked = edges(prompts[group[0]], kind, generator)
                if not blocked.any():
                    continue
                first = layer - (window - 1) // 2
                around = range(max(0, first), min(layers, first + window))
                with knocked_out(model, dict.fromkeys(around, blocked)):
                    found[group, turn, layer] = 1 - chances(model, ids, answers) / whole
            progress((done + (turn + 1) / len(kinds)) / len(groups))
    return found


@probe("knockout")
class Knockout(Probe):
    """In which layers does a fact flow: how much is lost when tokens may not look at others there?

    For facts that the model knows, attention from some tokens to others is blocked in a window of layers, window after
    window: from the subject to the prompt's last token, from the relation to the last token, from the subject to the
    relation, of the last token to itself, and as many random edges. Scores "knockout": the share of the answer's
    probability that is lost without subject to last, in the window around the layer.

    Fields:
        facts: how many, at most.
        window: layers that are blocked together; 0: a fifth of them (9 of 40 or 48 in papers).

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama")
        >>> Knockout().measure(model, Data.of(model, fv.tiny_tokenizer())).summary
        'The model completes none of the facts rightly, so no flow could be followed.'
    """

    paper: ClassVar[Paper | None] = Paper(
        "Cross-modal Information Flow in Multimodal Large Language Models", 2024, "https://arxiv.org/abs/2411.18620"
    )
    claim: ClassVar[str] = "what is asked for reaches the question in lower layers, and the last token in higher ones"
    title: ClassVar[str] = "In which layers does a fact reach the answer?"

    facts: int = 12
    window: int = 0

    def check(self, model: PreTrainedModel, data: Data) -> None:
        super().check(model, data)
        if self.facts < 1 or self.window < 0:
            raise FoveateError(
                f"knockout on {self.facts} facts in windows of {self.window} layers was asked for: give at least 1 "
                "fact, and a window of 0 or more."
            )

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        return 8.0 * (len(FACTS) + self.facts * len(KINDS) * len(anatomy(model).layers))

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        self.check(model, data)
        count = len(anatomy(model).layers)
        window = self.window or max(1, round(count / 5))
        setting = {"facts": self.facts, "window": window, "seed": data.seed, "least": LEAST}
        training = model.training
        model.eval()
        try:
            prompts = known_facts(model, data.tokenizer, FACTS, most=self.facts)
            if not prompts:
                nothing = {"knockout": UnitScores("layer", torch.zeros(count, 1))}
                summary = "The model completes none of the facts rightly, so no flow could be followed."
                return Reading("knockout", self.title, summary, scores=nothing, setting=setting)
            drops = dropped(model, prompts, window=window, seed=data.seed, progress=data.progress)
        finally:
            model.train(training)
        lost = drops.nanmean(0)
        curves = {kind: lost[i] for i, kind in enumerate(KINDS) if not lost[i].isnan().all()}
        most = {kind: int(curve.argmax()) for kind, curve in curves.items()}
        direct, control = curves["subject to last"], curves["random edges"]
        roles = [
            Role(
                "layer",
                layer,
                0,
                "takes the subject to the end",
                float(share),
                f"Where the last token can't look at the subject around here, {share:.0%} of the answer is lost.",
            )
            for layer, share in enumerate(direct.tolist())
            if share >= LEAST and share > float(control.max())
        ]
        summary = (
            f"Over {counted(len(prompts), 'known fact')}, the answer needs the last token's look at the subject most "
            f"around layer {most['subject to last']}: without it {float(direct.max()):.0%} of its probability is lost "
            f"(with as many random edges blocked there, {float(control[most['subject to last']]):.0%})."
        )
        panel = Lines(
            f"Attention blocked in {counted(window, 'layer')} around",
            "layer",
            "share of the answer's probability that is lost",
            {kind: [(float(x), float(y)) for x, y in enumerate(curve.tolist())] for kind, curve in curves.items()},
        )
        metrics = {
            f"lost without {kind}, layer {most[kind]}": mean(
                [x for x in drops[:, KINDS.index(kind), most[kind]].tolist() if x == x]
            )
            for kind in curves
        }
        scores = {"knockout": UnitScores("layer", direct[:, None].float())}
        return Reading("knockout", self.title, summary, metrics, scores, roles, [panel], setting)


# ---- the claim ------------------------------------------------------------------------------------------------------

COUNT = 24
"""Facts that the claim follows."""


@claim("knockout")
class FactsFlowInStages(Claim):
    statement: ClassVar[str] = (
        "what is asked about flows in stages: in lower layers into the tokens of the question, in higher layers from "
        "there to the last token (abstract; there from a picture, here from a fact's subject)"
    )
    setting: ClassVar[str] = (
        "24 known facts, half of them to find the window of each kind of edge and half to judge; a fifth of the layers "
        "blocked at a time; depth: the mean layer, weighted by what is lost; 3 draws of random edges"
    )

    def run(self, bench: Bench) -> Finding:
        model = bench.model
        prompts = known_facts(model, bench.tokenizer, FACTS, most=COUNT)
        if len(prompts) < 4:
            raise FoveateError(f"the model knows {len(prompts)} of the facts, and 4 are needed: take another model.")
        window = max(1, round(len(anatomy(model).layers) / 5))
        drops = dropped(model, prompts, KINDS[:4], window=window, progress=lambda done: bench.progress(done * 4 / 7))
        random = torch.cat([dropped(model, prompts, KINDS[4:], window=window, seed=seed) for seed in range(3)], dim=1)
        chosen, judged = drops[::2].nanmean(0), drops[1::2]
        peaks = chosen.nan_to_num(-torch.inf).argmax(-1).tolist()
        depth = _depths(drops)

        def lost(kind: int) -> list[float]:
            return [x for x in judged[:, kind, peaks[kind]].tolist() if x == x]

        def later(kind: int, than: int) -> list[float]:
            return [x for x in (depth[:, kind] - depth[:, than]).tolist() if x == x]

        metrics = {
            f"lost without {kind}, around layer {peaks[i]}": mean(lost(i))
            for i, kind in enumerate(KINDS[:4])
            if lost(i)
        }
        at_peak = random[1::2, :, peaks[0]]
        metrics["lost without as many random edges there"] = mean(at_peak.mean(1).tolist())
        metrics |= {
            f"depth of {kind}": mean([x for x in depth[:, i].tolist() if x == x])
            for i, kind in enumerate(KINDS[:4])
            if not depth[:, i].isnan().all()
        }
        checks = {
            "subject to last carries half of the answer or more": mean(lost(0)).low > 0.5,
            "random edges carry less than a tenth": mean(at_peak.mean(1).tolist()).high < 0.1,
        }
        for kind, name in ((0, "subject to last"), (1, "relation to last")):
            if rows := later(kind, 2):
                metrics[f"layers by which {name} is later than subject to relation"] = mean(rows)
                checks[f"{name} is later than subject to relation"] = mean(rows).low > 0
        return Finding(metrics, checks)


def _depths(drops: Tensor) -> Tensor:
    """The mean layer of each prompt and kind, weighted by what is lost: (prompt, kind); NaN where nothing is."""
    weights = drops.clamp(min=0)
    return (weights * torch.arange(drops.shape[-1])).sum(-1) / weights.sum(-1)
