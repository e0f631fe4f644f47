"""What every way to stack layers holds, over all that are registered, in a whole model."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from foveate.backbone import STACKS, BackboneConfig, BackboneForCausalLM, state_bytes

ALL = sorted(STACKS.all())
MIXERS = ["softmax", "linear", "linear+softmax:window=3"]
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


def built(stack, mixer="softmax", conv=3, layers=4):
    torch.manual_seed(0)
    config = BackboneConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=layers, mixer=mixer, stack=stack, conv=conv
    )
    model = BackboneForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # away from any special start, such as zeros
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def texts(batch=2, n=23):
    return torch.randint(0, 50, (batch, n), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ALL)
def test_a_text_in_pieces_gives_the_numbers_of_the_whole(name, mixer):
    model, ids = built(name, mixer), texts()
    with torch.no_grad():
        whole = model(ids).logits
        for cuts in ([1] * 23, [1, 1, 21], [4, 4, 8, 7], [2, 19, 1, 1], [23]):
            cache, rows = None, []
            for piece in ids.split(cuts, 1):
                out = model(piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                rows.append(out.logits)
            torch.testing.assert_close(torch.cat(rows, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_short_text_is_the_start_of_a_long_one(name):
    model, ids = built(name), texts()
    with torch.no_grad():
        whole = model(ids).logits
        for n in (1, 2, 3, 4, 5, 8, 9):
            torch.testing.assert_close(model(ids[:, :n]).logits, whole[:, :n], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_no_token_sees_what_comes_after_it_and_each_sees_all_before(name):
    model = built(name, "softmax", conv=0).double()
    x = torch.randn(1, 14, 32, dtype=torch.double, requires_grad=True)
    y = model(inputs_embeds=x).logits
    for t in range(14):
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        seen = gradient[0].abs().amax(-1)
        assert seen[t + 1 :].sum() == 0
        assert (seen[: t + 1] > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_every_weight_learns(name):
    model, ids = built(name).train(), texts()
    model(ids, labels=ids).loss.backward()
    assert [where for where, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ALL)
def test_states_are_batch_first_hide_nothing_and_stay_as_they_were(name, mixer):
    model = built(name, mixer)
    with torch.no_grad():
        for n in (5, 8, 22):
            cache = model(texts(3, n), use_cache=True).past_key_values
            given = cache.text.state
            leaves = tree_leaves(given)
            assert all(each.shape[0] == 3 for each in leaves)
            assert state_bytes(given) == sum(each.numel() * each.element_size() for each in leaves)
            before = tree_map(torch.clone, given)
            x = model.embed(texts(3, 7))
            first, _ = model.order(x, model.layers, given)
            again, _ = model.order(x, model.layers, given)
            assert torch.equal(first, again)
            assert all(torch.equal(a, b) for a, b in zip(leaves, tree_leaves(before), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_texts_of_a_batch_do_not_meet(name):
    model, ids = built(name), texts(3, 19)
    with torch.no_grad():
        alone = torch.cat([model(row[None]).logits for row in ids])
        torch.testing.assert_close(model(ids).logits, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 4, 10])
@pytest.mark.parametrize("name", ALL)
def test_generate_works_with_the_state(name, n):
    model, ids = built(name), texts(2, n)
    assert torch.equal(model.generate(ids, **GREEDY), model.generate(ids, use_cache=False, **GREEDY))
    assert model.generate(ids, num_beams=3, **GREEDY).shape == (2, n + 9)
    several = model.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=2, pad_token_id=0)
    assert several.shape == (4, n + 5)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16(name):
    model, ids = built(name), texts()
    with torch.no_grad():
        exact = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            near = model(ids).logits.float()
            cache = model(ids[:, :9], use_cache=True).past_key_values
            assert model(ids[:, 9:], past_key_values=cache, use_cache=True).logits.isfinite().all()
        half = model.bfloat16()
        rounded = half(ids, use_cache=True).logits
    assert (near - exact).norm() < 0.2 * exact.norm()
    assert rounded.dtype == torch.bfloat16 and rounded.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_saved_and_opened_again(name, tmp_path):
    model, ids = built(name), texts()
    model.save_pretrained(tmp_path)
    again = BackboneForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
