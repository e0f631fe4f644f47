"""One forward, many readers: probes that watch passes over text share them.

A `Watcher` names the streams that it wants to see and makes a `Watch`, which is shown every layer's attention, a block
of queries at a time, and the values at the sites that it asked for. Whatever is not reduced there is gone: no pass
keeps the attention of more than one layer.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.errors import FoveateError
from foveate.models.anatomy import anatomy
from foveate.models.attention import Call, check_free, replaced_attention, visible_to
from foveate.models.patching import Site, recorded
from foveate.models.surgery import has_attention, unit_counts
from foveate.probes.base import Data, Probe, Reading, quiet

BLOCK = 1 << 24
"""Attention weights held at a time (64 MiB in float32)."""


@dataclass(frozen=True)
class Seen:
    """Attention of one layer over one passage, for a block of its queries.

    Attributes:
        stream: which stream the passage is of.
        passage: its place in the stream.
        ids: LongTensor (token,): the passage.
        layer: index of the layer.
        start: the position of the block's first query.
        weights: (head, query, entry), float32; each row sums to one. Entries after the block's last query are left out.
        values: (kv_head, token, head_dim), of the whole passage.
        keys: the same of the keys, with positions.
    """

    stream: str
    passage: int
    ids: Tensor
    layer: int
    start: int
    weights: Tensor
    values: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Through:
    """One passage that is through the model.

    Attributes:
        stream, passage, ids: as of `Seen`.
        values: what stood at the sites that were asked for, (token, width) each.
        logits: (token, vocab), in the model's dtype, where the watch asks for them; else None.
    """

    stream: str
    passage: int
    ids: Tensor
    values: dict[Site, Tensor]
    logits: Tensor | None


class Watch:
    """What a probe notes while passages go by. Override what is wanted; `reading` says what was found.

    Attributes:
        attention_wanted: False: `attention` is never called.
        logits_wanted: True: `through` gets the logits.
    """

    attention_wanted: bool = True
    logits_wanted: bool = False

    def sites(self) -> list[Site]:
        """The sites whose values are shown to `through`."""
        return []

    def begin(self, ids: Tensor) -> None:
        """A passage, LongTensor (token,), is about to be read."""

    def attention(self, seen: Seen) -> None:
        """Look at a layer's attention, on the model's device; a layer that has none is not shown."""

    def through(self, passage: Through) -> None:
        """A passage is through."""

    @abstractmethod
    def reading(self) -> Reading:
        """What was found in all that was seen."""


class Watcher(Probe):
    """Base of probes that watch passes over text. A technique writes `watch`.

    Class attribute `streams`: the streams that it sees (see `Data.stream`).
    """

    streams: ClassVar[tuple[str, ...]] = ("mine",)

    def check(self, model: PreTrainedModel, data: Data) -> None:
        if self.watch(model, data).attention_wanted:
            require_plain_heads(model)

    @abstractmethod
    def watch(self, model: PreTrainedModel, data: Data) -> Watch:
        """What notes it."""

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        return float(len({data.alias(name) for name in self.streams}) * data.passages * data.length)

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        return watch_all(model, data, [self])[0]


@torch.no_grad()
def watch_all(model: PreTrainedModel, data: Data, watchers: Sequence[Watcher]) -> list[Reading]:
    """The readings of several watchers, from one pass over each stream that any of them sees.

    Each reading's time is that of the shared passes, which can't be told apart.

    Example:
        >>> import foveate as fv
        >>> from foveate.probes.induction import Induction
        >>> data = Data.of(fv.tiny("llama"), fv.tiny_tokenizer(), length=32, passages=1)
        >>> [reading.probe for reading in watch_all(fv.tiny("llama"), data, [Induction()])]
        ['induction']
    """
    start = time.perf_counter()
    if any(watcher.watch(model, data).attention_wanted for watcher in watchers):
        require_plain_heads(model)
    watches = [watcher.watch(model, data) for watcher in watchers]
    # Each stream, and who sees it under which name: "mine" may be "prose", which is then read once.
    streams: dict[str, dict[Watch, str]] = {}
    for watch, watcher in zip(watches, watchers, strict=True):
        for name in watcher.streams:
            streams.setdefault(data.alias(name), {}).setdefault(watch, name)
    with quiet(model):
        for turn, (stream, there) in enumerate(streams.items()):
            ids = data.stream(stream, model)
            for passage in range(len(ids)):
                _pass(model, passage, ids[passage], there)
                data.progress((turn + (passage + 1) / len(ids)) / len(streams))
    readings = [watch.reading() for watch in watches]
    seconds = time.perf_counter() - start
    shared = {"passages": data.passages, "length": min(data.length, anatomy(model).max_positions), "seed": data.seed}
    return [
        replace(
            reading,
            seconds=seconds,
            setting={"streams": list(watcher.streams), "text": data.text.name, **shared, **reading.setting},
        )
        for reading, watcher in zip(readings, watchers, strict=True)
    ]


def require_plain_heads(model: PreTrainedModel) -> None:
    """Raise FoveateError where attention can't be shown head by head: other modules, or layers of fewer heads."""
    parts = anatomy(model)
    check_free("a reading", parts)
    for layer, heads in zip(parts.layers, unit_counts(model, "head"), strict=True):
        if not getattr(layer.attention, "plain_entries", True):
            raise FoveateError(
                f"layer {layer.index} holds a {type(layer.attention).__name__} in the place of attention, whose "
                "weights can't be shown head by head: read the model before it was converted."
            )
        if has_attention(layer) and heads != parts.heads:
            raise FoveateError(
                f"layer {layer.index} has {heads} heads and others have {parts.heads}: the map of heads needs layers "
                "that are alike. Read the model before its heads were cut."
            )


def _pass(model: PreTrainedModel, passage: int, ids: Tensor, watches: dict[Watch, str]) -> None:
    looking = {watch: stream for watch, stream in watches.items() if watch.attention_wanted}
    sites = list(dict.fromkeys(site for watch in watches for site in watch.sites()))
    logits_wanted = any(watch.logits_wanted for watch in watches)

    def show(layer: int, start: int, weights: Tensor, call: Call) -> None:
        seen = Seen("", passage, ids, layer, start, weights, call.value[0], call.key[0])
        for watch, stream in looking.items():
            watch.attention(replace(seen, stream=stream))

    for watch in watches:
        watch.begin(ids)
    with ExitStack() as stack:
        if looking:
            stack.enter_context(replaced_attention(model, in_blocks(show), "a reading"))
        values = stack.enter_context(recorded(model, sites))
        out = model(ids[None], use_cache=False, logits_to_keep=0 if logits_wanted else 1)
    logits = out.logits[0] if logits_wanted else None
    for watch, stream in watches.items():
        own = {site: values[site][0] for site in watch.sites()}
        watch.through(Through(stream, passage, ids, own, logits if watch.logits_wanted else None))


def in_blocks(show: Callable[[int, int, Tensor, Call], None], block: int | None = None) -> Callable[[Call], Tensor]:
    """Attention that shows its weights, a block of queries at a time, for a text of one row read at once.

    Args:
        show: called with the layer, the block's first query, weights (head, query, entry) in float32, and the call.
        block: weights held at a time; None: `BLOCK`.
    """

    def attention(call: Call) -> Tensor:
        heads, queries, dim = call.query.shape[1:]
        kv_heads = call.key.shape[1]
        group = heads // kv_heads
        step = max(1, (block or BLOCK) // (heads * queries))
        outs = []
        for start in range(0, queries, step):
            end = min(queries, start + step)
            q = call.query[0, :, start:end].unflatten(0, (kv_heads, group))
            k, v = call.key[0, :, None, :end], call.value[0, :, None, :end]
            logits = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * call.scaling
            if call.softcap is not None:
                logits = call.softcap * torch.tanh(logits / call.softcap)
            seen = visible_to(end, end - start, call.sliding_window, q.device)
            weights = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
            outs.append((weights.to(v.dtype) @ v).flatten(0, 1))
            show(call.layer, start, weights.flatten(0, 1), call)
        return torch.cat(outs, dim=1)[None]

    return attention
