"""Rows, the frontier and the advice, from made-up cells."""

from __future__ import annotations

from typing import Any

import pytest

from foveate.compare.frontier import Figure, Row, advice, frontier, summarise


def cell(recipe: str, task: str = "perplexity", model: str = "tiny", **metrics: Any) -> dict[str, Any]:
    """A finished cell; a metric is a value (with an interval of 5% around it) or (value, low, high)."""
    figures = {
        name: dict(zip(("value", "low", "high"), m if isinstance(m, tuple) else (m, m * 0.95, m * 1.05), strict=True))
        for name, m in metrics.items()
    }
    return {
        "model": model,
        "recipe": recipe,
        "task": task,
        "status": "ok",
        "metrics": figures,
        "artifacts": {},
    }


def failed(recipe: str, task: str = "perplexity") -> dict[str, Any]:
    return cell(recipe, task) | {"status": "failed", "reason": "Out of memory."}


def blocks(recipe: str, nll: list[float], perplexity: float, **metrics: Any) -> dict[str, Any]:
    finished = cell(recipe, perplexity=perplexity, **metrics)
    return finished | {"artifacts": {"blocks": {"nll": nll, "tokens": [10] * len(nll)}}}


def exact(value: float) -> tuple[float, float, float]:
    return (value, value, value)


FULL = cell("full", perplexity=12.0, cache_fraction=exact(1))


def test_a_row_merges_the_tasks_of_a_recipe_and_keeps_texts_apart() -> None:
    rows = summarise(
        [
            cell("full", "perplexity:tokens=1", perplexity=10.0),
            cell("full", "perplexity:tokens=2", perplexity=20.0),
            cell("h2o", "perplexity:tokens=1", perplexity=11.0, cache_fraction=exact(0.5)),
            cell("h2o", "perplexity:tokens=2", perplexity=30.0, cache_fraction=exact(0.25)),
            cell("h2o", "speed", decode_speedup=1.4),
            failed("h2o", "passkey"),
        ]
    )
    assert [row.recipe for row in rows] == ["full", "h2o"]
    h2o = rows[1]
    assert h2o.changes["perplexity:tokens=1"]["perplexity"].value == pytest.approx(1.1)
    assert h2o.changes["perplexity:tokens=2"]["perplexity"].value == pytest.approx(1.5)
    assert h2o.cost("cache_fraction", "perplexity:tokens=2") == Figure(0.25, 0.25, 0.25)
    assert h2o.cost("decode_speedup", "perplexity:tokens=2") == h2o.figure("decode_speedup")
    assert h2o.figure("perplexity", "passkey") is None
    assert h2o.failures == {"passkey": "Out of memory."}


def test_full_of_another_model_is_no_reference() -> None:
    rows = summarise([cell("full", model="a", perplexity=10.0), cell("h2o", model="b", perplexity=20.0)])
    assert rows[1].changes == {}


def test_passkey_changes_are_differences() -> None:
    rows = summarise([cell("full", "p", passkey=exact(1)), cell("h2o", "p", passkey=(0.75, 0.5, 1.0))])
    change = rows[1].changes["p"]["passkey"]
    assert change.value == -0.25 and not change.real


def test_blocks_of_the_same_text_are_compared_in_pairs() -> None:
    base = [
        5.0,
        25.0,
        10.0,
        30.0,
    ] * 8  # far apart from each other, so that two intervals would overlap widely
    full = blocks("full", base, 5.75)
    worse = summarise([full, blocks("h2o", [nll + 0.5 for nll in base], 6.05)])[1].changes["perplexity"]["perplexity"]
    assert worse.real and worse.value == pytest.approx(1.0513, abs=1e-3)
    shorter = blocks("h2o", base[:-1], 6.0)
    assert not summarise([full, shorter])[1].changes["perplexity"]["perplexity"].real  # only their intervals are left


def test_a_given_ratio_is_believed() -> None:
    given = cell("h2o", perplexity=12.0, perplexity_ratio=(1.02, 1.01, 1.03))
    change = summarise([FULL, given])[1].changes["perplexity"]["perplexity"]
    assert (change.value, change.high, change.real) == (1.02, 1.03, True)


def test_frontier_leaves_out_what_is_beaten_and_what_was_not_measured() -> None:
    def row(recipe: str, cache: float, perplexity: float | None) -> Row:
        quality = {} if perplexity is None else {"perplexity": Figure(perplexity)}
        return Row("tiny", recipe, {"t": {"cache_fraction": Figure(cache), **quality}})

    rows = [row("full", 1, 10), row("a", 0.5, 11), row("b", 0.6, 12), row("c", 0.2, 30), row("twin", 0.5, 11)]
    rows.append(row("unmeasured", 0.1, None))
    assert [r.recipe for r in frontier(rows, "cache_fraction", "perplexity")] == ["c", "a", "twin", "full"]


def test_frontier_knows_that_more_speed_and_more_passkeys_are_better() -> None:
    def row(recipe: str, speed: float, passkey: float) -> Row:
        return Row("tiny", recipe, {"s": {"decode_speedup": Figure(speed)}, "p": {"passkey": Figure(passkey)}})

    rows = [row("full", 1.0, 1.0), row("slow", 0.9, 0.9), row("fast", 2.0, 0.8)]
    assert [r.recipe for r in frontier(rows, "decode_speedup", "passkey", "p")] == ["fast", "full"]


def test_advice_names_the_cheapest_within_tolerance() -> None:
    said = advice(
        [
            FULL,
            cell("h2o:keep=0.5", perplexity=12.05, cache_fraction=exact(0.5)),
            cell("h2o:keep=0.9", perplexity=12.01, cache_fraction=exact(0.9)),
            cell("window", perplexity=90.0, cache_fraction=exact(0.1)),
            cell("h2o:keep=0.5", "speed", decode_speedup=(1.41, 1.3, 1.5)),
        ]
    )
    assert said == "within 1% of the full model: h2o:keep=0.5 at 50% of the cache, 1.41x faster decoding."


def test_advice_breaks_ties_by_speed_and_never_makes_one_up() -> None:
    cells = [FULL] + [cell(r, perplexity=12.0, cache_fraction=exact(0.5)) for r in ("a", "b")]
    assert advice(cells) == "within 1% of the full model: a at 50% of the cache."
    cells.append(cell("b", "speed", decode_speedup=(1.2, 1.1, 1.3)))
    assert advice(cells) == "within 1% of the full model: b at 50% of the cache, 1.2x faster decoding."


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        ((1.05, 0.98, 1.1), ", no measurable difference in decoding speed."),
        ((0.5, 0.4, 0.6), ", 2x slower decoding."),
    ],
)
def test_advice_says_of_speed_what_its_interval_allows(speed: tuple[float, float, float], words: str) -> None:
    cells = [
        FULL,
        cell("a", perplexity=12.0, cache_fraction=exact(0.5)),
        cell("a", "speed", decode_speedup=speed),
    ]
    assert advice(cells).endswith(words)


def test_advice_takes_the_upper_end_of_a_paired_ratio() -> None:
    unsure = cell("a", perplexity=12.0, cache_fraction=exact(0.5), perplexity_ratio=(1.0, 0.97, 1.03))
    said = advice([FULL, unsure])
    assert said.startswith("nothing measured stays within 1% of the full model; nearest is a at 50% of the cache: ")
    assert said.endswith("its perplexity can't be told from that of full, but 3% higher isn't ruled out.")
    assert advice([FULL, unsure], tolerance=0.05).startswith("within 5% of the full model: a")


def test_advice_wants_it_within_tolerance_on_every_text() -> None:
    cells = [cell("full", task, perplexity=10.0) for task in ("short", "long")]
    cells += [
        cell("a", "short", perplexity=10.0, cache_fraction=exact(0.5)),
        cell("a", "long", perplexity=20.0),
    ]
    assert advice(cells).endswith("nearest is a at 50% of the cache: 2 times the perplexity of full.")


def test_advice_refuses_a_recipe_that_loses_passkeys_beyond_its_interval() -> None:
    def passkey(recipe: str, *figure: float) -> dict[str, Any]:
        return cell(recipe, "passkey", passkey=figure)

    cells = [FULL, cell("a", perplexity=12.0, cache_fraction=exact(0.5)), passkey("full", 1.0, 1.0, 1.0)]
    assert advice([*cells, passkey("a", 0.75, 0.5, 1.0)]).startswith("within 1%")
    said = advice([*cells, passkey("a", 0.25, 0.0, 0.5)])
    assert said.startswith("nothing measured stays within 1%")
    assert said.endswith(": 25% of the passkeys answered against 100%.")
    assert advice([*cells, failed("a", "passkey")]).startswith("no advice: no recipe beside `full` came through")


def test_advice_says_when_quality_is_kept_but_nothing_is_saved() -> None:
    said = advice([FULL, cell("a", perplexity=12.0, cache_fraction=exact(1))])
    assert said == "within 1% of the full model, but saving neither cache nor decoding time as far as measured: a."


def test_advice_without_a_reference() -> None:
    assert advice([cell("a", perplexity=12.0)]).startswith("no advice: `full` is not in this run")
    assert advice([failed("full"), cell("a", perplexity=12.0)]).startswith("no advice: the perplexity of `full`")
    assert advice([FULL]).startswith("no advice: no recipe beside `full`")


def test_advice_speaks_of_each_model() -> None:
    cells = [
        c | {"model": m} for m in ("x", "y") for c in (FULL, cell("a", perplexity=12.0, cache_fraction=exact(0.5)))
    ]
    sentence = "within 1% of the full model: a at 50% of the cache"
    assert advice(cells) == f"for x, {sentence}; for y, {sentence}."


def test_advice_breaks_ties_of_cache_by_quality() -> None:
    cells = [
        cell("full", perplexity=27.0, cache_fraction=exact(1)),
        cell("window", perplexity=19.0, cache_fraction=exact(0.0312)),
        cell("streaming", perplexity=11.0, cache_fraction=exact(0.0313)),
    ]
    assert "streaming at 3.1%" in advice(cells)
