"""PoNet: pooling over the whole text, a segment and a window in place of attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import linear, split_heads
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, median
from foveate.measure.clock import alternated, timed
from foveate.methods import Paper
from foveate.mixers.aaren import Stretch, prefixes
from foveate.mixers.softmax import Softmax
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.trial import by_seed, differences, over_seeds

POOLS = ("global", "segment", "local")


@mixer("ponet")
class PoNet(Mixer):
    """Three poolings, fused with each token, in time linear in the length.

    With q, k, s, l, o linear maps of x, and per head:

        g = softmax(mean(q) . k / sqrt(d)) k          the mean query attends once (values are keys)
        s_t = maximum of s over the segment of t
        l_t = maximum of l over the window round t
        y_t = W ((g + s_t) * o_t + l_t)

    The paper's form (`causal=false`) looks both ways: a whole text, whole segments, a window with t in its middle.
    Ours is the causal form: the mean of q so far scores each token as it comes, and g_t is the weighted mean up to t;
    the maximum of the segment is the running one; the window is the last tokens. Segments are of a number of tokens,
    where the paper takes sentences, or a number of segments. Poolings are of the paper; equations after public code
    that follows it, as the paper itself could not be read here.

    Fields:
        segment: tokens of a segment.
        window: tokens of the local pooling; odd with `causal=false`.
        causal: whether a token sees none after it.
        without: a pooling that is left out (`global`, `segment`, `local`); empty: none is.
    """

    paper = Paper(
        "PoNet: Pooling Network for Efficient Token Mixing in Long Sequences", 2021, "https://arxiv.org/abs/2110.02442"
    )
    claim = "mixes tokens by pooling at a linear cost, better than a Fourier transform does"

    segment: int = 16
    window: int = 3
    causal: bool = True  # type: ignore[misc]
    without: str = ""

    def __post_init__(self) -> None:
        if self.segment < 1 or self.window < 1:
            raise FoveateError(f"{self}: segment and window must be at least 1.")
        if not self.causal and self.window % 2 == 0:
            raise FoveateError(f"{self}: a window of {self.window} has no token in its middle: give an odd number.")
        if self.without not in ("", *POOLS):
            raise FoveateError(f"ponet: there is no pooling {self.without!r}: give {', '.join(POOLS)} or nothing.")

    def build(self, shape: Shape) -> TokenMixer:
        return PoNetMixer(shape, self)


class PoNetMixer(TokenMixer):
    def __init__(self, shape: Shape, settings: PoNet):
        super().__init__()
        self.heads, self.head, self.settings = shape.heads, shape.head, settings
        self.maps = linear(shape.width, 5 * shape.width)
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        if not self.settings.causal:
            raise FoveateError(
                "ponet:causal=false sees the whole text at once and can't go step by step: give whole texts, or causal."
            )
        exact = like.new_zeros(batch, self.heads, self.head, dtype=torch.promote_types(like.dtype, torch.float32))
        width = self.heads * self.head
        return {
            "queries": exact,
            "top": exact[..., 0] - torch.inf,
            "total": exact.clone(),
            "weight": exact[..., 0].clone(),
            "segment": like.new_full((batch, width), -torch.inf),
            "last": like.new_full((batch, self.settings.window - 1, width), -torch.inf),
            "seen": like.new_zeros(batch, dtype=torch.long),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k, s, local, o = self.maps(x).chunk(5, -1)
        q, k = (split_heads(each, self.heads).to(torch.promote_types(x.dtype, torch.float32)) for each in (q, k))
        if not self.settings.causal:
            return self._fused(
                whole(q, k), segment_max(s, self.settings.segment), around(local, self.settings), o
            ), None
        g, held = self._so_far(q, k, state)
        begun = None if state is None else state["seen"]
        s = running_max(s, self.settings.segment, begun, None if state is None else state["segment"])
        pad = (
            local.new_full((x.shape[0], self.settings.window - 1, x.shape[2]), -torch.inf)
            if state is None
            else state["last"]
        )
        local = torch.cat([pad, local], 1)
        pooled = functional.max_pool1d(local.mT, self.settings.window, 1).mT
        if state is not None:
            last = local[:, x.shape[1] :].clone()
            held |= {"segment": s[:, -1].clone(), "last": last, "seen": state["seen"] + x.shape[1]}
        return self._fused(g, s, pooled, o), None if state is None else held

    def _fused(self, g: Tensor, s: Tensor, local: Tensor, o: Tensor) -> Tensor:
        """Pooled vectors with each token, (batch, n, width); g (batch, n or 1, heads, head)."""
        parts = dict(zip(POOLS, (g.flatten(2).to(o.dtype), s, local), strict=True))
        if self.settings.without:
            parts[self.settings.without] = torch.zeros_like(o)
        y: Tensor = self.out((parts["global"] + parts["segment"]) * o + parts["local"])
        return y

    def _so_far(self, q: Tensor, k: Tensor, state: State | None) -> tuple[Tensor, State]:
        """g_t of the tokens up to t, (batch, n, heads, head), and the state after them."""
        count = torch.arange(1, q.shape[1] + 1, device=q.device, dtype=q.dtype).expand(q.shape[0], -1)
        total = q.cumsum(1)
        if state is not None:
            total, count = total + state["queries"].to(q.dtype).unsqueeze(1), count + state["seen"][:, None]
        scores = (total / count[..., None, None] * k).sum(-1) / math.sqrt(self.head)
        top = scores.detach()  # it only keeps numbers in range
        weight = (scores - top).exp()
        parts = Stretch(top, k * weight.unsqueeze(-1), weight)
        if state is not None:
            before = (state[name].to(q.dtype).unsqueeze(1) for name in ("top", "total", "weight"))
            parts = Stretch(*(torch.cat(each, 1) for each in zip(before, parts, strict=True)))
        sums = prefixes(parts)
        g = (sums.total / sums.weight.unsqueeze(-1).clamp_min(1e-30))[:, -q.shape[1] :]
        after = {
            "queries": total[:, -1],
            "top": sums.top[:, -1],
            "total": sums.total[:, -1],
            "weight": sums.weight[:, -1],
        }
        return g, {name: each.clone() for name, each in after.items()} if state is not None else {}


def whole(q: Tensor, k: Tensor) -> Tensor:
    """The mean query's attention over all tokens, (batch, 1, heads, d) of q and k (batch, n, heads, d)."""
    scores = (q.mean(1, keepdim=True) * k).sum(-1) / math.sqrt(q.shape[-1])
    return (scores.softmax(1).unsqueeze(-1) * k).sum(1, keepdim=True)


def segment_max(x: Tensor, size: int) -> Tensor:
    """Each token's maximum over its segment of `size` tokens, (batch, n, width)."""
    n = x.shape[1]
    parts = functional.pad(x, (0, 0, 0, -n % size), value=-torch.inf).unflatten(1, (-1, size))
    return parts.amax(2).repeat_interleave(size, 1)[:, :n]


def around(x: Tensor, settings: PoNet) -> Tensor:
    """Each token's maximum over the window round it, (batch, n, width)."""
    return functional.max_pool1d(x.mT, settings.window, 1, settings.window // 2).mT


def running_max(x: Tensor, size: int, seen: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """Each token's maximum over its segment up to itself, (batch, n, width).

    Args:
        seen: tokens before these, (batch,); `before`: the maximum at the last of them, (batch, width).

    Example:
        >>> running_max(torch.tensor([3.0, 1.0, 2.0, 5.0])[None, :, None], 2).flatten().tolist()
        [3.0, 3.0, 2.0, 5.0]
    """
    if seen is None or before is None:
        parts = functional.pad(x, (0, 0, 0, -x.shape[1] % size), value=-torch.inf).unflatten(1, (-1, size))
        return parts.cummax(2).values.flatten(1, 2)[:, : x.shape[1]]
    at = ((seen[:, None] + torch.arange(x.shape[1], device=x.device)) % size).unsqueeze(-1)  # place in the segment
    before = before.to(x.dtype).masked_fill(at[:, 0] == 0, -torch.inf)
    x = torch.cat([torch.maximum(x[:, :1], before.unsqueeze(1)), x[:, 1:]], 1)
    step = 1
    while step < min(size, x.shape[1]):  # maxima of 1, 2, 4, ... tokens
        back = functional.pad(x, (0, 0, step, 0), value=-torch.inf)[:, : x.shape[1]]
        x = torch.maximum(x, back.masked_fill(at < step, -torch.inf))
        step *= 2
    return x


@claim("ponet")
class PoNetClaim(Claim):
    statement: ClassVar[str] = (
        "pooling at three granularities is more accurate than attention and than Fourier mixing, at a cost linear in "
        "the length, and each granularity helps"
    )
    setting: ClassVar[str] = (
        "ListOps with texts of 64 tokens; 2 layers of width 64, 3 seeds, 400 steps of 64 texts each: softmax attention "
        "(causal, as the backbone's is), FNet, PoNet both ways, and without one of its poolings; and forward and "
        "backward of a layer on as many tokens in texts of two lengths"
    )
    reads = False
    steps: int = 400
    batch: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64)
    task: str = "listops"
    lengths: tuple[int, int] = (512, 8192)
    rounds: int = 5

    def run(self, bench: Bench) -> Finding:
        both = "ponet:causal=false"
        mixers = {"attention": "softmax", "fnet": "fnet", "ponet": both}
        mixers |= {f"ponet without {pool}": f"{both},without={pool}" for pool in POOLS}
        found = by_seed(
            self.task,
            {name: replace(self.sizes, mixer=each) for name, each in mixers.items()},
            Settings(steps=self.steps, batch=self.batch, lr=2e-3),
            device=bench.model.device,
            seeds=self.seeds,
            progress=lambda done: bench.progress(0.9 * done),
        )
        gains = {name: differences(found["ponet"], found[name], "accuracy") for name in mixers if name != "ponet"}
        grown = self.grown(bench.model.device)
        return Finding(
            {
                **{f"accuracy, {name}": over_seeds([x.scores["accuracy"] for x in found[name]]) for name in mixers},
                **{f"accuracy, ponet less {name}": each for name, each in gains.items()},
                **{f"time a token, longer over shorter texts, {name}": each for name, each in grown.items()},
            },
            {
                "it is more accurate than FNet": gains["fnet"].low > 0,
                "it is more accurate than attention": gains["attention"].low > 0,
                "each pooling helps": all(gains[f"ponet without {pool}"].low > 0 for pool in POOLS),
                "the time a token grows by less than a quarter": grown["ponet"].high < 1.25,
            },
        )

    def grown(self, device: torch.device) -> dict[str, Metric]:
        """Time a token in long texts over that in short ones."""
        shape = Shape(self.sizes.width, self.sizes.heads)
        layers = {"ponet": PoNet(causal=False).build(shape).to(device), "attention": Softmax().build(shape).to(device)}
        sides = []
        for length in self.lengths:
            x = torch.randn(self.lengths[-1] // length, length, shape.width, device=device)
            sides += [lambda layer=layer, x=x: _seconds(layer, x) for layer in layers.values()]
        alternated(sides, 1)
        times = alternated(sides, self.rounds)
        return {
            name: median([b / a for a, b in zip(times[i], times[i + 2], strict=True)]) for i, name in enumerate(layers)
        }


def _seconds(layer: TokenMixer, x: Tensor) -> float:
    """Forward and backward."""
    return timed(lambda: layer(x)[0].sum().backward(), x.device)[0]
