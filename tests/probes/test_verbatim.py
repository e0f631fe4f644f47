"""Verbatim: a circuit that remembers a list's order is found; one that knows only its words is told apart."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import foveate as fv
from foveate.errors import FoveateError
from foveate.models.planted import Planted
from foveate.probes import Data
from foveate.probes.verbatim import KINDS, Lists, Verbatim, looks_back
from foveate.tasks.copying import FIRST, NOUNS, SECOND

RATIO = "surprisal over the first list's, {}"


@pytest.fixture(scope="module")
def words():
    """A tokenizer that has a token for each word of the lists, and one for all else."""
    cut = pre_tokenizers.Whitespace()
    known = dict.fromkeys([*NOUNS, *(w for lead in (FIRST, SECOND) for w, _ in cut.pre_tokenize_str(lead)), "."])
    own = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i + 1 for i, w in enumerate(known)}, unk_token="[UNK]"))
    own.pre_tokenizer = cut
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]")


def remembering():
    """Head 1.3 looks at the token whose second one before was the one before this: the next word of the list."""
    plan = Planted(layers=2).previous(0, 1)
    plan.head(0, 2, match=("position", "position"), shift=-2, move=("token", "out"), strength=0.1)
    return plan.head(1, 3, match=("previous", "out"), move=("token", "out"), sharp=400.0).model()


def reading(model, tokenizer, **given):
    data = Data.of(model, tokenizer)
    own = Verbatim(**({"cases": 2, "nouns": 6, "gap": 8, "times": 2} | given))
    own.check(model, data)
    return own.measure(model, data)


@pytest.fixture(scope="module")
def found(words):
    return reading(remembering(), words)


def test_a_memory_of_words_in_order_is_found(found):
    assert found.of_role("verbatim memory") == [(1, 3)]
    same, permuted, novel = (found.metrics[RATIO.format(kind)].value for kind in KINDS)
    assert same < 0.5 < 0.9 < permuted and novel > 0.9  # but for the first word, which nothing comes before


def test_a_memory_of_the_words_alone_is_told_apart(words):
    """A head that looks at all words after a comma: it knows which there were, and not their order."""
    plan = Planted(layers=2).previous(0, 1).head(1, 3, match=("token", "previous"), move=("token", "out"))
    found = reading(plan.model(), words, times=1)
    _, permuted, novel = (found.metrics[RATIO.format(kind)].value for kind in KINDS)
    assert permuted < 0.9 * novel
    assert found.roles == [] and found.scores["verbatim"].scores.argmax() == 7  # head 1.3, but not clear


def test_what_is_drawn_is_what_was_measured(found):
    by_size, by_gap, by_times = found.panels
    for kind in KINDS:
        value = found.metrics[RATIO.format(kind)].value
        assert dict(by_size.series[kind])[6.0] == dict(by_gap.series[kind])[8.0] == pytest.approx(value)
        assert dict(by_times.series[kind])[1.0] == pytest.approx(value)
    assert [[x for x, _ in panel.series[KINDS[0]]] for panel in found.panels] == [[2, 3, 6], [1, 8, 24], [1, 2]]


def test_ratios_are_those_of_the_whole_text_read_at_once():
    model, tokenizer = fv.tiny("llama"), fv.tiny_tokenizer()
    lists, prose = Lists.drawn(4, 0), torch.arange(30, 62)[None]
    (row,) = lists.ratios(model, tokenizer, prose, 32)
    ids, second, first = lists.text(tokenizer, prose)
    with torch.no_grad():
        nats = -model(ids).logits[0].log_softmax(-1)
    told = nats[second - 1, ids[0, second]].mean() / nats[first - 1, ids[0, first]].mean()
    assert row[0] == pytest.approx(float(told), rel=1e-4)
    assert torch.equal(ids[0, first], ids[0, second])


def test_a_heads_score_is_its_attention_to_where_the_word_stood():
    model, tokenizer = fv.tiny("llama"), fv.tiny_tokenizer()
    texts = [Lists.drawn(4, seed).text(tokenizer, torch.arange(30, 62)[None]) for seed in range(2)]
    scores = looks_back(model, texts).scores
    model.set_attn_implementation("eager")
    looked = []
    for ids, second, first in texts:
        with torch.no_grad():
            maps = torch.cat(model(ids, output_attentions=True).attentions)  # (layer, head, query, entry)
        looked.append(maps[:, :, second - 1, first])
    torch.testing.assert_close(scores.float(), torch.cat(looked, -1).mean(-1))


def test_what_cannot_be_says_so(words):
    with pytest.raises(FoveateError, match="nouns 4 to"):
        Verbatim(nouns=2)
    with pytest.raises(FoveateError, match="fewer nouns"):
        model = remembering()
        Verbatim().check(model, Data.of(model, words))
