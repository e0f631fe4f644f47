"""The anatomy of every family, checked against what the models themselves compute."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM

from foveate.errors import FoveateError
from foveate.models import Family, anatomy, families, register_family
from foveate.models.tiny import TINY_FAMILIES, tiny

ROTARY = [family for family in TINY_FAMILIES if family not in ("gpt2", "opt")]
IDS = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def table():
    """The table of families, put back as it was after the test."""
    rows = sys.modules["foveate.models.family"]._FAMILIES
    before = dict(rows)
    yield rows
    rows.clear()
    rows.update(before)


@torch.no_grad()
def logits(model: nn.Module, **inputs) -> torch.Tensor:
    return model(IDS, **inputs).logits


class Nothing(nn.Module):
    """Stands in for an attention module, or for an MLP or its last projection: adds nothing to the stream."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, *args, **kwargs):
        output = hidden_states.new_zeros(*hidden_states.shape[:-1], 64)
        return (output, None) if self.attention else output


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_sizes(family):
    model = tiny(family, num_hidden_layers=3)
    parts = anatomy(model)
    shared = "num_key_value_heads" in model.config.to_dict()
    own_size = family in ("qwen3", "gemma2", "gemma3_text")
    assert (parts.family, len(parts.layers), [layer.index for layer in parts.layers]) == (
        family,
        3,
        [0, 1, 2],
    )
    assert (parts.heads, parts.kv_heads, parts.head_dim) == (4, 2 if shared else 4, 8 if own_size else 16)
    assert (parts.hidden, parts.intermediate, parts.vocab, parts.max_positions) == (64, 128, 260, 1024)
    assert parts.positions == ("rotary" if family in ROTARY else "learned")
    assert parts.embedding.weight.shape == parts.head.weight.shape == (260, 64)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_projections_have_the_shapes_that_the_sizes_say(family):
    parts = anatomy(tiny(family))
    queries, keys = parts.heads * parts.head_dim, parts.kv_heads * parts.head_dim
    wanted = {
        "q": (queries, parts.hidden),
        "k": (keys, parts.hidden),
        "v": (keys, parts.hidden),
        "qkv": (queries + 2 * keys, parts.hidden),
        "o": (parts.hidden, queries),
        "gate": (parts.intermediate, parts.hidden),
        "up": (parts.intermediate, parts.hidden),
        "gate_up": (2 * parts.intermediate, parts.hidden),
        "down": (parts.hidden, parts.intermediate),
    }
    for layer in parts.layers:
        found = {role: getattr(layer, role) for role in wanted if getattr(layer, role) is not None}
        for role, module in found.items():
            shape = tuple(module.weight.shape)
            assert (shape[::-1] if family == "gpt2" else shape) == wanted[role], role
            assert layer.module.get_submodule(layer.names[role]) is module
        assert {"o", "down"} <= found.keys()
        assert ("qkv" in found) != ({"q", "k", "v"} <= found.keys())
        assert ("gate_up" in found) != ("up" in found)
        # Nothing is forgotten: every matrix of the layer belongs to one of the parts.
        matrices = {id(weight) for weight in layer.module.parameters() if weight.ndim == 2}
        assert matrices == {id(module.weight) for module in found.values()}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_parts_are_the_ones_that_compute(family):
    model = tiny(family)
    parts = anatomy(model)
    before = logits(model)
    stubs = [
        (layer.module, name, Nothing(attention=name == layer.attention_name))
        for layer in parts.layers
        for name in (layer.attention_name, layer.mlp_name or layer.names["down"])
    ]
    for layer, name, stub in stubs:
        original = layer.get_submodule(name)
        layer.set_submodule(name, stub)
        assert (logits(model) - before).abs().max() > 0.1, name
        layer.set_submodule(name, original)
    assert torch.equal(logits(model), before)

    # With neither attention nor MLPs, what enters the first layer is what reaches the final norm.
    for layer, name, stub in stubs:
        layer.set_submodule(name, stub)
    seen = []
    for module in (parts.layers[0].module, parts.final_norm):
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits(model)
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_norms_run_in_the_order_given(family):
    model = tiny(family)
    ran: list[str] = []
    for layer in anatomy(model).layers[:1]:
        for name, module in layer.module.named_children():
            if "Norm" in type(module).__name__:
                module.register_forward_hook(lambda *_, name=name: ran.append(name))
    logits(model)
    assert list(anatomy(model).layers[0].norms) == ran


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gpt2"])
def test_the_layout_of_qkv(family):
    model = tiny(family)
    parts = anatomy(model)
    seen = {}

    def spy(module, query, key, value, mask, **kwargs):
        seen["value"] = value
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    model.set_attn_implementation("spy")
    parts.layers[-1].qkv.register_forward_hook(lambda module, inputs, output: seen.update(qkv=output[0]))
    logits(model)
    if parts.qkv_layout == "blocks":
        values = seen["qkv"][:, -parts.kv_heads * parts.head_dim :]
    else:
        values = seen["qkv"].unflatten(-1, (parts.heads, 3, parts.head_dim))[:, :, 2].flatten(1)
    assert torch.equal(seen["value"][0].transpose(0, 1).flatten(1), values)


def rotated(key: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """`key` (..., head_dim) turned by `angle` (n,): dimensions i and i + n together."""
    n = len(angle)
    first, second, rest = key[..., :n], key[..., n : 2 * n], key[..., 2 * n :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


SCALED = {"rope_theta": 10_000.0, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("family", "rope"),
    [(family, None) for family in ROTARY]
    + [
        ("llama", {**SCALED, "rope_type": "linear"}),
        ("llama", {**SCALED, "rope_type": "llama3", **LLAMA3}),
        ("qwen2", {**SCALED, "rope_type": "yarn", "original_max_position_embeddings": 256}),
        ("phi3", {"rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 0.5}),
    ],
)
def test_inv_freq_is_what_the_keys_are_rotated_with(family, rope):
    """Attention sees distances only: with all positions moved by 37, every key turns by 37 * inv_freq."""
    model = tiny(family, **({"rope_parameters": rope} if rope else {}))
    parts = anatomy(model)
    positions = torch.arange(IDS.shape[1])[None]
    here, there = (model(IDS, position_ids=positions + start, use_cache=True).past_key_values for start in (0, 37))
    for layer in parts.layers:
        frequencies = parts.inv_freq(layer.index)
        moved = rotated(here.layers[layer.index].keys, 37 * frequencies)
        torch.testing.assert_close(moved, there.layers[layer.index].keys, rtol=0, atol=2e-4)
    parts.require_static_rotary()
    share = {"gpt_neox": 0.25}.get(family, (rope or {}).get("partial_rotary_factor", 1.0))
    assert frequencies.shape == (parts.head_dim * share / 2,) and frequencies.dtype == torch.float32


def test_gemma3_rotates_local_and_global_layers_differently():
    parts = anatomy(tiny("gemma3_text"))
    assert not torch.equal(parts.inv_freq(0), parts.inv_freq(1))
    assert torch.equal(parts.inv_freq(0), parts.inv_freq(2))


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {**SCALED, "rope_type": "dynamic"}),
        (
            "phi3",
            {"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        ),
    ],
)
def test_frequencies_that_change_with_the_length_are_refused(family, rope):
    parts = anatomy(tiny(family, rope_parameters=rope))
    assert not parts.rotary_is_static
    with pytest.raises(FoveateError, match=rope["rope_type"]):
        parts.require_static_rotary()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_have_no_frequencies(family):
    parts = anatomy(tiny(family))
    assert parts.rotary is None and parts.inv_freq(0) is None and parts.rotary_is_static


@pytest.mark.parametrize(
    ("family", "overrides", "windows"),
    [
        ("llama", {}, [None] * 4),
        ("mistral", {"sliding_window": 16}, [16] * 4),
        ("phi3", {"sliding_window": 16}, [16] * 4),
        ("gemma2", {"sliding_window": 16}, [16, None, 16, None]),
        ("gemma3_text", {"sliding_window": 16}, [16, None, 16, None]),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
            [None, None, 16, 16],
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
            [None] * 3 + [16],
        ),
        ("qwen3", {"sliding_window": 16}, [None] * 4),  # not in use
        ("gpt_neox", {}, [None] * 4),
    ],
)
def test_sliding_windows_are_how_far_the_layers_look(family, overrides, windows):
    model = tiny(family, **overrides)
    assert [layer.sliding_window for layer in anatomy(model).layers] == windows
    model.set_attn_implementation("eager")
    length = IDS.shape[1]
    with torch.no_grad():
        weights = model(IDS, output_attentions=True).attentions
    for window, weight in zip(windows, weights, strict=True):
        query, key = (weight[0].amax(0) > 0).nonzero(as_tuple=True)
        assert (query - key).max() + 1 == (window or length)


def test_after_a_swap_the_rest_is_still_found():
    model = tiny("llama")
    first, second = anatomy(model).layers[:2]
    setattr(first.module, first.attention_name, Nothing(attention=True))
    setattr(second.module, second.mlp_name, Nothing(attention=False))
    second.module.set_submodule(second.names["q"], nn.Linear(64, 64))
    first, second = anatomy(model).layers[:2]
    assert isinstance(first.attention, Nothing) and isinstance(second.mlp, Nothing)
    assert (first.q, first.k, first.v, first.qkv, first.o) == (None,) * 5
    assert (second.gate, second.up, second.down) == (None,) * 3
    assert first.up is not None and second.q.bias is not None
    assert "q" not in first.names and "q" in second.names


def test_opt_without_a_final_norm():
    assert anatomy(tiny("opt", do_layer_norm_before=False)).final_norm is None


def test_inside_peft():
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    parts = anatomy(wrapped)
    assert parts.model is model and isinstance(parts.layers[0].q, peft.tuners.lora.Linear)


def unknown(model_type: str, **overrides) -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **overrides})).eval()


def test_an_unknown_family_gets_the_row_to_register(table):
    model = unknown("starcoder2", intermediate_size=128, num_key_value_heads=2)
    with pytest.raises(FoveateError, match="starcoder2.*Starcoder2ForCausalLM.*all was found") as error:
        anatomy(model)
    exec("if True:\n" + str(error.value).partition("\n\n")[2])  # its last paragraphs are code, indented
    parts = anatomy(model)
    assert (parts.heads, parts.kv_heads, parts.intermediate, parts.positions) == (4, 2, 128, "rotary")
    assert parts.layers[1].up is model.model.layers[1].mlp.c_fc


def test_what_cannot_be_seen_in_an_unknown_family_is_left_open(table):
    model = unknown("bloom")
    with pytest.raises(FoveateError, match="Not found under a usual name: qkv_layout") as error:
        anatomy(model)
    row = "if True:\n" + str(error.value).partition("\n\n")[2]
    with pytest.raises(FoveateError, match="still has a '[?]' for qkv_layout"):
        exec(row)
    assert "bloom" not in table
    exec(row.replace('"?"', '"heads"'))
    parts = anatomy(model)
    assert (parts.qkv_layout, parts.positions, parts.intermediate) == ("heads", "other", 256)
    assert parts.max_positions == sys.maxsize and parts.inv_freq(0) is None
    assert parts.layers[1].qkv is model.transformer.h[1].self_attention.query_key_value
    assert parts.final_norm is model.transformer.ln_f


def test_neighbours_are_not_taken_for_halves():
    with pytest.raises(FoveateError, match='positions="other"'):
        anatomy(unknown("cohere", intermediate_size=128))


def test_a_model_without_attention_names_what_is_missing():
    with pytest.raises(FoveateError, match="Not found under a usual name: attention, the projection o"):
        anatomy(unknown("mamba"))


def test_a_part_that_is_not_where_the_row_says():
    model = tiny("llama")
    model.model.layers[2] = nn.Identity()
    with pytest.raises(FoveateError, match="'self_attn' in Identity.*register_family"):
        anatomy(model)


def test_a_row_with_a_wrong_projection(table):
    register_family(Family(model_types=("llama",), projections={"q": "self_attn.query"}))
    with pytest.raises(FoveateError, match="'self_attn.query' in LlamaDecoderLayer"):
        anatomy(tiny("llama"))


def test_what_is_no_causal_language_model_is_refused():
    headless = AutoModel.from_config(tiny("llama").config)
    for other in (headless, nn.Linear(2, 2)):
        with pytest.raises(FoveateError, match="no causal language model"):
            anatomy(other)


def test_families_is_a_copy():
    assert set(TINY_FAMILIES) <= families().keys()
    families().clear()
    assert families()
