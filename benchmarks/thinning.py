"""What thinning costs and gives: perplexity on several kinds of text, and speed at several batch sizes.

Run: python benchmarks/thinning.py MODEL RECIPE --heal SPEC --out FOLDER [--packages FILE] [--batches 1,16]

A folder that is there already is measured, and not made again.

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
    parser.add_argument("--texts", default="prose,code", help="kinds of text, or paths; the first is timed")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--windows", type=int, default=32)
    options = parser.parse_args()
    if options.packages and not options.packages.exists():
        write_packages(options.packages, options.characters)
    if not options.out.exists():
        thin_to(options.model, options.recipe, options.out, heal=options.heal, device=options.device)
    model, tokenizer = fv.load(options.model, device=options.device)
    small, _ = fv.load(options.out, device=options.device)
    console = Console(width=110)

    def judge(text: str, windows: int, batch: int, repeats: int, parts: tuple[str, ...]) -> None:
        found = figures(small, model, tokenizer, text=text, windows=windows, batch=batch, repeats=repeats)
        console.print(f"{options.recipe}, {text}, batch of {batch}")
        console.print(figures_table({name: pair for name, pair in found.items() if any(p in name for p in parts)}))

    texts = options.texts.split(",")
    for text in texts:
        judge(text, options.windows, 1, 1, ("parameters", "perplexity"))
    for batch in options.batches.split(","):
        judge(texts[0], 1, int(batch), 7, ("speed-up",))


if __name__ == "__main__":
    main()
