"""Recycled attention: all entries stay, but most decode steps read only those that a full step found to matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.base import CachePolicy
from foveate.cache.entries import CacheView, Received
from foveate.cache.policy_cache import PolicyCache
from foveate.claims import Claim, Finding, Stream, claim
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Method, Paper, Recipe, apply, method
from foveate.tasks.base import Bench, read, surprisal
from foveate.tasks.passkey import Passkey


@method("recycled")
class Recycled(CachePolicy):
    """Attend to everything in some decode steps, and in those between only to what got most attention then.

    Nothing is evicted: `keep` or `entries` is K, the entries that a KV head reads in a partial step. These are the
    tokens since the last full step, and of the others those that the last token of that step attended to most, summed
    over the query heads that share the KV head (section 3). Forwards of more than one token are full steps, and so are
    steps in which all there is fits in K.

    Fields: those of `CachePolicy`, but that `sinks` and `recent` are always read rather than kept; and

        stride: every so many decode steps, one is full; 1 = all are.
        similarity: None: just so. A number: each layer then looks first at the cosine between its present queries and
            those of its last full step, in the mean over heads, and takes the full step only below this number (the
            dynamic schedule; the paper has stride=5, similarity=0.8).

    `cache.layers[i].read` counts the entries that each KV head read.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "recycled:entries=8"):
        ...     cache = model(torch.arange(1, 41).unsqueeze(0), use_cache=True).past_key_values
        ...     before = cache.layers[0].read
        ...     cache = model(torch.tensor([[41]]), past_key_values=cache).past_key_values
        >>> cache.layers[0].held()[0].tolist(), (cache.layers[0].read - before)[0].tolist()
        ([41, 41], [8, 8])
    """

    paper: ClassVar[Paper | None] = Paper(
        "Recycled Attention: Efficient inference for long-context language models",
        2024,
        "https://arxiv.org/abs/2411.05787",
    )
    claim: ClassVar[str] = "most steps can read only what a full step attended to, and what they skip isn't lost"
    evicts: ClassVar[bool] = False

    stride: int = 50
    similarity: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise FoveateError(f"{self.name}: stride={self.stride} is below 1: give the steps from one full one on.")
        if self.similarity is not None and not -1 <= self.similarity <= 1:
            raise FoveateError(f"{self.name}: similarity={self.similarity} is outside [-1, 1]: it is a cosine.")

    def received(self) -> Received:
        return Received(last=1)  # of the last token alone

    def score(self, view: CacheView) -> Tensor:
        return view.positions.float()  # only what a layer's own window hides ever goes

    def observe(self, view: CacheView) -> None:
        if view.query.shape[2] > 1 or "since" not in view.state:
            self._note(view, torch.ones(len(view.query), dtype=torch.bool))

    def reads(self, view: CacheView, limit: Tensor, most: int) -> Tensor | None:
        if "since" not in view.state:
            return None  # the first token of all
        fits = ((view.positions >= 0).sum(-1) <= limit[..., 0]).all(-1).cpu()
        full = fits | self._full(view)
        self._note(view, full)
        if bool(full.all()):
            return None
        assert view.received is not None  # asked for above
        positions, slots = view.positions, view.positions.shape[-1]
        since = view.state["since"].to(positions.device)[:, None, None]
        recent = torch.minimum((limit * self.recent).long(), limit - self.sinks).clamp(min=1)
        # The newest come first, even where there are more of them than may be read.
        always = positions >= view.seen - torch.maximum(since, recent)
        score = torch.where(always, 1e6 + positions, view.received)
        score = score.masked_fill(positions < self.sinks, torch.inf).masked_fill(positions < 0, -torch.inf)
        best = score.topk(min(most, slots), dim=-1)
        none = (torch.arange(best.indices.shape[-1], device=limit.device) >= limit) | (best.values == -torch.inf)
        index = best.indices.masked_fill(none, -1)
        if not bool(full.any()):
            return index
        everything = torch.arange(slots, device=index.device).masked_fill(positions < 0, -1)
        index = torch.nn.functional.pad(index, (0, slots - index.shape[-1]), value=-1)
        return torch.where(full.to(index.device)[:, None, None], everything, index)

    def _full(self, view: CacheView) -> Tensor:
        """Which sequences take a full step now: bool (batch,), on the CPU."""
        due = (view.state["since"] + 1) % self.stride == 0
        if self.similarity is None or not bool(due.any()):
            return due
        alike = torch.cosine_similarity(view.query[:, :, 0].float(), view.state["query"].float(), dim=-1)
        return due & (alike.mean(-1) < self.similarity).cpu()

    def _note(self, view: CacheView, full: Tensor) -> None:
        """Count the steps since the last full one, int64 (batch,) on the CPU, and keep the queries of that."""
        since = view.state.get("since", torch.zeros_like(full, dtype=torch.int64))
        view.state["since"] = torch.where(full, 0, since + 1)
        if self.similarity is None or not bool(full.any()):
            return
        query = view.query[:, :, -1]
        if view.valid is not None:  # of the last token that is no padding
            at = (view.valid * torch.arange(1, view.valid.shape[1] + 1, device=query.device)).argmax(-1)
            query = view.query[torch.arange(len(at), device=query.device), :, at]
        before = view.state.get("query", query)
        view.state["query"] = torch.where(full.to(query.device)[:, None, None], query, before).clone()


@dataclass(frozen=True, kw_only=True)
class _Oracle(Recycled):
    """For the claim: what each step itself would attend to most; it has to look at all keys to know."""

    def reads(self, view: CacheView, limit: Tensor, most: int) -> Tensor | None:
        batch, heads, _, dim = view.query.shape
        query = view.query.reshape(batch, view.keys.shape[1], -1, dim)
        logits = (query @ view.keys.transpose(-1, -2)).float() * dim**-0.5  # as the default model scales them
        weights = logits.masked_fill(view.positions[:, :, None] < 0, -torch.inf).softmax(-1).sum(2)
        return weights.topk(min(most, weights.shape[-1]), dim=-1).indices


@claim("recycled")
class SkippedIsNotLost(Claim):
    statement: ClassVar[str] = (
        "steps that read only the K entries of the last full step's attention, with a full step every so often, do "
        "twice as well as baselines with K entries that keep recent tokens or heavy hitters (abstract, RULER), and "
        "better on language modelling (K entries, a full step in 10)"
    )
    setting: ClassVar[str] = (
        "K=128 for all; passkeys in 1,024 tokens, a full step in 50; perplexity of 96 tokens that go in one by one "
        "after 1,024, a full step in 10; full, and the best K of every step itself, as controls"
    )

    size: ClassVar[int] = 128
    prompt: ClassVar[int] = 1024
    steps: ClassVar[int] = 96
    block: ClassVar[int] = 8

    def run(self, bench: Bench) -> Finding:
        k = self.size
        recipes: dict[str, str | Method] = {
            "full": "full",
            "every step full": f"recycled:entries={k},stride=1",
            "recycled": f"recycled:entries={k},stride=10",
            "recycled by similarity": f"recycled:entries={k},stride=5,similarity=0.8",
            "streaming": f"streaming:entries={k}",
            "h2o": f"h2o:entries={k}",
            "oracle": _Oracle(entries=k),
        }
        streams: dict[str, Stream] = {}
        share: dict[str, float] = {}
        for done, (name, recipe) in enumerate(recipes.items(), start=1):
            streams[name], share[name] = self.decoded(bench, recipe)
            bench.progress(0.6 * done / (len(recipes) + 1))
        as_many = round(share["recycled"] * (self.prompt + (self.steps + 1) / 2))
        streams["h2o that reads as many"] = self.decoded(bench, f"h2o:entries={as_many}")[0]
        found: dict[str, Metric] = {}
        for name in ("full", f"recycled:entries={k}", f"streaming:entries={k}", f"h2o:entries={k}"):
            outcome = Passkey(tokens=self.prompt).measure(bench, Recipe.of(name))
            found[name.partition(":")[0]] = outcome.metrics["passkey"]
            bench.progress(0.6 + 0.1 * len(found))
        over = {name: stream.over(streams["full"]) for name, stream in streams.items() if name != "full"}
        ours = streams["recycled"]
        return Finding(
            {f"passkey, {name}": metric for name, metric in found.items()}
            | {"perplexity, full cache": streams["full"].perplexity}
            | {f"perplexity over full: {name}": ratio for name, ratio in over.items()}
            | {f"keys read, of all: {n}": Metric.exact(share[n]) for n in ("recycled", "recycled by similarity")},
            {
                "passkeys: at least twice those of streaming": found["recycled"].value >= 2 * found["streaming"].value
                and found["recycled"].value > 0,
                "passkeys: at least twice those of h2o": found["recycled"].value >= 2 * found["h2o"].value
                and found["recycled"].value > 0,
                "perplexity below streaming": ours.below(streams["streaming"]),
                "perplexity below h2o": ours.below(streams["h2o"]),
                "no better than the oracle": over["recycled"].value > 0.999 * over["oracle"].value,
                "every step full is the full cache": abs(over["every step full"].value - 1) < 1e-3,
                "fewer than a quarter of the keys are read": share["recycled"] < 0.25,
            },
        )

    def decoded(self, bench: Bench, recipe: str | Method) -> tuple[Stream, float]:
        """The tokens after the prompt, read one by one; and the keys that these steps read, over what was there."""
        ids = tokens(bench.text.evaluation, bench.tokenizer, self.prompt + self.steps).to(bench.model.device)
        with apply(bench.model, recipe, tokenizer=bench.tokenizer):
            logits, cache = read(bench.model, ids[:, : self.prompt], last=1)
            nll, start = [], _read(cache)
            for i in range(self.prompt, self.prompt + self.steps):
                nll.append(float(surprisal(logits, ids[:, i : i + 1])))
                logits, cache = read(bench.model, ids[:, i : i + 1], cache)
            there = sum(range(self.prompt + 1, self.prompt + self.steps + 1))
            share = (_read(cache) - start) / there
        blocks = [sum(nll[i : i + self.block]) for i in range(0, self.steps, self.block)]
        return Stream(blocks, [min(self.block, self.steps - i) for i in range(0, self.steps, self.block)]), share


def _read(cache: object) -> float:
    """Entries that a KV head of a policy's cache read so far, in the mean; 0 for caches that don't count."""
    if not isinstance(cache, PolicyCache):
        return 0.0
    return float(torch.stack([layer.read.float().mean() for layer in cache.layers]).mean())
