"""Key norm: the entries with small keys stay."""

import torch

import foveate as fv


def test_the_smallest_keys_stay():
    model, ids = fv.tiny("llama"), torch.arange(3, 43).unsqueeze(0)
    keys = model(ids, use_cache=True).past_key_values.layers[0].keys[0, 0]
    smallest = keys[:-1].norm(dim=-1).topk(7, largest=False).indices.tolist()
    with fv.apply(model, "key-norm:entries=8"):
        out = model(ids, use_cache=True)
    assert out.past_key_values.layers[0].positions[0, 0].tolist() == [*sorted(smallest), 39]  # the last always stays
