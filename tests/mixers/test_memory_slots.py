"""Memory slots: the write and the long-term memory, the task, the errors, the claim."""

from __future__ import annotations

import pytest
import torch

from foveate.backbone import MIXERS, Shape
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.mixers.memory_slots import MemorySlotsClaim, Relations
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.tasks.base import Bench
from foveate.train import Sizes, build


def attention(q, k, v, heads):
    parts = (each.chunk(heads, -1) for each in (q, k, v))
    return torch.cat([(a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) @ c for a, b, c in zip(*parts, strict=True)], -1)


def written(module, h, working, long):
    """Slot by slot."""
    settings, rows = module.settings, []
    entries = torch.cat([working, h])
    k, v = module.written(entries).chunk(2, -1)
    for slot in working:
        scores = k @ module.writer(slot) / module.width**0.5
        best = scores.argsort(descending=True)[: settings.winners]
        won = scores[best].softmax(0) @ v[best]
        f = module.forget(torch.cat([slot, won])).sigmoid()
        rows.append(f * slot + (1 - f) * won.tanh())
    working = torch.stack(rows)
    a = module.spread(working.mean(0)).softmax(0)
    long = torch.stack([(1 - a[c]) * long[c] + a[c] * working for c in range(settings.long)])
    return working, long


def test_memories_and_reads_are_their_equations():
    torch.manual_seed(0)
    module = MIXERS.parse("memory-slots:slots=3,winners=2,long=2,segment=4").build(Shape(8, 2)).double()
    torch.nn.init.constant_(module.alpha, 0.7)
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        _, state = module(x, module.start(1, x))
        working, long = module.first, x.new_zeros(2, 3, 8)
        y = module(x)[0]
        for i in range(3):
            h = x[0, 4 * i : 4 * i + 4]
            if i == 2:
                k, v = module.working(working).chunk(2, -1)
                u = attention(module.ask(h), k, v, 2)
                k, v = module.stored(long.flatten(0, 1)).chunk(2, -1)
                far = attention(module.ask_long(u), k, v, 2)
                alpha = module.alpha.sigmoid()
                # Without memories a segment stands alone: what is left is attention within it.
                alone = module._read(h[None], torch.zeros_like(working)[None], torch.zeros_like(long)[None])[0]
                torch.testing.assert_close(y[0, 8:], module.out(alone + alpha * u + (1 - alpha) * far))
            working, long = written(module, h, working, long)
    torch.testing.assert_close(state["working"][0], working)
    torch.testing.assert_close(state["long"][0], long)


def test_answers_are_those_of_a_plain_look():
    task = Relations()
    inputs, targets = task.draw(200, torch.Generator().manual_seed(0))
    for row, answer in zip(inputs.tolist(), (targets[:, -1] - 30).tolist(), strict=True):
        things = [tuple(row[i : i + 4]) for i in range(0, 24, 4)]
        colour, question = row[24], row[25] - 24
        own = next(each for each in things if each[0] == colour)
        others = [each for each in things if each[0] != colour]
        far = [(each[2] - own[2]) ** 2 + (each[3] - own[3]) ** 2 for each in others]
        expected = [
            own[1] - 6,
            2 + (own[2] - 8 < 4),
            2 + (own[3] - 16 < 4),
            others[far.index(min(far))][1] - 6,
            others[far.index(max(far))][1] - 6,
            4 + sum(each[1] == own[1] for each in others),
        ]
        assert answer == expected[question]
    assert (targets[:, :-1] == -100).all() and int(targets.max()) < task.vocabulary


def test_sizes_of_the_claim_agree():
    claim = MemorySlotsClaim()
    slots, plain = Sizes(width=64, mixer="memory-slots"), Sizes(width=64, channel=f"gated:times={claim.times}")
    ours, theirs = (sum(p.numel() for p in build(Relations(), each).parameters()) for each in (slots, plain))
    assert abs(ours / theirs - 1) < 0.03


def test_bad_settings_get_a_sentence():
    for spec, words in (("slots=0", "at least 1"), ("winners=20", "20 winners of 8 slots and 8 tokens can't be")):
        with pytest.raises(FoveateError, match=words):
            MIXERS.parse(f"memory-slots:{spec}")


def test_the_claim_runs():
    claim = MemorySlotsClaim()
    claim.steps, claim.batch, claim.seeds = 2, 4, (0,)
    claim.sizes = Sizes(width=16, heads=2, layers=1)
    found = claim.run(Bench(tiny("llama"), tiny_tokenizer(), load_text("prose")))
    assert all(torch.tensor([m.value, m.low, m.high]).isfinite().all() for m in found.metrics.values())
    assert all(isinstance(held, bool) for held in found.checks.values())
