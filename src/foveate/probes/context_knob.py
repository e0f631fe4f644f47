"""Context knob: the one direction that decides whether an answer comes from the context or from memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.claims import Claim, Finding, claim
from foveate.data.facts import Prompt, known_facts
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.patching import Site, patched, recorded
from foveate.probes.base import Data, Lines, Probe, Reading, Role, probe
from foveate.tasks.base import Bench

FRAMES = {"context": "Context: {wrong}\nAnswer: {asked}", "memory": "False: {wrong}\nTrue: {asked}"}
"""How the two intents are told; {wrong} is "The capital of France is London.", {asked} "The capital of France is"."""
BARE = "{wrong}\n{asked}"
"""The same without an intent: nothing is found on it."""
FEWEST, MOST = 8, 48
"""Facts below which nothing is told, and how many the claim asks for at most."""


@dataclass(frozen=True)
class Conflict:
    """A fact that the model knows, and another answer that a context claims.

    Attributes:
        subject: what the fact is about.
        asked, wrong: the question, and the false sentence, as text.
        true, claimed: the first token of the right answer, and of the claimed one.
    """

    subject: str
    asked: str
    wrong: str
    true: int
    claimed: int


def conflicts(facts: Sequence[Prompt]) -> list[Conflict]:
    """Each fact with the answer of another one in the same words."""
    kinds: dict[str, list[Prompt]] = {}
    for fact in facts:
        kinds.setdefault(fact.fact.template, []).append(fact)
    found = []
    for alike in kinds.values():
        for index, fact in enumerate(alike):
            others = [other for other in alike[index:] + alike[:index] if other.answer != fact.answer]
            if others:
                asked, other = fact.fact.template.replace("{}", fact.fact.subject), others[len(others) // 2]
                wrong = f"{asked} {other.fact.answer}."
                found.append(Conflict(fact.fact.subject, asked, wrong, fact.answer, other.answer))
    return found


class Ends:
    """Conflicts under one frame. What stands before the last token is read once; that token, as often as is asked.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        cases: the conflicts.
        frame: one of `FRAMES`, or another text with {wrong} and {asked}.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: list[Conflict], frame: str):
        self.model, self.cases = model, cases
        rows: dict[int, list[int]] = {}
        texts = [tokens(frame.format(wrong=case.wrong, asked=case.asked), tokenizer)[0] for case in cases]
        for index, text in enumerate(texts):
            rows.setdefault(len(text), []).append(index)
        self.groups = []
        for which in rows.values():
            ids = torch.stack([texts[index] for index in which]).to(model.device)
            cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
            self.groups.append((which, ids[:, -1:], cache))

    @torch.no_grad()
    def leads(self, layer: int | None = None, change: Callable[[Tensor, list[int]], Tensor] | None = None) -> Tensor:
        """By how much the claimed answer's logit is above the right one's, (case,), float64 on the CPU.

        Args:
            layer: before which the residual stream of the last token is changed.
            change: what makes new states of the old, (row, hidden), of the cases with these indices.
        """
        found = torch.zeros(len(self.cases), dtype=torch.float64)
        for which, ids, cache in self.groups:
            patches = {}
            if layer is not None and change is not None:

                def patch(old: Tensor, which: list[int] = which) -> Tensor:
                    return change(old[:, 0].float(), which)[:, None].to(old)

                patches[Site("residual", layer)] = patch
            with patched(self.model, patches):
                logits = self._read(ids, cache).double().cpu()
            pair = torch.tensor([[self.cases[index].claimed, self.cases[index].true] for index in which])
            both = logits.gather(1, pair)
            found[which] = both[:, 0] - both[:, 1]
        return found

    @torch.no_grad()
    def states(self) -> Tensor:
        """The residual stream of the last token before each layer, float32 (layer, case, hidden)."""
        parts = anatomy(self.model)
        sites = [Site("residual", layer.index) for layer in parts.layers]
        found = torch.zeros(len(sites), len(self.cases), parts.hidden, device=self.model.device)
        for which, ids, cache in self.groups:
            with recorded(self.model, sites) as values:
                self._read(ids, cache)
            found[:, which] = torch.stack([values[site][:, -1].float() for site in sites])
        return found

    def _read(self, ids: Tensor, cache: Any) -> Tensor:
        cache = copy.deepcopy(cache)  # a forward adds to it
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


@dataclass(frozen=True)
class Knob:
    """A direction of the residual stream before a layer, and what stands on it under each intent.

    Attributes:
        layer: before which it is set.
        direction: (hidden,), of length one.
        values: "context" and "memory": the mean of the states' component along it.

    Example:
        >>> import foveate as fv, torch
        >>> model, ids = fv.tiny("llama"), torch.arange(1, 9).unsqueeze(0)
        >>> knob = Knob(2, torch.eye(64)[0], {"context": 3.0, "memory": -3.0})
        >>> with knob.turned(model, "memory"), recorded(model, [Site("residual", 2)]) as values:
        ...     _ = model(ids)
        >>> values[Site("residual", 2)][0, :, 0].unique()
        tensor([-3.])
    """

    layer: int
    direction: Tensor
    values: dict[str, float]

    def set(self, states: Tensor, to: str, along: Tensor | None = None) -> Tensor:
        """States (..., hidden) with the component set; with `along`, moved as far in that direction instead."""
        direction = self.direction.to(states)
        missing = self.values[to] - states @ direction
        return states + missing[..., None] * (direction if along is None else along.to(states))

    @contextmanager
    def turned(self, model: PreTrainedModel, to: str) -> Iterator[None]:
        """While in force, every token of every forward has the component set to an intent's value."""
        with patched(model, {Site("residual", self.layer): lambda old: self.set(old.float(), to).to(old)}):
            yield


def knobs(states: dict[str, Tensor], rows: Sequence[int]) -> list[Knob]:
    """A knob before each layer: the difference of the two intents' mean states over some cases."""
    found = []
    for layer in range(len(states["context"])):
        means = {intent: state[layer, list(rows)].mean(0) for intent, state in states.items()}
        difference = means["context"] - means["memory"]
        direction = difference / difference.norm().clamp(min=1e-12)
        found.append(Knob(layer, direction, {intent: float(each @ direction) for intent, each in means.items()}))
    return found


@dataclass(frozen=True)
class Found:
    """What a search gives: the best layer's knob, each layer's share, leads before, and which cases were looked at."""

    knob: Knob
    shares: Tensor
    swapped: Tensor
    before: dict[str, Tensor]
    ends: dict[str, Ends]
    learned: list[int]
    judged: list[int]


def find_knob(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: list[Conflict],
    progress: Callable[[float], None] = lambda done: None,
) -> Found:
    """The layer whose knob, set to the other intent's value, moves answers most: found on every other case.

    Args:
        model, tokenizer: the model and its tokenizer.
        cases: facts in conflict with a context.
        progress: called with the fraction done.

    Returns:
        Its `shares` are, for each layer, how much of the difference between the intents the knob makes, the mean of
        both ways; `swapped` is the same where the whole state is that of another fact under the other intent.
    """
    ends = {intent: Ends(model, tokenizer, cases, frame) for intent, frame in FRAMES.items()}
    before = {intent: each.leads() for intent, each in ends.items()}
    states = {intent: each.states() for intent, each in ends.items()}
    subjects = sorted({case.subject for case in cases})  # all that is known of one subject is in the same half
    halves = [[i for i, case in enumerate(cases) if subjects.index(case.subject) % 2 == half] for half in (0, 1)]
    learned, judged = halves
    every = knobs(states, learned)
    whole = float((before["context"] - before["memory"])[learned].mean())
    others = {row: learned[(index + 1) % len(learned)] for index, row in enumerate(learned)}
    next_one = [others.get(row, learned[0]) for row in range(len(cases))]
    shares, swapped = torch.zeros(len(every), 2), torch.zeros(len(every), 2)
    for knob in every:
        for way, (intent, to) in enumerate((("memory", "context"), ("context", "memory"))):
            sign = 1 if to == "context" else -1
            turned = ends[intent].leads(knob.layer, lambda old, rows, to=to, knob=knob: knob.set(old, to))  # type: ignore[misc]
            other = ends[intent].leads(
                knob.layer,
                lambda old, rows, to=to, knob=knob: states[to][knob.layer, [next_one[row] for row in rows]],  # type: ignore[misc]
            )
            for into, after in ((shares, turned), (swapped, other)):
                into[knob.layer, way] = sign * float((after - before[intent])[learned].mean()) / (abs(whole) or 1.0)
        progress((knob.layer + 1) / len(every))
    best = every[int(shares.mean(1).argmax())]
    return Found(best, shares.mean(1), swapped.mean(1), before, ends, learned, judged)


def flips(found: Found, intent: str, along: Tensor | None = None) -> list[float]:
    """Of each judged case under an intent, 1 if the knob, set to the other one, turns its answer over, else 0.

    -1 for one that is turned the wrong way: to what the intent asks for, where it wasn't.
    """
    to = "context" if intent == "memory" else "memory"
    after = found.ends[intent].leads(found.knob.layer, lambda old, rows: found.knob.set(old, to, along)) > 0
    before, sign = found.before[intent] > 0, 1 if to == "context" else -1
    return (sign * (after.double() - before.double()))[found.judged].tolist()


@probe("context-knob")
class ContextKnob(Probe):
    """Where it is decided whether an answer comes from the context or from memory, and along which one direction.

    A false sentence stands before a question whose answer the model knows: "Context: The capital of France is London.
    Answer: The capital of France is", or the same between "False:" and "True:". So the intent is told in two words,
    which a small model follows too; the paper's instructions, to consider or to ignore the context, need a model that
    was tuned for them. Before each layer, the difference between the two intents' mean states of the last token is one
    direction; its component is set to what it is under the other intent, and a layer's score is how much of the
    difference between the intents that makes (of logits of the claimed answer less the right one). Direction, values
    and layer come of the facts about every other subject; that the knob turns answers is judged on the rest.

    The paper learns the direction with a loss; here it is a difference of means.

    Fields:
        facts: at most so many facts.

    Source: Controllable Context Sensitivity and the Knob Behind It (2024).

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama")
        >>> ContextKnob().measure(model, Data.of(model, fv.tiny_tokenizer())).roles
        []
    """

    paper: ClassVar[Paper | None] = Paper(
        "Controllable Context Sensitivity and the Knob Behind It", 2024, "https://arxiv.org/abs/2411.07404"
    )
    claim: ClassVar[str] = "one direction in one layer decides between what the context says and what the model knows"
    title: ClassVar[str] = "What decides between the context and what the model knows?"

    facts: int = 48

    def check(self, model: PreTrainedModel, data: Data) -> None:
        anatomy(model)
        if self.facts < FEWEST:
            raise FoveateError(f"{self.name}: facts={self.facts} are too few to tell anything: give {FEWEST} or more.")

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        return self.facts * (2 * 20.0 + 4 * len(anatomy(model).layers))

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        training = model.training
        model.eval()
        try:
            cases = conflicts(known_facts(model, data.tokenizer, most=self.facts))
            return self._reading(model, cases, data)
        finally:
            model.train(training)

    def _reading(self, model: PreTrainedModel, cases: list[Conflict], data: Data) -> Reading:
        setting = {"facts": len(cases), "frames": FRAMES}
        layers = len(anatomy(model).layers)
        if len(cases) < FEWEST:
            summary = "This model knows too few of the facts that it was asked for, so that nothing can be told."
            none = {"knob": UnitScores("layer", torch.zeros(layers, 1))}
            return Reading(self.name, self.title, summary, {"facts": Metric.exact(len(cases))}, none, setting=setting)
        found = find_knob(model, data.tokenizer, cases, data.progress)
        follow = {intent: mean((lead > 0).double()[found.judged].tolist()) for intent, lead in found.before.items()}
        apart = mean((found.before["context"] - found.before["memory"])[found.judged].tolist())
        turned = flips(found, "memory") + flips(found, "context")
        chance = [flips(found, "memory", each) + flips(found, "context", each) for each in _random(found.knob)]
        own, others = mean(turned), [mean(each) for each in chance]
        roles, layer = [], found.knob.layer
        if apart.low > 0 and own.low > max(0.0, *(other.high for other in others)):
            words = f"Set to the other value, one direction of what enters this layer turns {own.value:.0%} of answers."
            roles.append(Role("layer", layer, 0, "context knob", own.value, words))
        summary = (
            f"With a false sentence before the question, answers follow it {follow['context'].value:.0%} of the time "
            f"where it is called the context, and {follow['memory'].value:.0%} where it is called false. "
            + (
                f"Before layer {layer}, one direction decides: set to the other value, it turns {own.value:.0%} of "
                f"the answers, a random one {others[0].value:.0%}."
                if roles
                else "No single direction clearly decides."
            )
        )
        metrics = {
            "facts": Metric.exact(len(cases)),
            **{f"answers that follow the context, intent {intent}": share for intent, share in follow.items()},
            "answers turned by the knob": own,
            **{f"answers turned by a random direction, {i + 1}": other for i, other in enumerate(others)},
        }
        lines = {"one direction": found.shares, "the whole state, of another fact": found.swapped}
        panel = Lines(
            "How much of the intent is in what enters each layer",
            "layer",
            "fraction of the difference",
            {name: [(float(i), float(y)) for i, y in enumerate(values)] for name, values in lines.items()},
        )
        scores = {"knob": UnitScores("layer", found.shares[:, None])}
        return Reading(self.name, self.title, summary, metrics, scores, roles, [panel], {**setting, "layer": layer})


def _random(knob: Knob, count: int = 3) -> list[Tensor]:
    """Directions of length one, for control."""
    drawn = torch.randn(count, len(knob.direction), generator=torch.Generator().manual_seed(0))
    return list(drawn / drawn.norm(dim=1, keepdim=True))


@claim("context-knob")
class OneDirectionDecides(Claim):
    statement: ClassVar[str] = (
        "one direction of the residual stream in one layer decides whether answers come from the context or from "
        "memory: set, it turns them (abstract; learned in tuned models of 7B to 9B, and at work in untuned ones)"
    )
    setting: ClassVar[str] = (
        "at most 48 facts that the model knows, each with another's answer in a false sentence before it, called "
        "'Context' or 'False'; direction (difference of means), values and layer from the facts about every other "
        "subject, judged on the rest; control: states moved as far along three random directions; beside it, prompts "
        "that tell no intent"
    )

    def run(self, bench: Bench) -> Finding:
        model = bench.model
        cases = conflicts(known_facts(model, bench.tokenizer, most=MOST))
        if len(cases) < FEWEST:
            raise FoveateError(
                f"context-knob: this model knows {len(cases)} facts, and {FEWEST} are needed: take another."
            )
        found = find_knob(model, bench.tokenizer, cases, lambda part: bench.progress(0.9 * part))
        turned = {intent: flips(found, intent) for intent in FRAMES}
        random = [{intent: flips(found, intent, each) for intent in FRAMES} for each in _random(found.knob)]
        bare = Ends(model, bench.tokenizer, cases, BARE)
        plain = [bare.leads(), *(bare.leads(found.knob.layer, _setter(found.knob, to)) for to in FRAMES)]
        follow = [mean((each > 0).double()[found.judged].tolist()) for each in plain]
        over = {
            intent: [mean([a - b for a, b in zip(turned[intent], each[intent], strict=True)]) for each in random]
            for intent in FRAMES
        }
        before = {intent: mean((lead > 0).double()[found.judged].tolist()) for intent, lead in found.before.items()}
        return Finding(
            {
                "facts": Metric.exact(len(cases)),
                "layer": Metric.exact(found.knob.layer),
                **{f"answers that follow the context, intent {intent}": share for intent, share in before.items()},
                "turned to the context by the knob": mean(turned["memory"]),
                "turned to memory by the knob": mean(turned["context"]),
                **{
                    f"turned to the context by random direction {i + 1}": mean(r["memory"])
                    for i, r in enumerate(random)
                },
                **{f"turned to memory by random direction {i + 1}": mean(r["context"]) for i, r in enumerate(random)},
                "no intent told: answers that follow the context": follow[0],
                "no intent told, knob at context": follow[1],
                "no intent told, knob at memory": follow[2],
            },
            {
                "set to context, it turns more answers than each random direction": all(
                    m.low > 0 for m in over["memory"]
                ),
                "set to memory, it turns more answers than each random direction": all(
                    m.low > 0 for m in over["context"]
                ),
            },
        )


def _setter(knob: Knob, to: str) -> Callable[[Tensor, list[int]], Tensor]:
    return lambda old, rows: knob.set(old, to)
