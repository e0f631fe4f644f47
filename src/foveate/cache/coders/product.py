"""Product quantisation of a layer's entries, in the basis in which errors cost least."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from foveate.cache.coders.base import Coder, Coding, coding
from foveate.cache.coders.statistics import TOKENS, LayerStatistics, entry_statistics, join
from foveate.claims import Claim, Finding, Streams, claim
from foveate.errors import FoveateError
from foveate.measure.shown import Shown
from foveate.methods import Paper, Target
from foveate.models.anatomy import Anatomy, anatomy
from foveate.models.stored import stored, text_digest
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity

SHRINK = 1.0  # of the sensitivity, towards the same for all channels: it is estimated from few texts
SLACK = 0.7  # components this much below the water level still go into the last group
ROUNDS = 12  # of k-means, on EXAMPLES entries; then one on all
EXAMPLES = 8192
WORDS = 256
SHIPPED = (0.036, 0.085, 0.185)
"""The shares of the recipes that ship by name. They are fitted together, since what takes longest serves all three."""


@coding("product")
class Product(Coding):
    """A few bytes for all of a token's keys and values of a layer: product quantisation after a joint transform.

    The keys (before they were rotated) and values of all KV heads of a layer are one vector. It is turned into the
    basis that makes its components uncorrelated where errors are measured by what they cost the model: the
    Karhunen-Loeve transform in the metric of the Fisher information. Components are cut into groups, each worth eight
    bits by reverse water-filling over all layers, and each group becomes one byte: the nearest of 256 codewords, found
    by k-means on calibration text (product quantisation, section 2). Every token is coded alone, as it arrives; sinks
    stay whole.

    It is fitted once a model (5 to 10 minutes on two cores, less on a GPU), on prose, code and needles, and kept on
    disk. The transforms and codewords belong to the model, not to the cache. All KV heads of a layer must hold the same
    tokens: a policy that evicts in each head by itself needs another code, or `keep=1`.

    Fields:
        share: bytes of an entry, as a fraction of what it takes in 16 bits.

    Example:
        >>> import foveate as fv, torch
        >>> model, prompt = fv.tiny("llama"), (torch.arange(400) % 197 + 3).unsqueeze(0)
        >>> full = model(prompt, use_cache=True).past_key_values
        >>> given = {"calibration": prompt, "tokenizer": fv.tiny_tokenizer()}
        >>> with fv.apply(model, "window:keep=1,code=product(share=0.1)", **given):
        ...     tenth = model(prompt, use_cache=True).past_key_values
        >>> from foveate.models.caches import cache_bytes
        >>> cache_bytes(tenth) < 0.07 * cache_bytes(full)  # of float32; sinks included
        True
    """

    paper: ClassVar[Paper | None] = Paper(
        "Product Quantization for Nearest Neighbor Search", 2011, "https://doi.org/10.1109/TPAMI.2010.57"
    )
    claim: ClassVar[str] = "in a basis chosen by what errors cost, a tenth of the bits holds nearly all"

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise FoveateError(f"product: share={self.share} is outside (0, 1]: it is a fraction of 16 bits.")

    def coder(self, target: Target) -> Coder:
        shares = SHIPPED if self.share in SHIPPED else (self.share,)
        version = f"2 {shares} {Coder.sinks} {text_digest(target.calibration(TOKENS))}"

        def make() -> dict[str, Tensor]:
            with Shown(f"what product(share={self.share:g}) needs") as progress:
                return fit(target, shares, Coder.sinks, progress)

        fitted = stored(target.model, "product", version, make)
        mine = {name: x for name, x in fitted.items() if name.endswith(f".{shares.index(self.share)}")}
        return ProductCoder(anatomy(target.model), mine, target.model.device)


def fit(
    target: Target, shares: tuple[float, ...], sinks: int, progress: Callable[[float], None] = lambda done: None
) -> dict[str, Tensor]:
    """The transforms and codewords of every layer for each share, as `NAME.LAYER.PLACE`, place that of the share.

    Names: `mean` (channels,); `into` (channels, components), float16; `back` (components, channels), float16; `sizes`
    (groups,), components of each; `words` (256, components), float16.
    """
    statistics = entry_statistics(target, sinks, lambda done: progress(0.5 * done))
    kv_heads = anatomy(target.model).kv_heads
    transforms = {layer: _transform(s) for layer, s in statistics.items()}
    costs = {layer: cost for layer, (_, _, cost) in transforms.items()}
    tensors: dict[str, Tensor] = {}
    done = 0.0
    for place, share in enumerate(shares):
        level = _water_level(costs, share)
        for layer, s in statistics.items():
            into, back, cost = transforms[layer]
            # As many bytes for every KV head, so that the codes lie beside each other as entries do.
            count = kv_heads * max(1, round(float(_rates(cost, level).sum()) / 8 / kv_heads))
            sizes = _groups(cost, min(count, len(cost) // kv_heads * kv_heads))
            used = sum(sizes)
            made = {
                "mean": s.mean,
                "into": into[:, :used].half(),
                "back": back[:used].half(),
                "sizes": torch.tensor(sizes),
                "words": _codewords(s.rows @ into[:, :used], sizes).half(),
            }
            tensors |= {f"{name}.{layer}.{place}": tensor for name, tensor in made.items()}
            done += share / sum(shares) / len(statistics)
            progress(0.5 + 0.5 * done)
    return tensors


def _transform(s: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """(channels, components) into the basis, (components, channels) back, and each component's cost, falling.

    With the metric M = R R, the components of R x along the eigenvectors of R cov R are uncorrelated, and a squared
    error in any of them costs its size; so their variances are what it costs to leave them out.
    """
    metric = s.sensitivity
    typical = metric.diagonal().mean()
    metric = metric + (SHRINK * typical + 1e-12) * torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp(min=float(values.max()) * 1e-9)
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
    cost, basis = torch.linalg.eigh(root @ s.covariance @ root)
    order = cost.argsort(descending=True)
    basis, cost = basis[:, order], cost[order].clamp(min=1e-30)
    return (root @ basis).float(), (basis.T @ inverse).float(), cost


def _rates(cost: Tensor, level: float) -> Tensor:
    """Bits of each component when errors are filled up to the level; at most the eight of a byte."""
    return (0.5 * torch.log2(cost / level)).clamp(0, 8)


def _water_level(costs: dict[int, Tensor], share: float) -> float:
    """The level at which all layers together take their share of 16 bits a channel."""
    bits = 16 * share * sum(len(cost) for cost in costs.values())
    low, high = 1e-30, max(float(cost.max()) for cost in costs.values())
    for _ in range(200):
        middle = math.sqrt(low * high)
        if sum(float(_rates(cost, middle).sum()) for cost in costs.values()) > bits:
            low = middle
        else:
            high = middle
    return high


def _groups(cost: Tensor, count: int) -> list[int]:
    """How many components, the costliest first, each of `count` bytes holds: about eight bits by their rates.

    Example:
        >>> import torch
        >>> _groups(torch.tensor([2.0**12, 2.0**8, 2.0**4, 2.0**4, 1.0, 1.0]).double(), 2)
        [1, 5]
    """
    low, high = 1e-40, float(cost.max())
    for _ in range(200):
        middle = math.sqrt(low * high)
        if float(_rates(cost, middle).sum()) > 8 * count:
            low = middle
        else:
            high = middle
    rates = _rates(cost, high)
    used = max(count, int((cost > SLACK * high).sum()))
    at = ((rates.cumsum(0) - rates / 2) * count / float(rates.sum())).long()[:used] if rates.any() else None
    sizes = [0] * count if at is None else torch.bincount((at // 1).clamp(max=count - 1), minlength=count).tolist()
    while 0 in sizes:  # a group without a component takes one of the largest's
        sizes[sizes.index(0)] += 1
        sizes[max(range(count), key=sizes.__getitem__)] -= 1
    return sizes


def _codewords(components: Tensor, sizes: list[int]) -> Tensor:
    """256 codewords of each group by k-means, the groups' components beside each other: (256, components)."""
    return torch.cat([kmeans(group) for group in components.split(sizes, dim=1)], dim=1)


def kmeans(x: Tensor) -> Tensor:
    """256 centres (256, n) of the points (many, n): Lloyd's algorithm, with empty cells put where errors are large.

    Example:
        >>> import torch
        >>> points = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
        >>> centres = kmeans(points)
        >>> bool(torch.cdist(points, centres).amin(1).square().mean() < 0.02)  # a fortieth of the variance
        True
    """
    draw = torch.Generator(x.device).manual_seed(0)
    some = x[torch.randperm(len(x), generator=draw, device=x.device)[:EXAMPLES]]
    repeats = -(-WORDS // len(some))
    centres = some[:WORDS].repeat(repeats, 1)[:WORDS].clone()
    for step in range(ROUNDS + 1):
        points = some if step < ROUNDS else x
        far = torch.addmm(centres.square().sum(1), points, centres.T, alpha=-2)
        error, cell = far.min(1)
        count = torch.zeros(WORDS, device=x.device).index_add_(0, cell, torch.ones_like(error))
        mean = torch.zeros_like(centres).index_add_(0, cell, points) / count.clamp(min=1)[:, None]
        centres = torch.where(count[:, None] > 0, mean, centres)
        if step % 3 == 2 and step < ROUNDS - 2:
            error = error + points.square().sum(1)
            loss = torch.zeros(WORDS, device=x.device).index_add_(0, cell, error.clamp(min=0))
            poor, rich = loss.argsort()[:16], loss.argsort(descending=True)[:16]
            worth = loss[rich] > 8 * loss[poor]
            spread = (loss[rich] / count[rich].clamp(min=1) / x.shape[1]).sqrt()[:, None]
            noise = torch.randn(16, x.shape[1], generator=draw, device=x.device)
            centres[poor] = torch.where(worth[:, None], centres[rich] + spread * noise, centres[poor])
    return centres


class Fitted(NamedTuple):
    """What was fitted to a layer.

    `mean` (channels,); `into` (channels, components) and `back` (components, channels): the transform; `words` (256,
    components): the groups' codewords beside each other; `group` (components,), int64: which group each is of;
    `padded` (groups, 256, largest size): the codewords again, `squares` (groups, 256) of their lengths, and `filled`
    (groups, largest size), bool: where there are numbers.
    """

    mean: Tensor
    into: Tensor
    back: Tensor
    words: Tensor
    group: Tensor
    padded: Tensor
    squares: Tensor
    filled: Tensor


class ProductCoder(Coder):
    """`of`: what was fitted to each layer, on the model's device."""

    def __init__(self, parts: Anatomy, tensors: dict[str, Tensor], device: torch.device):
        super().__init__(parts)
        self.heads, self.dim = parts.kv_heads, parts.head_dim
        self.of: dict[int, Fitted] = {}
        for name, sizes in tensors.items():
            kind, layer, place = name.split(".")
            if kind == "sizes":
                mean, into, back, words = (
                    tensors[f"{part}.{layer}.{place}"].float().to(device) for part in ("mean", "into", "back", "words")
                )
                filled = (torch.arange(int(sizes.max())) < sizes[:, None]).to(device)
                padded = words.new_zeros(WORDS, *filled.shape)
                padded[:, filled] = words
                group = torch.arange(len(sizes)).repeat_interleave(sizes).to(device)
                padded = padded.transpose(0, 1).contiguous()
                self.of[int(layer)] = Fitted(mean, into, back, words, group, padded, padded.square().sum(-1), filled)

    def encode(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor, tier: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self._same_tokens(positions)
        fitted = self.of[layer]
        words, filled = fitted.padded, fitted.filled
        components = (join(self.turned_back(layer, keys, positions), values) - fitted.mean) @ fitted.into
        batch, entries = components.shape[:2]
        grouped = components.new_zeros(batch * entries, *filled.shape)
        grouped[:, filled] = components.flatten(0, 1)
        codes = torch.empty(batch * entries, len(words), dtype=torch.uint8, device=keys.device)
        for rows in torch.arange(batch * entries, device=keys.device).split(
            max(1, (1 << 25) // fitted.squares.numel())
        ):
            near = torch.einsum("egc,gwc->egw", grouped[rows], words)
            codes[rows] = (fitted.squares - 2 * near).argmin(-1).to(torch.uint8)
        codes = codes.view(batch, entries, self.heads, len(words) // self.heads).transpose(1, 2)
        return codes, codes[..., :0]

    def decode(
        self,
        layer: int,
        key_codes: Tensor,
        value_codes: Tensor,
        positions: Tensor,
        tier: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        self._same_tokens(positions)
        fitted = self.of[layer]
        each = int(self.lengths(layer, None)[0])
        codes = key_codes[..., :each].transpose(1, 2).flatten(2)  # (batch, entry, group)
        of_component = codes.flatten(0, 1)[:, fitted.group].long()
        components = fitted.words.gather(0, of_component).unflatten(0, codes.shape[:2])
        channels = components @ fitted.back + fitted.mean
        keys, values = channels.unflatten(-1, (2, self.heads, self.dim)).permute(2, 0, 3, 1, 4)
        return self.turned(layer, keys, positions).to(dtype), values.to(dtype)

    def lengths(self, layer: int, tier: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.tensor(len(self.of[layer].filled) // self.heads), torch.tensor(0)

    def _same_tokens(self, positions: Tensor) -> None:
        if not bool((positions == positions[:, :1]).all()):
            raise FoveateError(
                "product: a layer's KV heads hold different tokens, but they are coded together: take "
                "code=groups(...), or a policy and budget that keep the same tokens in all heads of a layer."
            )


@claim("product")
class FewBytesHold(Claim):
    statement: ClassVar[str] = (
        "in a basis chosen by what errors cost, a byte a group holds far more than as many uniform steps (ours): a "
        "twelfth of 16 bits is better than 2 bits a number, which take twice as much"
    )
    setting: ClassVar[str] = "2,048 tokens in pieces of 512, so that most are read from coded entries"

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, window=2048, chunk=512, skip=512), of=3)
        full, ours = streams.read("full"), streams.read("window:keep=1,code=product(share=0.085)")
        uniform = streams.read("window:keep=1,code=groups(bits=2)")
        return Finding(
            {
                "perplexity, full cache": full.perplexity,
                "product over full": ours.over(full),
                "2 bits over full": uniform.over(full),
            },
            {"within 5% of the full cache": ours.over(full).value < 1.05, "better than 2 bits": ours.below(uniform)},
        )
