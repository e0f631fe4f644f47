"""What the entries of a model look like on calibration text, and how much errors in them cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.cache.attend import rotate
from foveate.data.needles import needles
from foveate.methods import Target
from foveate.models.anatomy import anatomy
from foveate.models.caches import with_cache

TOKENS = 61440  # of calibration text: 48 pieces
TEXT, FOLLOW = 1024, 256  # of a piece: tokens whose entries are looked at, and tokens that read them
NEEDLES = 12
NEEDLE_WEIGHT = 0.1  # of what answers are worth, against plain text
ROWS = 20480  # entries of each layer that are kept as examples


@dataclass
class LayerStatistics:
    """Of one layer, over its channels: the keys of all KV heads as they were before they were rotated, then the values.

    Attributes:
        mean: (channels,), of the entries; covariance: (channels, channels), about it.
        sensitivity: (channels, channels): half the mean outer product of the loss's gradient by an entry, times the
            entries of a text. Errors e in all of them cost about the mean of e' sensitivity e, in nats a token.
        rows: (examples, channels): entries, the mean taken off.
    """

    mean: Tensor
    covariance: Tensor
    sensitivity: Tensor
    rows: Tensor


def entry_statistics(
    target: Target, sinks: int, progress: Callable[[float], None] = lambda done: None
) -> dict[int, LayerStatistics]:
    """Statistics of every layer that holds entries, in float32 on the model's device.

    Pieces of calibration text, and needles in it, are read; then what follows is read on their entries, and the
    log-probability of tokens drawn from the model's own prediction (of an answer: its log-odds) is differentiated by
    every entry. That is the Fisher information: errors weigh as much as they change what the model predicts.

    Args:
        target: the model and its calibration text.
        sinks: first tokens of a text that are left out.
        progress: called with the fraction done.
    """
    model, parts = target.model, anatomy(target.model)
    ids = target.calibration(TOKENS)
    most = min(TEXT + FOLLOW, parts.max_positions, ids.shape[1])
    length = most - most // 5
    pieces: list[tuple[Tensor, Tensor, Tensor | None]]
    pieces = [(ids[:, at : at + length], ids[:, at + length : at + most], None) for at in _starts(ids, most)]
    cases = needles(ids, target.tokenizer(), cases=NEEDLES, length=length, seed=1) if length > 200 else []
    pieces += [(c.text, torch.cat([c.question, c.answer], 1), c.answer) for c in cases]
    draw = torch.Generator(model.device).manual_seed(0)
    gathered: dict[int, _Sums] = {}
    for done, (text, after, answer) in enumerate(pieces):
        entries = _entries(model, text.to(model.device))
        gradients = _gradients(model, entries, after.to(model.device), answer, draw)
        for layer, (pair, slopes) in enumerate(zip(entries, gradients, strict=True)):
            if pair is None or slopes is None:
                continue
            freq = parts.inv_freq(layer) if parts.rotary_is_static else None
            x, g = (_channels(keys, values, freq)[sinks:] for keys, values in (pair, slopes))
            gathered.setdefault(layer, _Sums()).add(x, g, answer is not None, -(-ROWS // len(pieces)), draw)
        progress((done + 1) / len(pieces))
    return {layer: sums.statistics() for layer, sums in gathered.items()}


def _starts(ids: Tensor, length: int) -> range:
    return range(0, ids.shape[1] - length + 1, length)


Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def _entries(model: Any, text: Tensor) -> list[Pair | None]:
    """Keys and values of each layer, (1, kv_head, entry, head_dim); None where a layer holds none."""
    cache: Any = DynamicCache()  # one that knows nothing of the layers' own windows keeps every entry
    model(text, **with_cache(cache), use_cache=True, logits_to_keep=1)
    return [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]


def _gradients(
    model: Any, entries: list[Pair | None], after: Tensor, answer: Tensor | None, draw: torch.Generator
) -> list[Pair | None]:
    """The gradient of a log-probability after the entries, by the entries."""
    leaves = [pair and (pair[0].clone().requires_grad_(), pair[1].clone().requires_grad_()) for pair in entries]
    cache: Any = DynamicCache()
    for layer, pair in enumerate(leaves):
        if pair is not None:
            cache.update(*pair, layer)
    on = [p for p in model.parameters() if p.requires_grad]
    for p in on:
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            logp = model(after, **with_cache(cache), use_cache=True).logits[0].float().log_softmax(-1)
            if answer is None:
                drawn = torch.multinomial(logp.detach().exp(), 1, generator=draw)
                goal = logp.gather(-1, drawn).sum() / len(logp) ** 0.5
            else:
                n = answer.shape[1]
                right = logp[-n - 1 : -1].gather(-1, answer[0, :, None].to(logp.device))[:, 0]
                odds = right - torch.log1p(-right.exp().clamp(max=1 - 1e-6))
                signs = torch.randn(n, generator=draw, device=odds.device)  # so that no cross terms are left
                goal = (odds * signs).sum() / n**0.5
            flat = [x for pair in leaves if pair is not None for x in pair]
            slopes = iter(torch.autograd.grad(goal, flat))
    finally:
        for p in on:
            p.requires_grad_(True)
    return [None if pair is None else (next(slopes), next(slopes)) for pair in leaves]


def _channels(keys: Tensor, values: Tensor, inv_freq: Tensor | None) -> Tensor:
    """(entry, channels), keys turned back to position 0; a gradient turns as its key does."""
    if inv_freq is not None:
        at = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[:3])
        keys = rotate(keys.float(), -at, inv_freq)
    return join(keys, values)[0]


def join(keys: Tensor, values: Tensor) -> Tensor:
    """(batch, kv_head, entry, head_dim) twice -> (batch, entry, channels), float32: all heads' keys, then values."""
    return torch.cat([x.float().transpose(1, 2).flatten(2) for x in (keys, values)], dim=-1)


class _Sums:
    """Running sums of one layer; index 0 of text, 1 of needles."""

    def __init__(self) -> None:
        self.count: float = 0
        self.sum: Tensor | float = 0
        self.squares: Tensor | float = 0
        self.slopes: list[Tensor | float] = [0, 0]
        self.cases = [0, 0]
        self.entries = 0
        self.rows: list[Tensor] = []

    def add(self, x: Tensor, g: Tensor, needle: bool, rows: int, draw: torch.Generator) -> None:
        self.count += len(x)
        self.sum = self.sum + x.sum(0, dtype=torch.float64)
        self.squares = self.squares + (x.double().T @ x.double())
        self.slopes[needle] = self.slopes[needle] + (g.T @ g).double()
        self.cases[needle] += 1
        self.entries = max(self.entries, len(x))
        self.rows.append(x[torch.randperm(len(x), generator=draw, device=x.device)[:rows]])

    def statistics(self) -> LayerStatistics:
        mean = torch.as_tensor(self.sum / self.count)
        covariance = torch.as_tensor(self.squares / self.count) - mean[:, None] * mean
        text, needle = (s / max(1, n) for s, n in zip(self.slopes, self.cases, strict=True))
        total = torch.as_tensor(text)
        if self.cases[1]:  # weigh by what errors as large as the entries themselves would cost
            worth = [float((torch.as_tensor(s) * covariance).sum()) for s in (text, needle)]
            total = total + NEEDLE_WEIGHT * worth[0] / max(worth[1], 1e-30) * torch.as_tensor(needle)
        rows = torch.cat(self.rows) - mean.float()
        return LayerStatistics(mean.float(), covariance, total / 2, rows)
