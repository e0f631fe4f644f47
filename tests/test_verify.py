"""Verify: what it selects, what it writes, and that a claim can fail; experiments themselves run by hand."""

from __future__ import annotations

import json

import pytest

from foveate.claims import CLAIMS, Claim, Finding, Stream
from foveate.data.text import Text
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import METHODS
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.tasks.base import Bench
from foveate.verify import page, selected, try_claim, write

RESIDENTS = ["drop-attention", "full", "h2o", "skip-layers", "streaming", "window"]


class Half(Claim):
    """A claim with two checks, one of which fails."""

    method = "h2o"
    statement = "two things | at once"
    setting = "none"

    def run(self, bench):
        return Finding({"figure": Metric(1.5, 1.0, 2.0)}, {"first": True, "second": False})


def bench():
    words = "the cat sat on the mat and looked at the moon. " * 80
    return Bench(tiny("llama"), tiny_tokenizer(), Text("t", words, words))


def test_every_resident_makes_a_claim():
    METHODS.all()
    assert [name for name in RESIDENTS if name not in CLAIMS] == []
    assert set(selected(role="depth")) == {"emoe", "skip-decode", "skip-layers"}
    assert list(selected(["h2o", "full"])) == ["full", "h2o"]


@pytest.mark.parametrize(
    "names,role,says", [(["h20"], None, "h2o"), ([], "cash", "cache"), (["random"], None, "no claim")]
)
def test_unknown_names_get_a_sentence(names, role, says):
    with pytest.raises(FoveateError, match=says):
        selected(names, role)


def test_a_claim_holds_only_if_every_check_does():
    verdict = try_claim(Half(), bench(), "tiny")
    assert verdict.status == "fails" and verdict.metrics["figure"] == {"value": 1.5, "low": 1.0, "high": 2.0}
    gpu = type("Gpu", (Half,), {"needs": "cuda"})
    assert try_claim(gpu(), bench(), "tiny").status == "needs device"


def test_the_page_tells_what_held_and_what_did_not(tmp_path):
    write(tmp_path / "h2o.json", json.dumps(vars(try_claim(Half(), bench(), "tiny"))))
    text = page(tmp_path)
    assert "fails here" in text and "**no**: second" in text and "yes: first" in text and "1 to 2" in text
    assert METHODS.all()["h2o"].paper.url in text
    assert list(tmp_path.iterdir()) == [tmp_path / "h2o.json"]


def test_a_paired_ratio_is_sure_where_two_intervals_are_not():
    a, b = Stream([10.0, 30.0, 50.0], [10, 10, 10]), Stream([9.0, 29.0, 49.0], [10, 10, 10])
    ratio = a.over(b)
    assert ratio.low == pytest.approx(ratio.high) and ratio.value == pytest.approx(2.718281828**0.1)
    assert a.perplexity.high > 2 * a.perplexity.low
