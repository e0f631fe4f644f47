"""How much work a forward is: floating point operations of a prefill, bytes that a decode step reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from foveate.models.anatomy import anatomy
from foveate.models.caches import cache_bytes, with_cache


@torch.no_grad()
def prefill_flops(model: PreTrainedModel, ids: Tensor) -> int:
    """Floating point operations of one forward of token ids (batch, length), the last token's logits included.

    Attention counts as two full matrix products: what a causal kernel leaves out is left out of every model alike.

    Example:
        >>> import torch
        >>> from foveate.models.tiny import tiny
        >>> ids = torch.ones(1, 8, dtype=torch.long)
        >>> prefill_flops(tiny("llama", num_hidden_layers=2), ids) < prefill_flops(tiny("llama"), ids)
        True
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, use_cache=True, logits_to_keep=1)
    return int(counter.get_total_flops())


@torch.no_grad()
def step_bytes(model: PreTrainedModel, ids: Tensor) -> int:
    """Bytes that decoding one more token after ids (batch, length) reads: the weights, and the cache.

    Of an embedding that is not the head's, one row a sequence is next to nothing, and doesn't count. Weights that
    several depths share are read by each, and count so often.

    Example:
        >>> import torch
        >>> from foveate.models.tiny import tiny
        >>> model = tiny("llama")
        >>> step_bytes(model, torch.ones(1, 8, dtype=torch.long)) < sum(p.nbytes for p in model.parameters())
        True
    """
    parts = anatomy(model)
    seen: list[int] = []

    def note(module: nn.Module, *given: object) -> None:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if module is parts.head and not own:  # it reads the embedding's table
            own = [*parts.embedding.parameters(), *parts.embedding.buffers()]
        if module is not parts.embedding:
            seen.append(sum(tensor.nbytes for tensor in own))

    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    held = cache_bytes(cache)
    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        model(ids[:, -1:], **with_cache(cache), use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(seen) + held
