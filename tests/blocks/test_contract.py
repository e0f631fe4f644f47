"""What every norm placement and every channel mixer holds, over all that are registered."""

import copy

import pytest
import torch

from foveate.backbone import CHANNELS, NORMS, BackboneConfig, BackboneForCausalLM, Shape
from foveate.errors import FoveateError

WIDTH, HEADS, LAYERS = 32, 4, 3
PLACEMENTS = sorted(NORMS.all())
MIXING = [name for name in sorted(CHANNELS.all()) if CHANNELS.build(name, {}).build(Shape(WIDTH, HEADS))]
SLOTS = [("norm", name) for name in PLACEMENTS] + [("channel", name) for name in sorted(CHANNELS.all())]


def moved(module):
    """Away from any special start, such as zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def residual(name, layer=0, layers=LAYERS):
    torch.manual_seed(0)
    return moved(NORMS.build(name, {}).build(Shape(WIDTH, HEADS, layer, layers)))


def channel(name, layer=0):
    torch.manual_seed(0)
    return moved(CHANNELS.build(name, {}).build(Shape(WIDTH, HEADS, layer, LAYERS))).eval()


def model_of(slot, name, layers=LAYERS):
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": layers}
    return moved(BackboneForCausalLM(BackboneConfig(vocab_size=50, **sizes, **{slot: name}))).eval()


def streams(batch=2, n=19, dtype=torch.float32):
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def ids(batch=2, n=16):
    return torch.randint(0, 50, (batch, n), generator=torch.Generator().manual_seed(2))


def body(x):
    """A sublayer: it mixes tokens, and hangs on its input's size."""
    return torch.tanh(x.cumsum(1)) + 0.5 * x.flip(-1)


# ---- norm placements ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_placement_keeps_shape_and_dtype_at_every_depth(name):
    for layer in range(LAYERS):
        module = residual(name, layer)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            y = copy.deepcopy(module).to(dtype)(streams(dtype=dtype), body)
            assert y.shape == streams().shape and y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_placement_calls_its_sublayer_once_and_lets_it_through(name):
    module, calls, x = residual(name), [], streams().requires_grad_()

    def counted(h):
        calls.append(h.shape)
        return body(h)

    y = module(x, counted)
    assert calls == [x.shape]
    assert (y - module(x, torch.zeros_like)).abs().max() > 0.1  # the sublayer counts
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.abs().min(-1).values.max() > 0


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_placement_moves_nothing_between_tokens_itself(name):
    module, x = residual(name).double(), streams(dtype=torch.float64).requires_grad_()
    y = module(x, lambda h: 2 * h)
    (gradient,) = torch.autograd.grad(y[:, 5].square().sum(), x)
    assert gradient[:, :5].abs().max() == 0 and gradient[:, 6:].abs().max() == 0 and gradient[:, 5].abs().max() > 0


@pytest.mark.parametrize("layers", [1, 2, 3, 8])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_placement_works_at_any_number_of_layers(name, layers):
    model = model_of("norm", name, layers)
    out = model(ids(), targets=ids())
    assert out.logits.isfinite().all() and out.loss.isfinite()


# ---- channel mixers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXING)
def test_a_channel_mixer_works_on_each_token_by_itself(name):
    module, x = channel(name), streams(3, 11)
    with torch.no_grad():
        whole = module(x)
        assert whole.shape == x.shape
        alone = torch.stack([torch.cat([module(x[i : i + 1, t : t + 1])[0] for t in range(11)]) for i in range(3)])
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MIXING)
def test_a_channel_mixer_gives_in_training_what_it_gives_in_use(name):
    module, x = channel(name), streams()
    with torch.no_grad():
        used = module(x)
        torch.manual_seed(0)
        trained = module.train()(x)
    if name == "duo":  # draws its ways
        return
    torch.testing.assert_close(trained, used, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MIXING)
def test_a_channel_mixer_in_bfloat16(name):
    module, x = channel(name), streams()
    with torch.no_grad():
        exact = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = module(x)
        half = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    for y in (mixed, half):
        close = (y.float() - exact).norm(dim=-1) < 0.1 * exact.norm(dim=-1) + 0.05
        assert y.isfinite().all() and close.float().mean() > 0.8  # rounding may send a token to another expert


# ---- both, within a backbone --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slot", "name"), SLOTS)
def test_every_weight_learns(slot, name):
    model = model_of(slot, name).train()
    model(ids(4, 24), targets=ids(4, 24)).loss.backward()
    assert [where for where, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    dead = [where for where, p in model.named_parameters() if p.grad.abs().max() == 0]
    assert dead == []


@pytest.mark.parametrize(("slot", "name"), SLOTS)
def test_gradients_agree_with_float64(slot, name):
    single = model_of(slot, name)
    double = copy.deepcopy(single).double()
    for model in (single, double):
        logits = model(ids()).logits
        logits.square().mean().backward()
    for (where, a), (_, b) in zip(single.named_parameters(), double.named_parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None
            continue
        scale = b.grad.abs().max() + 1e-6
        assert (a.grad.double() - b.grad).abs().max() < 1e-3 * scale, where


@pytest.mark.parametrize(("slot", "name"), SLOTS)
def test_saved_and_opened_again(slot, name, tmp_path):
    model = model_of(slot, name)
    model.save_pretrained(tmp_path)
    again = BackboneForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)
    assert getattr(again.config, slot) == name


@pytest.mark.parametrize(("slot", "name"), SLOTS)
def test_generate_and_copies(slot, name):
    model = copy.deepcopy(model_of(slot, name))
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids(), **greedy), model.generate(ids(), use_cache=False, **greedy))


@pytest.mark.parametrize(("slot", "name"), SLOTS)
def test_a_field_that_is_not_there_gets_a_sentence(slot, name):
    with pytest.raises(FoveateError, match=name):
        BackboneConfig(**{slot: f"{name}:nonsense=1"})
