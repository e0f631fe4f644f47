"""Work of a forward, against what is counted by hand."""

from __future__ import annotations

import torch

import foveate as fv
from foveate.models.work import prefill_flops, step_bytes

IDS = torch.arange(1, 65).unsqueeze(0)


def test_operations_are_those_of_the_matrix_products():
    model = fv.tiny("llama")
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    attention = 4 * 2 * 64 * 64 * 64  # layers, products, queries x keys x (heads x head_dim)
    rotary = 8 * 64 * 2  # frequencies times positions
    assert abs(prefill_flops(model, IDS) - 2 * (64 * layers + attention + 260 * 64)) <= 2 * rotary


def test_a_step_reads_every_weight_once_and_shared_ones_as_often_as_they_are_used():
    model = fv.tiny("llama")
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    cache = 4 * 2 * 2 * 16 * 64 * 4  # layers, keys and values, KV heads, head_dim, entries, bytes
    rotary = sum(b.nbytes for b in model.buffers())
    assert 0 <= step_bytes(model, IDS) - weights - cache <= rotary
    with fv.apply(model, "recursive:rank=0"):
        assert abs(step_bytes(model, IDS) - weights - cache) <= rotary
