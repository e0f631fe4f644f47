"""The cache of a policy: the entries of all layers, and what each KV head may hold of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from foveate.cache.budgets.base import allot
from foveate.cache.entries import NO_LIMIT, Limits, PolicyLayer, Received, Step
from foveate.errors import FoveateError

if TYPE_CHECKING:
    from foveate.cache.base import CachePolicy
    from foveate.cache.coders.base import Coder


class PolicyCache(Cache):
    """The cache of a policy: a `PolicyLayer` for each layer, and how many tokens each sequence has seen.

    `get_seq_length` is the number of tokens that went through, not of entries held, so that positions go on as in the
    text.
    """

    bears_gaps = True  # see NoAttention
    layers: list[PolicyLayer]  # type: ignore[assignment]

    def __init__(
        self,
        policy: CachePolicy,
        layers: int,
        context: int | None,
        weights: Tensor | None,
        coder: Coder | None,
        renumbers: bool,
    ):
        self.policy, self.context, self.weights, self.renumbers = policy, context, weights, renumbers
        self.step: Step | None = None
        self.reset()
        super().__init__(layers=[PolicyLayer(i, policy, coder) for i in range(layers)])

    def reset(self) -> None:
        self.seen = 0  # columns, padding included: what transformers counts
        self.counts: Tensor | None = None  # (batch,) int64, on the CPU: real tokens of each sequence
        self.prompt: Tensor | None = None  # (batch,) of these, tokens that came in forwards of more than one
        self.measured: Tensor | None = None  # (layer, batch, kv_head): the budget's weights, where it measures them
        self.limits: Limits | None = None
        for layer in getattr(self, "layers", ()):
            layer.reset()

    def begin(self, batch: int, new: int, valid: Tensor | None, device: torch.device) -> None:
        """Note the tokens of the forward that starts."""
        start = torch.zeros(batch, dtype=torch.int64) if self.counts is None else self.counts
        end = start + (new if valid is None else valid.sum(-1).cpu())
        order = torch.arange(new, device=device) if valid is None else valid.long().cumsum(-1) - 1
        watches, gain, fade = self.policy.watches(), None, None
        if watches is not None and (valid is not None or watches != Received()):
            real = torch.ones(1, new, dtype=torch.bool, device=device) if valid is None else valid
            count = real.sum(-1, keepdim=True)
            gain, faded = watches.weights(count - real.long().cumsum(-1), count)
            gain, fade = gain * real, faded[..., None]
        reading = new > 1 or self.prompt is None
        if reading or self.policy.grows:
            self.prompt = end
        if reading and self.weights is None:
            self.limits = None  # the budget measures this forward first
        elif reading or self.policy.grows or self.limits is None:  # it stays the same while tokens are generated
            self.limits = self._limits(device)
        before, after = start.view(-1, 1, 1).to(device), end.view(-1, 1, 1).to(device)
        self.after = end
        self.step = Step(new, before, after, before[:, 0] + order, valid, self.limits, gain, fade)

    def _limits(self, device: torch.device) -> Limits:
        """What each KV head may hold, of the prompt as far as it is known."""
        assert self.prompt is not None  # begin ran
        weights = self.measured
        if weights is None:
            assert self.weights is not None  # known before the text, or measured
            weights = self.weights[:, None].expand(-1, len(self.prompt), -1)
        table = torch.full(weights.shape, NO_LIMIT, dtype=torch.int64)
        for row, prompt in enumerate(self.prompt.tolist()):
            mean = self.policy.capacity(prompt, self.context)
            if mean is not None:
                most = max(prompt, self.context or 0, mean)
                table[:, row] = allot(weights[:, row], mean, min(mean, self.policy.sinks + 1), most)
        return Limits.from_table(table, device)

    def finish(self) -> None:
        """The forward is through."""
        step = self.step
        if step is not None and step.waiting:
            # The budget measures every layer; one that holds nothing (it is skipped) takes no part.
            shares = {layer.index: self.policy.budget.measure(view).float().cpu() for layer, view, _ in step.waiting}
            none = torch.zeros_like(next(iter(shares.values())))
            self.measured = torch.stack([shares.get(i, none) for i in range(len(self.layers))])
            self.limits = self._limits(step.end.device)
            for layer, view, sliding_window in step.waiting:
                layer.evict(view, self.limits, sliding_window)
        if self.step is not None:
            self.counts, self.seen, self.step = self.after, self.seen + self.step.new, None

    def reach(self) -> int:
        """The largest distance, in positions as attention sees them, from the last token back to an entry held."""
        if self.renumbers:
            return max(int(layer.held().max()) for layer in self.layers)
        oldest = [p.masked_fill(p < 0, self.seen).min() for layer in self.layers if (p := layer.positions) is not None]
        return self.seen - int(min(oldest))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.step is None:
            raise FoveateError("a policy's cache works only inside the `with` block of the recipe it came from.")
        return self.layers[layer_idx].update(key_states, value_states, self.step)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def _rows(self, pick: Any) -> None:
        for layer in self.layers:
            layer.rows(pick)
        if self.counts is not None and self.prompt is not None:
            self.counts, self.prompt = pick(self.counts), pick(self.prompt)
        self.measured = None if self.measured is None else pick(self.measured.transpose(0, 1)).transpose(0, 1)
        self.limits = None  # they follow the rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (a positive number is a length to keep); what was evicted to
        make room for them does not come back."""
        remove = -tokens_to_remove if tokens_to_remove <= 0 else self.seen - tokens_to_remove
        if remove <= 0 or self.counts is None or self.prompt is None:
            return
        self.seen -= remove
        self.counts = (self.counts - remove).clamp(min=0)
        self.prompt = torch.minimum(self.prompt, self.counts)
        self.limits = None  # they follow the prompt
        for layer in self.layers:
            if layer.is_initialized:
                layer.forget_from(self.counts)
                layer.seen -= remove
