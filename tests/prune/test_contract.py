"""The contract of every pruner, on a tiny model of every supported family."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import FoveateError
from foveate.methods import METHODS, Recipe, Target, apply
from foveate.models.surgery import layer_parameters
from foveate.models.tiny import TINY_FAMILIES, tiny
from foveate.prune import Pruner

PRUNERS = sorted(
    name
    for name, cls in METHODS.all().items()
    if issubclass(cls, Pruner) and cls.__module__.startswith("foveate.prune") and name != "scored"  # it needs a file
)
RECIPES = [
    *PRUNERS,
    "minitron:axes=depth",
    "minitron:axes=heads/channels",
    "flap:budget=uniform",
    "wanda:budget=global",
]
IDS = torch.randint(3, 120, (1, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def model(request):
    return tiny(request.param)


def with_keep(recipe, keep):
    return f"{recipe}{',' if ':' in recipe else ':'}keep={keep}"


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def unable(model, recipe):
    """The residual stream of Gemma can't be cut."""
    return model.config.model_type.startswith("gemma") and recipe == "minitron"


@pytest.mark.parametrize("recipe", RECIPES)
def test_keep_1_is_the_model_as_it_is(model, recipe):
    whole = model(IDS).logits
    with apply(model, with_keep(recipe, 1)):  # no calibration is given, and none is asked for
        assert torch.equal(model(IDS).logits, whole)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_pruned_works_and_leaves_no_trace(model, recipe):
    whole, before, inside = model(IDS).logits, parameters(model), layer_parameters(model)
    if unable(model, recipe):
        with (
            pytest.raises(FoveateError, match="scaled by their width"),
            apply(model, "minitron:keep=0.5", calibration=IDS),
        ):
            pass
        assert torch.equal(model(IDS).logits, whole)
        return
    with apply(model, with_keep(recipe, 0.75), calibration=IDS) as applied:
        assert isinstance(applied, Recipe) and parameters(model) < before
        if applied.methods[0].by == "parameters":
            assert layer_parameters(model) == pytest.approx(0.75 * inside, rel=0.07)
        pruned = model(IDS).logits
        assert pruned.isfinite().all() and not torch.allclose(pruned, whole)
        cache, pieces = None, []
        for piece in IDS.split([12, 1, 19], dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), pruned, atol=1e-4, rtol=1e-4)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 256}
        alone = model.generate(IDS[:, 5:], **options)[0]
        padded = torch.cat([torch.full((1, 5), 256), IDS[:, 5:]], dim=1)
        mask = (padded != 256).long()
        both = model.generate(
            torch.cat([padded, IDS]), attention_mask=torch.cat([mask, torch.ones_like(mask)]), **options
        )
        assert both[0, 5:].tolist() == alone.tolist()
        with apply(model, "h2o:entries=8"):
            assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 35)
    assert parameters(model) == before and torch.equal(model(IDS).logits, whole)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_plan_is_noted_and_can_be_carried_out_later(recipe, tmp_path):
    model = tiny("llama")
    target = Target(model, None, lambda *_: IDS, lambda: None)
    with Recipe.of(with_keep(recipe, 0.75)).methods[0].applied(target):
        pruned = model(IDS).logits
    (plan,) = target.plans
    assert plan.made_by.startswith(recipe.split(":")[0]) and plan.describe() != "everything stays"
    plan.save(tmp_path / "plan.json")
    with apply(model, f"plan:file={tmp_path / 'plan.json'}"):
        if plan.means is None:
            assert torch.equal(model(IDS).logits, pruned)
    other = apply(tiny("llama", seed=1), f"plan:file={tmp_path / 'plan.json'}")
    with pytest.raises(FoveateError, match="made for another model"), other:
        pass


def test_pruners_follow_each_other():
    model = tiny("llama")
    with apply(model, "drop-sublayers:keep=0.75+flap:keep=0.9+minitron:keep=0.9,axes=channels", calibration=IDS):
        assert model(IDS).logits.isfinite().all()
        assert layer_parameters(model) < 0.81 * 147968
    assert layer_parameters(model) == 147968


def test_fractions_that_are_none_are_said():
    for name in PRUNERS:
        with pytest.raises(FoveateError, match=rf"{name}: keep=1.5 is outside"):
            Recipe.of(f"{name}:keep=1.5")


def test_plans_of_files_that_are_not_there():
    with pytest.raises(FoveateError, match="can't be read"), apply(tiny("llama"), "plan:file=/no/plan.json"):
        pass


@pytest.mark.parametrize("before", ["low-rank:keep=0.5", "recursive:rank=4"])
@pytest.mark.parametrize("name", ["flap", "wanda", "magnitude", "minitron"])
def test_converted_maps_are_refused_in_a_sentence(before, name):
    text = torch.arange(3, 67).unsqueeze(0)
    asked = apply(tiny("llama"), f"{before}+{name}:keep=0.8", calibration=text)
    with pytest.raises(FoveateError, match="before its parts are converted"), asked:
        pass
