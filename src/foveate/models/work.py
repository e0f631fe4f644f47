"""How much work a forward is: floating point operations of a prefill, bytes that a decode step reads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from foveate.models.caches import cache_bytes


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

    Of an embedding that is not the head's, one row a sequence is next to nothing, and doesn't count.

    Example:
        >>> import torch
        >>> from foveate.models.tiny import tiny
        >>> model = tiny("llama")
        >>> step_bytes(model, torch.ones(1, 8, dtype=torch.long)) < sum(p.nbytes for p in model.parameters())
        True
    """
    weights = {id(p): p.nbytes for p in model.parameters()} | {id(b): b.nbytes for b in model.buffers()}
    table = model.get_input_embeddings().weight
    if table is not model.get_output_embeddings().weight:  # type: ignore[union-attr]
        weights.pop(id(table), None)
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    return sum(weights.values()) + cache_bytes(cache)
