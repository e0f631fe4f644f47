"""Norm placements against their equations, and their claims in small."""

import math

import pytest
import torch

from foveate.backbone import NORMS, BackboneConfig, BackboneForCausalLM, Shape
from foveate.blocks.norms.post import PostResidual
from foveate.blocks.norms.pre import PreResidual
from foveate.blocks.norms.trial import deep_models, full_start
from foveate.claims import CLAIMS
from foveate.errors import FoveateError
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes, build
from foveate.train.profile import depth_profile
from foveate.train.tasks import TRAIN_TASKS

WIDTH = 16
MATRIX = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def stream():
    return 3 * torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def f(x):
    return torch.tanh(x @ MATRIX)


def normed(x, gain, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def built(text, layer=0, layers=8):
    module = NORMS.parse(text).build(Shape(WIDTH, 4, layer, layers)).double()
    with torch.no_grad():
        for gain in module.parameters():
            gain.add_(0.3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    return module


@pytest.mark.parametrize("name", ["sandwich", "peri-ln"])
def test_input_and_output_are_normalised(name):
    module, x = built(name), stream()
    want = x + normed(f(normed(x, module.norm.weight)), module.norm_out.weight)
    torch.testing.assert_close(module(x, f), want)
    scaled = module(x, lambda h: 1000 * f(h))  # whatever a sublayer gives, it writes as much
    torch.testing.assert_close(scaled, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 7])
def test_ln_scaling_is_its_equation(layer):
    module, x = built("ln-scaling", layer), stream()
    torch.testing.assert_close(module(x, f), x + f(normed(x, module.norm.weight) / math.sqrt(layer + 1)))


def test_ln_scaling_in_the_first_layer_is_pre():
    x = stream()
    torch.testing.assert_close(built("ln-scaling", 0)(x, f), built("pre", 0)(x, f))


@pytest.mark.parametrize(
    ("text", "layers", "first"),
    [
        ("mix-ln", 12, 3),
        ("mix-ln", 6, 1),
        ("mix-ln", 3, 0),
        ("mix-ln:post=0.5", 5, 2),
        ("mix-ln:post=0.3", 10, 3),
        ("mix-ln:post=0.58", 50, 29),
    ],
)
def test_mix_ln_is_post_in_the_first_layers_and_pre_in_the_others(text, layers, first):
    kinds = [type(built(text, i, layers)) for i in range(layers)]
    assert kinds == [PostResidual] * first + [PreResidual] * (layers - first)


@pytest.mark.parametrize("post", ["0", "1", "-0.5", "1.5"])
def test_a_fraction_that_is_none_gets_a_sentence(post):
    with pytest.raises(FoveateError, match="can't be post-norm: give a fraction above 0 and below 1"):
        NORMS.parse(f"mix-ln:post={post}")


def test_only_peri_ln_normalises_embeddings_and_all_normalise_before_the_head():
    for name in ("sandwich", "peri-ln", "ln-scaling", "mix-ln"):
        model = BackboneForCausalLM(BackboneConfig(norm=name))
        assert (model.embed_norm is not None) == (name == "peri-ln") and model.norm is not None


def test_variance_over_depth_at_the_start():
    """Peri-LN: one more for each sublayer. LayerNorm scaling: less than pre-norm's."""
    task = TRAIN_TASKS.parse("lm:length=32")
    found = {}
    for name in ("pre", "peri-ln", "ln-scaling", "post"):
        model = build(task, Sizes(width=64, layers=8, norm=name))
        full_start(model)
        found[name] = depth_profile(model, task, count=2).variance
    sublayers = 2 * torch.arange(1, 9, dtype=torch.float64)
    torch.testing.assert_close(found["peri-ln"], 1 + sublayers, rtol=0.25, atol=0)
    assert (found["ln-scaling"][1:] < found["pre"][1:]).all()
    torch.testing.assert_close(found["post"], torch.ones(8, dtype=torch.float64), rtol=0.1, atol=0)


def test_a_full_start_takes_the_smaller_start_back():
    task = TRAIN_TASKS.parse("lm")
    model = build(task, Sizes(width=64, layers=8))
    full_start(model)
    out = model.layers[0].mixer.out.weight
    assert float(out.detach().std()) * math.sqrt(64) == pytest.approx(1, rel=0.05)


def test_a_loss_that_is_no_number_counts_as_a_guess():
    found = deep_models(
        {"hot": (Sizes(width=16, layers=2), Settings(steps=60, batch=2, lr=1e18, warmup=0.0))},
        length=8,
        examples=8,
        seeds=(0,),
        device=torch.device("cpu"),
    )
    (run,) = found["hot"]
    assert run.diverged and run.loss == math.log(256)


def bench():
    model = build(TRAIN_TASKS.parse("lm"), Sizes(width=16))
    told = []
    return Bench(model=model, tokenizer=None, text=None, progress=told.append), told


@pytest.mark.parametrize("name", ["mix-ln", "ln-scaling", "peri-ln"])
def test_claims_in_small(name):
    given, told = bench()
    claim = CLAIMS[name]()
    claim.steps, claim.layers, claim.width, claim.length, claim.batch, claim.seeds = 3, 4, 16, 16, 2, (0, 1)
    claim.examples = 16
    finding = claim.run(given)
    assert told[-1] == 1
    assert all(isinstance(held, bool) for held in finding.checks.values()) and len(finding.checks) >= 4
    assert all(math.isfinite(metric.value) for metric in finding.metrics.values())
