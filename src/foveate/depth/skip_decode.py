"""SkipDecode: the later a token stands in the text, the fewer layers it runs, and the upper ones stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from foveate.claims import Claim, Finding, Streams, claim
from foveate.depth.base import layers_of
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Method, Paper, Recipe, Target, method
from foveate.models.anatomy import anatomy
from foveate.models.caches import PartialCache, replaced_cache
from foveate.models.surgery import count_parameters, layer_parameters
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity
from foveate.tasks.speed import Speed


@method("skip-decode")
class SkipDecode(Method):
    """Give every position of the text a number of layers, the same for the whole batch, that falls as the text goes on.

    A token at position p runs the first `warmup` layers and as many upper ones as its number allows; the lower to
    middle ones in between are skipped. So a token's layers are a subset of those of every token before it, and every
    key and value that it attends to is there: nothing is computed twice, and batches work. The number falls
    linearly from `max_layers` to `min_layers` over `length` positions and stays there, as in the paper, which
    fine-tunes the model for it; here the model is used as it is. What is ours: the prompt follows the same schedule by
    position, so that it makes no difference how a text is cut into forwards; the warm-up layers are among
    those counted; in a batch with padding, a row's positions are its own. Skipped entries take no cache.

    Fields:
        min_layers: layers that the last tokens run, those of the warm-up among them; more than `warmup`.
        max_layers: layers that the first token runs; None: all there are.
        length: positions over which the number falls, 2 or more: the longest text that is expected, prompt and all.
        warmup: layers at the bottom that every token runs.

    Errors: FoveateError where the numbers don't fit the model, and where a cache policy is in force as well.

    Example:
        >>> import foveate as fv
        >>> [SkipDecode(min_layers=2, length=5).layers_at(p, 4) for p in (0, 1, 2, 3, 4, 99)]
        [4, 4, 3, 2, 2, 2]
        >>> model, prompt = fv.tiny("llama", num_hidden_layers=4), torch.arange(1, 11).unsqueeze(0)
        >>> with fv.apply(model, "skip-decode:min_layers=2,length=10"):
        ...     out = model(prompt, use_cache=True)
        >>> [layer.get_seq_length() for layer in out.past_key_values.layers]   # two layers are left out on the way
        [10, 3, 7, 10]
    """

    role: ClassVar[str] = "depth"
    paper: ClassVar[Paper | None] = Paper(
        "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference",
        2023,
        "https://arxiv.org/abs/2307.02628",
    )
    claim: ClassVar[str] = "later tokens can skip lower to middle layers, and no cache entry is ever missing"

    min_layers: int
    max_layers: int | None = None
    length: int = 512
    warmup: int = 1

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.min_layers <= self.warmup:
            raise FoveateError(
                f"{self}: min_layers={self.min_layers} leaves no upper layer beside warmup={self.warmup}: "
                "give more min_layers, or a smaller warmup, at least 0."
            )
        if self.max_layers is not None and self.max_layers < self.min_layers:
            raise FoveateError(f"{self}: max_layers is below min_layers, but the number of layers must fall.")
        if self.length < 2:
            raise FoveateError(f"{self}: length={self.length} is below 2: give the positions of the longest text.")

    def layers_at(self, position: int, layers: int) -> int:
        """How many of `layers` layers the token at a position runs; never more than at the position before."""
        most = layers if self.max_layers is None else self.max_layers
        left = max(0.0, 1 - position / (self.length - 1))
        return self.min_layers + round((most - self.min_layers) * left)

    def leaving(self, layers: int) -> list[int]:
        """Places of the layers, in the order in which they are left out as the number falls: from the bottom up."""
        return list(range(self.warmup, layers))

    def ends(self, layers: int) -> dict[int, int]:
        """Place of a layer -> the first position that does not run it; layers that every token runs are not in it.

        Raises:
            FoveateError: more layers are asked for than there are.
        """
        if max(self.min_layers, self.max_layers or 0) > layers:
            raise FoveateError(f"{self}: there are only {layers} layers: ask for {layers} at most.")
        numbers = [self.layers_at(position, layers) for position in range(self.length)]
        return {
            layer: sum(number >= layers - gone for number in numbers)
            for gone, layer in enumerate(self.leaving(layers)[: layers - self.min_layers])
        }

    @contextmanager
    def applied(self, target: Target) -> Iterator[None]:
        model = target.model
        parts = anatomy(model)
        there = layers_of(parts)
        ends = {there[place]: end for place, end in self.ends(len(there)).items()}
        if model.config._attn_implementation == "flex_attention":
            raise FoveateError(f"{self.name} can't cut flex_attention's masks: load the model with another attention.")
        tokens = _Tokens()
        with ExitStack() as stack:
            stack.enter_context(
                replaced_cache(
                    model,
                    make=lambda: SteppedCache(config=model.config),
                    replaces=lambda cache: type(cache) in (DynamicCache, PartialCache),
                    before=tokens.begin,
                )
            )
            for index, end in ends.items():
                stack.enter_context(_run_until(parts.layers[index].module, end, tokens, self.name))
            yield


class SteppedCache(PartialCache):
    """The model's own cache where layers stop at some position: lengths are read off those that have not stopped."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        layers: list[Any] = self.layers
        return max((layer.get_seq_length() for layer in layers), default=0)

    def _stand_in(self, layer_idx: int) -> int:
        """Masks are made once for all layers of a sort: to the size of the one that has seen most."""
        layers: list[Any] = self.layers
        sort = getattr(layers[layer_idx], "is_sliding", False)
        alike = [i for i, layer in enumerate(layers) if getattr(layer, "is_sliding", False) == sort]
        return max(alike, key=lambda i: layers[i].get_seq_length())

    def crop(self, max_length: int) -> None:
        """Forget the last tokens: `max_length` stay, or as many as it is below zero leave."""
        stays = max_length if max_length >= 0 else self.get_seq_length() + max_length
        layers: list[Any] = self.layers
        for layer in layers:
            surplus = layer.get_seq_length() - stays
            if surplus > 0:  # a layer that stopped before has nothing to forget
                layer.crop(-surplus)


class _Tokens:
    """Where the tokens of the forward under way stand.

    Attributes:
        positions: LongTensor (batch or 1, token).
        low, high: the lowest and the highest position of each column: rows differ where there is padding.
    """

    positions: Tensor
    low: list[int]
    high: list[int]

    def begin(self, cache: Cache | None, inputs: dict[str, Any]) -> None:
        ids = inputs.get("input_ids")
        ids = inputs["inputs_embeds"] if ids is None else ids
        positions, mask, count = inputs.get("position_ids"), inputs.get("attention_mask"), ids.shape[1]
        if positions is None and isinstance(mask, Tensor) and mask.ndim == 2:
            positions = mask.long().cumsum(dim=1)[:, -count:] - 1
        elif positions is None:
            seen = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(seen, seen + count, device=ids.device)
        self.positions = positions.view(-1, count).clamp(min=0)
        # Once a forward, so that layers need not ask the device.
        self.low, self.high = torch.stack(self.positions.aminmax(dim=0)).tolist()

    def before(self, end: int) -> int:
        """How many columns are needed for every token that stands before a position."""
        return max((column + 1 for column, position in enumerate(self.low) if position < end), default=0)


@contextmanager
def _run_until(layer: nn.Module, end: int, tokens: _Tokens, who: str) -> Iterator[None]:
    """The decoder layer runs for the tokens before a position, and hands on the others as they are."""
    if "forward" in vars(layer):
        raise FoveateError(f"{who}: a layer's forward has been replaced already, by a hook or another method.")
    whole: Callable[..., Tensor] = layer.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, Cache)), None)
        if cache is not None and not isinstance(cache, SteppedCache):
            raise FoveateError(
                f"{who} leaves layers out for some tokens, and the {type(cache).__name__} in force needs every layer "
                "to see every token: use it without a cache policy, or take skip-layers."
            )
        count, runs = hidden_states.shape[1], tokens.before(end)
        if runs == 0:
            return hidden_states
        gone = count - runs
        out = whole(
            hidden_states[:, :runs],
            *(_first(arg, runs, gone) for arg in args),
            **{name: _first(arg, runs, gone) for name, arg in kwargs.items()},
        )
        if max(tokens.high[:runs]) >= end:
            # Rows with padding are behind. What the others make here in the meantime is not seen by any of their tokens
            # that still run.
            out = torch.where(tokens.positions[:, :runs, None] < end, out, hidden_states[:, :runs])
        return torch.cat([out, hidden_states[:, runs:]], dim=1) if gone else out

    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.forward


def _first(value: Any, runs: int, gone: int) -> Any:
    """Of what a layer is given for all tokens, what belongs to the first `runs`; `gone` follow them.

    Positions (batch, token), rotations (batch, token, dim), masks (batch, 1, token, entry) or (batch, entry): the
    tokens of a forward are always the last.
    """
    if gone == 0:
        return value
    if isinstance(value, tuple):
        return tuple(_first(each, runs, gone) for each in value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.ndim == 4:
        return value[:, :, :runs, : value.shape[-1] - gone]
    return value[:-gone] if value.ndim == 1 else value[:, :-gone]


@dataclass(frozen=True, kw_only=True)
class _ExitEarly(SkipDecode):
    """The alternative, for the claim: layers are left out from the top."""

    def leaving(self, layers: int) -> list[int]:
        return list(range(layers - 1, -1, -1))


@dataclass(frozen=True, kw_only=True)
class _SkipRandom(SkipDecode):
    """The control, for the claim: layers are left out in random order, so that no entry is missing here either."""

    seed: int

    def leaving(self, layers: int) -> list[int]:
        order: list[int] = torch.randperm(layers, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return order


@claim("skip-decode")
class UpperLayersMatterMore(Claim):
    statement: ClassVar[str] = (
        "tokens that skip lower to middle layers, more of them the later they stand, lose next to nothing at 2 to 5 "
        "times the speed, and less than by leaving from the top (abstract; the paper fine-tunes for it, this "
        "experiment does not)"
    )
    setting: ClassVar[str] = (
        "from all layers to 4 fewer, and from two thirds to one third (half on average); 1,024 tokens of evaluation "
        "text over which the number falls; against leaving out as many from the top, and in two random orders; decode "
        "after a prompt of 256 tokens, where the number has fallen to two thirds, timed in alternation"
    )

    def run(self, bench: Bench) -> Finding:
        layers = len(layers_of(anatomy(bench.model)))
        streams = Streams(bench, Perplexity(tokens=1024, chunk=64), of=10)
        full = streams.read("full")
        metrics = {"perplexity, whole model": full.perplexity}
        checks = {}
        third = layers // 3
        for words, most, least in (
            ("4 fewer", layers, layers - 4),
            ("half on average", layers - third, third),
        ):
            sizes: dict[str, Any] = {"max_layers": most, "min_layers": least, "length": 1024}
            ours = streams.read(SkipDecode(**sizes))
            metrics[f"over whole, {words}: lower to middle skipped"] = ours.over(full)
            checks[f"{words}: little loss (within 5%)"] = ours.over(full).value < 1.05
            others = {
                "from the top": _ExitEarly(**sizes),
                "random, first order": _SkipRandom(**sizes, seed=0),
                "random, second order": _SkipRandom(**sizes, seed=1),
            }
            for name, other in others.items():
                stream = streams.read(other)
                metrics[f"over whole, {words}: {name}"] = stream.over(full)
                checks[f"{words}: better than {name}"] = ours.below(stream)
        least = layers - third
        recipe = f"skip-decode:min_layers={least},length=128"
        speed = Speed(prompt=256, tokens=32, repeats=7).measure(bench, Recipe.of(recipe)).metrics["decode_speedup"]
        expected = _speedup(bench.model, least / layers)
        metrics |= {"decode speed-up, two thirds": speed, "decode speed-up by weights read": Metric.exact(expected)}
        checks["at least 0.85 of the speed-up that the weights read promise"] = speed.value > 0.85 * expected
        return Finding(metrics, checks)


def _speedup(model: PreTrainedModel, fraction: float) -> float:
    """Weights that a token reads with all layers, over those with a fraction of them: the head is always read."""
    head, layers = count_parameters(anatomy(model).head), layer_parameters(model)
    return (head + layers) / (head + fraction * layers)
