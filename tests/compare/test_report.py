"""The page, read as text and opened in a real browser."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from foveate.compare.charts import COLOURS, NEUTRAL, looks
from foveate.compare.frontier import Figure
from foveate.compare.report import read_cells, write_report
from foveate.compare.words import texts
from foveate.errors import FoveateError

HOSTILE = """</script><script>document.title='owned'</script><img src=x onerror="document.title='owned'">&"'"""
TASKS = {
    "perplexity": "perplexity:tokens=16384,window=2048",
    "passkey": "passkey:tokens=2048,cases=8",
    "speed": "speed:prompt=1024,new=64",
    "generate": "generate:new=60",
    "held": "held:tokens=256",
}
# recipe: perplexity, cache, passkeys of 8, decode speed-up, share of the heads that hold an old entry
RECIPES = {
    "full": (12.31, 1.0, 8, 1.0, 1.0),
    "window:keep=0.25": (684.0, 0.031, 2, 1.61, 0.0),
    "streaming:keep=0.25": (13.4, 0.031, 2, 1.58, 0.0),
    "h2o:keep=0.5": (12.36, 0.0625, 7, 1.41, 0.5),
    "h2o:keep=0.2": (12.92, 0.025, 5, 1.66, 0.2),
    "skip-layers:keep=0.85": (15.9, 0.85, 6, 1.17, 1.0),
    "drop-attention:keep=0.8+h2o:keep=0.5": (13.1, 0.05, 5, 1.74, 0.5),
}
PROSE = (
    "The with statement is used to wrap the execution of a block with methods defined by a context manager. "
    "This allows common try except finally usage patterns to be encapsulated for convenient reuse. The pass "
    "key is 48213 . Remember it .\n\nA context manager is an object that defines the runtime context to be "
    "established when executing a with statement. The context manager handles the entry into, and the exit "
    "from, the desired runtime context for the execution of the block of code. What is the pass key ?"
)


def made_up_cells(hostile: str = "") -> list[dict[str, Any]]:
    """A run as `foveate compare` leaves it: seven recipes, five tasks, a failed cell; `hostile` all over."""
    dice = random.Random(0)
    setting = {
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
        "text": "prose",
        "text_digest": "9c1f4be2",
        "foveate": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.23.0",
    }
    tokens = [piece if i == 0 else f" {piece}" for i, piece in enumerate(PROSE.split(" "))]
    cells = []
    for recipe, (perplexity, cache, answered, speedup, old) in RECIPES.items():
        cache_metrics = {"cache_bytes": _exact(cache * 377487360), "cache_fraction": _exact(cache)}
        x = list(range(512, 16385, 512))
        breaks = recipe.startswith("window")
        y = [
            dice.gauss(1, 0.06) * (12.5 if breaks and at <= 1024 else perplexity * 1.2 if breaks else perplexity)
            for at in x
        ]
        cases = [
            {
                "prompt": f"… The pass key is {k}1357. {hostile}What is the pass key?",
                "expected": f"{k}1357",
                "answer": f"{k}1357" if 7 - k < answered else "the same as the one above" + hostile,
                "ok": 7 - k < answered,
                "depth": k / 7,
            }
            for k in range(8)
        ]
        heads = [
            90
            if i < 4 and not breaks or i >= len(tokens) - 20
            else round(90 * old * (dice.random() < 0.7 or old == 1))
            if old in (0, 1)
            else min(90, int(90 * old * 2 * dice.random()))
            for i in range(len(tokens))
        ]
        text = (
            " and then the block is left, whatever happened in it. " * 3 if not breaks else " the the the, , , the" * 9
        )
        measured: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "perplexity": (
                {"perplexity": {"value": perplexity, "low": perplexity * 0.965, "high": perplexity * 1.04}}
                | cache_metrics,
                {
                    "curve": {"x": x, "y": y, "x_name": "tokens read", "y_name": "perplexity"},
                    "blocks": {
                        "nll": [128 * math.log(perplexity) * dice.gauss(1, 0.0003) for _ in x],
                        "tokens": [128] * 32,
                    },
                },
            ),
            "passkey": (
                {
                    "passkey": {
                        "value": answered / 8,
                        "low": max(0, answered / 8 - 0.3) if answered < 8 else 1.0,
                        "high": min(1, answered / 8 + 0.25),
                    }
                }
                | cache_metrics,
                {"cases": cases},
            ),
            "speed": (
                {
                    "decode_speedup": _about(speedup, 0.05),
                    "prefill_speedup": _about(1.0 if old else 0.97, 0.04),
                    "decode_tokens_per_second": _about(14.2 * speedup, 0.06),
                    "prefill_seconds": _about(3.1, 0.1),
                    "peak_memory_bytes": _exact(890e6 + cache * 1e8),
                    "parameters": _exact(134515008),
                }
                | cache_metrics,
                {},
            ),
            "generate": (
                {"tokens": _exact(60), "distinct_2": _exact(0.8)},
                {
                    "samples": [
                        {
                            "prompt": "Write a sentence about the with statement." + hostile,
                            "text": text + hostile,
                        },
                        {"prompt": "Once upon a time", "text": text},
                    ]
                },
            ),
            "held": (
                {"held_fraction": _exact(sum(heads) / 90 / len(heads))},
                {
                    "held": {
                        "tokens": tokens + ([hostile] if hostile else []),
                        "heads": heads + ([7] if hostile else []),
                        "of": 90,
                    }
                },
            ),
        }
        for name, (metrics, artifacts) in measured.items():
            cells.append(
                {
                    "id": f"{len(cells):08x}",
                    "model": "smollm2-135m" + hostile,
                    "recipe": recipe + hostile if hostile and recipe != "full" else recipe,
                    "task": TASKS[name],
                    "status": "ok",
                    "seconds": 12.3,
                    "setting": setting,
                    "metrics": metrics,
                    "artifacts": artifacts,
                }
            )
    broken = next(c for c in cells if c["recipe"].startswith("drop-attention") and c["task"] == TASKS["passkey"])
    broken |= {
        "status": "failed",
        "metrics": {},
        "artifacts": {},
        "reason": "RuntimeError: out of memory while 2.1 GiB were asked for; 0.4 GiB were free." + hostile,
    }
    return cells


def _exact(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value}


def _about(value: float, spread: float) -> dict[str, float]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def cells_of(task: str, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["task"] == TASKS[task]]


# ---- the page as text ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {
        "plain": write_report(made_up_cells(), folder / "plain.html"),
        "hostile": write_report(made_up_cells(HOSTILE), folder / "hostile.html"),
    }


def test_the_page_says_what_was_measured(pages: dict[str, Path]) -> None:
    page = pages["plain"].read_text(encoding="utf-8")
    for text in (
        "Within 1% of the full model: h2o:keep=0.5 at 6.2% of the cache, 1.41x faster decoding.",
        "12.31", "[11.9, 12.8]", "1.41x", "22.5 MiB", "134.5 M", "−75 points", "≈ full", "34 of 35",
        "out of memory while 2.1 GiB were asked for", "9c1f4be2", "5.23.0",
    ):  # fmt: skip
        assert text in page, text
    assert page.count("vegaEmbed") < 20 and len(page) < 3e6


def test_texts_are_escaped(pages: dict[str, Path]) -> None:
    page = pages["hostile"].read_text(encoding="utf-8")
    assert "</script><script>document" not in page
    assert "<img src=x" not in page
    assert "&lt;/script&gt;" in page  # it is in the prompts, recipes and reasons
    assert "\\u003c/script\\u003e" in page  # and in the tokens and the charts' data


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    cells = cells_of("speed", made_up_cells())
    page = write_report(cells, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "All figures" in page
    for heading in (
        "What is kept",
        "Along the text",
        "Passkeys",
        "What is still held",
        "Samples",
        "Failed cells",
    ):
        assert heading not in page


def test_a_run_folder_is_read_in_grid_order(tmp_path: Path) -> None:
    cells = list(reversed(cells_of("perplexity", made_up_cells())))
    (tmp_path / "cells").mkdir()
    for cell in cells:
        (tmp_path / "cells" / f"{cell['id']}.json").write_text(json.dumps(cell))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in reversed(cells)))
    assert [cell["recipe"] for cell in read_cells(tmp_path)] == list(RECIPES)
    assert write_report(tmp_path, tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="no cell is finished"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(FoveateError, match="can't be written"):
        write_report(made_up_cells(), tmp_path / "missing" / "report.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(FoveateError, match="can't be written"):
        write_report(made_up_cells(), tmp_path / "folder.html")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder.html"]


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("perplexity", 12.3141, "12.31"),
        ("perplexity", 1234.5, "1,234"),
        ("perplexity", 1.014e304, "1.014e+304"),  # as high as a broken recipe's goes
        ("passkey", 0.0, "0%"),
        ("cache_fraction", 0.0625, "6.2%"),
        ("cache_fraction", 0.25, "25%"),
        ("decode_speedup", 1.406, "1.41x"),
        ("cache_bytes", 12_345, "0.0118 MiB"),
        ("acc,none", 0.123456, "0.123"),
    ],
)
def test_figures_are_in_peoples_units(metric: str, value: float, text: str) -> None:
    assert texts(metric, Figure(value)) == (text, "")


def test_marks_can_be_seen_on_either_page() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for colour in (*COLOURS, NEUTRAL):
        assert 1.05 / (luminance(colour) + 0.05) >= 3  # on white
        assert (luminance(colour) + 0.05) / (luminance("#12161c") + 0.05) >= 2.99  # on the dark page
    found = looks({f"r{i}": i == 0 for i in range(31)})
    assert len(set(found.values())) == 31


# ---- the page in a browser -------------------------------------------------------------------------------


def open_page(browser: Any, page: Path, width: int = 1200, scheme: str = "light") -> None:
    """Open a page and wait until its charts are drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier pages left
    browser.get(page.as_uri())
    drawn = "return document.querySelectorAll('[data-chart]:not(:has(svg.marks))').length === 0"
    WebDriverWait(browser, 30).until(lambda b: b.execute_script(drawn))


@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_the_charts_draw_without_errors_and_without_the_network(
    browser: Any, pages: dict[str, Path], kind: str
) -> None:
    open_page(browser, pages[kind])
    marks = browser.execute_script(
        "return [...document.querySelectorAll('[data-chart]')].map(e => [e.querySelector('svg').clientWidth,"
        " e.querySelectorAll('.mark-symbol path').length,"
        " e.querySelectorAll('.mark-rule.role-mark line').length])"
    )
    assert len(marks) == 5  # perplexity and passkeys, each against cache and speed; and along the text
    assert all(width > 300 for width, _, _ in marks)
    assert [points for _, points, _ in marks] == [7, 7, 6, 6, 7 * 32]
    assert all(bars >= 6 for _, _, bars in marks[:4])
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url for url in urls if not url.startswith("data:")} == {pages[kind].as_uri()}


def test_a_recipe_that_breaks_is_on_a_logarithmic_axis_and_on_the_edge(browser: Any, pages: dict[str, Path]) -> None:
    open_page(browser, pages["plain"])
    charts = [e.text for e in browser.find_elements("css selector", "[data-chart]")]
    assert "window:keep=0.25 ↑ 684.0" in charts[0]
    assert {"10", "100", "1,000"} <= set(charts[4].split())


def test_hostile_texts_are_shown_and_not_run(browser: Any, pages: dict[str, Path]) -> None:
    open_page(browser, pages["hostile"])
    assert browser.title.endswith("what each recipe costs and keeps")
    assert browser.find_elements("css selector", "img, body script:not([type])") == []
    assert HOSTILE in browser.find_element("css selector", "h1").text
    assert HOSTILE in browser.find_element("css selector", ".passage").get_attribute("textContent")
    from selenium.webdriver import ActionChains

    mark = browser.find_elements("css selector", ".mark-symbol path")[1]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    ActionChains(browser).move_to_element(mark).perform()
    assert HOSTILE in browser.find_element("css selector", "#vg-tooltip-element").text
    assert browser.title.endswith("what each recipe costs and keeps")


def test_the_tooltip_has_the_figures_and_the_interval(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains

    open_page(browser, pages["plain"])
    mark = browser.find_elements("css selector", ".mark-symbol path")[3]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    ActionChains(browser).move_to_element(mark).perform()
    said = browser.find_element("css selector", "#vg-tooltip-element").text
    assert "h2o:keep=0.5" in said and "12.36 [11.9, 12.9]" in said and "6.2%" in said


def test_the_table_sorts_by_click_and_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    open_page(browser, pages["plain"])

    def column(number: int) -> list[str]:
        cells = browser.find_elements("css selector", f".sortable tbody tr > :nth-child({number})")
        return [cell.text.split("\n")[0] for cell in cells]

    heads = browser.find_elements("css selector", ".sortable thead th")
    perplexity, passkeys = heads[1], heads[2]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", perplexity)
    perplexity.find_element("css selector", "button").click()
    assert perplexity.get_attribute("aria-sort") == "ascending"
    assert column(2) == ["12.31", "12.36", "12.92", "13.10", "13.40", "15.90", "684.0"]
    passkeys.find_element("css selector", "button").send_keys("\ue007")  # Enter
    assert passkeys.get_attribute("aria-sort") == "ascending"
    assert perplexity.get_attribute("aria-sort") == "none"
    assert column(3)[-2:] == ["100%", "failed"]
    passkeys.find_element("css selector", "button").send_keys(" ")
    assert passkeys.get_attribute("aria-sort") == "descending"
    assert column(3)[0] == "100%" and column(3)[-1] == "failed"  # what was not measured stays below
    heads[0].find_element("css selector", "button").click()
    assert column(1) == sorted(RECIPES)


@pytest.mark.parametrize("kind", ["plain", "hostile"])
@pytest.mark.parametrize("width", [375, 768])
def test_nothing_sticks_out_on_a_small_screen(browser: Any, pages: dict[str, Path], kind: str, width: int) -> None:
    open_page(browser, pages[kind], width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_passage_says_who_holds_a_token(browser: Any, pages: dict[str, Path]) -> None:
    open_page(browser, pages["plain"])
    view = browser.find_element("css selector", ".held")
    tokens, output = (
        view.find_elements("css selector", ".passage .token"),
        view.find_element("css selector", "output"),
    )
    full, window = view.find_elements("css selector", "label")[:2]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", window)
    window.click()
    assert tokens[5].get_attribute("title") == "held by 0 of 90 heads"
    full.click()
    assert tokens[5].get_attribute("title") == "held by 90 of 90 heads"
    tokens[5].click()
    assert output.text == "“to” is held by 90 of 90 heads."
    browser.switch_to.active_element.send_keys("\ue014")  # right arrow
    assert output.text == "“wrap” is held by 90 of 90 heads."


def test_the_page_is_dark_where_that_is_wished(browser: Any, pages: dict[str, Path]) -> None:
    def colour(css: str, name: str) -> str:
        return browser.find_element("css selector", css).value_of_css_property(name)

    open_page(browser, pages["plain"], scheme="light")
    light = [colour("body", "background-color"), colour(".role-axis-label text", "fill")]
    open_page(browser, pages["plain"], scheme="dark")
    dark = [colour("body", "background-color"), colour(".role-axis-label text", "fill")]
    assert light[0] != dark[0] and light[1] != dark[1]
    assert colour("svg.marks", "background-color") == "rgba(0, 0, 0, 0)"


def test_what_a_screen_reader_needs_is_there(browser: Any, pages: dict[str, Path]) -> None:
    open_page(browser, pages["plain"])
    assert len(browser.find_elements("css selector", "h1")) == 1
    assert all(
        table.find_elements("css selector", "caption") for table in browser.find_elements("css selector", "table")
    )
    charts = browser.find_elements("css selector", "[data-chart] [role='graphics-document']")
    assert len(charts) == 5 and all(chart.get_attribute("aria-label") for chart in charts)
    said = browser.find_element("css selector", ".mark-symbol path:nth-child(2)").get_attribute("aria-label")
    assert said == "window:keep=0.25: perplexity 684.0 [660, 711], share of the full cache held 3.1%"
