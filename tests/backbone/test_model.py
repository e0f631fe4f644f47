"""The backbone as a Hugging Face model: what it refuses, what it gives, how it starts."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from foveate.backbone import BackboneConfig, BackboneForCausalLM
from foveate.backbone.model import written
from foveate.backbone.parts import attend
from foveate.backbone.recurrence import recurrence, recurrence_by_steps
from foveate.errors import FoveateError
from foveate.train import Sizes, build
from foveate.train.tasks import TRAIN_TASKS


def model(**given):
    torch.manual_seed(0)
    return BackboneForCausalLM(BackboneConfig(**{"vocab_size": 40, "hidden_size": 32, **given})).eval()


IDS = torch.randint(0, 40, (2, 11), generator=torch.Generator().manual_seed(0))


def test_labels_are_shifted_and_targets_are_not():
    backbone = model()
    logits = backbone(IDS).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert float(backbone(IDS, labels=IDS).loss.detach()) == pytest.approx(float(expected), abs=1e-6)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten())
    assert float(backbone(IDS, targets=IDS).loss.detach()) == pytest.approx(float(expected), abs=1e-6)


def test_hidden_states_and_the_last_logits():
    out = model()(IDS, output_hidden_states=True, logits_to_keep=1)
    assert len(out.hidden_states) == 3 and out.logits.shape == (2, 1, 40)
    again = model().generate(IDS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    assert again.sequences.shape == (2, 13)


def test_embeddings_in_place_of_ids():
    backbone = model()
    torch.testing.assert_close(backbone(inputs_embeds=backbone.embed(IDS)).logits, backbone(IDS).logits)
    with pytest.raises(FoveateError, match="give one of them"):
        backbone()


def test_a_cache_of_another_kind_is_refused():
    from transformers import DynamicCache

    with pytest.raises(FoveateError, match="can't hold a backbone's states"):
        model()(IDS, past_key_values=DynamicCache(), use_cache=True)


def test_padding_on_the_right_changes_nothing_before_it():
    backbone, mask = model(), torch.ones_like(IDS)
    mask[:, 8:] = 0
    torch.testing.assert_close(backbone(IDS, attention_mask=mask).logits[:, :8], backbone(IDS[:, :8]).logits)


def test_saved_it_opens_by_its_type(tmp_path):
    backbone = model(mixer="softmax:window=4+linear", norm="peri-ln", channel="mlp")
    backbone.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, backbone(IDS).logits)


def test_what_writes_starts_smaller_in_deeper_models_but_not_under_ln_scaling():
    def spread(layers, norm, channel="gated"):
        backbone = model(num_hidden_layers=layers, norm=norm, channel=channel, hidden_size=64)
        return [float(w.std()) for w in written(backbone.layers[0].channel)]

    for channel in ("gated", "moe", "duo"):
        shallow, deep = spread(2, "pre", channel), spread(8, "pre", channel)
        assert all(a == pytest.approx(2 * b, rel=0.1) for a, b in zip(shallow, deep, strict=True)) and shallow
        same = spread(2, "ln-scaling", channel), spread(8, "ln-scaling", channel)
        assert all(a == pytest.approx(b, rel=0.1) for a, b in zip(*same, strict=True))


@pytest.mark.parametrize("mixer", ["fnet", "ponet:causal=false", "softmax+fnet"])
def test_a_mixer_that_would_read_the_answers_is_refused(mixer):
    with pytest.raises(FoveateError, match="would read the answers"):
        build(TRAIN_TASKS.parse("lm"), Sizes(mixer=mixer))
    build(TRAIN_TASKS.parse("listops"), Sizes(mixer=mixer))


@pytest.mark.parametrize("held", [1, 3, 4, 50])
def test_a_window_over_a_long_later_piece(held):
    q, k, v = (torch.randn(2, held + 23, 2, 4, dtype=torch.double) for _ in range(3))
    whole = attend(q, k, v, window=5)
    torch.testing.assert_close(attend(q[:, held:], k, v, window=5), whole[:, held:])


def test_a_window_over_a_long_later_piece_takes_linear_memory():
    from foveate.measure.clock import peak_bytes

    def peak(n):
        q, k, v = (torch.randn(1, 2 * n, 1, 8) for _ in range(3))
        return peak_bytes(lambda: attend(q[:, n:], k, v, window=16), torch.device("cpu"))[0]

    assert peak(2048) < 3 * peak(1024)


def test_after_strong_decay_the_numbers_still_agree():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3000, 1, 8) for _ in range(3))
    decay = torch.full((1, 3000, 1), -20.0)
    decay[:, 2250:] = -1e-4
    y, memory = recurrence(q, k, v, decay)
    exact, held = recurrence_by_steps(*(x.double() for x in (q, k, v, decay)))
    assert float((memory - held).norm() / held.norm()) < 1e-4
    assert float((y - exact)[:, 2250:].norm() / exact[:, 2250:].norm()) < 1e-4


def test_linear_attention_in_float16_of_a_long_text():
    from foveate.backbone import MIXERS, Shape

    torch.manual_seed(0)
    module, x = MIXERS.parse("linear").build(Shape(32, 2)), 3 * torch.randn(1, 4000, 32)
    with torch.no_grad():
        exact, half = module(x)[0], module.half()(x.half())[0]
    assert float((half - exact).norm() / exact.norm()) < 0.02


def test_numbers_that_are_none_get_a_sentence():
    from foveate.backbone import CHANNELS

    for text in ("gated:times=nan", "moe:balance=inf"):
        with pytest.raises(FoveateError, match="give a finite one"):
            CHANNELS.parse(text)
    assert math.isfinite(CHANNELS.parse("gated:times=2").times)
