"""SkipDecode: the number of layers falls with the position, no entry is missing, skipped work is not done."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch

import foveate as fv
from foveate.depth.skip_decode import SkipDecode, _ExitEarly, _SkipRandom
from foveate.errors import FoveateError
from foveate.methods import Change, apply
from foveate.models.tiny import TINY_FAMILIES, tiny

IDS = torch.randint(3, 120, (2, 30), generator=torch.Generator().manual_seed(1))
FALLING = SkipDecode(min_layers=2, length=24)
# Gemma 2's attention is eager, with a softmax in float32.
CLOSE = {"gemma2": {"atol": 1e-4, "rtol": 1e-4}}
MODELS = [*((family, {}) for family in TINY_FAMILIES), *((g, {"sliding_window": 7}) for g in ("gemma2", "gemma3_text"))]


@contextmanager
def by_hand(model, ends):
    """The slow reference: every layer runs for all tokens, and for those from a position on, it is as if it had not."""
    with ExitStack() as hooks:
        for layer in fv.anatomy(model).layers:

            def after(module, args, kwargs, out, index=layer.index):
                end = ends.get(index, out.shape[1])
                before = args[0] if args else kwargs["hidden_states"]
                return torch.cat([out[:, :end], before[:, end:]], dim=1)

            hooks.callback(layer.module.register_forward_hook(after, with_kwargs=True).remove)
        yield


def in_pieces(model, ids, cuts):
    cache, logits = None, []
    for a, b in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(ids[:, a:b], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("given", [{}, {"max_layers": 20}, {"warmup": 0, "min_layers": 1}, {"length": 2}])
def test_the_number_never_rises_and_later_tokens_run_a_subset(given):
    decode = SkipDecode(**{"min_layers": 5, "length": 50, **given})
    ends = decode.ends(24)
    before = set(range(24))
    for position in range(60):
        run = {layer for layer in range(24) if position < ends.get(layer, 10**9)}
        assert run <= before and len(run) == decode.layers_at(position, 24)
        assert run >= {*range(decode.warmup), *range(24 - decode.min_layers + decode.warmup, 24)}
        assert run == {*range(decode.warmup), *range(24 - len(run) + decode.warmup, 24)}  # the upper ones
        before = run
    assert decode.layers_at(0, 24) == (decode.max_layers or 24) and len(before) == decode.min_layers


@torch.no_grad()
@pytest.mark.parametrize("family,given", MODELS)
def test_whole_pieces_and_one_by_one_are_the_reference(family, given):
    model = tiny(family, **given).double()
    with by_hand(model, FALLING.ends(4)):
        expected = model(IDS).logits
    full = model(IDS).logits
    with apply(model, FALLING):
        results = [model(IDS).logits, model(IDS, use_cache=True).logits]
        for cuts in ((4, 12, 20, 21), range(1, 30)):
            logits, cache = in_pieces(model, IDS, list(cuts))
            results.append(logits)
            assert [layer.get_seq_length() for layer in cache.layers] == [30, 6, 18, 30]
    for logits in results:
        torch.testing.assert_close(logits, expected, **CLOSE.get(family, {"atol": 1e-9, "rtol": 1e-9}))
    assert not torch.allclose(expected, full, atol=1e-2)
    assert torch.equal(model(IDS).logits, full)
    assert all("forward" not in vars(layer.module) for layer in fv.anatomy(model).layers)


@torch.no_grad()
@pytest.mark.parametrize("family,given", MODELS)
def test_padded_rows_are_as_they_are_alone(family, given):
    model = tiny(family, **given)
    model = model if family == "gemma2" else model.double()  # its mask of a float64's least gives NaN as a float32
    rows = [IDS[:1], IDS[1:, :17]]
    padded = torch.cat([rows[0], torch.cat([torch.full((1, 13), 256), rows[1]], dim=1)])
    mask = (padded != 256).long()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with apply(model, SkipDecode(min_layers=2, length=34)):  # it still falls while tokens are generated
        alone = [model.generate(row, **options) for row in rows]
        both = model.generate(padded, attention_mask=mask, **options)
    for row, one in enumerate(alone):
        assert torch.equal(both.sequences[row, 30:], one.sequences[0, -6:])
        together = torch.stack(both.logits)[:, row]
        expected = torch.stack(one.logits)[:, 0]
        torch.testing.assert_close(together, expected, **CLOSE.get(family, {"atol": 1e-8, "rtol": 1e-8}))


def test_skipped_work_is_not_done():
    model, tokens = tiny("llama"), [0, 0, 0, 0]
    for i, layer in enumerate(model.model.layers):

        def count(module, args, out, i=i):
            tokens[i] += out.shape[1]

        layer.mlp.register_forward_hook(count)
    with apply(model, FALLING):
        model(IDS)
        assert tokens == [30, 6, 18, 30]
        tokens[:] = [0] * 4
        in_pieces(model, IDS, [10, 11, 25])
        assert tokens == [30, 6, 18, 30]
        ends = FALLING.ends(4)
        assert sum(tokens) == sum(FALLING.layers_at(p, 4) for p in range(30)) == 60 + ends[1] + ends[2]


@torch.no_grad()
@pytest.mark.parametrize("other", [_ExitEarly, lambda **given: _SkipRandom(seed=3, **given)])
def test_the_alternatives_miss_no_entry_either(other):
    model = tiny("llama").double()
    early = other(min_layers=1, warmup=0, length=24)
    with by_hand(model, early.ends(4)):
        expected = model(IDS).logits
    with apply(model, early):
        logits, cache = in_pieces(model, IDS, [3, 9, 10, 22])
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    assert cache.get_seq_length() == 30 and len(early.ends(4)) == 3


@torch.no_grad()
def test_a_cropped_cache_goes_on_where_it_was_cut():
    model = tiny("llama").double()
    with apply(model, FALLING):
        expected = model(IDS).logits
        _, cache = in_pieces(model, IDS, [12])
        cache.crop(-17)
        assert [layer.get_seq_length() for layer in cache.layers] == [13, 6, 13, 13]
        logits = model(IDS[:, 13:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[:, 13:], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_all_layers_for_all_tokens_is_the_model_itself():
    model = tiny("llama")
    full = model(IDS).logits
    with apply(model, "skip-decode:min_layers=4"):
        assert torch.equal(model(IDS).logits, full)


@torch.no_grad()
@pytest.mark.parametrize(
    "recipe,layers",
    [
        ("skip-layers:keep=0.75+skip-decode:min_layers=2,length=24", [30, 12, 0, 30]),
        ("drop-attention:keep=0.75+skip-decode:min_layers=2,length=24", None),
    ],
)
def test_after_layers_or_attention_left(recipe, layers):
    model = tiny("llama").double()
    with apply(model, recipe, calibration=IDS[:1]):
        whole = model(IDS, use_cache=True).logits
        logits, cache = in_pieces(model, IDS, [3, 9, 10, 22])
        assert layers is None or [layer.get_seq_length() for layer in cache.layers] == layers
    torch.testing.assert_close(logits, whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("recipe", ["{}+window:entries=8", "window:entries=8+{}"])
def test_a_cache_policy_gets_a_sentence(recipe):
    model = tiny("llama")
    with apply(model, recipe.format(FALLING)), pytest.raises(FoveateError, match="without a cache policy"):
        model(IDS, use_cache=True)
    assert all("forward" not in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize(
    "fields,says",
    [
        ("min_layers=1", "no upper layer"),
        ("min_layers=3,max_layers=2", "must fall"),
        ("min_layers=2,length=1", "below 2"),
        ("min_layers=9", "only 4 layers"),
        ("min_layers=2,max_layers=5", "only 4 layers"),
        ("min_layers=2+skip-decode:min_layers=2", "replaced already"),
    ],
)
def test_what_can_not_be_gets_a_sentence(fields, says):
    with pytest.raises(FoveateError, match=says), apply(tiny("llama"), f"skip-decode:{fields}"):
        pass


def test_it_is_not_for_good():
    assert not issubclass(SkipDecode, Change)
