"""Factual recall: which heads and MLPs bring the answer to a known fact, and what the last layer takes back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim, random_others
from foveate.data.facts import Prompt, known_facts
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import Anatomy, anatomy
from foveate.models.attention import Call, replaced_attention
from foveate.models.circuits import head_maps, require_plain_widths
from foveate.models.patching import Site, ablated, recorded
from foveate.probes.base import Data, Lines, Probe, Reading, Role, named, probe
from foveate.probes.watch import in_blocks
from foveate.tasks.base import Bench

LEAST, ERRORS = 0.02, 4
"""From which part of the answer's lead, and how many standard errors from zero, a part has a role."""


@dataclass(frozen=True)
class Parts:
    """What each part of a model adds to the logit of an answer at the last token of some prompts; float64, CPU.

    All are direct: through the final norm, held at its scale there, and not through what later layers make of it. A
    logit is told without the mean over the vocabulary, which no probability depends on, and before a softcap.

    Attributes:
        head: (prompt, answer, layer, head); without the bias of the attention's last map.
        attention, mlp: (prompt, answer, layer).
        embedding: (prompt, answer): what stands there before the first layer.
        rest: (answer,): what the final norm's bias adds to all.
        looked: (prompt, layer, head): a head's attention from the last token to the subject.
    """

    head: Tensor
    attention: Tensor
    mlp: Tensor
    embedding: Tensor
    rest: Tensor
    looked: Tensor


@torch.no_grad()
def attributed(model: PreTrainedModel, facts: Sequence[Prompt], answers: Tensor, progress: Any = None) -> Parts:
    """The direct parts of heads and sublayers in answers' logits.

    Args:
        model: the model.
        facts: prompts, read one by one.
        answers: LongTensor (answer,): the tokens whose logits are taken apart.
        progress: called with the fraction done.
    """
    parts = anatomy(model)
    require_plain_widths("factual-recall", parts)
    layers, count = parts.layers, len(parts.layers)
    weight = parts.head.weight.detach().float()  # type: ignore[union-attr, operator]
    answers = answers.to(weight.device)
    wanted = weight[answers] - weight.mean(0)
    bias = getattr(parts.head, "bias", None)
    sites = [Site(kind, layer.index) for layer in layers for kind in ("attention", "mlp")]  # type: ignore[arg-type]
    heads = [Site("head", layer.index, head) for layer in layers for head in range(parts.heads)]
    ends = [Site("residual", 0), Site("residual", count)]
    out = [head_maps(parts, layer.index).o for layer in layers]
    found: dict[str, list[Tensor]] = {name: [] for name in ("head", "attention", "mlp", "embedding", "looked")}
    rest = torch.zeros(len(answers), dtype=torch.float64)
    for done, fact in enumerate(facts):
        looked = torch.zeros(count, parts.heads, dtype=torch.float64)

        def look(
            layer: int, start: int, weights: Tensor, call: Call, fact: Prompt = fact, looked: Tensor = looked
        ) -> None:
            looked[layer] = weights[:, -1, fact.start : fact.end].double().sum(-1).cpu()

        outer: dict[Site, nn.Module] = {}
        with (
            replaced_attention(model, in_blocks(look), "factual-recall"),
            _outer_norms(parts, outer),
            recorded(model, [*sites, *heads, *ends]) as values,
        ):
            model(fact.ids.to(model.device), use_cache=False, logits_to_keep=1)
        last = {site: value[0, -1].float() for site, value in values.items()}
        pulled, constant = _pulled(parts.final_norm, last[ends[1]], wanted)
        rest = constant.double().cpu() + (0 if bias is None else (bias[answers] - bias.mean()).double().cpu())
        attention, mlp, head = [], [], []
        for layer in layers:
            site = Site("attention", layer.index)
            through = _pulled(outer.get(site), last[site], pulled)[0]
            attention.append(through @ last[site])
            given = torch.stack([last[Site("head", layer.index, h)] for h in range(parts.heads)])
            head.append(torch.einsum("ai,hid,hd->ah", through, out[layer.index], given))
            site = Site("mlp", layer.index)
            mlp.append(_pulled(outer.get(site), last[site], pulled)[0] @ last[site])
        for name, value in (("attention", attention), ("mlp", mlp), ("head", head)):
            found[name].append(torch.stack(value, 1).double().cpu())
        found["embedding"].append((pulled @ last[ends[0]]).double().cpu())
        found["looked"].append(looked)
        if progress is not None:
            progress((done + 1) / len(facts))
    return Parts(**{name: torch.stack(value) for name, value in found.items()}, rest=rest)


def _pulled(norm: nn.Module | None, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Directions before a norm that are worth what `wanted` (n, hidden) are after it, at the scale that it has on `x`.

    And what the norm's bias is worth along them, (n,). How the norm works is seen from what it makes of two vectors, so
    that no class has to be known: x -> scale(x) * weight * (x, or x less its mean) + bias.
    """
    if norm is None:
        return wanted, torch.zeros(len(wanted), device=wanted.device)
    kind = next(norm.parameters()).dtype if any(True for _ in norm.parameters()) else x.dtype
    signs = torch.ones_like(x)
    signs[1::2] = -1

    def of(vector: Tensor) -> Tensor:
        return norm(vector.to(kind)[None, None])[0, 0].float()

    bias = (of(signs) + of(-signs)) / 2
    weight = (of(signs) - of(-signs)) / 2 * signs
    centred = bool((of(torch.ones_like(x)) - bias).abs().max() < 0.5 * weight.abs().max())
    inner = (x - x.mean() if centred else x) * weight
    scale = ((of(x) - bias) @ inner) / (inner @ inner).clamp(min=1e-30)
    pulled = scale * weight * wanted
    return pulled - pulled.mean(-1, keepdim=True) if centred else pulled, wanted @ bias


def _outer_norms(parts: Anatomy, outer: dict[Site, nn.Module]) -> ExitStack:
    """While in force, notes which sublayers have a norm right after them: one that is given the very same values."""
    stack, last = ExitStack(), []  # type: ignore[var-annotated]

    def gives(site: Site) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            last[:] = [(site, output[0] if isinstance(output, tuple) else output)]

        return hook

    def norm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if last and args and args[0].data_ptr() == last[0][1].data_ptr():
            outer[last[0][0]] = module

    for layer in parts.layers:
        for kind, module in (
            ("attention", layer.attention),
            ("mlp", layer.mlp if layer.mlp is not None else layer.down),
        ):
            if module is not None:
                stack.callback(module.register_forward_hook(gives(Site(kind, layer.index))).remove)  # type: ignore[arg-type]
        for each in layer.norms.values():
            stack.callback(each.register_forward_hook(norm).remove)
    return stack


@probe("factual-recall")
class FactualRecall(Probe):
    """Which heads bring the answers to known facts, what the MLPs add, and what the last layer takes back.

    On prompts such as "The capital of France is", the logit of the answer is taken apart into what every head and
    every MLP adds to it directly. A head's score "answer" is what it adds to this fact's answer beyond what it adds to
    the other facts' answers, as a part of what the whole model adds; "mlp" is the same of MLPs. "subject" is a head's
    attention from the last token to the subject.

    The paper also takes the MLPs' outputs apart, by regression on the outputs of heads; here it stays with their sum.
    A head or MLP has a role if its part is at least 2% and clear of zero (4 standard errors over facts), and more than
    the highest that is found when every fact is given another's answer.

    Fields:
        facts: at most so many facts.

    Source: Interpreting Key Mechanisms of Factual Recall (2024).

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama")
        >>> reading = FactualRecall().measure(model, Data.of(model, fv.tiny_tokenizer()))
        >>> reading.scores["answer"].scores.shape, reading.roles
        (torch.Size([4, 4]), [])
    """

    paper: ClassVar[Paper | None] = Paper(
        "Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models",
        2024,
        "https://arxiv.org/abs/2403.19521",
    )
    claim: ClassVar[str] = (
        "heads bring the topic, MLPs turn it into the answer, and the last layer takes some of it back"
    )
    title: ClassVar[str] = "Which parts recall a fact, and does the last layer hold it back?"

    facts: int = 48

    def check(self, model: PreTrainedModel, data: Data) -> None:
        anatomy(model)
        if self.facts < 4:
            raise FoveateError(f"{self.name}: facts={self.facts} are too few to tell their parts from chance: give 4.")

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        return 20.0 * self.facts

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        training = model.training
        model.eval()
        try:
            facts = known_facts(model, data.tokenizer, most=self.facts)
            return self._reading(model, facts, data)
        finally:
            model.train(training)

    def _reading(self, model: PreTrainedModel, facts: Sequence[Prompt], data: Data) -> Reading:
        shape = len(anatomy(model).layers), anatomy(model).heads
        setting = {"facts": len(facts), "least": LEAST, "errors": ERRORS}
        names = {"answer": "head", "subject": "head", "mlp": "mlp"}
        if len({fact.answer for fact in facts}) < 4:
            empty = {
                name: UnitScores(kind, torch.zeros(shape[0], shape[1] if kind == "head" else 1))
                for name, kind in names.items()
            }
            summary = "This model knows too few of the facts that it was asked for, so that nothing can be told."
            return Reading(self.name, self.title, summary, {"facts": Metric.exact(len(facts))}, empty, setting=setting)
        answers, own = torch.tensor([fact.answer for fact in facts]).unique(return_inverse=True)
        found = attributed(model, facts, answers, data.progress)
        whole = found.head.sum((2, 3)) + found.mlp.sum(2) + found.embedding
        total = float(_own(whole, own).mean().abs().clamp(min=1e-12))
        scores, roles = {}, []
        for name, part in (("answer", found.head), ("mlp", found.mlp[..., None])):
            kind = names[name]
            each = _own(part, own) / total
            scores[name] = UnitScores(kind, each.mean(0))
            clear = each.mean(0) > ERRORS * each.std(0) / len(facts) ** 0.5
            null = torch.stack([(_own(part, own.roll(shift)) / total).mean(0).max() for shift in (1, 2, 3)]).max()
            for layer, unit in ((scores[name].scores >= max(LEAST, float(null))) & clear).nonzero().tolist():
                share, seen = (
                    float(scores[name].scores[layer, unit]),
                    float(found.looked[:, layer, unit].mean()) if kind == "head" else 0.0,
                )
                words = f"{share:.0%} of what tells the right answer from others is added here directly" + (
                    f"; at the end of the prompt, {seen:.0%} of its attention is on what is asked about."
                    if kind == "head"
                    else "."
                )
                roles.append(Role(kind, layer, unit, "adds the answer", share, words))
        scores["subject"] = UnitScores("head", found.looked.mean(0))
        roles.sort(key=lambda role: -role.score)
        right = torch.arange(len(facts)), own
        lines = {"attention": found.attention[right], "mlp": found.mlp[right]}
        last = {name: mean(value[:, -1].tolist()) for name, value in lines.items()}
        final = mean(sum(value[:, -1] for value in lines.values()).tolist())  # type: ignore[union-attr]
        if final.high < 0:
            words = f"It lowers the right answer's logit, by {-final.value:.1f} on average."
            roles.append(Role("layer", shape[0] - 1, 0, "suppresses the answer", -final.value, words))
        heads = [role for role in roles if role.kind == "head"]
        parts = {"heads": found.head.sum((2, 3)), "MLPs": found.mlp.sum(2)}
        shares = {name: mean((_own(part, own) / total).tolist()) for name, part in parts.items()}
        metrics = {
            "facts": Metric.exact(len(facts)),
            **{f"of the right answer's lead, added by {name}": share for name, share in shares.items()},
            "added to the right answer's logit by the last layer": final,
            **{f"by its {name}": value for name, value in last.items()},
        }
        moved = "lowers" if final.value < 0 else "raises"
        summary = (
            f"Over {len(facts)} facts that the model knows, MLPs add "
            f"{shares['MLPs'].value:.0%} of the right answer's lead directly, and heads {shares['heads'].value:.0%}"
            + (f", most of all {named(heads)}" if heads else "")
            + f". The last layer {moved} the right answer's logit by {abs(final.value):.1f}."
        )
        panel = Lines(
            "What each layer adds to the right answer's logit",
            "layer",
            "logit added",
            {name: [(float(i), float(y)) for i, y in enumerate(value.mean(0))] for name, value in lines.items()},
        )
        return Reading(self.name, self.title, summary, metrics, scores, roles, [panel], setting)


def _own(part: Tensor, own: Tensor) -> Tensor:
    """What is added to each prompt's own answer beyond the others' mean: (prompt, ...) of (prompt, answer, ...)."""
    mine = part[torch.arange(len(own)), own]
    return mine - (part.sum(1) - mine) / (part.shape[1] - 1)


MOST = 48
"""Facts of the claim."""


@claim("factual-recall")
class LastLayerSuppresses(Claim):
    statement: ClassVar[str] = (
        "heads move the topic to the end of a factual prompt and MLPs turn it into the answer; the final layer "
        "suppresses right answers in every model tried (abstract)"
    )
    setting: ClassVar[str] = (
        "at most 48 facts that the model knows: what the last layer adds directly to the right answer's logit, less "
        "the vocabulary's mean, over all of them; heads: the 5% that add most to right answers beyond others on the "
        "facts about one half of the subjects, set to zero on the rest, against three random sets of as many heads; "
        "loss: of the right answer's lead over the other facts' answers"
    )

    def run(self, bench: Bench) -> Finding:
        model, parts = bench.model, anatomy(bench.model)
        facts = known_facts(model, bench.tokenizer, most=MOST)
        if len(facts) < 4:
            raise FoveateError(
                f"the model knows {len(facts)} of the facts, and the claim needs at least 4: take another."
            )
        answers, own = torch.tensor([fact.answer for fact in facts]).unique(return_inverse=True)
        found = attributed(model, facts, answers, lambda part: bench.progress(0.4 * part))
        right, half = (torch.arange(len(facts)), own), torch.tensor(_first_half(facts))
        last = {"attention": found.attention[right][:, -1], "MLP": found.mlp[right][:, -1]}
        final = mean((last["attention"] + last["MLP"]).tolist())
        mlps = found.mlp[right].mean(0)
        count = max(1, round(0.05 * len(parts.layers) * parts.heads))
        best = _own(found.head, own)[half].mean(0).flatten().argsort(descending=True)[:count]
        sets = [best[:0], best]
        for seed in range(3):
            sets.append(torch.tensor(random_others(found.head[0, 0].numel(), count, best.tolist(), seed)))
        rest = [fact for fact, first in zip(facts, half.tolist(), strict=True) if not first]
        leads = []
        for done, heads in enumerate(sets):
            with ablated(model, [divmod(int(h), parts.heads) for h in heads]):
                logits = torch.cat([_last(model, fact)[None, answers] for fact in rest])
            leads.append(_own(logits, own[~half]).tolist())
            bench.progress(0.4 + 0.6 * (done + 1) / len(sets))
        lost = [mean([a - b for a, b in zip(leads[0], each, strict=True)]) for each in leads[1:]]
        over = [mean([b - a for a, b in zip(leads[1], each, strict=True)]) for each in leads[2:]]
        names = [f"{count} random heads, set {i + 1}" for i in range(3)]
        return Finding(
            {
                "facts": Metric.exact(len(facts)),
                "added to the right answer's logit by the last layer": final,
                **{f"by its {name}": mean(each.tolist()) for name, each in last.items()},
                "by the MLP that adds most": Metric.exact(float(mlps.max())),
                "lead of the right answer (logits), whole model": mean(leads[0]),
                f"lost without the {count} heads that add most": lost[0],
                **{f"lost without {name}": each for name, each in zip(names, lost[1:], strict=True)},
            },
            {
                "the last layer lowers the right answer's logit on average": final.high < 0,
                "without the heads that add most, the lead falls": lost[0].low > 0,
                "by more than without random heads, in all three sets": all(each.low > 0 for each in over),
            },
        )


def _first_half(facts: Sequence[Prompt]) -> list[bool]:
    """Which facts are in the first half; all that is known of one subject is in the same."""
    subjects = sorted({fact.fact.subject for fact in facts})
    return [subjects.index(fact.fact.subject) % 2 == 0 for fact in facts]


@torch.no_grad()
def _last(model: PreTrainedModel, fact: Prompt) -> Tensor:
    """The logits after a fact's prompt, float64 (vocab,), on the CPU."""
    return model(fact.ids.to(model.device), use_cache=False, logits_to_keep=1).logits[0, -1].double().cpu()
