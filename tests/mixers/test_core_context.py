"""Core context aware attention: what the contract of all mixers doesn't hold."""

import math

import pytest
import torch

import foveate as fv
from foveate.backbone import MIXERS, Shape
from foveate.backbone.parts import rotated
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.core_context import CoreContextIsNearlyAttention
from foveate.tasks.base import Bench
from foveate.train.build import Sizes


def module_of(text="core-context"):
    torch.manual_seed(0)
    module = MIXERS.parse(text).build(Shape(32, 4)).double()
    with torch.no_grad():
        module.qkv.weight.mul_(2)  # so that significance differs
    return module


def texts(n=50):
    return torch.randn(2, n, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def by_hand(module, x):
    """One text, token by token: lists of core tokens and of raw ones."""
    g, w = module.settings.group, module.settings.window
    q, k, v = module.qkv(x).view(len(x), 3, 4, 8).unbind(1)
    q, k = rotated(q[None])[0], rotated(k[None])[0]
    rows, reads = [], []
    for t in range(len(x)):
        merged = 0
        while g * (merged + 1) <= t + 1 - w:
            merged += 1
        heads = []
        for h in range(4):
            keys, values = [], []
            for i in range(merged):
                inside = slice(g * i, g * i + g)
                a = (k[inside, h] @ q[g * i + g - 1, h] / math.sqrt(8)).softmax(0)
                a = torch.full_like(a, 1 / g) if module.settings.pooling == "mean" else a
                keys.append(a @ k[inside, h])
                values.append(a @ v[inside, h])
            keys += list(k[g * merged : t + 1, h])
            values += list(v[g * merged : t + 1, h])
            weights = (torch.stack(keys) @ q[t, h] / math.sqrt(8)).softmax(0)
            heads.append(weights @ torch.stack(values))
        reads.append(len(keys))
        rows.append(module.out(torch.cat(heads)))
    return torch.stack(rows), reads


@pytest.mark.parametrize(
    "text",
    [
        "core-context",
        "core-context:group=3,window=4",
        "core-context:group=5,window=1",
        "core-context:group=1,window=7",
        "core-context:group=4,window=5,pooling=mean",
    ],
)
def test_it_is_its_equations_at_once_and_in_pieces(text):
    module, x = module_of(text), texts()
    g, w = module.settings.group, module.settings.window
    with torch.no_grad():
        y, _ = module(x)
        state, rows = module.start(2, x), []
        for piece in x.split([1, 1, 6, 17, 1, 2, 22], 1):
            out, state = module(piece, state)
            rows.append(out)
            assert state["keys"].shape[1] <= w + g - 2 or w == 1
        for i in range(2):
            slow, reads = by_hand(module, x[i])
            torch.testing.assert_close(y[i], slow)
            torch.testing.assert_close(torch.cat(rows, 1)[i], slow)
    assert state["core_keys"].shape[1] == 50 // g
    assert max(reads) <= 50 / g + w + g


def test_groups_of_one_are_softmax_attention():
    ours = module_of("core-context:group=1,window=4")
    theirs = MIXERS.parse("softmax").build(Shape(32, 4)).double()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(texts())[0], theirs(texts())[0])


def test_a_long_text_costs_no_square_of_scores():
    module = module_of("core-context:group=16,window=16")
    sizes = []
    softmax = torch.Tensor.softmax

    def counted(self, *args, **kwargs):
        sizes.append(self.numel())
        return softmax(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", counted)
        module(texts(620))
    assert max(sizes) == 2 * 4 * 620 * (620 // 16 + 2 * 31)


def test_a_token_of_no_significance_is_merged_away():
    """A core token is its group's significant token, however far its others are."""
    module, x = module_of("core-context:group=4,window=4"), texts(16)
    with torch.no_grad():
        q = module.qkv(x)[:, 3:4].unflatten(-1, (12, 8))[:, :, :4]
        k = torch.zeros(2, 4, 4, 8, dtype=torch.double)
        k[:, 1] = 100 * q[:, 0]
        v = torch.randn(2, 4, 4, 8, dtype=torch.double)
        keys, values = module._merged(q, k, v, 0)
    torch.testing.assert_close(keys[:, 0], k[:, 1])
    torch.testing.assert_close(values[:, 0], v[:, 1])


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="must be 1 or more"):
        MIXERS.parse("core-context:group=0")
    with pytest.raises(FoveateError, match="no pooling 'max': give significance or mean"):
        MIXERS.parse("core-context:pooling=max")
    with pytest.raises(FoveateError, match="heads of an even size, not 1"):
        MIXERS.parse("core-context").build(Shape(32, 32))


class Small(CoreContextIsNearlyAttention):
    lm_steps, steps, seeds, sizes = 2, 2, (0,), Sizes(width=32, layers=1)
    lm, recall = "lm:length=32", "induction:length=16"


def test_the_claim_runs():
    finding = Small().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.checks["a text costs L / g + w + g keys at most"]
