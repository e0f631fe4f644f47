"""`foveate verify`: run the claims, keep what was found in one file each, and write the page of them all."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from foveate.claims import CLAIMS, Claim
from foveate.data.text import load_text
from foveate.errors import FoveateError
from foveate.methods import Function, Method, Part, techniques
from foveate.models.load import device_of, load, model_name
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.specs import nearest
from foveate.tasks.base import Bench
from foveate.version import __version__

STATUSES = {"holds": "holds here", "fails": "fails here", "needs device": "needs a device that is not there"}


@dataclass(frozen=True)
class Verdict:
    """One claim tried. Same fields as its file: `docs/claims/NAME.json`.

    `status` is "holds" (every check did), "fails" (one did not) or "needs device". `metrics` maps a name to
    `{value, low, high}`; `checks` maps what is claimed, in words, to whether it held.
    """

    method: str
    statement: str
    setting: str
    status: str
    model: str = ""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""


def selected(names: Iterable[str] = (), role: str | None = None) -> dict[str, type[Method] | type[Part] | Function]:
    """The methods with a claim that the names, or the role, ask for; all of them when nothing is asked for.

    Example:
        >>> list(selected(["h2o"]))
        ['h2o']
    """
    known = techniques()
    roles = {cls.role for cls in known.values()}
    if role is not None and role not in roles:
        raise FoveateError(f"there is no role called {role!r}: {nearest(role, roles)}")
    names = list(names)
    for name in names:
        if name not in known:
            raise FoveateError(f"there is no method called {name!r}: {nearest(name, known)}")
        if name not in CLAIMS:
            raise FoveateError(f"the method {name!r} makes no claim that could be tried.")
    return {n: c for n, c in known.items() if n in CLAIMS and (not names or n in names) and role in (None, c.role)}


def verify(
    names: Iterable[str] = (),
    *,
    role: str | None = None,
    model: str = "smollm2-135m",
    dtype: str = "auto",
    out: Path | str | None = None,
    progress: Callable[[str, float], None] = lambda name, done: None,
) -> list[Verdict]:
    """Run the claims of some methods, or all, on a model.

    Args:
        names: methods; none = every method that has a claim.
        role: only methods of this role.
        model: what `load` takes.
        dtype: as in `load`.
        out: a folder for `claims/NAME.json`, a file for each claim as soon as it is run, and `claims.md`, which tells
            of every claim in that folder; None = nothing is written.
        progress: called with a method's name and the fraction of its experiment that is done.

    Example:
        >>> verdict = verify(["full"])[0]                       # doctest: +SKIP
        >>> verdict.status                                      # doctest: +SKIP
        'holds'
    """
    chosen = selected(names, role)
    folder = None if out is None else Path(out) / "claims"
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FoveateError(f"{folder} can't be made: {error.strerror}. Give another --out.") from error
    trains = not any(CLAIMS[name].reads for name in chosen)  # then no model has to be there
    live, tokenizer = (tiny("llama").to(device_of("auto")), tiny_tokenizer()) if trains else load(model, dtype=dtype)  # type: ignore[arg-type]
    text = load_text("prose")
    verdicts = []
    for name in chosen:
        bench = Bench(live, tokenizer, text, lambda done, name=name: progress(name, done))  # type: ignore[misc]
        verdict = try_claim(CLAIMS[name](), bench, model_name(live))
        verdicts.append(verdict)
        if folder is not None:
            write(folder / f"{name}.json", json.dumps(vars(verdict), indent=1, ensure_ascii=False) + "\n")
            write(folder.parent / "claims.md", page(folder))
        progress(name, 1.0)
    return verdicts


def try_claim(claim: Claim, bench: Bench, model: str) -> Verdict:
    """Run one experiment, or say that it needs a device."""
    if claim.needs == "cuda" and bench.model.device.type != "cuda":
        return Verdict(claim.method, claim.statement, claim.setting, "needs device")
    start = time.perf_counter()
    finding = claim.run(bench)
    return Verdict(
        claim.method,
        claim.statement,
        claim.setting,
        "holds" if all(finding.checks.values()) else "fails",
        _on(claim, bench, model),
        {name: {k: round(v, 6) for k, v in metric.to_json().items()} for name, metric in finding.metrics.items()},
        {words: bool(held) for words, held in finding.checks.items()},
        round(time.perf_counter() - start, 1),
        {
            "foveate": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        datetime.now(UTC).date().isoformat(),
    )


def _on(claim: Claim, bench: Bench, model: str) -> str:
    """What the experiment was made on: model, numbers, device."""
    device = bench.model.device.type
    if claim.reads:
        return f"{model}, {str(bench.model.dtype).removeprefix('torch.')}, {device}"
    products = "bfloat16" if device == "cuda" else "float32"  # as training has it by default
    return f"models trained on the spot, {products} products, {device}"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def page(folder: Path) -> str:
    """Markdown that tells of every claim kept in a folder."""
    known = techniques()
    verdicts: list[dict[str, Any]] = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    lines = [
        "# Claims",
        "",
        "What each method is said to do, the smallest experiment that could refute it, and what it showed.",
        "Written by `foveate verify`; figures are with 95% bootstrap intervals.",
        "",
        "| method | role | on | verdict |",
        "|---|---|---|---|",
    ]
    for v in verdicts:
        role = known[v["method"]].role if v["method"] in known else ""
        lines.append(f"| [{v['method']}](#{v['method']}) | {role} | {v['model']} | {STATUSES[v['status']]} |")
    for v in verdicts:
        lines += ["", f"## {v['method']}", ""]
        paper = known[v["method"]].paper if v["method"] in known else None
        if paper is not None:
            lines += [f"[{paper.title}]({paper.url}), {paper.year}", ""]
        lines += [f"**Said:** {v['statement']}.", "", f"**Tried:** {v['setting']}.", ""]
        lines += [f"**Verdict: {STATUSES[v['status']]}.**", ""]
        lines += [f"- {'yes' if held else '**no**'}: {words}" for words, held in v["checks"].items()]
        if v["metrics"]:
            lines += ["", "| figure | value | interval |", "|---|---|---|"]
            lines += [
                f"| {name} | {m['value']:.4g} | {m['low']:.4g} to {m['high']:.4g} |" for name, m in v["metrics"].items()
            ]
        if v["date"]:
            versions = ", ".join(f"{name} {version}" for name, version in v["versions"].items())
            lines += ["", f"{v['model']}; {v['seconds']:.0f} seconds; {v['date']}; {versions}."]
    return "\n".join(lines) + "\n"
