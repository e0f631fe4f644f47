"""Blockwise: codes are the nearest there are, bytes really fall, tied tables stay one."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.convert.blockwise import fill
from foveate.errors import FoveateError
from foveate.measure.weights import weight_bytes
from foveate.methods import apply
from foveate.models.stored import fingerprint
from foveate.models.tiny import tiny
from foveate.portable.blockwise import BlockwiseHead, BlockwiseTable, pack, unpack

IDS = torch.randint(3, 120, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", range(1, 9))
def test_what_is_packed_comes_out_again_in_as_many_bits(bits):
    codes = torch.randint(0, 2**bits, (5, 24), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 3 * bits)
    assert torch.equal(unpack(packed, bits), codes)


def rounded(weight, bits, block, shift):
    """One number after the other, in plain Python."""
    rows, columns = weight.shape
    groups = [[(r, c) for r in range(rows) for c in range(columns)]]
    if block is not None:
        groups = [
            [(r, c) for c in range(s, min(s + block, columns))] for r in range(rows) for s in range(0, columns, block)
        ]
    result = torch.zeros_like(weight)
    for group in groups:
        values = [float(weight[at]) for at in group]
        if shift:
            step = 2.0**-60
            while step * (2 ** (bits - 1) - 1) < max(map(abs, values)):
                step *= 2
            low = -(2 ** (bits - 1)) * step
        else:
            low = float(torch.tensor(min(values)).half())
            step = float(torch.tensor((max(values) - low) / (2**bits - 1)).half())
        for at, value in zip(group, values, strict=True):
            candidates = [low + code * step for code in range(2**bits)]
            result[at] = min(candidates, key=lambda each: abs(each - value))
    return result


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("block", [8, 16, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_weight_becomes_the_nearest_number_of_its_block(bits, block, shift):
    weight = torch.randn(3, 21) * torch.tensor([[1e-3], [1.0], [30.0]])  # 21: the last block is short
    table = BlockwiseTable(3, 21, bits, block, shift)
    fill(table, weight)
    ours, plain = table.numbers(torch.float32), rounded(weight, bits, block, shift)
    # Where two numbers are as near, either is right.
    torch.testing.assert_close((ours - weight).abs(), (plain - weight).abs(), atol=1e-6, rtol=1e-4)
    some = torch.tensor([2, 0, 2])
    assert torch.equal(table.numbers(torch.float32, some), ours[some])


@pytest.mark.parametrize("weight", [torch.zeros(2, 16), torch.full((2, 16), 0.37), torch.eye(16)[:2] * 1e-9])
@pytest.mark.parametrize("shift", [False, True])
def test_blocks_without_a_range_are_no_trouble(weight, shift):
    table = BlockwiseTable(2, 16, 4, 16, shift)
    fill(table, weight)
    off = (table.numbers(torch.float32) - weight).abs().max()
    assert off <= (0.07 if shift else 1e-3) * weight.abs().max() + 1e-7


def test_smaller_blocks_and_more_bits_are_nearer():
    weight = torch.randn(32, 256) * torch.rand(32, 1) ** 4

    def lost(bits, block):
        table = BlockwiseTable(32, 256, bits, block, False)
        fill(table, weight)
        return float((table.numbers(torch.float32) - weight).norm())

    assert lost(4, 32) < lost(4, 256) < lost(4, None)
    assert lost(8, 64) < lost(4, 64) < lost(3, 64) < lost(2, 64)


@pytest.mark.parametrize("bits, block, shift", [(4, 32, False), (8, None, False), (3, 16, True)])
def test_bytes_are_what_codes_and_parameters_take(bits, block, shift):
    model = tiny("llama", tie_word_embeddings=True)
    numel = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    norms = sum(p.numel() * 4 for p in model.parameters() if p.ndim == 1)
    matrices = sum(p.ndim == 2 for p in model.parameters())
    with apply(model, f"blockwise:bits={bits},block={block},shift={shift}"):
        blocks = matrices if block is None else numel // block
        assert weight_bytes(model) == norms + numel * bits // 8 + blocks * (1 if shift else 4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_tied_embedding_and_head_share_one_table(family):
    model = tiny(family, tie_word_embeddings=True)
    assert fv.anatomy(model).head.weight is fv.anatomy(model).embedding.weight
    full = model(IDS).logits
    with apply(model, "blockwise:bits=8,block=16"):
        head, embedding = fv.anatomy(model).head, fv.anatomy(model).embedding
        assert isinstance(head, BlockwiseHead) and head._table[0] is embedding
        assert not list(head.state_dict())
        near = model(IDS).logits
        assert (near - full).norm() < 0.1 * full.norm()
    with apply(model, "blockwise:embedding=false"):
        assert fv.anatomy(model).head.weight is fv.anatomy(model).embedding.weight


def test_a_change_of_dtype_touches_no_code_and_no_scale():
    model = tiny("llama")
    with apply(model, "blockwise:bits=4"):
        before = {key: value.clone() for key, value in model.state_dict().items() if "proj" in key}
        model.to(torch.bfloat16)
        assert model(IDS).logits.dtype == torch.bfloat16
        for key, value in before.items():
            assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("first", ["low-rank:keep=0.8", "recursive:rank=64"])
def test_it_works_on_what_another_converter_made(first):
    model = tiny("llama")
    with apply(model, first, calibration=IDS):
        converted, size = model(IDS).logits, weight_bytes(model)
    with apply(model, f"{first}+blockwise:bits=8,block=16", calibration=IDS):
        near = model(IDS).logits
        assert weight_bytes(model) < 0.4 * size
    assert (near - converted).norm() < 0.2 * converted.norm()


def test_gradients_pass_through():
    model = tiny("llama")
    with apply(model, "blockwise:bits=4"):
        model(IDS, labels=IDS).loss.backward()
        assert model.model.layers[0].input_layernorm.weight.grad.abs().sum() > 0


def test_models_in_other_bits_have_other_fingerprints():
    model, seen = tiny("llama"), set()
    for fields in ("bits=4", "bits=4,shift=true", "bits=8", "bits=8,block=32"):
        with apply(model, f"blockwise:{fields}"):
            seen.add(fingerprint(model))
    assert len(seen) == 4
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:8] += 1
    with apply(model, "blockwise:bits=4"):
        seen.add(fingerprint(model))
    assert len(seen) == 5


def test_wrong_requests_are_sentences():
    model = tiny("llama")
    for text, words in (
        ("blockwise:bits=9", "2 to 8"),
        ("blockwise:block=12", "multiple of 8"),
        ("blockwise:bits=8+blockwise:bits=4", "once"),
    ):
        with pytest.raises(FoveateError, match=words), apply(model, text):
            pass
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(FoveateError, match="65,504"), apply(model, "blockwise"):
        pass
