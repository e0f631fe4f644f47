"""Blend: what is remade is right, what is not is as it was stored, and those remade are those that differ most."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import foveate as fv
from foveate.cache.blend import FewTokensMendTheRest, _counts, blend
from foveate.claims import CLAIMS
from foveate.errors import FoveateError
from foveate.models.caches import cache_bytes
from foveate.models.tiny import TINY_FAMILIES, tiny

ROTARY = [family for family in TINY_FAMILIES if fv.anatomy(tiny(family)).positions == "rotary"]
IDS = torch.randint(3, 120, (1, 60), generator=torch.Generator().manual_seed(1))
PARTS = list(IDS.split([14, 9, 21, 16], dim=1))
CHUNKS, QUESTION = PARTS[:-1], PARTS[-1]


@pytest.fixture(scope="module", params=ROTARY)
def model(request):
    return tiny(request.param)


def windowed(family):
    """A model whose layers (or some of them) see 12 tokens only: fewer than a chunk has."""
    return tiny(family, sliding_window=12)


def check_everything_remade_is_a_full_prefill(model):
    with torch.no_grad():
        full = model(IDS, use_cache=True)
        more = model(IDS[:, :5], past_key_values=full.past_key_values)
        out = blend(model, CHUNKS, QUESTION, recompute=1)
        ours = model(IDS[:, :5], past_key_values=out.past_key_values)
    torch.testing.assert_close(out.logits, full.logits[:, -16:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.logits, more.logits, atol=1e-4, rtol=1e-4)
    assert type(out.past_key_values) is DynamicCache
    assert cache_bytes(out.past_key_values) == cache_bytes(full.past_key_values)
    for one, other in zip(out.past_key_values.layers, full.past_key_values.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-4)


def test_everything_remade_is_a_full_prefill(model):
    check_everything_remade_is_a_full_prefill(model)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "phi3"])
def test_also_where_layers_have_windows_of_their_own(family):
    check_everything_remade_is_a_full_prefill(windowed(family))


def test_generation_goes_on(model):
    with torch.no_grad():
        out = blend(model, CHUNKS, QUESTION, recompute=1)
    ids = torch.cat([IDS, out.logits[:, -1:].argmax(-1)], dim=1)
    given = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    ours = model.generate(ids, attention_mask=mask, past_key_values=out.past_key_values, **given)
    assert torch.equal(ours, model.generate(ids, attention_mask=mask, **given))


class Reference:
    """The same for Llama in float64, written out: every layer over all tokens, then the stale ones put back."""

    def __init__(self, model):
        self.model, self.layers = model, model.model.layers

    def read(self, ids, start, stale=None, chosen=None):
        """Hidden states after all layers, and keys and values; token t's entries in layer i are taken from `stale`
        unless t is in chosen[i], and its hidden state is then worth nothing."""
        hidden = self.model.model.embed_tokens(ids)
        n = ids.shape[1]
        cos, sin = self.model.model.rotary_emb(hidden, torch.arange(start, start + n)[None])
        made = []
        for i, layer in enumerate(self.layers):
            x, attention = layer.input_layernorm(hidden), layer.self_attn
            q, k, v = (
                p(x).view(1, n, -1, attention.head_dim).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = (t * cos[:, None] + self.half(t) * sin[:, None] for t in (q, k))
            fresh = (k.clone(), v.clone())
            if stale is not None:
                old = torch.tensor([t for t in range(n) if t not in chosen(i, fresh)])
                if len(old):
                    k[:, :, old], v[:, :, old] = stale[i][0][:, :, old], stale[i][1][:, :, old]
            made.append((k, v))
            group = q.shape[1] // k.shape[1]
            logits = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * attention.scaling
            weights = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
            mixed = (weights @ v.repeat_interleave(group, 1)).transpose(1, 2).reshape(1, n, -1)
            hidden = hidden + attention.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(self.model.model.norm(hidden)), made

    @staticmethod
    def half(x):
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)


@pytest.mark.parametrize("recompute", [0.0, 0.3, 0.7])
@torch.no_grad()
def test_same_as_a_reference_that_reads_chunks_at_their_places(recompute):
    """Chunks are read alone, but at their places at once, so that nothing needs to be rotated."""
    model = tiny("llama", num_hidden_layers=6).double()
    reference, first, chunked = Reference(model), 14, 44
    pieces, start = [], 0
    for chunk in CHUNKS:
        pieces.append(reference.read(chunk, start)[1])
        start += chunk.shape[1]
    room = torch.zeros(1, 2, 16, 16).double()
    stale = [tuple(torch.cat([*(p[i][j] for p in pieces), room], 2) for j in (0, 1)) for i in range(6)]
    picked, question = {-1: set(range(first, chunked))}, set(range(chunked, 60))

    def chosen(layer, fresh):
        """Which tokens are remade in a layer; and for the next one, those of them that differ most here."""
        if recompute == 0:
            return question
        here = picked[layer - 1]
        apart = sum((a - b).abs().sum((0, 1, 3)) for a, b in zip(fresh, stale[layer], strict=True))
        part = [30, 30, *(30 * recompute * x for x in (1.2, 1 + 0.2 / 3, 1 - 0.2 / 3, 0.8))]
        if layer < 5:
            picked[layer] = set(sorted(here, key=lambda t: -float(apart[t]))[: round(part[layer + 1])])
        return here | question

    logits, made = reference.read(IDS, 0, stale, chosen)
    out = blend(model, CHUNKS, QUESTION, recompute=recompute)
    torch.testing.assert_close(out.logits, logits[:, -16:], atol=1e-5, rtol=1e-5)
    for layer, (keys, values) in zip(out.past_key_values.layers, made, strict=True):
        torch.testing.assert_close(layer.keys, keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.values, values, atol=1e-5, rtol=1e-5)


def test_the_fraction_is_the_mean_over_the_later_layers_and_falls():
    counts = _counts(1000, 0.15, 30)
    assert counts[:3] == [1000, 1000, 180] and counts[-1] == 120 and counts == sorted(counts, reverse=True)
    assert sum(counts[2:]) == pytest.approx(28 * 150, abs=28)
    assert _counts(1000, 0.95, 12)[2] == 1000 and sum(_counts(1000, 0.95, 12)[2:]) == pytest.approx(9500, abs=10)
    assert _counts(7, 1.0, 4) == [7] * 4 and _counts(7, 0.0, 3) == [0] * 3
    assert _counts(10, 0.5, 1) == [10] and _counts(10, 0.5, 3) == [10, 10, 5]


def test_one_chunk_needs_no_mending(model):
    with torch.no_grad():
        full = model(IDS).logits[:, -16:]
    out = blend(model, [IDS[:, :44]], QUESTION, recompute=0)
    torch.testing.assert_close(out.logits, full, atol=1e-4, rtol=1e-4)


def test_the_store_reads_a_chunk_once_and_forgets_the_one_unused_longest():
    model, read = tiny("llama"), []
    store = fv.ChunkCache(model, tokens=25)
    handle = model.model.register_forward_hook(lambda *_: read.append(1))
    one, two, three = CHUNKS  # of 14, 9 and 21 tokens
    first = store.entries(one)
    store.entries(two)
    assert store.entries(one[0]) is first and len(read) == 2 and len(store) == 23
    store.entries(torch.tensor([5, 6, 7]))
    assert len(store) == 17  # `two` is gone
    store.entries(two)
    assert len(read) == 4 and len(store) == 12  # and now `one`
    store.entries(torch.arange(1, 40))
    assert len(store) == 12  # what never fits isn't held, and drives nothing out
    handle.remove()
    before = [(k.clone(), v.clone()) for k, v in store.entries(two)]
    blend(model, [three, two], QUESTION, recompute=1, store=store)
    for (k, v), (old_k, old_v) in zip(store.entries(two), before, strict=True):
        assert torch.equal(k, old_k) and torch.equal(v, old_v)


def test_bfloat16_and_nothing_left_behind(model):
    def trace(m):
        return [(n, len(x._forward_hooks), len(x._forward_pre_hooks)) for n, x in m.named_modules()], m.config.to_dict()

    before = trace(model)
    blend(model, CHUNKS, QUESTION)
    assert trace(model) == before and model.config._attn_implementation != "foveate"
    half = tiny(model.config.model_type).bfloat16()
    out = blend(half, CHUNKS, QUESTION)
    assert out.logits.isfinite().all() and out.past_key_values.layers[0].keys.dtype == torch.bfloat16


def test_chosen_at_random_is_another_choice():
    model = tiny("llama", num_hidden_layers=8)
    given = {"recompute": 0.3, "choose": "random"}
    one, other = (blend(model, CHUNKS, QUESTION, seed=seed, **given).logits for seed in (0, 1))
    assert not torch.allclose(one, other)
    assert torch.equal(one, blend(model, CHUNKS, QUESTION, **given).logits)


@pytest.mark.parametrize(
    "given,says",
    [
        ({"chunks": []}, "no chunks"),
        ({"recompute": 1.5}, "outside"),
        ({"choose": "best"}, "neither"),
        ({"question": torch.ones(2, 3, dtype=torch.long)}, "one text"),
        ({"chunks": [torch.ones(0, dtype=torch.long)]}, "one text"),
    ],
)
def test_bad_arguments_get_a_sentence(given, says):
    with pytest.raises(FoveateError, match=says):
        blend(tiny("llama"), **({"chunks": CHUNKS, "question": QUESTION} | given))


def test_models_and_recipes_that_do_not_go_with_it_get_a_sentence():
    model = tiny("llama")
    with pytest.raises(FoveateError, match="not rotary"):
        blend(tiny("gpt2"), CHUNKS, QUESTION)
    with pytest.raises(FoveateError, match="another model"):
        blend(model, CHUNKS, QUESTION, store=fv.ChunkCache(tiny("qwen2")))
    store = fv.ChunkCache(model)
    with fv.apply(model, "window:keep=0.5"), pytest.raises(FoveateError, match="in force"):
        blend(model, CHUNKS, QUESTION, store=store)
    with fv.apply(model, "drop-attention:keep=0.5", calibration=IDS), pytest.raises(FoveateError, match="skipped"):
        blend(model, CHUNKS, QUESTION, store=store)
    for chunk in CHUNKS:
        store.entries(chunk)
    with fv.apply(model, "window:keep=0.5"), pytest.raises(FoveateError, match="in force"):
        blend(model, CHUNKS, QUESTION, store=store)


def test_it_is_in_the_catalog_as_a_call_with_a_claim(monkeypatch):
    from foveate.catalog import catalog, markdown
    from foveate.verify import selected

    entry = next(each for each in catalog("cache") if each.name == "blend")
    assert entry.kind == "function" and entry.fields["recompute"] == "0.15" and entry.verified != "no experiment"
    assert "`fv.blend()`" in markdown() and list(selected(["blend"])) == ["blend"]
    monkeypatch.setattr(FewTokensMendTheRest, "chunk", 20)
    monkeypatch.setattr(FewTokensMendTheRest, "cases", 2)
    monkeypatch.setattr(FewTokensMendTheRest, "rounds", 1)
    bench = fv.Bench(tiny("llama"), fv.tiny_tokenizer(), fv.load_text("prose"))
    assert CLAIMS["blend"]().run(bench).checks["no divergence where all is remade (under 0.0001)"]
