"""Thinning for good: what may be, what is saved, what is measured, and going on after a stop."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import foveate as fv
from foveate.cli import app, main
from foveate.errors import FoveateError
from foveate.models.load import load
from foveate.models.saved import is_plain
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.plans import Plan
from foveate.thin import figures, permanent, plan_only, thin_to

IDS = torch.randint(3, 120, (1, 96), generator=torch.Generator().manual_seed(1))
MODULE = sys.modules["foveate.thin"]  # by its name the package gives the function
HEAL = "distill:tokens=2k,batch=4,length=64,data=samples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and its tokenizer as a folder."""
    place = tmp_path_factory.mktemp("tiny") / "model"
    tiny("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return str(place)


@pytest.fixture
def quick(monkeypatch):
    """Figures of little text."""

    def few(small, model, tokenizer, **given):
        return figures(small, model, tokenizer, **given | {"windows": 1, "repeats": 1})

    monkeypatch.setattr(MODULE, "figures", few)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "recipe, shape",
    [
        ("drop-attention:keep=0.5", "irregular"),
        ("skip-layers:keep=0.5", "plain"),
        ("flap:keep=0.8", "irregular"),
        ("flap:keep=0.8,budget=uniform", "plain"),
        ("drop-mlp:keep=0.75+low-rank:keep=0.6", "irregular"),
        ("minitron:keep=0.8,axes=hidden", "irregular"),  # heads don't divide the width, which the stock class asks for
    ],
)
def test_a_thinned_model_is_smaller_and_opens_as_it_was(recipe, shape, tmp_path):
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with fv.apply(model, recipe, calibration=IDS), torch.no_grad():
        inside = model(IDS).logits
    small = fv.thin(model, recipe, calibration=IDS, tokenizer=tiny_tokenizer())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert parameters(small) < parameters(model)
    small.save_pretrained(tmp_path / "small")
    opened, _ = load(tmp_path / "small", dtype="float32", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, inside, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(opened(IDS).logits, inside, atol=1e-5, rtol=1e-5)
    told = json.loads((tmp_path / "small" / "foveate.json").read_text())
    assert told["shape"] == shape and told["recipe"] == recipe


def test_what_is_only_in_force_while_applied_is_refused():
    for recipe in ("h2o:keep=0.5", "flap:keep=0.8+skip-decode:min_layers=2,max_layers=4,length=64"):
        with pytest.raises(FoveateError, match="in force only while applied"):
            fv.thin(tiny("llama"), recipe, calibration=IDS)


def test_regular_makes_budgets_uniform_and_refuses_what_can_not_be():
    assert str(permanent("flap:keep=0.8,budget=global(floor=0.2)", regular=True)) == (
        "flap:keep=0.8,budget=uniform(floor=0.2)"
    )
    assert is_plain(fv.thin(tiny("llama"), "flap:keep=0.8", regular=True, calibration=IDS))
    with pytest.raises(FoveateError, match="different shapes"):
        fv.thin(tiny("llama"), "drop-attention:keep=0.5", regular=True, calibration=IDS)


def test_a_healed_model_learned_and_says_so(tmp_path):
    model = tiny("llama")
    bare = fv.thin(model, "flap:keep=0.8", calibration=IDS)
    healed = fv.thin(model, "flap:keep=0.8", heal=HEAL, calibration=IDS, tokenizer=tiny_tokenizer())
    with torch.no_grad():
        apart = [float((m(IDS).logits - model(IDS).logits).square().mean()) for m in (bare, healed)]
    assert apart[1] < apart[0]
    assert healed.story.heal["tokens"] == 2048 and not bare.story.heal
    with pytest.raises(FoveateError, match="way to heal"):
        fv.thin(model, "flap:keep=0.8", heal="destil", calibration=IDS)


def test_figures_are_those_of_the_two_models():
    model = tiny("llama")
    small = fv.thin(model, "skip-layers:keep=0.5", calibration=IDS)
    found = figures(small, model, tiny_tokenizer(), windows=2, repeats=1)
    before, after = found["parameters in the layers"]
    assert after.value == before.value / 2
    whole, thinned = found["perplexity on prose"]
    assert found["perplexity on prose, ratio"][1].value == pytest.approx(thinned.value / whole.value)
    operations = found["prefill speed-up, predicted by operations"][1].value
    assert 1.5 < operations < 2  # half of the layers; the head's one row is next to nothing
    same = figures(model, model, tiny_tokenizer(), windows=1, repeats=1)
    assert same["perplexity on prose, ratio"][1].value == 1


def test_the_command_writes_a_folder_with_a_card(folder, tmp_path, quick):
    out = tmp_path / "small"
    arguments = ["thin", folder, "flap:keep=0.8", "--heal", HEAL, "--out", str(out)]
    run = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert run.exit_code == 0, run.output
    assert "parameters in the layers" in run.output and str(out) in run.output
    card = (out / "README.md").read_text()
    assert "flap:keep=0.8" in card and "perplexity on prose" in card and "2048" in card
    scores = dict(json.loads((out / "foveate.json").read_text())["scores"])
    assert {kind: len(layers) for kind, layers in scores.items()} == {"kv_head": 4, "channel": 4}
    assert all(low < middle < high for low, middle, high in scores["channel"])
    assert "- channel: " in card.replace("\\", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]  # nothing is left beside it


def test_a_plan_is_printed_saved_and_carried_out_later(folder, tmp_path):
    path = tmp_path / "plan.json"
    run = CliRunner().invoke(app, ["thin", folder, "flap:keep=0.8", "--plan", str(path)])
    assert run.exit_code == 0 and "of 128" in run.output
    model, tokenizer = load(folder, device="cpu")
    bare, means = (fv.thin(model, f"plan:file={path}{more}", tokenizer=tokenizer) for more in ("", ",compensate=true"))
    flap = fv.thin(model, "flap:keep=0.8", tokenizer=tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(means(IDS).logits, flap(IDS).logits)
        assert not torch.allclose(bare(IDS).logits, flap(IDS).logits)
    with pytest.raises(FoveateError, match="made for another model"):
        fv.thin(tiny("llama", seed=1), f"plan:file={path}", calibration=IDS)
    assert Plan.load(path).made_by == "flap:keep=0.8"
    for recipe, says in [("flap:keep=0.9+wanda:keep=0.9", "2 methods"), ("low-rank:keep=0.6", "no units")]:
        with pytest.raises(FoveateError, match=says):
            plan_only(folder, recipe, tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()


def test_a_stopped_run_goes_on_from_where_healing_was(folder, tmp_path, quick, monkeypatch, capsys):
    def stopped(*given, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "figures", stopped)
        with pytest.raises(KeyboardInterrupt):
            thin_to(folder, "flap:keep=0.8", tmp_path / "small", heal=HEAL)
    assert not (tmp_path / "small").exists() and (tmp_path / ".small.heal").is_dir()
    capsys.readouterr()
    thin_to(folder, "flap:keep=0.8", tmp_path / "small", heal=HEAL)
    assert "goes on at step 8" in capsys.readouterr().err
    assert (tmp_path / "small" / "model.safetensors").exists() and not (tmp_path / ".small.heal").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["flap:keep=0.8"], "--out"),
        (["flap:keep=0.8", "--out", "{taken}"], "not empty"),
        (["h2o:keep=0.5", "--out", "{out}"], "in force only while applied"),
        (["flap:keep=0.8", "--heal", "distil:tokens=1k", "--out", "{out}"], "did you mean distill"),
        (["flap:keep=0.8", "--heal", "distill:data={short}", "--out", "{out}"], "sequence"),
        (["flap:keep=0.8", "--text", "nowhere.txt", "--out", "{out}"], "no text"),
        (["flap:keep=0.01", "--out", "{out}"], "keep"),
        (["plan:file={short}", "--out", "{out}"], "no plan"),
        (["flap:keep=0.8", "--text", "{short}", "--out", "{out}"], "tokens"),
        (["flap:keep=0.8", "--heal", "distill:data={long}", "--text", "{long}", "--out", "{out}"], "say nothing"),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_nothing(folder, tmp_path, arguments, says, monkeypatch, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("keep me")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "long.txt").write_text("A text that is long enough for this. " * 4000)
    places = {"long": tmp_path / "long.txt"}
    places |= {"taken": tmp_path / "taken", "out": tmp_path / "out", "short": tmp_path / "short.txt"}
    given = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["foveate", "thin", folder, *given])
    if says in ("tokens", "say nothing"):  # told before any work
        monkeypatch.setattr(MODULE, "thin", lambda *args, **more: pytest.fail("it began"))
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists() and (tmp_path / "taken" / "mine.txt").read_text() == "keep me"


def test_two_processes_make_one_folder(folder, tmp_path):
    out = tmp_path / "small"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "foveate", "thin"]
    run = subprocess.run(
        [*command, folder, "flap:keep=0.8", "--heal", HEAL, "--out", str(out)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("parameters in the layers, ratio") == 1
    assert json.loads((out / "foveate.json").read_text())["heal"]["tokens"] == 2048


def test_healing_keeps_a_regular_shape_or_is_refused():
    healing = {"heal": "bias:tokens=1k,length=64,data=samples", "tokenizer": tiny_tokenizer()}
    with pytest.raises(FoveateError, match="regular shape"):  # Qwen 2 has no such biases
        fv.thin(tiny("qwen2"), "magnitude:keep=0.8", regular=True, **healing)
    assert is_plain(fv.thin(tiny("llama"), "magnitude:keep=0.8", regular=True, **healing))
