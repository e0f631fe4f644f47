"""Channel mixers against their equations, the oracle of duo, and duo's claim in small."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional

from foveate.backbone import CHANNELS, Shape
from foveate.blocks.channels.duo import duos, oracle, sent, spent, with_router
from foveate.claims import CLAIMS
from foveate.errors import FoveateError
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes, build, fit
from foveate.train.tasks import TRAIN_TASKS

WIDTH = 16


def built(text, layers=1):
    torch.manual_seed(0)
    return CHANNELS.parse(text).build(Shape(WIDTH, 4, 0, layers)).double()


def stream(batch=3, n=7):
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---- mlp ----------------------------------------------------------------------------------------------------------


def test_mlp_is_its_equation():
    acts = {"gelu": functional.gelu, "relu": torch.relu, "relu2": lambda x: torch.relu(x) ** 2, "silu": functional.silu}
    for name, act in acts.items():
        module, x = built(f"mlp:activation={name}"), stream()
        torch.testing.assert_close(module(x), act(x @ module.up.weight.T) @ module.out.weight.T)
    assert built("mlp").up.weight.shape == (4 * WIDTH, WIDTH)


def test_mlp_says_what_it_can_not_do():
    with pytest.raises(FoveateError, match="no activation 'gelo'.*gelu"):
        CHANNELS.parse("mlp:activation=gelo")
    with pytest.raises(FoveateError, match="times must be above 0"):
        CHANNELS.parse("mlp:times=0")


# ---- moe ----------------------------------------------------------------------------------------------------------


def slow_moe(module, x, active):
    rows = []
    for token in x.flatten(0, 1):
        p = torch.softmax(module.router.weight @ token, 0)
        best = p.topk(active).indices.tolist()
        total = sum(p[e] for e in best) if active > 1 else 1.0
        y = torch.zeros_like(token)
        for e in best:
            gate, up = (token @ module.gate_up[e]).chunk(2)
            y = y + p[e] / total * ((functional.silu(gate) * up) @ module.down[e])
        rows.append(y)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize(("experts", "active"), [(8, 2), (4, 1), (3, 3), (1, 1), (5, 4)])
def test_moe_is_its_equation_with_gradients(experts, active):
    module = built(f"moe:experts={experts},active={active}")
    found = []
    for forward in (module, lambda x: slow_moe(module, x, active)):
        x = stream().requires_grad_()
        y = forward(x)
        weights = [module.gate_up, module.down, *([module.router.weight] if experts > 1 else [])]
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *weights], allow_unused=True)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow)


def test_moe_drops_no_token_where_all_go_to_one_expert():
    module, x = built("moe:experts=4,active=1"), stream().abs()
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[2] = 1.0
    torch.testing.assert_close(module(x), slow_moe(module, x, 1))


def test_moe_balance():
    module, x = built("moe:experts=4,active=2,balance=0.5"), stream()
    module(x)
    p = torch.softmax(x.flatten(0, 1) @ module.router.weight.T, -1)
    chosen = p.topk(2).indices.flatten()
    share = torch.stack([(chosen == e).double().mean() for e in range(4)])
    torch.testing.assert_close(module.extra_loss, 0.5 * 4 * (share * p.mean(0)).sum())
    with torch.no_grad():
        module.router.weight.zero_()  # all alike: as low as it gets
    module(x)
    assert float(module.extra_loss.detach()) == pytest.approx(0.5)
    module.eval()(x)
    assert module.extra_loss is None


def test_moe_learns_to_use_its_experts_alike():
    module = CHANNELS.parse("moe:experts=4,active=1,balance=1").build(Shape(WIDTH, 4))
    with torch.no_grad():
        module.router.weight[0] += 0.6  # expert 0 is preferred
    x = stream(8, 32).float() + 0.5
    optimizer = torch.optim.Adam(module.router.parameters(), lr=0.02)

    def busiest():
        return float(module.router(x).argmax(-1).flatten().bincount(minlength=4).max()) / (8 * 32)

    before = busiest()
    for _ in range(150):
        module(x)
        optimizer.zero_grad()
        module.extra_loss.backward()
        optimizer.step()
    assert before > 0.9 and busiest() < 0.5


def test_moe_says_what_it_can_not_do():
    for text in ("moe:active=9", "moe:active=0"):
        with pytest.raises(FoveateError, match="give active from 1 to the number of experts"):
            CHANNELS.parse(text)
    with pytest.raises(FoveateError, match="balance 0 or more"):
        CHANNELS.parse("moe:balance=-1")


# ---- duo ----------------------------------------------------------------------------------------------------------


def duo_model(layers=2, width=WIDTH, **settings):
    text = "duo" + (":" + ",".join(f"{k}={v}" for k, v in settings.items()) if settings else "")
    model = build(TRAIN_TASKS.parse("lm"), Sizes(width=width, layers=layers, channel=text))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return model.eval()


@pytest.mark.parametrize("training", [False, True])
def test_duo_sends_each_token_its_way(training):
    module, x = built("duo").train(training), stream()
    module.forced = torch.randint(0, 3, x.shape[:2], generator=torch.Generator().manual_seed(0))
    ways = [torch.zeros_like(x), module.small(x), module.big(x)]
    want = torch.stack(ways).gather(0, module.forced[None, ..., None].expand(1, *x.shape))[0]
    torch.testing.assert_close(module(x), want)


def test_duo_draws_all_ways_in_training_and_takes_the_big_one_in_use():
    module, x = built("duo"), stream(8, 64)
    torch.testing.assert_close(module.eval()(x), module.big(x))
    module.train()(x)
    shares = module.taken.flatten().bincount(minlength=3) / module.taken.numel()
    assert (shares - 1 / 3).abs().max() < 0.1


def test_a_router_learns_and_pays():
    module, x = built("duo:route=router,price=0.6", layers=3), stream()
    y = module(x)
    p = torch.softmax(x @ module.router.weight.T, -1)
    want = 0.2 * (p * torch.tensor([0.0, 8 / 40, 1.0], dtype=torch.float64)).sum(-1).mean()
    torch.testing.assert_close(module.extra_loss, want)
    (gradient,) = torch.autograd.grad(y.square().sum(), module.router.weight)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(module.eval()(x), y)  # the way taken is the most likely one in both
    assert module.extra_loss is None


def test_with_router_only_routers_learn_and_the_rest_stays():
    model = duo_model()
    before = copy.deepcopy(model.state_dict())
    router = with_router(model, price=5.0)
    assert {n for n, p in router.named_parameters() if p.requires_grad} == {
        f"layers.{i}.channel.router.weight" for i in range(2)
    }
    assert router.config.channel == "duo:route=router,price=5.0" and model.config.channel == "duo"
    ids = torch.randint(0, 256, (4, 16))
    router(ids)
    early = spent(router)
    fit(router, TRAIN_TASKS.parse("lm:length=16"), Settings(steps=40, batch=8, lr=3e-2))
    router(ids)
    assert spent(router) < early or spent(router) == 0  # work is dear
    after = router.state_dict()
    assert all(torch.equal(each, after[name]) for name, each in before.items())


def test_spent_counts_work():
    model, ids = duo_model(), torch.ones(1, 4, dtype=torch.long)
    small = duos(model)[0].costs[1]
    for ways, cost in (([2, 2], 1.0), ([0, 0], 0.0), ([2, 0], 0.5), ([1, 1], small)):
        with sent(model, torch.tensor(ways)):
            model(ids)
        assert spent(model) == pytest.approx(cost)
    assert all(each.forced is None for each in duos(model))


def test_the_oracle_is_a_search_over_all_paths():
    """Against whole texts read anew for each token and each path."""
    model = duo_model().double()
    ids = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(5))
    small = duos(model)[0].costs[1]
    budget = (1 + small) / 2
    found = oracle(model, ids, budget=budget)
    cost = {path: sum((0.0, small, 1.0)[way] for way in path) / 2 for path in itertools.product(range(3), repeat=2)}
    within = {path for path in cost if cost[path] <= budget + 1e-9}
    assert {tuple(path) for path in found.paths.tolist()} == within and len(within) == 8
    assert found.costs.tolist() == sorted(found.costs.tolist())
    for row in range(2):
        taken = []
        for t in range(5):
            losses = {}
            for path in within:
                with torch.no_grad(), sent(model, torch.tensor([[*taken, path]])):
                    logits = model(ids[row : row + 1, : t + 1]).logits[0, -1]
                losses[path] = float(functional.cross_entropy(logits.float(), ids[row, t + 1]))
            best = min(losses, key=losses.get)
            assert tuple(found.ways[row, t].tolist()) == best
            assert float(found.loss[row, t]) == pytest.approx(losses[best], abs=1e-5)
            assert float(found.cost[row, t]) == pytest.approx(cost[best], abs=1e-6)
            assert float(found.difficulty[row, t]) == pytest.approx(losses[0, 0] - losses[best], abs=1e-5)
            taken.append(best)


def test_what_the_oracle_promises_the_model_keeps():
    model, ids = duo_model(3), torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(6))
    found = oracle(model, ids)
    with torch.no_grad(), sent(model, found.ways):
        logits = model(ids[:, :-1]).logits
    again = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(again, found.loss, atol=1e-4, rtol=1e-4)
    assert spent(model) == pytest.approx(float(found.cost.mean()), abs=1e-5)
    poorer = oracle(model, ids, budget=0.0)
    assert poorer.paths.tolist() == [[0, 0, 0]] and float(poorer.difficulty.abs().max()) == 0


def test_duo_says_what_it_can_not_do():
    with pytest.raises(FoveateError, match="small must be above 0 and below big"):
        CHANNELS.parse("duo:small=3")
    with pytest.raises(FoveateError, match="no route 'oracle': give random or router"):
        CHANNELS.parse("duo:route=oracle")
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(FoveateError, match="build one with channel=duo"):
        oracle(build(TRAIN_TASKS.parse("lm"), Sizes(width=16)), ids)
    with pytest.raises(FoveateError, match="can't try the 3\\^9 paths"):
        oracle(duo_model(9), ids)
    with pytest.raises(FoveateError, match="texts of 2 tokens or more"):
        oracle(duo_model(), ids[:, :1])


def test_the_claim_in_small():
    told = []
    claim = CLAIMS["duo"]()
    claim.steps, claim.router_steps, claim.layers, claim.width, claim.length = 3, 3, 2, 16, 12
    claim.texts, claim.draws, claim.seeds = 2, 2, (0, 1)
    finding = claim.run(Bench(model=duo_model(), tokenizer=None, text=None, progress=told.append))
    assert told[-1] == 1 and len(finding.checks) == 3
    assert all(isinstance(held, bool) for held in finding.checks.values())
    assert all(math.isfinite(metric.value) for metric in finding.metrics.values())
