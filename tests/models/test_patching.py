"""Patching: what stands at a site is recorded and changed rightly, in every family, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.anatomy import anatomy
from foveate.models.patching import (
    Site,
    ablated,
    activation_patching,
    at,
    head_sites,
    knocked_out,
    means_of,
    patched,
    path_patching,
    recorded,
)
from foveate.models.tiny import TINY_FAMILIES

KINDS = ("residual", "attention", "mlp", "head", "query", "key", "value")
IDS, OTHER = torch.randint(3, 250, (2, 2, 12), generator=torch.Generator().manual_seed(0))  # two rows of 12 tokens each
families = pytest.mark.parametrize("family", TINY_FAMILIES)


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda family: made.setdefault(family, fv.tiny(family))


def all_sites(model):
    parts = anatomy(model)
    layers = range(len(parts.layers))
    return [
        *(Site("residual", layer) for layer in (*layers, len(parts.layers))),
        *(Site(kind, layer) for kind in ("attention", "mlp") for layer in layers),
        *(Site(kind, layer, head) for kind in ("head", "query") for layer in layers for head in range(parts.heads)),
        *(Site(kind, layer, head) for kind in ("key", "value") for layer in layers for head in range(parts.kv_heads)),
    ]


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


def run(model, sites, ids=IDS):
    with recorded(model, sites) as values:
        logits(model, ids)
    return values


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


@families
def test_values_have_the_promised_shape(family, models):
    model, parts = models(family), anatomy(models(family))
    for site, value in run(model, all_sites(model)).items():
        wide = site.kind in ("residual", "attention", "mlp")
        assert value.shape == (2, 12, parts.hidden if wide else parts.head_dim), site
        assert not value.requires_grad


@families
def test_recording_changes_nothing(family, models):
    model = models(family)
    with recorded(model, all_sites(model)):
        watched = logits(model)
    assert torch.equal(watched, logits(model))


@families
@pytest.mark.parametrize("kind", KINDS)
def test_its_own_value_changes_nothing(family, kind, models):
    model = models(family)
    sites = [site for site in all_sites(model) if site.kind == kind]
    plain = logits(model)
    with patched(model, dict(run(model, sites))):
        assert torch.equal(logits(model), plain)


@families
def test_another_texts_residual_gives_the_other_texts_logits(family, models):
    model = models(family)
    there = run(model, [Site("residual", layer) for layer in range(5)], OTHER)
    expected = logits(model, OTHER)
    for site, value in there.items():
        with patched(model, {site: value}):
            torch.testing.assert_close(logits(model), expected)


@families
def test_the_residual_grows_by_what_sublayers_add(family, models):
    model, parts = models(family), anatomy(models(family))
    values = run(model, all_sites(model))
    norms_after = family in ("gemma2", "gemma3_text", "olmo2")
    for layer in range(len(parts.layers)):
        added = values[Site("residual", layer + 1)] - values[Site("residual", layer)]
        sublayers = values[Site("attention", layer)] + values[Site("mlp", layer)]
        assert torch.allclose(added, sublayers, atol=1e-4) != norms_after


@families
def test_an_ablated_head_is_a_masked_output_map(family, models):
    model, parts = fv.tiny(family), anatomy(models(family))
    heads = [(0, 1), (2, 0), (2, 3)]
    with ablated(models(family), heads):
        ours = logits(models(family))
    for layer, head in heads:
        o = anatomy(model).layers[layer].o
        columns = slice(head * parts.head_dim, (head + 1) * parts.head_dim)
        with torch.no_grad():
            (o.weight.T if isinstance(o, Conv1D) else o.weight)[:, columns] = 0
    expected = logits(model)
    torch.testing.assert_close(ours, expected)
    assert not torch.allclose(ours, logits(models(family)))


def test_with_means_a_head_gives_its_mean_everywhere(models):
    model = models("llama")
    sites = [Site("head", 1, 2), Site("head", 3, 0)]
    means = means_of(model, OTHER, sites)
    for site, value in run(model, sites, OTHER).items():
        torch.testing.assert_close(means[site], value.flatten(0, 1).mean(0))
    with ablated(model, [(1, 2), (3, 0)], means), recorded(model, sites) as values:
        logits(model)
    for site in sites:
        torch.testing.assert_close(values[site], means[site].expand(2, 12, -1))


@families
def test_heads_are_what_attention_makes_of_values(family, models):
    model, parts = models(family), anatomy(models(family))
    values = run(model, all_sites(model))
    o = parts.layers[1].o
    heads = torch.cat([values[Site("head", 1, head)] for head in range(parts.heads)], -1)
    with torch.no_grad():
        torch.testing.assert_close(o(heads), values[Site("attention", 1)])
    # The first token can only look at itself: what a head gives is its KV head's value.
    group = parts.heads // parts.kv_heads
    for head in range(parts.heads):
        torch.testing.assert_close(values[Site("head", 1, head)][:, 0], values[Site("value", 1, head // group)][:, 0])


@families
def test_queries_and_keys_are_those_of_their_head(family, models):
    """Head 2 of layer 1 gets head 0's query and key: where these share values, it then gives what head 0 gives."""
    model, parts = models(family), anatomy(models(family))
    group, values = parts.heads // parts.kv_heads, run(model, all_sites(model))
    patches = {Site("query", 1, 2): values[Site("query", 1, 0)]}
    for kind in ("key", "value"):
        patches[Site(kind, 1, 2 // group)] = values[Site(kind, 1, 0)]
    with patched(model, patches), recorded(model, [Site("head", 1, 2)]) as changed:
        logits(model)
    if family == "olmo2":  # its norm goes over the queries of all heads at once, with a weight for each channel
        assert not torch.allclose(changed[Site("head", 1, 2)], values[Site("head", 1, 2)])
    else:
        torch.testing.assert_close(changed[Site("head", 1, 2)], values[Site("head", 1, 0)])


def test_at_changes_some_positions_only(models):
    model, there = models("gpt2"), run(models("gpt2"), [Site("residual", 2)], OTHER)
    with patched(model, {Site("residual", 2): at([3, 7], there[Site("residual", 2)])}):
        changed = logits(model)
    plain = logits(model)
    assert torch.equal(changed[:, :3], plain[:, :3]) and not torch.allclose(changed[:, 3:], plain[:, 3:])
    new = at(slice(1, 3), torch.ones(1, 4, 2))(torch.zeros(2, 4, 2))
    assert new[:, :, 0].tolist() == [[0, 1, 1, 0]] * 2


@families
def test_a_knockout_is_eager_attention_with_a_mask(family):
    model = fv.tiny(family).double()
    edges = torch.rand(4, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.3
    edges[:, range(12), range(12)] = False  # each row keeps its own token
    blocked = {1: edges, 2: edges[0]}
    with knocked_out(model, blocked):
        ours = logits(model)
    expected = with_masks(model, {layer: e if e.dim() == 3 else e[None] for layer, e in blocked.items()})
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)  # some families' softmax is in float32
    assert not torch.allclose(ours, logits(model))


def with_masks(model, blocked):
    """The logits under eager attention, whose additive mask blocks more in some layers."""
    model.set_attn_implementation("eager")
    handles = []
    for layer, edges in blocked.items():
        more = torch.zeros(edges.shape, dtype=torch.float64).masked_fill(edges, -1e9)

        def add(module, args, kwargs, more=more):
            return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + more}

        attention = anatomy(model).layers[layer].attention
        handles.append(attention.register_forward_pre_hook(add, with_kwargs=True))
    out = logits(model)
    for handle in handles:
        handle.remove()
    return out


def test_a_token_that_sees_nothing_gets_nothing(models):
    model = models("llama")
    edges = torch.zeros(12, 12, dtype=torch.bool)
    edges[5] = True
    with knocked_out(model, {2: edges}), recorded(model, head_sites(anatomy(model))) as values:
        logits(model)
    for head in range(4):
        assert not values[Site("head", 2, head)][:, 5].any() and values[Site("head", 2, head)][:, 4].any()


@families
def test_nothing_stays_behind(family, models):
    model = models(family)
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), patched(model, dict.fromkeys(all_sites(model), torch.zeros_like)):
        assert hooks(model)
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), knocked_out(model, {0: torch.zeros(12, 12, dtype=torch.bool)}):
        raise ZeroDivisionError

    def fail(value):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), patched(model, {Site("mlp", 1): fail}):
        logits(model)
    with pytest.raises(FoveateError), patched(model, {Site("mlp", 1): fail, Site("mlp", 9): fail}):
        pass
    assert not hooks(model) and model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("site", "sentence"),
    [
        (Site("mlp", 4), "layers are 0 to 3"),
        (Site("residual", 5), "layers are 0 to 3"),
        (Site("head", -1, 0), "layers are 0 to 3"),
        (Site("head", 0), "heads 0 to 3"),
        (Site("query", 0, 4), "heads 0 to 3"),
        (Site("key", 0, 2), "heads 0 to 1"),
        (Site("neuron", 0, 2), "no such kind of site"),
    ],
)
def test_a_site_that_is_not_there(site, sentence, models):
    with pytest.raises(FoveateError, match=sentence), patched(models("llama"), {site: torch.zeros_like}):
        pass


def test_a_converted_layer_has_no_such_site():
    model = fv.tiny("llama")
    model.model.layers[1].self_attn = nn.Identity()
    with pytest.raises(FoveateError, match="not converted"), recorded(model, [Site("head", 1, 0)]):
        pass


def test_a_knockout_in_a_layer_that_is_not_there(models):
    edges = torch.zeros(12, 12, dtype=torch.bool)
    with pytest.raises(FoveateError, match="no layer 4"), knocked_out(models("llama"), {4: edges}):
        pass


# ---- experiments ----------------------------------------------------------------------------------------------------


def score(out):
    """A number for each row."""
    return out[:, -1, 7] - out[:, -1, 9]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_activation_patching_is_one_patch_at_a_time(family, models):
    model = models(family)
    sites = [Site("residual", 2), Site("mlp", 1), Site("head", 0, 3)]
    there, done = run(model, sites, OTHER), []
    found = activation_patching(model, IDS, there, sites, score, positions=[4, 11], progress=done.append)
    assert found.shape == (3, 2) and found.dtype == torch.float64 and done[-1] == 1
    for row, site in enumerate(sites):
        value = there[site].clone()
        here = run(model, [site])[site]
        keep = [i for i in range(12) if i not in (4, 11)]
        value[:, keep] = here[:, keep]
        with patched(model, {site: value}):
            torch.testing.assert_close(found[row], score(logits(model)).double())


def slow_path(model, sender, receivers, freeze_mlps):
    """Path patching with copies of modules' outputs, by hand for llama: no function of ours but `score`."""
    layers, dim = model.model.layers, 16

    def heads(ids):
        kept = {}
        handles = [
            block.self_attn.o_proj.register_forward_pre_hook(lambda m, a, i=i: kept.__setitem__(("o", i), a[0].clone()))
            for i, block in enumerate(layers)
        ]
        handles += [
            block.mlp.register_forward_hook(lambda m, a, out, i=i: kept.__setitem__(("mlp", i), out.clone()))
            for i, block in enumerate(layers)
        ]
        logits(model, ids)
        for handle in handles:
            handle.remove()
        return kept

    here, there = heads(IDS), heads(OTHER)
    still = {key: value.clone() for key, value in here.items() if key[0] == "o" or freeze_mlps}
    columns = slice(dim * sender.head, dim * sender.head + dim)
    still["o", sender.layer][..., columns] = there["o", sender.layer][..., columns]
    heard, handles = {}, []
    for (what, i), value in still.items():
        if what == "o":
            handles.append(layers[i].self_attn.o_proj.register_forward_pre_hook(lambda m, a, v=value: (v,)))
        else:
            handles.append(layers[i].mlp.register_forward_hook(lambda m, a, out, v=value: v))
    for site in receivers:
        q = layers[site.layer].self_attn.q_proj
        handles.append(q.register_forward_hook(lambda m, a, out, s=site: heard.__setitem__(s, out.clone())))
    logits(model)
    for handle in handles:
        handle.remove()
    handles = []
    for site in receivers:
        columns = slice(dim * site.head, dim * site.head + dim)

        def put(m, a, out, value=heard[site], columns=columns):
            new = out.clone()
            new[:, [11], columns] = value[:, [11], columns]
            return new

        handles.append(layers[site.layer].self_attn.q_proj.register_forward_hook(put))
    found = score(logits(model)).double()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_path_patching_is_the_slow_way(freeze_mlps, models):
    model = models("llama")
    senders = [Site("head", 0, 1), Site("head", 1, 3), Site("head", 3, 2)]
    receivers = [Site("query", 2, 0), Site("query", 2, 2), Site("query", 3, 1)]
    found = path_patching(model, IDS, OTHER, senders, receivers, score, positions=[11], freeze_mlps=freeze_mlps)
    for row, sender in enumerate(senders):
        torch.testing.assert_close(found[row], slow_path(model, sender, receivers, freeze_mlps))
    assert not torch.allclose(found[0], found[2])
    torch.testing.assert_close(found[2], score(logits(model)).double())  # it comes after all that could hear it
    assert not hooks(model)


@families
def test_in_every_family_a_path_to_the_end_is_the_direct_effect(family, models):
    """To the residual stream at the end, all else frozen: what the head says otherwise, through its output map."""
    model, parts = models(family), anatomy(models(family))
    if family in ("gemma2", "gemma3_text", "olmo2"):
        pytest.skip("a norm after the attention mixes the heads")
    sender, end = Site("head", 1, 2), Site("residual", len(parts.layers))
    found = path_patching(model, IDS, OTHER, [sender], [end], score, freeze_mlps=True)
    here, there = run(model, [sender, end]), run(model, [sender], OTHER)
    o, change = parts.layers[1].o, torch.zeros(2, 12, parts.heads * parts.head_dim)
    change[..., 2 * parts.head_dim : 3 * parts.head_dim] = there[sender] - here[sender]
    weight = o.weight if isinstance(o, Conv1D) else o.weight.T
    with torch.no_grad(), patched(model, {end: here[end] + change @ weight}):
        expected = score(logits(model)).double()
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
