"""Search: steps are measured rightly, the goal is reached, nothing is left, and a stopped search goes on."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.methods import changed
from foveate.models.surgery import Surgery, cut, layer_parameters, undone
from foveate.search import axes as axes_module
from foveate.search import search
from foveate.search.axes import AXES, AttentionAxis, CacheAxis, ChannelAxis, KvHeadAxis, LayerAxis, RankAxis
from foveate.search.goals import Memory, Params, Times
from foveate.search.judge import answer
from foveate.search.loss import Loss
from foveate.search.states import Live, State, Step
from foveate.search.walk import Journal

TINY = {"calibration_tokens": 64, "evaluation_tokens": 128, "show": False}


@pytest.fixture
def tiny():
    return fv.tiny("llama"), fv.tiny_tokenizer()


def ids(length=48, batch=2):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


def kl(model, given, before):
    """Nats a token from the logits before, the slow and plain way."""
    p, q = before.double().softmax(-1), model(given).logits.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


# ---- steps and states ------------------------------------------------------------------------------------------------

STEPS = [
    Step("attention", "attention 2", {(2, "attention"): ()}),
    Step("mlp", "mlp 1", {(1, "mlp"): ()}),
    Step("layer", "layer 3", {(3, "attention"): (), (3, "mlp"): ()}),
    Step("kv_head", "kv_head 2.0", {(2, "kv_head"): (1,)}),
    Step("channel", "channel 1", {(1, "channel"): tuple(range(64))}),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
@torch.no_grad()
def test_a_loss_from_the_layer_on_is_that_of_the_whole_forward(family, step):
    model = fv.tiny(family)
    given = ids()
    before = model(given).logits
    if family in ("gpt2", "opt") and step.axis == "kv_head":
        step = Step("kv_head", "kv_head 2.0", {(2, "kv_head"): (1, 3)})
    with undone(model):
        live = Live(model)
        loss = Loss(model, given)
        assert loss.of() == pytest.approx(0, abs=1e-6)
        here = State({(0, "channel"): tuple(range(100))})
        live.show(here)
        loss.remember()
        live.show(step.after(here))
        assert loss.of(step.first) == pytest.approx(kl(model, given, before), rel=1e-4)
        live.show(here)
        assert loss.of() == pytest.approx(kl(model, given, before), rel=1e-4)
        live.restore()
    assert torch.equal(model(given).logits, before)
    assert not any("forward" in vars(layer.module) for layer in fv.anatomy(model).layers)


@torch.no_grad()
def test_a_live_state_is_what_its_plan_carries_out():
    model, given = fv.tiny("llama"), ids()
    state = State()
    for step in [STEPS[3], STEPS[4], STEPS[0]]:  # a head of layer 2, then all of its attention
        state = step.after(state)
    with undone(model):
        live = Live(model)
        live.show(state)
        shown, size = model(given).logits, layer_parameters(model)
        live.restore()
    plan = state.plan(model, "test")
    with fv.apply(model, answer(plan, "")):
        assert layer_parameters(model) == size
        torch.testing.assert_close(model(given).logits, shown)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("place", [(1, "mlp"), (2, "attention")])
@torch.no_grad()
def test_a_live_state_with_ranks_is_what_its_recipe_says(family, place):
    model, given = fv.tiny(family), ids()
    before = model(given).logits
    axis = RankAxis(model, given)
    assert len(axis.maps) == 8
    (step,) = [step for step in axis.steps(State()) if {*step.ranks} == {place}]
    # Another layer behind it is cut, too: what this one reads is as in the original.
    state = step.after(State({(3, "mlp"): ()}))
    with undone(model):
        live, loss = Live(model, axis.factors), Loss(model, given)
        live.show(State({(3, "mlp"): ()}))
        loss.remember()
        live.show(state)
        shown, size = model(given).logits, layer_parameters(model)
        assert loss.of(step.first) == pytest.approx(kl(model, given, before), rel=1e-3)
        live.restore()
    assert torch.equal(model(given).logits, before) and size < layer_parameters(model)
    with fv.apply(model, answer(state.plan(model, "test"), state.beside), calibration=given):
        assert layer_parameters(model) == size
        torch.testing.assert_close(model(given).logits, shown, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_maps_of_low_rank_are_found_and_the_answer_is_a_recipe(tiny, tmp_path):
    model, tokenizer = tiny
    mlp, generator = model.model.layers[1].mlp, torch.Generator().manual_seed(0)
    for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):  # 16 of 64 ranks: 0.375 of the parameters
        up, down = (torch.randn(n, 16, generator=generator) for n in each.weight.shape)
        each.weight.copy_(up @ down.T / 64)
    whole, size = model(ids()).logits, layer_parameters(model)
    found = search(model, params=0.905, tokenizer=tokenizer, out=tmp_path, axes=["rank", "mlp"], **TINY)
    assert {step.name for step in found.steps[:2]} == {"rank mlp 1: 0.8", "rank mlp 1: 0.6"}
    assert found.steps[1].loss == pytest.approx(0, abs=1e-4)
    assert found.beside == "low-rank:keep=0.4,maps=mlp,layers=1" and found.recipe.endswith("+" + found.beside)
    assert torch.equal(model(ids()).logits, whole)
    small = fv.thin(model, found.recipe, tokenizer=tokenizer)
    assert layer_parameters(small) / size == pytest.approx(found.amount, abs=1e-3)
    page = (tmp_path / "report.html").read_text()
    assert "40% in factors" in page and found.beside in page and page.count("attention all") == len(model.model.layers)
    assert found.judged[1].amount == pytest.approx(found.amount, abs=1e-3)


@torch.no_grad()
def test_uneven_layers_have_the_same_size_live_and_by_the_recipe():
    model, given = fv.tiny("qwen3"), ids()
    cut(model, "channel", [torch.arange(count) for count in (64, 73, 82, 91)], Surgery())
    cut(model, "kv_head", [torch.arange(count) for count in (2, 1, 2, 2)], Surgery())
    axis = RankAxis(model, given)
    for part in (0.8, 0.6, 0.4):
        state = State({}, "", dict.fromkeys(axis.maps, part))
        with undone(model):
            live = Live(model, axis.factors)
            live.show(state)
            size = layer_parameters(model)
            live.restore()
        with fv.apply(model, state.beside, calibration=given):
            assert layer_parameters(model) == size


@pytest.mark.parametrize("axes", [["rank", "kv_head"], ["kv_head", "rank"]])
def test_steps_that_shut_each_other_out_end_in_a_sentence_or_at_the_goal(tiny, axes):
    model, tokenizer = tiny
    try:
        found = search(model, params=0.3, axes=axes, tokenizer=tokenizer, judged=False, **TINY)
        assert found.amount <= 0.3
    except FoveateError as error:
        assert "no step saves any parameters in the layers" in str(error)
    found = search(model, params=0.5, axes=axes, tokenizer=tokenizer, judged=False, **TINY)
    assert found.amount <= 0.5


def test_what_was_converted_is_left_as_it_is(tiny):
    model, tokenizer = tiny
    part = changed(model, "low-rank:keep=0.5,layers=0", calibration=ids())[0]
    found = search(part, params=0.9, axes=["rank"], tokenizer=tokenizer, judged=False, **TINY)
    assert found.ranks and all(layer > 0 for layer, _ in found.ranks)


def test_another_text_is_what_recipes_are_prepared_on(tiny, monkeypatch):
    model, tokenizer = tiny
    seen = []
    module = sys.modules["foveate.search"]
    monkeypatch.setattr(module, "judge", lambda *given, calibration: seen.append(calibration) or [])
    monkeypatch.setattr(module, "RANKING_TOKENS", 512)
    for text in ("prose", "code"):
        search(model, params=0.9, axes=["mlp"], tokenizer=tokenizer, text=text, **TINY)
    assert seen[0] is None and seen[1].numel() == 512


def test_another_text_to_rank_on_is_another_search(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny
    asked = {"params": 0.97, "axes": ["rank"], "tokenizer": tokenizer, "judged": False, "out": tmp_path, **TINY}
    search(model, **asked)
    monkeypatch.setattr(sys.modules["foveate.search"], "RANKING_TOKENS", 512)
    with pytest.raises(FoveateError, match="holds a search with another ranking text"):
        search(model, **asked)


def test_a_single_technique_keeps_as_much_as_the_budget_allows(tiny):
    """Two more sublayers less would be within the margin, too, and no fair comparison."""
    model, tokenizer = fv.tiny("llama", num_hidden_layers=8, intermediate_size=1024), fv.tiny_tokenizer()
    found = search(model, params=0.98, axes=["attention"], tokenizer=tokenizer, **TINY)
    (row,) = [row for row in found.judged if row.recipe.startswith("drop-attention")]
    assert row.amount == pytest.approx(found.amount) and row.perplexity is not None


def test_units_are_ranked_on_text_that_no_step_is_measured_on(tiny):
    from foveate.data.text import load_text
    from foveate.search import passages, rest

    model, tokenizer = tiny
    text = load_text("prose").calibration[:3000]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    for count in (200, 600, 1500):
        measured = passages(model, tokenizer, text, count)
        others = rest(model, tokenizer, text, measured, 10**6)
        assert others.shape[1] <= model.config.max_position_embeddings and others.numel() > 0.5 * (len(whole) - count)
        left = list(whole)
        for row in measured.tolist():
            at = next(i for i in range(len(left)) if left[i : i + len(row)] == row)
            left[at : at + len(row)] = [-1] * len(row)
        left = [token for token in left if token >= 0]
        assert others.flatten().tolist() == left[: others.numel()]
    assert rest(model, tokenizer, text, passages(model, tokenizer, text, 200), 100).numel() == 100
    short = text[:512]
    measured = passages(model, tokenizer, short, 512)
    assert torch.equal(rest(model, tokenizer, short, measured, 100), measured)  # there is no other


def test_a_sublayer_is_cut_or_factorised():
    model = fv.tiny("llama")
    rank, channel, heads = (axis(model, ids()) for axis in (RankAxis, ChannelAxis, KvHeadAxis))
    assert len(rank.steps(State())) == 8
    thin = State({}, "", {(1, "mlp"): 0.8, (2, "attention"): 0.25})
    assert [step.name for step in rank.steps(thin) if "1:" in step.name] == ["rank attention 1: 0.8", "rank mlp 1: 0.6"]
    assert not any("attention 2" in step.name for step in rank.steps(thin))  # no lower rank than that
    assert {step.name.split(":")[0] for step in channel.steps(thin)} == {"channel 0", "channel 2", "channel 3"}
    assert not any("2." in step.name for step in heads.steps(thin))
    cut = State({(1, "channel"): (0, 1), (2, "attention"): ()})
    assert not any("mlp 1" in step.name or "attention 2" in step.name for step in rank.steps(cut))
    assert (
        thin.digest != State().digest
        and State({(1, "mlp"): ()}).digest == State({(1, "mlp"): ()}, "", {(1, "mlp"): 0.8}).digest
    )


def test_what_is_left_of_a_sublayer_that_is_gone_makes_no_other_state():
    whole = State({(2, "attention"): ()})
    assert State({(2, "attention"): (), (2, "kv_head"): (1,)}).digest == whole.digest
    assert State({(2, "kv_head"): (1,)}).digest != whole.digest


def test_axes_leave_something_of_each_layer():
    model = fv.tiny("llama")
    for axis, kind, least in ((KvHeadAxis, "kv_head", 1), (ChannelAxis, "channel", 8), (AttentionAxis, "attention", 0)):
        made, state = axis(model, ids()), State()
        while steps := made.steps(state):
            state = steps[0].after(state)
        kept = [len(state.keep.get((i, kind), (0,))) for i in range(4)]
        assert sum(kept) == (1 if kind == "attention" else 4 * least)
    left = LayerAxis(model, ids()).steps(State({(0, "mlp"): ()}))
    assert [step.name for step in left] == ["layer 1", "layer 2", "layer 3"]
    lower = CacheAxis(model, ids()).steps(State({}, "h2o:keep=0.5"))
    assert [step.cache for step in lower] == ["streaming:keep=0.35", "h2o:keep=0.35"]


@torch.no_grad()
def test_neurons_that_do_nothing_are_the_first_to_leave():
    model = fv.tiny("llama")
    dead = [5, 17, 90]
    model.model.layers[2].mlp.down_proj.weight[:, dead] = 0
    order = ChannelAxis(model, ids()).order[2]
    assert sorted(order[:3]) == dead


def test_channel_scores_are_squared_slopes_of_gates():
    model, given = fv.tiny("llama", num_hidden_layers=1).double(), ids(8, 1)
    (scores,) = axes_module.channel_scores(model, given)
    logits = model(given).logits[0].float()
    labels = logits.softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(0))[:, 0]
    gates = torch.ones(8, 128, dtype=torch.float64, requires_grad=True)  # one for each token and neuron
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: (args[0] * gates,))
    torch.nn.functional.cross_entropy(model(given).logits[0], labels, reduction="sum").backward()
    hook.remove()
    torch.testing.assert_close(scores.double(), gates.grad.square().sum(0), rtol=1e-3, atol=1e-7)


# ---- goals -----------------------------------------------------------------------------------------------------------


def test_memory_counts_weights_and_cache():
    model = fv.tiny("llama")
    weights = sum(p.nbytes for p in model.parameters())
    goal = Memory.of(model, "1MiB", 100)
    cache = 4 * 2 * 2 * 16 * 4 * 100  # layers, keys and values, KV heads, head size, bytes, tokens
    assert goal.amount(model) == weights + cache
    assert goal.amount(model, 0.25) == weights + cache / 4
    layer = sum(p.nbytes for p in model.model.layers[1].parameters())
    with fv.apply(model, "skip-layers:keep=0.5"):
        assert goal.amount(model) == weights - 2 * layer + cache / 2


def test_predicted_time_is_linear_in_what_stays():
    times = Times(rest=1.0, attention=0.5, kv_head=0.25, mlp=2.0, channel=0.01)
    model = fv.tiny("llama")
    assert times.of(model) == pytest.approx(1 + 4 * (0.5 + 2 * 0.25 + 2 + 1.28))
    with undone(model):
        live = Live(model)
        live.show(State({(0, "attention"): (), (1, "channel"): tuple(range(28))}))
        assert times.of(model) == pytest.approx(1 + 4 * (0.5 + 2 * 0.25 + 2 + 1.28) - 1 - 1)
        live.restore()


# ---- whole searches --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_adds_nothing_leaves_first(tiny):
    model, tokenizer = tiny
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.model.layers[2].mlp.down_proj.weight.zero_()
    found = search(model, params=0.75, tokenizer=tokenizer, judged=False, axes=["attention", "mlp"], **TINY)
    assert {step.name for step in found.steps[:2]} == {"attention 1", "mlp 2"}
    assert found.steps[1].loss == pytest.approx(0, abs=1e-6)


def test_a_search_reaches_its_goal_and_leaves_nothing_behind(tiny, tmp_path):
    model, tokenizer = tiny
    given = ids()
    before, size = model(given).logits, layer_parameters(model)
    found = search(model, params=0.85, tokenizer=tokenizer, out=tmp_path, **TINY)
    assert torch.equal(model(given).logits, before) and layer_parameters(model) == size
    with fv.apply(model, answer(found.plan, found.beside), tokenizer=tokenizer):
        assert layer_parameters(model) / size == pytest.approx(found.amount)
    assert 0.8 < found.amount <= 0.85
    assert found.recipe == "+".join(filter(None, [f"plan:file={tmp_path / 'plan.json'}", found.beside]))
    assert (tmp_path / "recipe.txt").read_text() == found.recipe + "\n"
    kept = json.loads((tmp_path / "result.json").read_text())
    assert [step["name"] for step in kept["steps"]] == [step.name for step in found.steps]
    assert {row["recipe"].split(":")[0] for row in kept["judged"]} >= {"full", "search", "drop-attention"}
    page = (tmp_path / "report.html").read_text()
    assert found.steps[0].name in page and "http-equiv" in page and "<script src" not in page


def test_each_round_takes_the_best_of_all_that_was_tried(tiny):
    """With every step measured anew, the first rounds are those of plain greedy search."""
    model, tokenizer = tiny
    found = search(model, params=0.75, tokenizer=tokenizer, judged=False, axes=["attention"], **TINY)
    from foveate.data.text import load_text
    from foveate.search import passages

    given = passages(model, tokenizer, load_text("prose").calibration, 64)
    before, gone = model(given).logits, []
    with undone(model), torch.no_grad():
        live = Live(model)
        for _ in found.steps:
            losses = {}
            for layer in sorted(set(range(4)) - set(gone)):
                live.show(State({(i, "attention"): () for i in [*gone, layer]}))
                losses[layer] = kl(model, given, before)
            gone.append(min(losses, key=lambda layer: losses[layer]))
        live.restore()
    assert [step.name for step in found.steps] == [f"attention {layer}" for layer in gone]


def test_a_stopped_search_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny
    asked = {"params": 0.85, "tokenizer": tokenizer, "judged": False, "axes": ["attention", "channel"], **TINY}
    whole = search(model, **asked)
    calls, of = [], Loss.of

    def dies(self, first=0, cache=""):
        calls.append(first)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return of(self, first, cache)

    monkeypatch.setattr(Loss, "of", dies)
    given, before = ids(), model(ids()).logits
    with pytest.raises(KeyboardInterrupt):
        search(model, out=tmp_path, **asked)
    assert torch.equal(model(given).logits, before)
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": "cut sho')  # as a killed process may leave it
    again = []
    monkeypatch.setattr(Loss, "of", lambda self, first=0, cache="": again.append(first) or of(self, first, cache))
    resumed = search(model, out=tmp_path, **asked)
    assert [step.name for step in resumed.steps] == [step.name for step in whole.steps]
    measured = whole.steps[-1].measured
    assert len(again) < measured - 5
    again.clear()
    assert search(model, out=tmp_path, **asked).steps == resumed.steps and not again
    nearer = search(model, out=tmp_path, **{**asked, "params": 0.95})  # another goal, the same measurements
    assert nearer.steps[0] == resumed.steps[0] and len(again) < 4


def test_memory_is_found_in_the_cache_where_the_cache_is_large(tiny):
    model, tokenizer = tiny
    goal = Memory.of(model, 1, 100_000)
    found = search(
        model, memory=int(0.7 * goal.amount(model)), context=100_000, axes=["cache", "attention"], judged=True,
        tokenizer=tokenizer, **TINY,
    )  # fmt: skip
    assert found.amount <= 0.7 * found.start
    assert any(row.recipe == "search" and row.perplexity for row in found.judged)


def test_a_speed_goal_is_reached_by_prediction_and_measured(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny
    # What a busy machine would measure of so small a model is anything.
    monkeypatch.setattr(
        sys.modules["foveate.search"], "measure_times", lambda *given, **more: Times(1e-3, 1e-3, 1e-4, 1e-3, 1e-6)
    )
    found = search(model, speed=1.1, tokenizer=tokenizer, out=tmp_path, axes=["attention", "mlp"], **TINY)
    assert found.amount <= 1 / 1.1 and found.measured["low"] <= found.measured["high"]
    assert "measured" in found.summary().lower()
    again = search(model, speed=1.1, tokenizer=tokenizer, out=tmp_path, axes=["attention", "mlp"], **TINY)
    assert again.steps == found.steps


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, said",
    [
        ({}, "a search has one goal, and none was given"),
        ({"params": 0.8, "speed": 1.5}, r"2 were given \(params, speed\)"),
        ({"params": 1.2}, r"params=1.2 is outside \(0, 1\)"),
        ({"speed": 0.9}, "speed=0.9 is not above 1"),
        ({"speed": 1.5, "axes": ["mlp", "rank"]}, "leave rank out"),
        ({"speed": 1.5, "phase": "decoding"}, "there is no phase 'decoding'"),
        ({"memory": "4 apples"}, "memory=4 apples is no size"),
        ({"params": 0.8, "axes": ["atention"]}, "there is no axis called 'atention': did you mean attention"),
        ({"params": 0.8, "axes": []}, "no axis was named"),
        ({"params": 0.3, "axes": ["attention"]}, "params: 30.0% of parameters in the layers can't be reached"),
        ({"memory": 1000}, "memory: 1000 bytes of memory can't be reached"),
    ],
)
def test_bad_input_gets_a_sentence(tiny, asked, said):
    model, tokenizer = tiny
    with pytest.raises(fv.FoveateError, match=said):
        search(model, tokenizer=tokenizer, **asked, **TINY)


def test_a_folder_of_another_search_is_refused(tmp_path):
    Journal(tmp_path / "steps.jsonl", {"model": "abc", "dtype": "float32"})
    with pytest.raises(fv.FoveateError, match="holds a search with another dtype"):
        Journal(tmp_path / "steps.jsonl", {"model": "abc", "dtype": "bfloat16"})
    (tmp_path / "steps.jsonl").write_text("rubbish\n")
    with pytest.raises(fv.FoveateError, match="is damaged"):
        Journal(tmp_path / "steps.jsonl", {})


def test_every_axis_has_words():
    assert all(axis.words and axis.name == name for name, axis in AXES.items())
    assert Params.of(fv.tiny("llama"), 0.5).words(0.5) == "50.0%"


@pytest.mark.parametrize("stopped_in", ["cut", "undo"])
def test_a_change_that_is_stopped_halfway_is_undone(stopped_in, monkeypatch):
    model = fv.tiny("llama")
    whole = {name: p.shape for name, p in model.named_parameters()}
    live = Live(model)
    live.show(State({(1, "attention"): (), (2, "mlp"): ()}))
    owner = sys.modules[Live.__module__] if stopped_in == "cut" else Surgery
    does = getattr(owner, stopped_in)

    def stopped(*args):
        does(*args)
        monkeypatch.setattr(owner, stopped_in, does)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, stopped_in, stopped)
    with pytest.raises(KeyboardInterrupt):
        live.show(State({(0, "attention"): ()}))
    live.restore()
    assert {name: p.shape for name, p in model.named_parameters()} == whole


def test_what_a_converted_sublayer_costs_is_not_taken_for_nothing():
    model = fv.tiny("llama")
    times = Times(1.0, 1.0, 1.0, 1.0, 1.0)
    asked = [lambda: Memory.of(model, "1MiB", 2048).amount(model), lambda: times.of(model)]
    for amount, recipe in [(asked[0], "latent"), (asked[1], "latent"), (asked[1], "low-rank:keep=0.5,aware=false")]:
        amount()
        with fv.apply(model, recipe), pytest.raises(FoveateError, match="converted"):
            amount()
