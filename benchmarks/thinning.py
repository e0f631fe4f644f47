"""What thinning costs and gives: perplexity on two kinds of text, and speed at several batch sizes.

Run: python benchmarks/thinning.py MODEL RECIPE --heal SPEC --out FOLDER [--packages FILE] [--batches 1,16]

`--packages FILE` first writes the sources of the installed packages into FILE, the work of thousands of hands, for
`--heal distill:data=FILE,...`; Python's own library and help, which tasks read, are not among them.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from pathlib import Path

from rich.console import Console

import foveate as fv
from foveate.thin import figures, figures_table, thin_to


def write_packages(path: Path, characters: int) -> None:
    """Sources of installed packages in a random order, but for tests and what is very short or long."""
    files = [p for p in Path(sysconfig.get_path("purelib")).rglob("*.py") if "test" not in p.as_posix()]
    random.Random(0).shuffle(files)
    texts: list[str] = []
    size = 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if 2_000 < len(text) < 60_000:
            texts.append(text)
            size += len(text)
        if size > characters:
            break
    path.write_text("\n\n".join(texts), encoding="utf-8")
    print(f"{len(texts)} files, {size:,} characters in {path}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("recipe")
    parser.add_argument("--heal", default="none")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--characters", type=int, default=120_000_000)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--windows", type=int, default=32)
    options = parser.parse_args()
    if options.packages and not options.packages.exists():
        write_packages(options.packages, options.characters)
    thin_to(options.model, options.recipe, options.out, heal=options.heal, device=options.device)
    model, tokenizer = fv.load(options.model, device=options.device)
    small, _ = fv.load(options.out, device=options.device)
    console = Console(width=110)
    for text, batch in [(text, int(b)) for text in ("prose", "code") for b in options.batches.split(",")]:
        console.print(f"{options.recipe}, judged on {text}, batch of {batch}")
        found = figures(small, model, tokenizer, text=text, windows=options.windows, batch=batch, repeats=7)
        console.print(figures_table(found))


if __name__ == "__main__":
    main()
