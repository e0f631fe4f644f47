"""Liger: no new parameters, gates from the keys as they are, half a recurrence and half a window."""

from __future__ import annotations

import torch

from foveate.methods import apply
from foveate.models.tiny import tiny

IDS = torch.randint(3, 120, (1, 60), generator=torch.Generator().manual_seed(1))


def test_no_parameter_is_new():
    model = tiny("qwen3")
    before = {name: id(p) for name, p in model.named_parameters()}
    with apply(model, "liger"):
        assert {name: id(p) for name, p in model.named_parameters()} == before


@torch.no_grad()
def test_one_token_sees_itself_alone():
    model = tiny("llama")
    with apply(model, "liger:window=4"):
        attention = model.model.layers[0].self_attn
        hidden = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
        q, k, v, turned = attention.projected(hidden, model.model.rotary_emb(hidden, torch.zeros(1, 1).long()))
        out = attention.attended(q, k, v, turned)[0].view(2, 2, 16)
    weight = (q.softmax(-1) * k.softmax(-1).unsqueeze(2)).sum(-1)[0, :, :, 0]
    torch.testing.assert_close(out, (0.5 + 0.5 * weight)[..., None] * v[0])


@torch.no_grad()
def test_a_key_that_forgets_wipes_the_memory():
    model = tiny("llama")
    with apply(model, "liger:window=0"):
        attention = model.model.layers[0].self_attn
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 9, 64, generator=generator)
        q, k, v, turned = attention.projected(hidden, model.model.rotary_emb(hidden, torch.arange(9)[None]))
        k[:, :, 5] = -1e4
        whole = attention.attended(q, k, v, turned)[0][:, 5:]
        q, k, v, turned_q, turned_k = (x[..., 5:, :] for x in (q, k, v, *turned))
        after = attention.attended(q, k, v, (turned_q, turned_k))[0]
    torch.testing.assert_close(whole, after, atol=1e-4, rtol=1e-3)  # what is wiped is some 1 in size
