"""The page of a reading, read as text and opened in a real browser."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate as fv
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import UnitScores
from foveate.probes.base import Grid, Lines, Marked, Reading, Role, Rows
from foveate.read import Readings, read
from foveate.read.advice import advice
from foveate.read.report import write_anatomy

HOSTILE = """</script><script>document.title='owned'</script><img src=x onerror="document.title='owned'">&"'"""


def made_up(hostile: str = "") -> Readings:
    """A reading of a planted model, with every sort of panel, and `hostile` all over."""
    passage = "the cat. the cat" + hostile
    made = read(
        fv.planted(), ["induction"], tokenizer=fv.tiny_tokenizer(), length=64, passages=1, show=False, passage=passage
    )
    more = Reading(
        "layers",
        "How much does each layer change?" + hostile,
        "It says something." + hostile,
        {"a figure" + hostile: Metric(0.5, 0.4, 0.6)},
        {
            "attention": UnitScores("attention", torch.tensor([[0.2], [0.1], [0.3]])),
            "mlp": UnitScores("mlp", torch.tensor([[0.2], [float("nan")], [0.3]])),
        },
        [Role("head", 2, 1, "odd" + hostile, 0.5, "It does odd things." + hostile)],
        [
            Lines(
                "Lines" + hostile,
                "layer",
                "share" + hostile,
                {"one" + hostile: [(0, 0.1), (1, 0.2)], "two": [(0, 0.3)]},
            ),
            Grid("Grid" + hostile, "layer", "layer", [[1.0, None], [0.2, 1.0]]),
            Rows("Rows" + hostile, ["a" + hostile, "b"], [["x" + hostile, 0.123456]]),
            Marked("Marked" + hostile, ["to", "ken" + hostile], [0.1, 1.0]),
        ],
        {"least" + hostile: "0.3" + hostile},
    )
    rest = Reading("unheard-of", "Another", "Something.")
    return dataclasses.replace(
        made,
        model="tiny" + hostile,
        asked="tiny" + hostile,
        readings={**made.readings, "layers": more, "unheard-of": rest},
        skipped={"other": "it can't be" + hostile},
        folder=Path("runs/my reading"),
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for kind, hostile in (("plain", ""), ("hostile", HOSTILE)):
        found[kind] = write_anatomy(made_up(hostile), folder / f"{kind}.html")
    return found


def test_the_page_says_what_was_found(pages: dict[str, Path]) -> None:
    text = pages["plain"].read_text()
    for words in ("tiny", "a figure", "0.4 to 0.6", "In-context Learning and Induction Heads", "0.123", "could go"):
        assert words in text, words
    assert "http" not in re.sub(
        r"https://arxiv.org|http://www.w3.org|http-equiv", "", text
    )  # nothing is fetched from elsewhere
    assert text.count('role="gridcell"') == 12
    assert "layer 1, head 3: induction" in text and "layer 0, head 0: no clear part" in text


def test_texts_are_escaped(pages: dict[str, Path]) -> None:
    text = pages["hostile"].read_text()
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "<img" not in text


def test_commands_are_quoted_and_parse() -> None:
    import shlex

    import typer

    from foveate.cli import app
    from foveate.methods import Recipe
    from foveate.specs import split_specs

    found = advice(made_up())
    assert {each.goes for each in found} == {True}  # no retrieval heads, no sinks were measured
    for each in found:
        words = shlex.split(each.command)
        verb = typer.main.get_command(app).commands[words[1]]
        given = verb.make_context(words[1], words[2:]).params
        recipes = given.get("recipes") or [given.get("recipe")]
        for recipe in [spec for each in recipes for spec in split_specs(each)]:
            Recipe.of(recipe)
    assert "in layers 1." in found[0].words


def test_what_must_stay_is_told_where_it_was_measured() -> None:
    made = made_up()
    heads = Reading("retrieval-heads", "", ".", scores={"retrieval": UnitScores("head", torch.rand(3, 4))})
    sinks = Reading("sinks", "", ".", roles=[Role("head", 1, 0, "sink", 1.0, "It rests.")])
    found = advice(dataclasses.replace(made, readings={"retrieval-heads": heads, "sinks": sinks}))
    assert [each.goes for each in found] == [False, False]
    assert "budget=measured(file=runs/my reading,of=retrieval-heads.retrieval)" in found[0].command


def test_nothing_measured_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="no probe was measured"):
        write_anatomy(dataclasses.replace(made_up(), readings={}), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


# ---- the page in a browser -------------------------------------------------------------------------------


def open_page(browser: Any, page: Path, width: int = 1200, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get_log("browser")
    browser.get(page.as_uri())


def find(browser: Any, css: str) -> Any:
    return browser.find_element("css selector", css)


@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_it_opens_without_errors_and_runs_no_text(browser: Any, pages: dict[str, Path], kind: str) -> None:
    open_page(browser, pages[kind])
    assert browser.get_log("browser") == []
    assert browser.title != "owned" and find(browser, "#head h3").text.startswith("Head ")


@pytest.mark.parametrize("kind", ["plain", "hostile"])
@pytest.mark.parametrize("width", [375, 768, 1400])
def test_nothing_sticks_out(browser: Any, pages: dict[str, Path], kind: str, width: int) -> None:
    open_page(browser, pages[kind], width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_head_tells_what_it_does_and_where_it_looks(browser: Any, pages: dict[str, Path]) -> None:
    open_page(browser, pages["plain"])
    cell = find(browser, "[data-head='1.3']")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    cell.click()
    assert find(browser, "#head h3").text == "Head 1.3"
    assert "goes to what came after it then" in find(browser, "#head .does").text
    assert "no. 1 of 12" in find(browser, "#head .figures").text
    tokens = browser.find_elements("css selector", "#head .text span")
    assert [token.text for token in tokens[:3]] == ["t", "h", "e"]
    browser.execute_script("arguments[0].click()", tokens[10])  # the second "h"
    said = find(browser, "#head output").text
    assert "looks at “e” at 2" in said


def test_the_map_is_for_the_keyboard_too(browser: Any, pages: dict[str, Path]) -> None:
    open_page(browser, pages["plain"])
    stops = browser.execute_script(
        "return [...document.querySelectorAll('.map button')].filter(b => b.tabIndex === 0).length"
    )
    assert stops == 1
    browser.execute_script(
        "document.querySelector('[data-head=\"0.0\"]').click(); document.querySelector('[data-head=\"0.0\"]').focus()"
    )
    browser.switch_to.active_element.send_keys("\ue015\ue014")  # down, right
    assert browser.switch_to.active_element.get_attribute("data-head") == "1.1"
    assert find(browser, "#head h3").text == "Head 1.1"
    assert "No probe found a clear part" in find(browser, "#head").text
    assert find(browser, "[data-head='1.1']").get_attribute("aria-selected") == "true"


def test_a_role_lights_its_heads(browser: Any, pages: dict[str, Path]) -> None:
    open_page(browser, pages["plain"])
    pill = find(browser, "[data-role='induction']")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", pill)
    pill.click()
    lit = browser.find_elements("css selector", ".map .lit")
    assert [cell.get_attribute("data-head") for cell in lit] == ["1.3"]
    pill.click()
    assert pill.get_attribute("aria-pressed") == "false" and not browser.find_elements("css selector", ".map .lit")


def test_the_map_can_show_any_score(browser: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver.support.ui import Select

    open_page(browser, pages["plain"])
    Select(find(browser, "#by")).select_by_visible_text("induction: previous")
    share = "return document.querySelector('[data-head=\"0.1\"]').style.getPropertyValue('--share')"
    assert float(browser.execute_script(share)) == 1
    assert find(browser, ".scale").is_displayed()


def test_it_is_dark_where_that_is_wished(browser: Any, pages: dict[str, Path]) -> None:
    colours = []
    for scheme in ("light", "dark"):
        open_page(browser, pages["plain"], scheme=scheme)
        colours.append(
            [
                find(browser, css).value_of_css_property(name)
                for css, name in (
                    ("body", "background-color"),
                    ("#head", "background-color"),
                    (".panel svg text", "fill"),
                )
            ]
        )
    assert all(a != b for a, b in zip(*colours, strict=True))


def test_what_a_screen_reader_needs_is_there(browser: Any, pages: dict[str, Path]) -> None:
    open_page(browser, pages["plain"])
    assert len(browser.find_elements("css selector", "h1")) == 1
    assert all(
        e.get_attribute("aria-label") for e in browser.find_elements("css selector", "[role=img], [role=gridcell]")
    )
    levels = [int(e.tag_name[1]) for e in browser.find_elements("css selector", "h1, h2, h3, h4")]
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
