"""Key-driven grouped-query attention: what the contract of all mixers doesn't hold."""

import math

import pytest
import torch

import foveate as fv
from foveate.backbone import MIXERS, Shape
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.key_driven_groups import KeyDrivenGroupsBeatEqualOnes, _shared_out
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.trial import learned


def module_of(text="key-driven-groups", heads=8, seed=0):
    torch.manual_seed(seed)
    return MIXERS.parse(text).build(Shape(32, heads)).double()


def texts(n=12, scale=1.0):
    return scale * torch.randn(2, n, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def with_keys(module, scales):
    """Multiply each KV head's keys."""
    kv = module.settings.kv_heads
    with torch.no_grad():
        rows = module.qkv.weight.view(module.heads + 2 * kv, module.head, 32)
        keys = rows[module.heads : module.heads + kv]
        keys /= keys.flatten(1).norm(dim=1)[:, None, None]
        keys *= torch.tensor(scales, dtype=torch.double)[:, None, None]
    return module


def sizes(module):
    return module.group.bincount(minlength=module.settings.kv_heads).tolist()


def test_groups_that_are_equal_are_grouped_query_attention():
    ours, theirs = module_of("key-driven-groups:kv_heads=4"), MIXERS.parse("softmax:kv_heads=4").build(Shape(32, 8))
    theirs = theirs.double()
    theirs.load_state_dict({name: w for name, w in ours.state_dict().items() if name.endswith("weight")})
    torch.testing.assert_close(ours(texts())[0], theirs(texts())[0])


def test_unequal_groups_are_heads_with_the_keys_of_their_group():
    ours = module_of("key-driven-groups:kv_heads=2")
    ours.group.copy_(torch.tensor([0, 1, 1, 1, 1, 1, 1, 1]))
    theirs = MIXERS.parse("softmax").build(Shape(32, 8)).double()
    q, k, v = ours.qkv.weight.view(12, 4, 32).split([8, 2, 2])
    weights = torch.cat([q, k[ours.group], v[ours.group]]).flatten(0, 1)
    theirs.load_state_dict({"qkv.weight": weights, "out.weight": ours.out.weight})
    torch.testing.assert_close(ours(texts())[0], theirs(texts())[0])


def test_heads_are_shared_out_by_the_figures():
    for figures, heads, wanted in [
        ([1.0, 1.0], 8, [4, 4]),
        ([1.0, 3.0], 8, [2, 6]),
        ([0.0, 1.0], 8, [1, 7]),
        ([0.0, 0.0, 0.0], 8, [3, 3, 2]),
        ([1.0, 1.0, 1.0, 1.0], 4, [1, 1, 1, 1]),
        ([5.0], 8, [8]),
        ([1.0, 1.0, 1.0], 8, [3, 3, 2]),
        ([1.0, 2.0, 5.0], 8, [1, 2, 5]),
    ]:
        group = _shared_out(torch.tensor(figures), heads)
        assert group.bincount(minlength=len(figures)).tolist() == wanted
        assert (group.diff() >= 0).all() and group.dtype == torch.int64
    for seed in range(50):
        figures = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        counts = _shared_out(figures, 16).bincount(minlength=5)
        assert counts.sum() == 16 and counts.min() >= 1
        assert (counts[figures.argsort()].diff() >= 0).all()  # larger keys, no fewer heads


def test_only_training_renews_the_groups_and_for_the_passes_after():
    module = with_keys(module_of(), [1.0, 3.0])
    whole = module.eval()(texts())[0]
    assert sizes(module) == [4, 4]
    torch.testing.assert_close(module.train()(texts())[0], whole)  # with the groups that it found
    assert sizes(module) == [2, 6]
    assert not torch.allclose(module.eval()(texts())[0], whole)
    assert sizes(module) == [2, 6] and int(module.passes) == 1


def test_the_rules():
    torch.manual_seed(3)
    by_norms = with_keys(module_of("key-driven-groups:kv_heads=3,rule=norms"), [1.0, 2.0, 3.0]).train()
    by_norms(texts())
    n = by_norms.norms
    shares = (n - n.min()) / (n - n.min()).sum()
    assert sizes(by_norms) == _shared_out(shares, 8).bincount(minlength=3).tolist()
    assert sizes(by_norms)[0] == 1

    average = with_keys(module_of("key-driven-groups:newest=0.75"), [1.0, 1.0]).train()
    average(texts())
    first = average.norms.clone()
    average(texts(scale=3.0))
    torch.testing.assert_close(average.norms, (0.75 * 3 + 0.25) * first)

    change = with_keys(module_of("key-driven-groups:rule=change"), [1.0, 3.0]).train()
    change(texts())
    with_keys(change, [2.0, 3.0])  # only the first moves on
    change(texts())
    assert sizes(change) == [7, 1]


def test_groups_are_renewed_every_so_many_passes():
    module = with_keys(module_of("key-driven-groups:every=3"), [1.0, 1.0]).train()
    seen = []
    for step in range(4):
        module(texts())
        seen.append(sizes(module))
        if step == 0:
            with_keys(module, [1.0, 3.0])
    assert seen[0] == seen[1] == seen[2] != seen[3] == [2, 6]


def test_random_groups_differ_and_stay():
    found = {tuple(sizes(module_of("key-driven-groups:kv_heads=3,rule=random", seed=seed))) for seed in range(30)}
    assert len(found) > 8 and all(sum(each) == 8 and min(each) >= 1 for each in found)
    module = module_of("key-driven-groups:rule=random").train()
    before = module.group.clone()
    module(texts())
    assert torch.equal(module.group, before)


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="there is no rule 'size': give one of norms, average, change, random"):
        MIXERS.parse("key-driven-groups:rule=size")
    with pytest.raises(FoveateError, match="must be 1 or more"):
        MIXERS.parse("key-driven-groups:kv_heads=0")
    with pytest.raises(FoveateError, match="8 query heads can't be shared out to 9 KV heads"):
        module_of("key-driven-groups:kv_heads=9")
    with pytest.raises(FoveateError, match="heads of an even size, not 1"):
        module_of(heads=32)


class Small(KeyDrivenGroupsBeatEqualOnes):
    steps, more, seeds, sizes, task = 2, 2, (0,), Sizes(width=32, heads=8, layers=1), "lm:length=16"


def test_the_claim_runs():
    finding = Small().run(Bench(fv.tiny("llama"), fv.tiny_tokenizer(), load_text("prose")))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.checks["all hold as much of a text"]


def test_conversion_averages_the_keys_of_neighbours():
    small = Small()
    whole = learned(small.task, small.sizes, Settings(steps=1, batch=4), device=torch.device("cpu"))
    still = Settings(steps=1, batch=4, lr=1e-30, decay=0.0)
    got = small.converted(whole, Sizes(width=32, heads=8, layers=1, mixer="softmax:kv_heads=4"), still)
    old, new = (x.model.layers[0].mixer.qkv.weight for x in (whole, got))
    torch.testing.assert_close(new[:32], old[:32])
    torch.testing.assert_close(new[32:36], (old[32:36] + old[36:40]) / 2)  # the first KV head's keys
    torch.testing.assert_close(new[-4:], (old[-8:-4] + old[-4:]) / 2)  # the last one's values
