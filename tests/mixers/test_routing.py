"""The Routing Transformer's attention: its definition token by token, its centroids, its sentences."""

import math

import pytest
import torch
from torch.nn import functional

from foveate.backbone import BackboneConfig, BackboneForCausalLM, Shape
from foveate.errors import FoveateError
from foveate.mixers.routing import Routing, RoutingClaim, in_clusters, last_in_cluster
from foveate.tasks.base import Bench
from foveate.train import build
from foveate.train.tasks import TRAIN_TASKS


def slow(shared, values, which, members):
    """The definition, token by token."""
    y = torch.zeros_like(values)
    for b, t, h in torch.cartesian_prod(*(torch.arange(size) for size in which.shape)).tolist():
        peers = [j for j in range(t + 1) if which[b, j, h] == which[b, t, h]][-members:]
        peers = peers[:-1] or peers  # itself only where there is no other
        scores = shared[b, peers, h] @ shared[b, t, h] / math.sqrt(shared.shape[-1])
        y[b, t, h] = scores.softmax(0) @ values[b, peers, h]
    return y


def drawn(n, clusters):
    torch.manual_seed(n)
    shared, values = torch.randn(2, 2, n, 3, 4, dtype=torch.double).unbind(0)
    return shared, values, torch.randint(clusters, (2, n, 3))


@pytest.mark.parametrize("clusters", [1, 2, 5])
@pytest.mark.parametrize(("n", "members"), [(1, 4), (7, 1), (19, 4), (20, 5), (19, 100)])
def test_sorted_blocks_are_the_definition(n, members, clusters):
    given = drawn(n, clusters)
    wanted = slow(*given, members)
    torch.testing.assert_close(in_clusters(*given, members), wanted)
    torch.testing.assert_close(last_in_cluster(*given, members), wanted[:, -1:])


def test_tokens_belong_to_the_nearest_centroid():
    module = Routing(clusters=5).build(Shape(32, 4))
    with torch.no_grad():
        module.centroids.mul_(torch.rand(2, 5, 1) * 3)  # of different norms
    x = torch.randn(2, 9, 2, 8)
    far = (x.unsqueeze(3) - module.centroids).norm(dim=-1)
    assert torch.equal(module.nearest(x), far.argmin(-1))


def test_centroids_follow_the_means_in_training_only():
    torch.manual_seed(0)
    module, x = Routing(clusters=3, decay=0.75).build(Shape(32, 4)), torch.randn(2, 30, 32)
    before = module.centroids.clone()
    with torch.no_grad():
        module.eval()(x)
        assert torch.equal(module.centroids, before)
        shared = functional.layer_norm(module.project(x)[..., : 2 * 8].unflatten(-1, (2, 8)), (8,))
        which = module.nearest(shared)
        module.train()(x)
    for head in range(2):
        for cluster in range(3):
            there = shared[:, :, head][which[:, :, head] == cluster]
            old = before[head, cluster]
            wanted = 0.75 * old + 0.25 * there.mean(0) if len(there) else old
            torch.testing.assert_close(module.centroids[head, cluster], wanted)
    module.centroids[:, 2] = 1000.0  # nobody is near
    module(x)
    assert (module.centroids[:, 2] == 1000.0).all()


def test_centroids_are_saved_with_the_weights(tmp_path):
    model = BackboneForCausalLM(BackboneConfig(mixer="routing")).train()
    model(torch.ones(2, 12, dtype=torch.long))
    model.save_pretrained(tmp_path)
    again = BackboneForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.layers[1].mixer.centroids, model.layers[1].mixer.centroids)


def test_all_heads_may_route_but_one():
    torch.manual_seed(0)
    module, x = Routing(members=3).build(Shape(8, 1)).eval(), torch.randn(2, 11, 8)
    with torch.no_grad():
        whole, _ = module(x)
        state, rows = module.start(2, x), []
        for piece in x.split([4, 1, 1, 5], 1):
            y, state = module(piece, state)
            rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), whole, atol=1e-5, rtol=1e-4)
    assert Routing(local_heads=3).build(Shape(32, 4)).routed == 1


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="clusters, members and window must be 1 or more"):
        Routing(clusters=0)
    with pytest.raises(FoveateError, match="decay must be at least 0 and below 1"):
        Routing(decay=1.0)
    with pytest.raises(FoveateError, match="of 4 heads 4 can't be local"):
        Routing(local_heads=4).build(Shape(32, 4))
    with pytest.raises(FoveateError, match="heads of an even size, not 3"):
        Routing().build(Shape(12, 4))


def test_the_claim_runs():
    class Short(RoutingClaim):
        steps, seeds, width, lengths, pairs, length = 3, (0,), 32, (256, 1024), 1, 16

    finding = Short().run(Bench(build(TRAIN_TASKS.parse("mqar")), None, None))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert len(finding.checks) == 4 and all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.checks["one cluster is dense attention"]
