"""The docs say what is there: commands parse, worked examples work, and nothing registered is missing from its page.

The `>>>` examples of the pages are doctests of their own (see pyproject.toml).
"""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

import foveate as fv
from foveate import claims
from foveate.backbone import CHANNELS, MIXERS, NORMS, STACKS
from foveate.cli import app
from foveate.compare import PROFILES
from foveate.compare.mixers import CONTESTS, asked_for
from foveate.methods import FUNCTIONS, METHODS, PARTS, Recipe, techniques
from foveate.models.tiny import TINY_FAMILIES
from foveate.probes.base import PROBES
from foveate.specs import split_specs
from foveate.tasks import TASKS
from foveate.train.tasks import TRAIN_TASKS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app).commands


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCED.findall(page.read_text(encoding="utf-8")) if language in languages]


def command_lines(page: Path) -> list[list[str]]:
    shell = "\n".join(blocks(page, "sh", "bash", "console")).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in shell.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("foveate ")]


@pytest.fixture
def examples(monkeypatch, tmp_path):
    """The Python files that CONTRIBUTING.md shows, by name, as modules; forgotten again after the test."""
    METHODS.all(), TASKS.all(), PROBES.all()
    for registry in (METHODS, TASKS, PROBES):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    before, modules = dict(claims.CLAIMS), {}
    for text in blocks(ROOT / "CONTRIBUTING.md", "python"):
        name = "shown_" + re.search(r"\w+", text)[0].lower() + str(len(modules))
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        modules[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, modules[name])
        spec.loader.exec_module(modules[name])
    yield list(modules.values())
    claims.CLAIMS.clear()
    claims.CLAIMS.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_parses(page, examples):
    for verb, *arguments in command_lines(page):
        assert verb in COMMANDS, f"{page.name}: there is no `foveate {verb}`"
        given = COMMANDS[verb].make_context(verb, arguments).params
        for spec in [spec for each in given.get("recipes") or () for spec in split_specs(each)]:
            assert spec.endswith(".yaml") or Recipe.of(spec)
        tasks = [spec for each in given.get("tasks") or () for spec in split_specs(each)]
        if given.get("mixers"):
            asked = asked_for(None, None, given["mixers"], tasks, given["train"], None)
            assert all(MIXERS.parse(each) for name in asked["mixers"] or () for each in name.split("+"))
        for spec in tasks:
            (TRAIN_TASKS if given.get("mixers") else TASKS).parse(spec)
        if verb == "train":
            TRAIN_TASKS.parse(given["task"])
            for registry, name in ((NORMS, "norm"), (CHANNELS, "channel"), (STACKS, "stack")):
                registry.parse(given[name])
            assert all(MIXERS.parse(each) for each in given["mixer"].split("+"))
        assert given.get("profile", "quick") in PROFILES
        assert {*(given.get("names") or ())} <= {*techniques()}
        for spec in [spec for each in given.get("probes") or () for spec in split_specs(each)]:
            PROBES.parse(spec)
        assert given.get("role") in (None, *(cls.role for cls in techniques().values()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_verbs_and_options_in_running_text_are_there(page):
    prose = FENCED.sub("", page.read_text(encoding="utf-8"))
    options = {option for each in COMMANDS.values() for parameter in each.params for option in parameter.opts}
    for code in re.findall(r"`([^`]+)`", prose):
        if verb := re.match(r"foveate ([a-z]+)", code):
            assert verb[1] in COMMANDS, code
        if code.startswith("--"):
            assert code.split()[0] in options, code


def test_pages_show_commands():
    assert sum(len(command_lines(page)) for page in PAGES) > 10  # or the pattern has gone blind


def test_contributing_shows_key_norm_as_it_is():
    shown = blocks(ROOT / "CONTRIBUTING.md", "python")
    for block, path in zip(shown, ("src/foveate/cache/key_norm.py", "tests/cache/test_key_norm.py"), strict=False):
        assert block == (ROOT / path).read_text(encoding="utf-8"), f"CONTRIBUTING.md shows another {path}"


def test_what_contributing_shows_works(examples):
    method, test, task, probe = examples
    assert doctest.testmod(method).attempted == 4
    test.test_the_smallest_keys_stay()
    bench = fv.Bench(fv.tiny("llama"), fv.tiny_tokenizer(), fv.load_text("prose"))
    right = task.NextToken(prompt=16, guesses=4).measure(bench, Recipe.of("key-norm:keep=0.5")).metrics["right"]
    assert 0 <= right.low <= right.value <= right.high <= 1
    model = fv.planted()
    focus = probe.Focus().measure(model, fv.Data.of(model, fv.tiny_tokenizer(), length=32, passages=1)).scores["focus"]
    assert float(-focus.scores[1, 0]) == pytest.approx(1, abs=1e-3)  # it rests on the first token
    assert float(-focus.scores[0, 0]) == pytest.approx(16.5, abs=1e-3)  # it looks at all of 1 to 32 tokens evenly


def test_the_claim_that_contributing_shows_is_tried(examples, monkeypatch):
    method = examples[0]
    monkeypatch.setattr(
        method, "Perplexity", lambda **given: fv.tasks.perplexity.Perplexity(tokens=96, skip=64, chunk=16)
    )
    bench = fv.Bench(fv.tiny("llama"), fv.tiny_tokenizer(), fv.load_text("prose"))
    finding = claims.CLAIMS["key-norm"]().run(bench)
    assert len(finding.checks) == 2 and len(finding.metrics) == 3


@pytest.mark.parametrize("role", ["cache", "convert", "depth", "prune", "steer"])
def test_every_technique_stands_on_its_roles_page(role):
    page = (ROOT / "docs" / f"{role}.md").read_text(encoding="utf-8")
    for name, cls in METHODS.all().items():
        if cls.role == role and cls.__module__.startswith("foveate."):
            assert f"\n`{name}`\n" in page, f"docs/{role}.md says nothing of {name}"
            assert cls.paper is None or f"]({cls.paper.url}), {cls.paper.year}" in page


def test_every_function_budget_and_coding_stands_on_its_page():
    for name, function in FUNCTIONS.items():
        page = (ROOT / "docs" / f"{function.role}.md").read_text(encoding="utf-8")
        assert f"\n`fv.{name}()`\n" in page, f"docs/{function.role}.md says nothing of {name}"
        assert f"]({function.paper.url}), {function.paper.year}" in page
    for name, cls in [item for registry in PARTS for item in registry.all().items()]:
        if cls.__module__.startswith("foveate."):
            page = (ROOT / "docs" / f"{cls.role}.md").read_text(encoding="utf-8")
            assert f"\n`{name}`\n" in page, f"docs/{cls.role}.md says nothing of {name}"
            assert cls.paper is None or f"]({cls.paper.url}), {cls.paper.year}" in page


def test_every_module_but_those_of_a_page_of_their_own_stands_in_the_design():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    told = {cls.__module__ for registry in (METHODS, TASKS, TRAIN_TASKS, *PARTS) for cls in registry.all().values()}
    source = ROOT / "src"
    for path in (source / "foveate").rglob("*.py"):
        if ".".join(path.relative_to(source).with_suffix("").parts) in told:
            continue
        if path.name not in ("__init__.py", "version.py", "errors.py"):
            assert re.search(rf"[`/]{path.name}`", page), f"docs/design.md says nothing of {path.name}"


def test_every_task_and_field_stands_on_the_tasks_page():
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    for name, cls in TASKS.all().items():
        section = re.search(rf"^## {name}$(.*?)(^## |\Z)", page, re.MULTILINE | re.DOTALL)
        assert section, f"docs/tasks.md has no section {name}"
        for field in dataclasses.fields(cls):
            default = "" if field.default is dataclasses.MISSING else str(field.default).lower()
            assert re.search(rf"^\| `{field.name}` \| *{default} *\|", section[1], re.MULTILINE), (name, field.name)


def test_every_training_task_and_field_stands_on_the_page_of_training():
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    for name, cls in TRAIN_TASKS.all().items():
        section = re.search(rf"^### {name}$(.*?)(^##|\Z)", page, re.MULTILINE | re.DOTALL)
        assert section, f"docs/train.md has no section {name}"
        for field in dataclasses.fields(cls):
            default = str(field.default).lower()
            assert re.search(rf"^\| `{field.name}` \| *{re.escape(default)} *\|", section[1], re.MULTILINE), (
                name,
                field.name,
            )
    assert all(f"| `{name}` |" in page for name in CONTESTS)


def test_every_profile_family_and_public_name_is_told_of():
    compare, models, reference = (
        (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("compare", "models", "reference")
    )
    assert all(f"| `{name}` |" in compare for name in PROFILES)
    assert all(f"| `{family}` |" in models for family in TINY_FAMILIES)
    for name in set(fv.__all__) - {"__version__"}:
        assert re.search(rf"^::: foveate\.(\w+\.)?{name}$", reference, re.MULTILINE), f"docs/reference.md lacks {name}"
