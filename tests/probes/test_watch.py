"""Watching: what is shown is what the model does, and the model does as it would have."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.anatomy import anatomy
from foveate.models.attention import replaced_attention
from foveate.models.patching import Site, recorded
from foveate.models.tiny import TINY_FAMILIES
from foveate.probes import watch as room
from foveate.probes.base import Data, Reading
from foveate.probes.induction import Induction
from foveate.probes.watch import Watch, Watcher, in_blocks, watch_all

LENGTH = 40
WINDOWED = ("gemma2", "gemma3_text", "mistral")
CASES = [*((family, {}) for family in TINY_FAMILIES), *((family, {"sliding_window": 16}) for family in WINDOWED)]


class Everything(Watch):
    """Keeps all that it is shown."""

    def __init__(self, model, sites=(), logits_wanted=False):
        self.parts, self.asked, self.logits_wanted = anatomy(model), list(sites), logits_wanted
        self.blocks, self.passages = [], []

    def sites(self):
        return self.asked

    def attention(self, seen):
        self.blocks.append(seen)

    def through(self, passage):
        self.passages.append(passage)

    def map(self, passage, layer):
        """(head, query, entry) of a layer, put together from its blocks."""
        blocks = [b for b in self.blocks if (b.passage, b.layer) == (passage, layer)]
        whole = torch.zeros(self.parts.heads, LENGTH, LENGTH, dtype=blocks[0].weights.dtype)
        for block in blocks:
            queries, entries = block.weights.shape[1:]
            assert entries == block.start + queries
            whole[:, block.start : block.start + queries, :entries] = block.weights
        return whole

    def reading(self):
        return Reading("induction", "all", "All.", setting={"mine": 1})


@dataclass(frozen=True)
class Keeps(Watcher):
    """A watcher that isn't registered."""

    made: Everything
    names: tuple = ("prose",)

    @property
    def streams(self):
        return self.names

    def watch(self, model, data):
        return self.made


def data_of(model, passages=2, length=LENGTH):
    return Data.of(model, fv.tiny_tokenizer(), length=length, passages=passages)


def eager(model, ids):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(ids, output_attentions=True, use_cache=False)


@pytest.mark.parametrize(("family", "given"), CASES, ids=lambda each: str(each))
@pytest.mark.parametrize("block", [1 << 24, 4 * LENGTH * 7], ids=["one block", "blocks of 7 queries"])
def test_attention_is_eager_attention(family, given, block, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", block)
    model = fv.tiny(family, **given).double()
    ids, watch = data_of(model).stream("prose", model), Everything(model)
    watch_all(model, data_of(model), [Keeps(made=watch)])
    starts = {b.start for b in watch.blocks}
    assert starts == ({0} if block > 1e6 else {0, 7, 14, 21, 28, 35})
    expected = eager(model, ids).attentions
    for passage in range(2):
        for layer, maps in enumerate(expected):
            # Some families' own softmax is in float32.
            torch.testing.assert_close(watch.map(passage, layer), maps[passage], atol=1e-6, rtol=1e-5)
    if given:  # the window is felt
        assert watch.map(0, 0)[:, 30, :14].abs().max() == 0


@pytest.mark.parametrize(("family", "given"), CASES, ids=lambda each: str(each))
def test_the_outputs_are_the_models_own(family, given, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", 4 * LENGTH * 7)
    model = fv.tiny(family, **given).double()
    watch = Everything(model, logits_wanted=True)
    watch_all(model, data_of(model), [Keeps(made=watch)])
    ids = data_of(model).stream("prose", model)
    expected = eager(model, ids).logits
    for passage in watch.passages:
        torch.testing.assert_close(passage.logits, expected[passage.passage], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_model_is_as_it_was(family):
    model, fresh = fv.tiny(family), fv.tiny(family)
    watch_all(model, data_of(model), [Keeps(made=Everything(model, [Site("residual", 2)])), Induction()])
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation == fresh.config._attn_implementation


def test_weights_keys_and_values_are_what_they_say():
    model = fv.tiny("llama")
    ids, watch = data_of(model).stream("prose", model), Everything(model)
    watch_all(model, data_of(model), [Keeps(made=watch)])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    for seen in watch.blocks:
        assert seen.weights.dtype == torch.float32 and seen.stream == "prose"
        assert torch.equal(seen.ids, ids[seen.passage])
        torch.testing.assert_close(seen.weights.sum(-1), torch.ones(4, LENGTH))
        torch.testing.assert_close(seen.keys, cache.layers[seen.layer].keys[seen.passage], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen.values, cache.layers[seen.layer].values[seen.passage], atol=1e-5, rtol=1e-4)


def test_in_bfloat16_weights_are_float32():
    model = fv.tiny("llama").to(torch.bfloat16)
    watch = Everything(model, [Site("mlp", 0)], logits_wanted=True)
    watch_all(model, data_of(model), [Keeps(made=watch)])
    assert all(seen.weights.dtype == torch.float32 for seen in watch.blocks)
    assert watch.passages[0].logits.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_values_at_sites_are_those_of_a_plain_forward(family):
    model = fv.tiny(family)
    sites = [Site("residual", 4), Site("mlp", 1), Site("head", 2, 3), Site("key", 0, 1), Site("attention", 3)]
    watch = Everything(model, sites)
    watch_all(model, data_of(model), [Keeps(made=watch)])
    ids = data_of(model).stream("prose", model)
    with torch.no_grad(), recorded(model, sites) as values:
        model(ids, use_cache=False)
    assert [p.passage for p in watch.passages] == [0, 1] and watch.passages[0].logits is None
    for passage in watch.passages:
        assert list(passage.values) == sites
        for site in sites:
            torch.testing.assert_close(passage.values[site], values[site][passage.passage], atol=1e-4, rtol=1e-4)


def test_several_watchers_see_what_each_would_alone():
    model = fv.tiny("gpt2")

    def kept():
        return [
            Keeps(made=Everything(model, [Site("mlp", 1), Site("residual", 0)])),
            Keeps(made=Everything(model, [Site("residual", 0), Site("head", 1, 1)], logits_wanted=True)),
            Keeps(made=Everything(model), names=("repeat", "prose")),
            Induction(),
        ]

    together, alone = kept(), kept()
    done = []
    data = data_of(model)
    data.progress = done.append
    shared = watch_all(model, data, together)
    assert done == sorted(done) and done[-1] == 1 and len(done) == 4  # two streams of two passages: one pass each
    for watcher, other, reading in zip(together, alone, shared, strict=True):
        single = watch_all(model, data_of(model), [other])[0]
        same = ("summary", "metrics", "roles", "setting")
        assert all(getattr(reading, name) == getattr(single, name) for name in same)
        for name, scores in single.scores.items():
            assert torch.equal(scores.scores, reading.scores[name].scores)
        if isinstance(watcher, Induction):
            continue
        assert len(watcher.made.blocks) == len(other.made.blocks)
        mine = {(b.stream, b.passage, b.layer): b.weights for b in watcher.made.blocks}
        assert {stream for stream, *_ in mine} == set(watcher.streams)
        for block in other.made.blocks:
            assert torch.equal(mine[block.stream, block.passage, block.layer], block.weights)
        for a, b in zip(watcher.made.passages, sorted(other.made.passages, key=lambda p: p.stream), strict=False):
            assert set(a.values) == set(watcher.made.asked) == set(b.values)
    first, second = together[0].made.passages[0], together[1].made.passages[0]
    assert first.logits is None and second.logits.shape == (LENGTH, 260)
    assert torch.equal(first.values[Site("residual", 0)], second.values[Site("residual", 0)])


def test_a_watch_without_attention_leaves_the_models_own_in_place():
    model, ways = fv.tiny("llama"), []

    class Blind(Everything):
        attention_wanted = False

        def through(self, passage):
            ways.append(model.config._attn_implementation)

    watch = Blind(model, [Site("mlp", 0)])
    original = model.config._attn_implementation
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda m, a: ways.append(m.self_attn.config._attn_implementation)
    )
    watch_all(model, data_of(model), [Keeps(made=watch)])
    handle.remove()
    assert not watch.blocks and set(ways) == {original}


def test_the_reading_tells_what_was_read():
    model = fv.tiny("llama")
    reading = watch_all(model, data_of(model, passages=1), [Keeps(made=Everything(model))])[0]
    assert reading.setting == {
        "streams": ["prose"],
        "text": "prose",
        "passages": 1,
        "length": LENGTH,
        "seed": 0,
        "mine": 1,
    }
    assert reading.seconds > 0
    short = fv.tiny("gpt2", max_position_embeddings=32)
    assert watch_all(short, data_of(short), [Keeps(made=Everything(short))])[0].setting["length"] == 32


def test_a_model_that_trains_is_read_in_eval_mode_and_trains_again():
    model = fv.tiny("gpt2", attn_pdrop=0.5, embd_pdrop=0.5).train()
    first, second = (Everything(model, [Site("residual", 3)]) for _ in range(2))
    for watch in (first, second):
        watch_all(model, data_of(model), [Keeps(made=watch)])
        assert model.training
    a, b = (w.passages[0].values[Site("residual", 3)] for w in (first, second))
    assert torch.equal(a, b) and not a.requires_grad


def test_after_an_error_the_model_is_as_it_was():
    model = fv.tiny("llama")
    before = model.config._attn_implementation

    class Fails(Everything):
        def attention(self, seen):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        watch_all(model.train(), data_of(model), [Keeps(made=Fails(model, [Site("mlp", 0)]))])
    assert model.training and model.config._attn_implementation == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_two_that_replace_attention_do_not_mix():
    model = fv.tiny("llama")
    attention = in_blocks(lambda *given: None)
    with replaced_attention(model, attention, "another"), pytest.raises(FoveateError, match="a reading: another"):
        watch_all(model, data_of(model), [Induction()])
