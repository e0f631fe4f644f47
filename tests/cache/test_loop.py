"""The decode loop: token by token the same as the policy's own cache, in memory that never grows."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.cache.base import CachePolicy
from foveate.cache.budgets import EVERYTHING, Budget
from foveate.cache.loop import DecodeLoop
from foveate.cache.slots import SlotCache
from foveate.errors import FoveateError
from foveate.methods import Recipe, apply
from foveate.models.anatomy import anatomy
from foveate.models.caches import cache_bytes
from foveate.models.tiny import TINY_FAMILIES, tiny

MODEL = tiny("llama").double()
IDS = torch.randint(3, 120, (2, 40), generator=torch.Generator().manual_seed(1))


class Ragged(Budget):
    """Another weight for every head; the first head keeps everything."""

    name = "ragged"
    claim = "for tests"

    def weights(self, target, keep):
        parts = anatomy(target.model)
        weights = torch.arange(1.0, 1 + len(parts.layers) * parts.kv_heads).view(len(parts.layers), parts.kv_heads)
        weights[0, 0] = EVERYTHING
        return weights


class Measured(Ragged):
    measured = True

    def measure(self, view):
        return view.received[..., -1] + 0.1


def method(name: str, **fields) -> CachePolicy:
    cls = type(Recipe.of(f"{name}:keep=1").methods[0])
    return cls(**fields)


def prefill(model, ids, mask=None):
    """The prompt's cache and its most likely next tokens, read as `generate` reads it."""
    extra = {}
    if mask is not None:
        extra = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    out = model(ids, use_cache=True, **extra)
    return out.past_key_values, out.logits[:, -1:].argmax(-1)


@torch.no_grad()
def reference(model, ids, recipe, steps, mask=None):
    """Tokens (batch, steps), logits (batch, steps, vocab) and the cache of plain forwards."""
    tokens, logits = [], []
    with apply(model, recipe):
        cache, following = prefill(model, ids, mask)
        for _ in range(steps):
            extra = {}
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                extra = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
            out = model(following, past_key_values=cache, use_cache=True, **extra)
            following = out.logits[:, -1:].argmax(-1)
            tokens.append(following)
            logits.append(out.logits[:, -1])
    return torch.cat(tokens, 1), torch.stack(logits, 1), cache


@torch.no_grad()
def ours(model, ids, recipe, steps, mask=None, **options):
    options.setdefault("room", steps)
    with apply(model, recipe):
        cache, following = prefill(model, ids, mask)
        if recipe == "full":
            options["attention_mask"] = mask
        loop = DecodeLoop(model, cache, **options)
        logits = []
        for _ in range(steps):
            logits.append(loop.step(following))
            following = logits[-1].argmax(-1, keepdim=True)
        cache, following = prefill(model, ids, mask)
        tokens = DecodeLoop(model, cache, **options).generate(following, steps)
    return tokens, torch.stack(logits, 1), loop


def same(model, ids, recipe, steps, mask=None, **options):
    tokens, logits, cache = reference(model, ids, recipe, steps, mask)
    our_tokens, our_logits, loop = ours(model, ids, recipe, steps, mask, **options)
    torch.testing.assert_close(our_logits, logits, atol=1e-5, rtol=0)
    assert torch.equal(our_tokens, tokens)
    if recipe != "full":
        for layer, slots in zip(cache.layers, loop.cache.layers, strict=True):
            held = [[[p for p in head if p >= 0] for head in row] for row in layer.positions.tolist()]
            assert slots.held_positions() == held
            assert slots.held().tolist() == layer.held().tolist()
    return loop


RECIPES = [
    "full",
    "h2o:keep=1",
    "window:keep=0.3",
    "streaming:keep=0.3,positions=text",
    "streaming:keep=0.3",
    "h2o:keep=0.3",
    "h2o:keep=0.3,positions=cache",
    "h2o:entries=55",  # fills up on the way
    "random:keep=0.3,budget=pyramid",
    "h2o:keep=0.3,budget=pyramid(slope=3)",
    method("h2o", keep=0.3, budget=Ragged()),
    method("h2o", keep=0.3, budget=Ragged(), positions="cache"),
    method("h2o", keep=0.3, budget=Measured()),
    method("streaming", keep=0.3, budget=Ragged()),
    method("window", keep=0.3, budget=Ragged()),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_loop_is_the_policy(recipe):
    same(MODEL, IDS, recipe, 30)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_also_in_a_batch_with_padding(recipe):
    mask = torch.ones_like(IDS)
    mask[1, :13] = 0
    same(MODEL, IDS, recipe, 20, mask)


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("recipe", ["full", "h2o:keep=0.3", "streaming:keep=0.3"])
def test_every_family(family, recipe):
    same(tiny(family).double(), IDS, recipe, 8)


@pytest.mark.parametrize(
    "recipe", ["streaming:entries=9", "streaming:entries=9,sinks=0", "window:entries=9,positions=cache"]
)
@pytest.mark.parametrize("prompt", [2, 4, 7, 30])  # shorter than the sinks, than the budget, and longer
def test_sinks_move_along(recipe, prompt):
    loop = same(MODEL, IDS[:, :prompt], recipe, 25)
    assert (loop.cache.layers[0].rank is None) == (prompt >= 4 or recipe != "streaming:entries=9")


def test_what_is_received_fades():
    from foveate.cache.entries import Received
    from foveate.cache.h2o import H2O

    class Fading(H2O):
        def received(self):
            return Received(forget=0.7)

    class Lately(H2O):
        def received(self):
            return Received(last=4)

    for policy in (Fading(keep=0.3), Lately(keep=0.3)):
        same(MODEL, IDS, policy, 20)


def test_the_budget_holds_and_memory_is_flat():
    with apply(MODEL, "h2o:keep=0.3"), torch.no_grad():
        cache, following = prefill(MODEL, IDS)
        loop = DecodeLoop(MODEL, cache)
        assert cache_bytes(cache) == 0  # the entries have moved
        before = cache_bytes(loop.cache), [layer.keys.data_ptr() for layer in loop.cache.layers]
        for _ in range(100):
            loop.generate(following, 1)
            assert all(int(layer.held().max()) <= 12 for layer in loop.cache.layers)
        assert before == (cache_bytes(loop.cache), [layer.keys.data_ptr() for layer in loop.cache.layers])
        assert all(len(layer.keys) == 2 * 2 * 13 for layer in loop.cache.layers)  # and the token at work


def test_the_model_is_left_as_it_was():
    before = MODEL.config._attn_implementation
    with apply(MODEL, "window:keep=0.3"):
        inside = MODEL.config._attn_implementation
        cache, following = prefill(MODEL, IDS)
        DecodeLoop(MODEL, cache).generate(following, 2)
        assert MODEL.config._attn_implementation == inside
        prefill(MODEL, IDS)  # the policy is still in force
    assert MODEL.config._attn_implementation == before
    cache, following = prefill(MODEL, IDS)
    DecodeLoop(MODEL, cache, room=3).generate(following, 2)
    assert MODEL.config._attn_implementation == before


@pytest.mark.parametrize("recipe", ["skip-layers:keep=0.75+h2o:keep=0.3", "skip-layers:keep=0.75"])
def test_layers_that_are_skipped_stay_so(recipe):
    tokens, logits, _ = reference(MODEL, IDS, recipe, 10)
    our_tokens, our_logits, loop = ours(MODEL, IDS, recipe, 10)
    torch.testing.assert_close(our_logits, logits, atol=1e-5, rtol=0)
    assert torch.equal(our_tokens, tokens) and len(loop.cache.filled) == 3


def test_sampling_follows_the_model():
    """Of a batch of the same sequence, the first sampled tokens are as frequent as they are likely."""
    ids = IDS[:1, :8].expand(2000, -1)
    with apply(MODEL, "window:entries=4"), torch.no_grad():
        cache, following = prefill(MODEL, ids)
        likely = DecodeLoop(MODEL, cache).step(following)[0].div(3.0).softmax(-1)
        cache, _ = prefill(MODEL, ids)
        drawn = DecodeLoop(MODEL, cache).generate(following, 1, temperature=3.0)[:, 0]
    seen = torch.bincount(drawn, minlength=len(likely)) / len(ids)
    assert float((seen - likely).abs().max()) < 0.03
    assert float(likely.max()) < 0.9  # there was something to draw


def test_compiled_pieces_give_the_same():
    from torch._dynamo.testing import CompileCounter

    from foveate.cache import loop as module

    counter = CompileCounter()
    module._compile.cache_clear()
    original, torch.compile = (
        torch.compile,
        lambda function, dynamic: original(function, backend=counter, dynamic=dynamic),
    )
    try:
        for recipe in ("h2o:keep=0.3,budget=pyramid", RECIPES[11]):
            same(MODEL, IDS, recipe, 12, compile=True)
        same(tiny("qwen3").double(), IDS, "streaming:keep=0.3", 8, compile=True)
    finally:
        torch.compile = original
        module._compile.cache_clear()
        torch._dynamo.reset()
    assert counter.frame_count < 40  # by kind of piece, not by layer
    assert all("forward" not in vars(part) for part in MODEL.modules())


class OrderMatters(type(method("window", keep=1))):  # type: ignore[misc]
    def score(self, view):
        return torch.arange(view.positions.shape[-1]).expand(view.positions.shape).float()


@pytest.mark.parametrize(
    "recipe,options,says",
    [
        ("full", {}, "room=N"),
        ("h2o:keep=1", {}, "room=N"),
        ("h2o:keep=0.3,grows=true", {}, "grows"),
        (OrderMatters(keep=0.3), {}, "order"),
    ],
)
def test_what_slots_cannot_do_is_said(recipe, options, says):
    with apply(MODEL, recipe), torch.no_grad():
        cache, _ = prefill(MODEL, IDS)
        with pytest.raises(FoveateError, match=says):
            DecodeLoop(MODEL, cache, **options)


def test_too_little_room_is_said():
    cache, following = prefill(MODEL, IDS)
    loop = DecodeLoop(MODEL, cache, room=3)
    loop.generate(following, 2)
    with pytest.raises(FoveateError, match="room for 3"):
        loop.generate(following, 2)
    with pytest.raises(FoveateError, match="one token a sequence"):
        loop.step(IDS)
    with pytest.raises(FoveateError, match="the cache is empty"):
        DecodeLoop(MODEL, cache, room=3)


def test_windows_of_the_model_are_said():
    model = tiny("gemma2", sliding_window=16)
    cache, _ = prefill(model, IDS)
    with pytest.raises(FoveateError, match="window of 16"):
        DecodeLoop(model, cache, room=3)


def test_positions_that_run_out_are_said():
    model = tiny("gpt2", max_position_embeddings=42)
    with apply(model, "window:keep=0.3"):
        cache, following = prefill(model, IDS)
        loop = DecodeLoop(model, cache)
        loop.generate(following, 2)
        with pytest.raises(FoveateError, match="42 positions"):
            loop.generate(following, 1)


def test_it_is_public():
    assert fv.DecodeLoop is DecodeLoop and SlotCache


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "recipe", ["full", "h2o:keep=0.3", method("h2o", keep=0.3, budget=Ragged()), "streaming:keep=0.3"]
)
def test_captured_steps_give_the_same(recipe, compile, dtype):
    model = tiny("llama", hidden_size=128).to("cuda", dtype)  # heads of 32, as the kernel takes them
    ids = IDS.cuda()
    with apply(model, recipe), torch.no_grad():
        logits = []
        for graph in (False, True):
            cache, following = prefill(model, ids)
            loop = DecodeLoop(model, cache, room=30, graph=graph, compile=compile and graph)
            assert (loop.plain_because is None) == (dtype == torch.bfloat16)
            fed = torch.randint(3, 120, (30, 2, 1), generator=torch.Generator().manual_seed(2)).cuda()
            logits.append(torch.stack([loop.step(token) for token in fed]))
            assert bool(loop.graphs) == graph
        off = (logits[1] - logits[0]).abs().float()
        # In bfloat16, entries that received nearly the same may go in another order.
        assert float(off.max()) < 1e-3 if dtype == torch.float32 else float(off.median()) < 0.1
        cache, following = prefill(model, ids)
        loop = DecodeLoop(model, cache, room=60)
        drawn = loop.generate(following, 30, temperature=2.0)
        assert len(set(drawn.flatten().tolist())) > 5  # replays draw anew
        loop.generate(following, 30)
        assert set(loop.graphs) == {False, True}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_never_waits_for_the_device():
    model = tiny("llama", hidden_size=128).to("cuda", torch.bfloat16)
    with apply(model, "h2o:keep=0.3"), torch.no_grad():
        cache, following = prefill(model, IDS.cuda())
        loop = DecodeLoop(model, cache)
        loop.generate(following, 5)  # captured by now
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop.generate(following, 5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
