"""Groups: uniform steps, keys scaled per channel and values per token."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from foveate.cache.coders.base import Coder, Coding, calibration_entries, coding, pack_bits, unpack_bits
from foveate.claims import Claim, Finding, Streams, claim
from foveate.errors import FoveateError
from foveate.methods import Paper, Target
from foveate.models.anatomy import Anatomy, anatomy
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity


@coding("groups")
class Groups(Coding):
    """Uniform quantisation: keys in steps of each channel, values in steps of each token's groups of channels.

    Channels of keys differ in size and keep it from token to token; values don't (section 3). Keys are coded as they
    were before they were rotated to their positions. A channel's range is that of calibration text; a key that lies
    beyond widens all of its own channels' ranges by a factor, held in a byte. So every token is coded alone, as it
    arrives. (The paper codes rotated keys in groups of tokens, with the range of each group, and holds the last ones
    back uncoded.) Sinks stay whole.

    Fields:
        bits: of a number, 1 to 8.
        group: channels that share a step of a value.

    Example:
        >>> import foveate as fv, torch
        >>> model, prompt = fv.tiny("llama"), torch.arange(3, 103).unsqueeze(0)
        >>> full = model(prompt, use_cache=True).past_key_values
        >>> with fv.apply(model, "window:keep=1,code=groups(bits=4,group=16)", calibration=prompt):
        ...     four = model(prompt, use_cache=True).past_key_values
        >>> from foveate.models.caches import cache_bytes
        >>> cache_bytes(four) < 0.3 * cache_bytes(full)  # of float32
        True
    """

    paper: ClassVar[Paper | None] = Paper(
        "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024, "https://arxiv.org/abs/2402.02750"
    )
    claim: ClassVar[str] = "keys scaled per channel and values per token bear few bits"

    bits: int = 4
    group: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FoveateError(f"groups: bits={self.bits} is outside 1 to 8.")
        if self.group < 1:
            raise FoveateError(f"groups: group={self.group}: give at least 1 channel.")

    def coder(self, target: Target) -> Coder:
        parts = anatomy(target.model)
        dim = parts.head_dim
        if dim % self.group or dim % 8:
            raise FoveateError(
                f"groups: group={self.group} does not divide this model's heads of {dim} channels (which must be a "
                "multiple of 8): give another."
            )
        coder = GroupsCoder(parts, self)
        for keys, _, at in calibration_entries(target):
            for layer, key in enumerate(keys):
                if isinstance(key, Tensor) and key.shape[2] > coder.sinks:
                    positions = at[..., -key.shape[2] :].expand(key.shape[:3])
                    coder.widen(layer, coder.turned_back(layer, key, positions)[:, :, coder.sinks :])
        return coder


class GroupsCoder(Coder):
    """`low` and `range`, by layer, float32 (kv_head, 1, head_dim): a channel's lowest value and its range."""

    def __init__(self, parts: Anatomy, coding: Groups):
        super().__init__(parts)
        self.dim, self.group, self.bits = parts.head_dim, coding.group, coding.bits
        self.low: dict[int, Tensor] = {}
        self.range: dict[int, Tensor] = {}

    def widen(self, layer: int, keys: Tensor) -> None:
        """Make the ranges hold these keys, (1, kv_head, entry, head_dim)."""
        low, high = keys[0].float().amin(1, keepdim=True), keys[0].float().amax(1, keepdim=True)
        high = torch.maximum(high, low + 1e-6)
        if layer in self.low:
            high = torch.maximum(high, self.low[layer] + self.range[layer])
            low = torch.minimum(low, self.low[layer])
        self.low[layer], self.range[layer] = low, high - low

    def encode(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor, tier: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # From -1/2 to 1/2 over a channel's range; further out, the range is made wider by 2**(factor / 32).
        share = (self.turned_back(layer, keys, positions) - self.low[layer]) / self.range[layer] - 0.5
        reach = 2 * share.abs().amax(-1, keepdim=True)
        factor = (32 * reach.clamp(min=1e-6).log2()).ceil().clamp(0, 255)
        share = share / 2 ** (factor / 32) + 0.5
        groups = values.float().unflatten(-1, (-1, self.group))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        top = 2**self.bits - 1
        steps = torch.cat([low, ((high - low) / top).clamp(min=1e-8)], -1).bfloat16()
        value = ((groups - steps[..., :1].float()) / steps[..., 1:].float()).round().clamp(0, top)
        key = pack_bits((share * top).round().clamp(0, top), self.bits)
        scales = steps.flatten(-2).view(torch.uint8)
        return torch.cat([key, factor.to(torch.uint8)], -1), torch.cat(
            [pack_bits(value.flatten(-2), self.bits), scales], -1
        )

    def decode(
        self,
        layer: int,
        key_codes: Tensor,
        value_codes: Tensor,
        positions: Tensor,
        tier: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        n = self.dim * self.bits // 8
        key_codes, scales = key_codes[..., : n + 1], value_codes[..., n : n + 4 * (self.dim // self.group)]
        share = unpack_bits(key_codes[..., :n], self.bits) / (2**self.bits - 1) - 0.5
        key = (share * 2 ** (key_codes[..., n:] / 32) + 0.5) * self.range[layer] + self.low[layer]
        steps = scales.contiguous().view(torch.bfloat16).float().unflatten(-1, (-1, 2))
        value = unpack_bits(value_codes[..., :n], self.bits).unflatten(-1, (-1, self.group))
        value = (value * steps[..., 1:] + steps[..., :1]).flatten(-2)
        return self.turned(layer, key, positions).to(dtype), value.to(dtype)

    def lengths(self, layer: int, tier: Tensor | None) -> tuple[Tensor, Tensor]:
        n = self.dim * self.bits // 8
        return torch.tensor(n + 1), torch.tensor(n + 4 * (self.dim // self.group))


@claim("groups")
class FewBitsHold(Claim):
    statement: ClassVar[str] = (
        "two bits, with keys scaled per channel and values per token, keep almost the same quality (abstract)"
    )
    setting: ClassVar[str] = "2,048 tokens in pieces of 512, so that most are read from coded entries"

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, window=2048, chunk=512, skip=512), of=4)
        full = streams.read("full")
        ratios = {bits: streams.read(f"window:keep=1,code=groups(bits={bits})").over(full) for bits in (2, 3, 4)}
        return Finding(
            {"perplexity, full cache": full.perplexity} | {f"{bits} bits over full": r for bits, r in ratios.items()},
            {
                "2 bits within 5% of the full cache": ratios[2].value < 1.05,
                "4 bits within 1%": ratios[4].value < 1.01,
            },
        )
