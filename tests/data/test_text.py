"""Texts: always there, the same each time, in two parts that do not mix, read only as far as needed."""

from __future__ import annotations

import sys
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveate.data import Text, load_text, text, tokens
from foveate.errors import FoveateError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word (`w0` to `w9`), with a special token that it would put first if it were let."""
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10)} | {"?": 10, "<s>": 11}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 11)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", bos_token="<s>", model_max_length=16)


def long_lines(part: str) -> set[str]:
    return {line.strip() for line in part.splitlines() if len(line.strip()) > 40}


def test_prose_is_every_topic_once_and_the_parts_share_no_line():
    prose = load_text()
    assert prose == load_text("prose")
    assert len(prose.calibration) + len(prose.evaluation) + 2 == len("\n\n".join(topics.values()))
    share = len(prose.calibration) / (len(prose.calibration) + len(prose.evaluation))
    assert 0.15 < share < 0.21  # a fifth; whole topics go to one side, and topics differ by Python version
    assert not long_lines(prose.calibration) & long_lines(prose.evaluation)


def test_topics_that_repeat_each_other_stay_together():
    line = "x" * 41
    repeated = {
        "a": f"{line}1",
        "b": "other",
        "c": f"{line}2\n{line}3",
        "d": f"  {line}3\n{line}1",
        "e": "other",
    }
    assert sorted(text._families(repeated)) == [["a", "c", "d"], ["b"], ["e"]]


def test_code_is_sources_only_split_by_file():
    code = load_text("code")
    assert code.digest == load_text("code").digest
    assert len(code.calibration) + len(code.evaluation) < text.MOST_CHARACTERS * 1.01
    assert 0.1 < len(code.calibration) / len(code.evaluation) < 0.4
    assert "import " in code.calibration and "import unittest\n\nclass " not in code.evaluation
    long = [part for part in code.calibration.split("\n\n") if len(part) > 2000]
    assert long and not any(part in code.evaluation for part in long)


def test_the_digest_tells_parts_apart():
    digests = {Text("t", a, b).digest for a, b in (("a", "b"), ("ab", ""), ("", "ab"), ("b", "a"))}
    assert len(digests) == 4
    assert Text("one", "a", "b").digest == Text("two", "a", "b").digest


def test_a_file_is_split_at_a_line(tmp_path):
    file = tmp_path / "mine.txt"
    lines = [f"line {i}: naïve 漢字\n" for i in range(100)]
    file.write_text("".join(lines), encoding="utf-8-sig")
    mine = load_text(str(file))
    assert mine.calibration + mine.evaluation == "".join(lines)
    assert mine.calibration.endswith("\n") and 20 <= mine.calibration.count("\n") <= 22
    file.write_text("word " * 100)
    assert load_text(str(file)).calibration == "word " * 21
    file.write_text("x" * 100)
    assert len(load_text(str(file)).calibration) == 20


def test_a_file_that_is_no_text_is_a_sentence(tmp_path):
    file = tmp_path / "mine.txt"
    for content, sentence in (
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xff\xfe\x00a", "UTF-8"),
        (b"a\0b", "binary"),
    ):
        file.write_bytes(content)
        with pytest.raises(FoveateError, match=sentence):
            load_text(str(file))
    with pytest.raises(FoveateError, match="can't be read"):
        load_text(str(tmp_path))
    with pytest.raises(FoveateError, match="there is no text proze: did you mean prose"):
        load_text("proze")


def test_tokens_are_the_whole_texts_tokens_and_no_special_ones(tokenizer, caplog, capfd):
    words = "".join(f"w{i % 10} " for i in range(50_000))
    every = tokens(words, tokenizer)
    assert every.shape == (1, 50_000) and every.dtype == torch.int64 and 11 not in every
    for start, length in ((0, 1), (0, 4096), (777, 4096), (49_000, 1000)):
        assert torch.equal(tokens(words, tokenizer, length, start), every[:, start : start + length])
    assert torch.equal(tokens(words, tokenizer, start=49_990), every[:, 49_990:])
    assert not caplog.records and capfd.readouterr() == ("", "")  # nothing about the 16 positions


def test_long_words_and_texts_that_end_are_read_to_the_end(tokenizer):
    sparse = ("x" * 500 + " w1 ") * 200  # far more characters a token than the first cut allows for
    assert tokens(sparse, tokenizer, 400).tolist() == [[10, 1] * 200]
    with pytest.raises(FoveateError, match="has 400 tokens, the task needs 401: give a longer text or fewer"):
        tokens(sparse, tokenizer, 401)
    with pytest.raises(FoveateError, match="has 400 tokens, the task needs 405"):
        tokens(sparse, tokenizer, 5, start=400)
    with pytest.raises(FoveateError, match="has 0 tokens, the task needs 1"):
        tokens("", tokenizer)


def test_only_a_little_of_a_long_text_is_tokenized(tokenizer, monkeypatch):
    seen = []
    encode = text._encode
    monkeypatch.setattr(text, "_encode", lambda part, tok: seen.append(len(part)) or encode(part, tok))
    tokens("w1 " * 1_000_000, tokenizer, 1000)
    assert sum(seen) < 20_000


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package datasets: fill `splits`, then see what was asked for in `asked`."""
    state = SimpleNamespace(splits={}, asked=None)

    def load_dataset(name, configuration=None, *, streaming):
        state.asked = (name, configuration, streaming)
        if not state.splits:
            raise ConnectionError("the Hub is away\nsince noon")
        return state.splits

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return state


def rows(word, number=10):
    return ({"id": i, "text": f"{word} {i}" if i % 2 else ""} for i in range(number))


def test_hub_splits_become_the_parts(hub):
    hub.splits = {"train": rows("learn"), "validation": rows("tune"), "test": rows("judge")}
    data = load_text("hub:org/set:small")
    assert hub.asked == ("org/set", "small", True)
    assert data.name == "hub:org/set:small"
    assert data.calibration.split("\n\n") == [f"learn {i}" for i in (1, 3, 5, 7, 9)]
    assert data.evaluation.startswith("judge 1\n\njudge 3")
    hub.splits = {"train": rows("all", 100)}
    data = load_text("hub:set")
    assert hub.asked == ("set", None, True)
    assert "all 1\n" in data.calibration and "all 99" in data.evaluation
    assert not set(data.calibration.split("\n\n")) & set(data.evaluation.split("\n\n")) - {""}


def test_hub_rows_beyond_the_limit_are_not_fetched(hub, monkeypatch):
    monkeypatch.setattr(text, "MOST_CHARACTERS", 100)
    endless = iter(lambda: {"text": "word " * 5}, None)
    hub.splits = {"train": endless, "test": rows("judge", 10)}
    assert len(load_text("hub:set").calibration) == 100


def test_hub_troubles_are_sentences(hub, monkeypatch):
    with pytest.raises(FoveateError, match=r"hub:set can't be had \(the Hub is away\)"):
        load_text("hub:set")
    hub.splits = {"train": [{"label": 1, "content": "x"}]}
    with pytest.raises(FoveateError, match="no column text, only label, content"):
        load_text("hub:set")
    hub.splits = {"train": []}
    with pytest.raises(FoveateError, match="hub:set is empty"):
        load_text("hub:set")
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an import of an absent package meets
    with pytest.raises(FoveateError, match=r"pip install 'foveate\[hub\]'"):
        load_text("hub:set")


def test_the_default_model_reads_the_default_text_at_about_12(smollm2):
    model, tokenizer = smollm2
    prose = load_text()
    assert tokens(prose.evaluation, tokenizer).shape[1] > 85_000
    ids = tokens(prose.evaluation, tokenizer, 2048).to(model.device)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:])
    assert 11 < loss.exp() < 13
