"""The Block Transformer's stack: its definition, what it holds, its sentences, its claim."""

import math

import pytest
import torch

from foveate.backbone import STACKS, BackboneConfig, BackboneForCausalLM
from foveate.blocks.stacks import block_to_local
from foveate.blocks.stacks.block_to_local import BlockToLocalClaim
from foveate.errors import FoveateError
from foveate.tasks.base import Bench
from foveate.train import build
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import held_bytes


def built(stack="block-to-local", layers=4, **sizes):
    torch.manual_seed(0)
    return BackboneForCausalLM(BackboneConfig(hidden_size=32, num_hidden_layers=layers, stack=stack, **sizes)).double()


@pytest.mark.parametrize(("text", "block", "prefix", "lower"), [("", 4, 2, 2), (":block=3,prefix=1,lower=1", 3, 1, 1)])
def test_it_is_its_definition(text, block, prefix, lower):
    model = built("block-to-local" + text)
    x = torch.randn(2, 17, 32, dtype=torch.double)
    order, layers = model.order, model.layers
    contexts = [order.first.expand(2, -1)]
    whole = 17 // block
    h = torch.stack([order.embed(x[:, b * block : (b + 1) * block].flatten(1)) for b in range(whole)], 1)
    for layer in layers[:lower]:
        h, _ = layer(h)
    contexts += list(h.unbind(1))
    guesses = []
    for b, context in enumerate(contexts):
        tokens = x[:, b * block : (b + 1) * block][:, : block - 1]
        h = torch.cat([order.expand(context).unflatten(1, (prefix, 32)), tokens], 1)
        for layer in layers[lower:]:
            h, _ = layer(h)
        guesses.append(h[:, prefix - 1 :])
    slow = torch.cat(guesses, 1)[:, 1:]  # the first is of the first token
    fast, _ = order(x, layers)
    torch.testing.assert_close(fast, slow[:, :17])


def test_the_state_holds_blocks_below_and_one_block_above():
    model = built()
    with torch.no_grad():
        state = model(torch.ones(1, 42, dtype=torch.long), use_cache=True).past_key_values.text.state
    assert [state[i]["keys"].shape[1] for i in "0123"] == [10, 10, 4, 4]
    assert state["block"]["tokens"].shape == (1, 2, 32)
    plain = built("plain")
    assert held_bytes(model, 400) < held_bytes(plain, 400) / 7


def test_blocks_in_parts_change_nothing(monkeypatch):
    model, ids = built(), torch.ones(3, 42, dtype=torch.long)
    whole = model(ids).logits
    monkeypatch.setattr(block_to_local, "ROWS", 4)
    torch.testing.assert_close(model(ids).logits, whole)


def test_bad_settings_get_a_sentence():
    with pytest.raises(FoveateError, match="block must be 2 or more"):
        STACKS.parse("block-to-local:block=1")
    with pytest.raises(FoveateError, match="of 1 layers 0 can't be the lower ones"):
        built(layers=1)
    with pytest.raises(FoveateError, match="of 4 layers 4 can't be the lower ones"):
        built("block-to-local:lower=4")


def test_the_claim_runs():
    class Short(BlockToLocalClaim):
        steps, seeds, width, length, context, texts, generated = 3, (0,), 32, 16, 40, 2, 5

    finding = Short().run(Bench(build(TRAIN_TASKS.parse("mqar")), None, None))
    assert all(math.isfinite(each.value) for each in finding.metrics.values())
    assert len(finding.checks) == 6 and all(isinstance(each, bool) for each in finding.checks.values())
    assert finding.checks["no token sees what comes after it"]
    assert finding.checks["with as many layers the state is less than a quarter of plain's"]
