"""What every token mixer holds, over all that are registered."""

import copy

import pytest
import torch

from foveate.backbone import MIXERS, BackboneConfig, BackboneForCausalLM, Shape, state_bytes
from foveate.errors import FoveateError

WIDTH, HEADS = 32, 4
ALL = sorted(MIXERS.all())
CAUSAL = [name for name in ALL if MIXERS.all()[name].causal]


def built(name, layer=0, seed=0):
    torch.manual_seed(seed)
    module = MIXERS.build(name, {}).build(Shape(WIDTH, HEADS, layer, 2))
    with torch.no_grad():
        for parameter in module.parameters():  # away from any special start, such as zeros
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def texts(batch=2, n=37, dtype=torch.float32):
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_text_in_pieces_gives_the_numbers_of_the_whole(name, layer):
    module, x = built(name, layer), texts()
    with torch.no_grad():
        whole, none = module(x)
        assert none is None
        for cuts in ([1] * 37, [20, 1, 1, 15], [3, 34]):
            state, rows = module.start(2, x), []
            for piece in x.split(cuts, 1):
                y, state = module(piece, state)
                rows.append(y)
            torch.testing.assert_close(torch.cat(rows, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_token_sees_what_comes_after_it(name):
    module, x = built(name), texts(1, 24, torch.float64).requires_grad_()
    module = module.double()
    y, _ = module(x)
    for t in (0, 7, 15, 22):
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        assert gradient[0, t + 1 :].abs().max() == 0
        assert gradient[0, : t + 1].abs().max() > 0


@pytest.mark.parametrize("name", ALL)
def test_gradients_agree_with_float64(name):
    single, x = built(name), texts(2, 21)
    double = copy.deepcopy(single).double()
    for module, given in ((single, x), (double, x.double())):
        y, _ = module(given)
        y.square().sum().backward()
    for (where, a), (_, b) in zip(single.named_parameters(), double.named_parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None
            continue
        scale = b.grad.abs().max() + 1e-6
        assert (a.grad.double() - b.grad).abs().max() < 1e-3 * scale, where


@pytest.mark.parametrize("name", ALL)
def test_every_weight_learns(name):
    module, x = built(name).train(), texts(2, 37)
    torch.manual_seed(0)
    y, _ = module(x)
    loss = y.square().sum() + (0 if module.extra_loss is None else module.extra_loss)
    loss.backward()
    assert [where for where, p in module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", CAUSAL)
def test_states_are_what_they_say(name):
    modules = [built(name, layer) for layer in (0, 1)]  # together, as layers may differ
    sizes = dict.fromkeys((40, 41, 90), 0)
    with torch.no_grad():
        for n in sizes:
            for module in modules:
                _, state = module(texts(3, n), module.start(3, texts()))
                assert all(each.shape[0] == 3 for each in state.values())
                assert state_bytes(state) == sum(each.numel() * each.element_size() for each in state.values())
                sizes[n] += state_bytes(state)
    if not MIXERS.all()[name].grows:
        assert len(set(sizes.values())) == 1
    else:
        assert sizes[90] > sizes[40]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_state_that_was_given_is_left_as_it_was(name):
    module, x = built(name), texts(2, 12)
    with torch.no_grad():
        _, state = module(x[:, :8], module.start(2, x))
        before = {key: each.clone() for key, each in state.items()}
        first, _ = module(x[:, 8:], state)
        again, _ = module(x[:, 8:], state)
    assert torch.equal(first, again)
    assert all(torch.equal(each, before[key]) for key, each in state.items())


@pytest.mark.parametrize("name", ALL)
def test_texts_of_a_batch_do_not_meet(name):
    module, x = built(name), texts(3, 19)
    with torch.no_grad():
        together, _ = module(x)
        alone = torch.cat([module(row[None])[0] for row in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_one_token_and_bfloat16(name):
    module = built(name)
    with torch.no_grad():
        assert module(texts(1, 1))[0].shape == (1, 1, WIDTH)
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = module(texts(2, 33))
        assert y.isfinite().all()
        exact, _ = module(texts(2, 33))
        half = copy.deepcopy(module).bfloat16()
        rounded, _ = half(texts(2, 33).bfloat16())
        assert rounded.dtype == torch.bfloat16 and rounded.isfinite().all()
    assert (y.float() - exact).norm() < 0.2 * exact.norm()


def model_of(name):
    torch.manual_seed(0)
    config = BackboneConfig(vocab_size=50, hidden_size=WIDTH, num_attention_heads=HEADS, mixer=name, conv=3)
    model = BackboneForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", CAUSAL)
def test_generate_works_with_the_mixers_own_state(name):
    model = model_of(name)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_state = model.generate(ids, **greedy)
    without = model.generate(ids, use_cache=False, **greedy)
    assert torch.equal(with_state, without)
    assert model.generate(ids, num_beams=3, **greedy).shape == (2, 17)
    assert model.generate(ids, max_new_tokens=4, do_sample=True, num_return_sequences=2, pad_token_id=0).shape == (
        4,
        13,
    )


@pytest.mark.parametrize("name", ALL)
def test_saved_and_opened_again(name, tmp_path):
    model = model_of(name)
    ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    again = BackboneForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ALL)
def test_bad_input_gets_a_sentence(name):
    model = model_of(name)
    with pytest.raises(FoveateError, match="length 0"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(FoveateError, match="heads don't divide a width"):
        BackboneConfig(hidden_size=32, num_attention_heads=5, mixer=name)
    if MIXERS.all()[name].causal:
        cache = model(torch.ones(2, 3, dtype=torch.long), use_cache=True).past_key_values
        with pytest.raises(FoveateError, match="the state holds 2 texts, but 3 came"):
            model(torch.ones(3, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        with pytest.raises(FoveateError, match="padded on the left"):
            model(torch.ones(1, 3, dtype=torch.long), attention_mask=torch.tensor([[0, 1, 1]]))
