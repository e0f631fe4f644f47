"""Saving: what opens is what was saved, anywhere; what is on disk is whole, whatever happens."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import yaml
from torch import nn

import foveate as fv
from foveate.errors import FoveateError
from foveate.methods import METHODS, Recipe, apply
from foveate.models import saved as module
from foveate.models.form import form
from foveate.models.saved import MARK, Story, card, is_plain, save
from foveate.models.surgery import Surgery, cut, settle, unit_counts
from foveate.models.tiny import TINY_FAMILIES, tiny, tiny_tokenizer
from foveate.portable import portable_classes, register_portable

GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(3, 250, (2, 20), generator=GENERATOR)
MASK = torch.ones_like(IDS)
MASK[0, :6] = 0  # a batch with left padding
ONE, NONE = torch.arange(1), torch.arange(0)
SOME = torch.arange
CARD = "A test."


def shrunk(family: str, kind: str, **overrides) -> nn.Module:
    """A tiny model, cut in one of the ways that matter for saving."""
    model, surgery = tiny(family, **overrides), Surgery()
    kv = unit_counts(model, "kv_head")[0]
    means = {(1, "down"): torch.randn(128), (0, "attention"): torch.randn(64)}
    if kind == "layers":
        cut(model, "layer", [ONE, NONE, ONE, ONE], surgery)
    elif kind == "channels":
        cut(model, "channel", [SOME(100)] * 4, surgery)
    elif kind == "heads":  # the same in all layers, and a width that GPT-2's heads don't divide
        cut(model, "kv_head", [SOME(kv - 1)] * 4, surgery)
    elif kind == "hidden":
        cut(model, "hidden", [SOME(50)], surgery)
    elif kind == "compensated":  # some maps have biases now
        cut(model, "channel", [SOME(100)] * 4, surgery, means)
    elif kind == "irregular":
        cut(model, "attention", [NONE, ONE, ONE, ONE], surgery, means)
        cut(model, "mlp", [ONE, ONE, NONE, ONE], surgery)
        cut(model, "channel", [SOME(100), SOME(90), NONE, SOME(77)], surgery, means)
        cut(model, "kv_head", [NONE, SOME(kv - 1), SOME(kv), ONE], surgery)
    settle(model)
    return model


@torch.no_grad()
def answers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What must be the same everywhere."""
    how = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 256}
    return {
        "logits": model(IDS, attention_mask=MASK).logits[MASK.bool()],
        "greedy": model.generate(IDS, **how),
        "beam": model.generate(IDS, num_beams=3, **how),
    }


def check(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found["logits"], wanted["logits"], atol=1e-5, rtol=1e-5)
    assert torch.equal(found["greedy"], wanted["greedy"]) and torch.equal(found["beam"], wanted["beam"])


# ---- here -----------------------------------------------------------------------------------------------------------

KINDS = ["layers", "channels", "heads", "hidden", "compensated", "irregular"]
CASES = [
    (family, kind)
    for family in TINY_FAMILIES
    for kind in KINDS
    if not (kind == "hidden" and family.startswith("gemma"))
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_is_loaded_is_what_was_saved(family, kind, tmp_path):
    model = shrunk(family, kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    shape = save(model, tiny_tokenizer(), tmp_path / "small", card=CARD)
    assert (shape == "plain") == is_plain(model)
    assert shape == "irregular" if kind == "irregular" else shape == "plain" or kind not in ("layers", "channels")
    assert {name: torch.equal(value, before[name]) for name, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert model.config.to_dict() == config  # saving changes nothing
    loaded, tokenizer = fv.load(tmp_path / "small", device="cpu")
    assert tokenizer("abc").input_ids == tiny_tokenizer()("abc").input_ids
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    parts, wanted = fv.anatomy(loaded), fv.anatomy(model)
    assert (parts.family, parts.heads, parts.head_dim, parts.hidden) == (
        family,
        wanted.heads,
        wanted.head_dim,
        wanted.hidden,
    )
    sizes = {name: value.shape for name, value in loaded.state_dict().items()}
    zeros = dict.fromkeys(form(model).zeros)
    assert {name: size for name, size in sizes.items() if name not in zeros} == {n: v.shape for n, v in before.items()}


def test_compensated_llama_is_plain_with_zero_biases_elsewhere():
    model = shrunk("llama", "compensated")
    how = form(model)
    assert how.thin is None and how.config.mlp_bias and not how.config.attention_bias
    assert "model.layers.0.mlp.down_proj.bias" in how.zeros and "model.layers.1.mlp.down_proj.bias" not in how.zeros
    assert form(shrunk("mistral", "compensated")).thin is not None  # which has no such setting


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied, tmp_path):
    model = shrunk("llama", "hidden", tie_word_embeddings=tied)
    save(model, tiny_tokenizer(), tmp_path / "small", card=CARD)
    loaded, _ = fv.load(tmp_path / "small", device="cpu")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_embeddings_that_came_apart_are_saved_apart(tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    assert save(model, tiny_tokenizer(), tmp_path / "small", card=CARD) == "plain"
    loaded, _ = fv.load(tmp_path / "small", device="cpu")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("recipe", ["h2o:entries=8", "streaming:entries=8", "h2o:keep=1.0", "skip-layers:keep=0.75"])
def test_techniques_work_on_what_was_loaded(family, recipe, tmp_path):
    model = shrunk(family, "irregular")
    save(model, tiny_tokenizer(), tmp_path / "small", card=CARD)
    loaded, _ = fv.load(tmp_path / "small", device="cpu")
    found, full = [], []
    for each in (model, loaded):
        with apply(each, recipe), torch.no_grad():
            out = each(IDS, use_cache=True)
            assert not recipe.endswith("=8") or max(int(layer.held().max()) for layer in held(out)) == 8
            found.append((out.logits, each.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=256)))
        full.append(each(IDS).logits)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    if recipe.endswith("=1.0"):
        torch.testing.assert_close(found[1][0], full[1], atol=1e-4, rtol=1e-4)


def held(out):
    return [layer for layer in out.past_key_values.layers if layer.is_initialized]


def test_text_in_pieces_where_the_first_layer_holds_no_cache(tmp_path):
    save(shrunk("gemma2", "irregular", sliding_window=8), tiny_tokenizer(), tmp_path / "small", card=CARD)
    model, _ = fv.load(tmp_path / "small", device="cpu")
    cache, pieces = None, []
    for piece in (IDS[:, :9], IDS[:, 9:10], IDS[:, 10:]):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_modules_with_heads_of_their_own_follow_another_attention():
    model = shrunk("phi3", "irregular")
    plain = model(IDS).logits
    model.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers[1:]} == {"eager"}
    torch.testing.assert_close(model(IDS).logits, plain, atol=1e-4, rtol=1e-4)


def test_a_loaded_model_is_cut_saved_and_opened_again(tmp_path):
    save(shrunk("llama", "irregular"), tiny_tokenizer(), tmp_path / "one", card=CARD)
    model, tokenizer = fv.load(tmp_path / "one", device="cpu")
    cut(model, "channel", [SOME(50), SOME(50), NONE, SOME(50)], Surgery())
    settle(model)
    assert save(model, tokenizer, tmp_path / "two", card=CARD) == "irregular"
    again, _ = fv.load(tmp_path / "two", device="cpu")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    again.save_pretrained(tmp_path / "three")  # transformers' own way keeps the code, too
    tokenizer.save_pretrained(tmp_path / "three")
    assert (tmp_path / "three" / "modeling_thin.py").exists()
    assert torch.equal(fv.load(tmp_path / "three", device="cpu")[0](IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_number_types_are_kept_and_can_be_asked_for(dtype, tmp_path):
    model = shrunk("llama", "irregular").to(getattr(torch, dtype))
    save(model, tiny_tokenizer(), tmp_path / "small", card=CARD)
    assert json.loads((tmp_path / "small/config.json").read_text())["dtype"] == dtype
    loaded, _ = fv.load(tmp_path / "small", device="cpu", dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    wide, _ = fv.load(tmp_path / "small", device="cpu")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


# ---- portable modules -----------------------------------------------------------------------------------------------

NEIGHBOUR = """
def scaled(tensor, by):
    return tensor * by
"""
PORTABLE = '''
import torch
from torch import nn

from .dummy_neighbour import scaled


class DummyLinear(nn.Module):
    """Rows coded in eight bits; or another module's weights, with a scale of its own."""

    def __init__(self, inputs, outputs, like=None, config=None):
        super().__init__()
        self.inputs, self.outputs, self.like, self.other = inputs, outputs, like, ()
        if like is None:
            self.register_buffer("codes", torch.empty(outputs, inputs, dtype=torch.uint8))
            self.register_buffer("seen", torch.empty(outputs, dtype=torch.bool))
        self.scale = nn.Parameter(torch.empty(outputs, 1))
        self.limit = config.vocab_size if config is not None else None

    @property
    def settings(self):
        return {"inputs": self.inputs, "outputs": self.outputs, "like": self.like}

    def tie(self, model):
        if self.like is not None:
            self.other = (model.get_submodule(self.like),)

    def forward(self, x):
        codes = (self.other[0] if self.other else self).codes
        return x @ scaled(codes.to(x.dtype) - 128, self.scale).T


class Forgetful(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(3), persistent=False)

    @property
    def settings(self):
        return {}

    def forward(self, x):
        return x
'''


@pytest.fixture
def dummy(tmp_path, monkeypatch):
    """A module of portable classes of another package."""
    home = tmp_path / "elsewhere"
    home.mkdir()
    (home / "__init__.py").touch()
    (home / "dummy_neighbour.py").write_text(NEIGHBOUR)
    (home / "dummy_linear.py").write_text(PORTABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("foveate.portable._REGISTERED", {})
    found = importlib.import_module("elsewhere.dummy_linear")
    for cls in (found.DummyLinear, found.Forgetful):
        register_portable(cls)
    yield found
    for name in [name for name in sys.modules if name.split(".")[0] == "elsewhere"]:
        del sys.modules[name]


def converted_by_dummy(dummy) -> nn.Module:
    """Two maps of the dummy's, the second of which shares the first one's codes."""
    model = tiny("llama")
    for layer, like in ((1, None), (2, "model.layers.1.mlp.up_proj")):
        linear = dummy.DummyLinear(64, 128, like)
        if like is None:
            linear.codes.random_(0, 256)
            linear.seen.fill_(True)
        nn.init.normal_(linear.scale, std=0.01)
        model.model.layers[layer].mlp.up_proj = linear
    model.model.layers[2].mlp.up_proj.tie(model)
    return model.eval()


def test_portable_modules_of_another_package_are_saved_with_all_they_hold(dummy, tmp_path):
    model = converted_by_dummy(dummy)
    assert save(model, tiny_tokenizer(), tmp_path / "small", card=CARD) == "irregular"
    assert {"dummy_linear.py", "dummy_neighbour.py", "parts.py"} <= {f.name for f in (tmp_path / "small").iterdir()}
    loaded, _ = fv.load(tmp_path / "small", device="cpu")
    one, other = (loaded.model.layers[i].mlp.up_proj for i in (1, 2))
    assert one.codes.dtype == torch.uint8 and one.seen.dtype == torch.bool and one.limit == 260
    assert other.other[0] is one and not list(other.buffers())
    check(answers(loaded), answers(model))


def test_what_nothing_would_fill_again_is_refused(dummy, tmp_path):
    model = tiny("llama")
    model.model.layers[0].mlp.act_fn = dummy.Forgetful()
    with pytest.raises(FoveateError, match="buffer that is not saved.*table.*persistent=True"):
        save(model, tiny_tokenizer(), tmp_path / "small", card=CARD)


def test_modules_that_can_not_travel_are_refused(tmp_path):
    model = tiny("llama")
    model.model.layers[3].mlp.up_proj = nn.Sequential(nn.Linear(64, 128))
    with pytest.raises(FoveateError, match=r"model\.layers\.3\.mlp\.up_proj is a torch.*Sequential.*can't be saved"):
        is_plain(model)
    model = tiny("llama")
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(FoveateError, match=r"model\.layers\.1 has .*hooked in"):
        is_plain(model)
    handle.remove()
    with apply(model, "h2o:entries=4"), pytest.raises(FoveateError, match="hooked in.*block of `apply`"):
        is_plain(model)
    assert is_plain(model)


def test_a_model_that_was_not_settled_is_refused():
    model = tiny("llama")
    del model.model.layers[3]
    with pytest.raises(FoveateError, match=r"model\.layers\.3.*settle\(\)"):
        is_plain(model)


def test_a_newer_format_or_an_unknown_module_is_a_sentence(dummy, tmp_path, monkeypatch):
    folder = tmp_path / "small"
    save(converted_by_dummy(dummy), tiny_tokenizer(), folder, card=CARD)
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr("foveate.portable._REGISTERED", {})
    with pytest.raises(FoveateError, match="unknown here .DummyLinear.*newer foveate.*trust_remote_code"):
        fv.load(folder)
    config["thin"] |= {"format": 99, "modules": {}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FoveateError, match="another format.*newer foveate"):
        fv.load(folder)
    config["thin"] = "nothing"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FoveateError, match="does not say what shape"):
        fv.load(folder)


# ---- where foveate is not installed ----------------------------------------------------------------------------------

OPENER = """
import os, sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("foveate", "elsewhere"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
warnings.simplefilter("ignore")
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    given = torch.load(f"{folder}.pt")
    remote = {"trust_remote_code": os.path.exists(f"{folder}/modeling_thin.py")}
    tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
    assert tokenizer("abc").input_ids == given["abc"], folder
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **remote)
    assert not any(info.values()), (folder, info)
    ids, mask = given["ids"], given["mask"]
    how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 256}
    with torch.no_grad():
        out = {"logits": model(ids, attention_mask=mask).logits[mask.bool()]}
        out |= {"greedy": model.generate(ids, **how), "beam": model.generate(ids, num_beams=3, **how)}
        if "static" not in given["without"]:
            out["static"] = model.generate(ids, cache_implementation="static", **how)
        model.save_pretrained(f"{folder}-again")
        again = AutoModelForCausalLM.from_pretrained(f"{folder}-again", device_map="cpu", **remote)
        out["again"] = again(ids, attention_mask=mask).logits[mask.bool()]
        half = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", **remote)
        assert half.dtype == torch.bfloat16
        model.set_attn_implementation("eager")
        out["eager"] = model(ids, attention_mask=mask).logits[mask.bool()]
    model.train()
    plain = model(ids, labels=ids).loss
    if "checkpointing" not in given["without"]:
        model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    out["built"] = torch.tensor(type(model).__name__ == "ThinForCausalLM")
    torch.save(out, f"{folder}.out")
assert "foveate" not in sys.modules
"""


def open_elsewhere(
    models: dict[str, nn.Module], tmp_path: Path, without: dict[str, list[str]]
) -> dict[str, dict[str, torch.Tensor]]:
    """Save models, open them in a process that can't import foveate, and give what that process found."""
    folders = []
    for name, model in models.items():
        folder = tmp_path / name
        save(model, tiny_tokenizer(), folder, card=CARD)
        given = {"ids": IDS, "mask": MASK, "abc": tiny_tokenizer()("abc").input_ids}
        torch.save(given | {"without": without.get(name, [])}, f"{folder}.pt")
        folders.append(str(folder))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    run = subprocess.run(
        [sys.executable, "-P", "-c", OPENER, *folders], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return {name: torch.load(tmp_path / f"{name}.out") for name in models}


def check_elsewhere(models: dict[str, nn.Module], tmp_path: Path, without: dict[str, list[str]] | None = None) -> None:
    without = without or {}
    found = open_elsewhere(models, tmp_path, without)
    for name, model in models.items():
        wanted = answers(model)
        check(found[name], wanted)
        if "static" not in without.get(name, []):
            assert torch.equal(found[name]["static"], wanted["greedy"])
        torch.testing.assert_close(found[name]["again"], wanted["logits"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[name]["eager"], wanted["logits"], atol=1e-3, rtol=1e-3)
        assert bool(found[name]["built"]) != is_plain(model)


def test_every_family_opens_where_foveate_is_not_installed(tmp_path):
    models = {family: shrunk(family, "irregular") for family in TINY_FAMILIES}
    models |= {"llama_plain": shrunk("llama", "compensated"), "qwen3_plain": shrunk("qwen3", "layers")}
    models |= {
        "gpt2_hidden": shrunk("gpt2", "hidden"),
        "llama_tied": shrunk("llama", "hidden", tie_word_embeddings=True),
    }
    check_elsewhere(models, tmp_path)


CONVERTED: dict[str, list[str]] = {
    "low-rank:keep=0.6": [],
    "blockwise:bits=4,block=32": [],
    "recursive:rank=4": [],
    "latent:keep=0.5": [],
    "echo:layers=1": ["checkpointing"],  # a layer made again by itself has no source to read
    "lolcats:window=8,tokens=0": ["static"],  # their state is no row of slots
    "liger:window=8": ["static"],
    "emoe:experts=8,top_k=4": [],
    "drop-attention:keep=0.5+low-rank:keep=0.6": [],
}
"""A recipe for each technique that puts other modules in, and what these can't do."""


def test_converted_models_open_where_foveate_is_not_installed(dummy, tmp_path):
    calibration = torch.randint(3, 120, (1, 96), generator=torch.Generator().manual_seed(3))
    names = {f"converted{number}": recipe for number, recipe in enumerate(CONVERTED)}
    models = {name: fv.thin(tiny("llama"), recipe, calibration=calibration) for name, recipe in names.items()}
    without = {name: CONVERTED[recipe] for name, recipe in names.items()}
    check_elsewhere({"dummy": converted_by_dummy(dummy)} | models, tmp_path, without)


def test_every_converter_is_saved_here():
    ours = {name for name, cls in METHODS.all().items() if cls.role == "convert" and "foveate." in cls.__module__}
    assert ours <= {m.name for recipe in CONVERTED for m in Recipe.of(recipe).methods}


def test_the_portable_files_need_no_foveate():
    for cls in portable_classes().values():
        text = Path(sys.modules[cls.__module__].__file__).read_text()
        assert "import foveate" not in text and "from foveate" not in text


# ---- other readers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layers", "channels", "heads", "compensated"])
def test_plain_llama_has_what_other_readers_read(kind, tmp_path):
    """The fields that vLLM and llama.cpp's converter read of a Llama, and no tensor that they have no name for."""
    from safetensors import safe_open

    model = shrunk("llama", kind)
    assert save(model, tiny_tokenizer(), tmp_path / "small", card=CARD) == "plain"
    config = json.loads((tmp_path / "small/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert not {"thin", "auto_map"} & {*config} and not list((tmp_path / "small").glob("*.py"))
    with safe_open(tmp_path / "small/model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    heads, kv_heads, dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    wanted = {
        "self_attn.q_proj": [heads * dim, config["hidden_size"]],
        "self_attn.k_proj": [kv_heads * dim, config["hidden_size"]],
        "self_attn.v_proj": [kv_heads * dim, config["hidden_size"]],
        "self_attn.o_proj": [config["hidden_size"], heads * dim],
        "mlp.gate_proj": [config["intermediate_size"], config["hidden_size"]],
        "mlp.up_proj": [config["intermediate_size"], config["hidden_size"]],
        "mlp.down_proj": [config["hidden_size"], config["intermediate_size"]],
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in wanted.items():
            assert shapes[f"model.layers.{layer}.{name}.weight"] == shape
            assert (f"model.layers.{layer}.{name}.bias" in shapes) == config[
                f"{name[:3].replace('sel', 'attention')}_bias"
            ]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    assert all(names.get_name(name, try_suffixes=(".weight", ".bias")) for name in shapes)
    for needed in ("rms_norm_eps", "rope_parameters", "max_position_embeddings", "vocab_size", "hidden_act"):
        assert needed in config
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        each.name for each in (tmp_path / "small").iterdir()
    }


# ---- whole or not at all --------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


@pytest.fixture
def old(tmp_path):
    """A folder with a model that was saved before, alone in its parent."""
    folder = tmp_path / "models" / "small"
    save(tiny("llama"), tiny_tokenizer(), folder, card="The old one.")
    return folder


def test_a_model_of_ours_is_replaced_and_nothing_lies_beside_it(old):
    save(shrunk("llama", "irregular"), tiny_tokenizer(), old, card="The new one.", extra={"plan.json": "{}"})
    assert (old / "README.md").read_text() == "The new one." and (old / "plan.json").read_text() == "{}"
    assert [each.name for each in old.parent.iterdir()] == ["small"]
    save(tiny("llama"), tiny_tokenizer(), old, card=CARD)
    assert not (old / "plan.json").exists() and not (old / "modeling_thin.py").exists()


def test_replaced_in_two_steps_where_folders_can_not_change_places(old, monkeypatch):
    monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    save(tiny("llama"), tiny_tokenizer(), old, card="The new one.")
    assert (old / "README.md").read_text() == "The new one."
    assert [each.name for each in old.parent.iterdir()] == ["small"]


def test_other_folders_are_left_alone(old, tmp_path):
    (old / "notes.txt").write_text("mine")
    with pytest.raises(FoveateError, match=r"notes\.txt, which foveate did not write"):
        save(tiny("llama"), tiny_tokenizer(), old, card=CARD)
    assert (old / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").touch()
    with pytest.raises(FoveateError, match="not empty, and holds no model that foveate saved"):
        save(tiny("llama"), tiny_tokenizer(), tmp_path / "other", card=CARD)
    with pytest.raises(FoveateError, match="is a file"):
        save(tiny("llama"), tiny_tokenizer(), tmp_path / "other/a.txt", card=CARD)
    (tmp_path / "empty").mkdir()
    assert save(tiny("llama"), tiny_tokenizer(), tmp_path / "empty", card=CARD) == "plain"
    with pytest.raises(FoveateError, match="can't be an extra file"):
        save(tiny("llama"), tiny_tokenizer(), tmp_path / "new", card=CARD, extra={"../up.txt": ""})
    with pytest.raises(FoveateError, match="can't be an extra file"):
        save(tiny("llama"), tiny_tokenizer(), tmp_path / "new", card=CARD, extra={"config.json": ""})
    assert not (tmp_path / "new").exists() and not (tmp_path / "up.txt").exists()


@pytest.mark.parametrize("step", ["tokenizer", "config", "sync", "swap"])
def test_an_error_at_any_step_leaves_the_old_one(old, step, monkeypatch):
    before, tokenizer = state(old), tiny_tokenizer()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if step == "tokenizer":
        tokenizer.save_pretrained = full
    else:
        name = {"config": "_complete_config", "sync": "_sync", "swap": "_exchange"}[step]
        monkeypatch.setattr(module, name, full)
    with pytest.raises(FoveateError, match="No space left on device.*as it was"):
        save(shrunk("llama", "irregular"), tokenizer, old, card="The new one.")
    assert state(old) == before and [each.name for each in old.parent.iterdir()] == ["small"]


def test_a_full_disk_leaves_the_old_one(old):
    before = state(old)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the weights take more
    try:
        with pytest.raises(FoveateError, match="can't be written.*as it was"):
            save(tiny("llama"), tiny_tokenizer(), old, card="The new one.")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert state(old) == before and [each.name for each in old.parent.iterdir()] == ["small"]


def test_too_little_room_is_said_before_anything_is_written(old, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: module.shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    monkeypatch.setattr(type(tiny("llama")), "save_pretrained", None)
    with pytest.raises(FoveateError, match="the model takes .* GiB, and .* has 0.0 GiB free"):
        save(tiny("llama"), tiny_tokenizer(), old, card="The new one.")


KILLED = """
import sys, time
import foveate as fv
from foveate.models import saved

model, tokenizer, folder = fv.tiny("llama"), fv.tiny_tokenizer(), sys.argv[1]

def slow(what):
    def call(*given):
        print("ready", flush=True)
        time.sleep(float(sys.argv[2]))
        return what(*given)
    return call
setattr(saved, sys.argv[3], slow(getattr(saved, sys.argv[3])))
print("started", flush=True)
saved.save(model, tokenizer, folder, card="The new one.")
print("done", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("step", ["_write_mark", "_swap"])
def test_a_killed_save_leaves_the_old_one_and_the_next_clears_up(old, step):
    before = state(old)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(old), "60", step], stdout=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() != "ready":
        assert process.poll() is None
    with pytest.raises(FoveateError, match="being written by another process"):
        save(tiny("llama"), tiny_tokenizer(), old, card=CARD)
    process.kill()
    process.wait()
    assert state(old) == before
    assert len(list(old.parent.iterdir())) == 2  # what was half-written lies hidden beside it
    save(tiny("llama"), tiny_tokenizer(), old, card="The third one.")
    assert [each.name for each in old.parent.iterdir()] == ["small"]
    assert (old / "README.md").read_text() == "The third one."


# ---- the card -------------------------------------------------------------------------------------------------------


def test_the_card_tells_the_story_and_trusts_no_text():
    story = Story(
        name="small <script>",
        base_model="owner/base: |\n evil: 1",
        recipe="flap:keep=0.8 ``` x",
        shape="irregular",
        plans=["layers 0: 3 of 4 head | <b>", "# not a title\n- nor this"],
        text={"calibration": "prose, 2,048 tokens"},
        heal={"loss": 2.5},
        before={
            "perplexity": {"value": 11.6, "low": 11.1, "high": 12.2},
            "parameters": {"value": 1e8, "low": 1e8, "high": 1e8},
        },
        after={"perplexity": {"value": 12.75, "low": 12.0, "high": 13.5}},
        versions={"torch": "2.11"},
        license="apache-2.0",
    )
    text = card(story)
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["foveate"],
        "license": "apache-2.0",
    }
    assert "<script>" not in body and "<b>" not in body and "trust_remote_code=True" in body
    assert "```` flap:keep=0.8 ``` x ````" in body
    assert "\n# not" not in body and r"\# not a title \- nor this" in body
    assert r"| perplexity | 11.6 [11.1, 12.2] | 12.75 [12, 13.5] |" in body
    assert r"| parameters | 100,000,000 |  |" in body
    assert json.loads(json.dumps(story.to_json()))["recipe"] == story.recipe
    plain = card(Story(name="x", base_model="owner/base", recipe="full", shape="plain"))
    assert yaml.safe_load(plain.split("---\n")[1])["base_model"] == "owner/base" and "trust_remote" not in plain
    assert "## Healing" not in plain and "## Figures" not in plain


def test_the_mark_says_what_the_folder_is(tmp_path):
    extra = {MARK: json.dumps({"recipe": "flap:keep=0.8"})}
    save(shrunk("llama", "irregular"), tiny_tokenizer(), tmp_path / "small", card=CARD, extra=extra)
    mark = json.loads((tmp_path / "small" / MARK).read_text())
    assert mark["recipe"] == "flap:keep=0.8" and mark["shape"] == "irregular" and mark["foveate_model"] == 1
    assert set(mark["files"]) == {each.name for each in (tmp_path / "small").iterdir()}
