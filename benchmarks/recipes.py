"""Recipes of the cache room side by side: bytes, pass keys found, and the perplexity of what follows on a prompt.

Each prompt of 1,030 tokens goes in as one forward, and the cache is then what the recipe leaves of it. The 256 tokens
after it are scored, in one forward or token by token (--stream). Pass keys are asked for only after the prompt. Bytes
are those that the cache holds after the prompt, bookkeeping included, over the full cache in 16 bits.

    python benchmarks/recipes.py full twentieth-cache tenth-cache fifth-cache
    python benchmarks/recipes.py --text code --stream --passages 4 full twentieth-cache
"""

from __future__ import annotations

import argparse
import time

import torch

import foveate as fv
from foveate.data.text import load_text
from foveate.measure.bootstrap import perplexity, perplexity_ratio
from foveate.methods import Recipe
from foveate.models.caches import cache_bytes, full_cache_bytes
from foveate.tasks.base import Bench, passages, read, surprisal
from foveate.tasks.passkey import Passkey

PROMPT, FOLLOW = 1030, 256


def continued(bench: Bench, recipe: str, count: int, stream: bool) -> tuple[list[float], float]:
    """Summed nats of what follows on each passage, and the mean bytes of the cache after the prompt."""
    nll, held = [], 0
    with fv.apply(bench.model, recipe, tokenizer=bench.tokenizer):
        for ids in passages(bench, count, PROMPT + FOLLOW):
            last, cache = read(bench.model, ids[:, :PROMPT], last=1)
            held += cache_bytes(cache)
            pieces = ids[:, PROMPT:].split(1 if stream else FOLLOW, dim=1)
            logits = torch.cat([last] + [read(bench.model, piece, cache)[0] for piece in pieces], dim=1)[:, :-1]
            nll.append(float(surprisal(logits, ids[:, PROMPT:]).double().sum()))
    return nll, held / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="prose")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--passkeys", type=int, default=20)
    parser.add_argument("--stream", action="store_true", help="score token by token")
    chosen = parser.parse_args()
    model, tokenizer = fv.load(chosen.model)
    bench = Bench(model, tokenizer, load_text(chosen.text))
    full, _ = continued(bench, "full", chosen.passages, chosen.stream)
    counts = [FOLLOW] * chosen.passages
    whole = full_cache_bytes(model, PROMPT) * 2 / model.dtype.itemsize
    there = f"{chosen.model} in {model.dtype} on {model.device}, {chosen.text}"
    print(f"{there}: perplexity {perplexity(full, counts).value:.2f} with the full cache")
    print(f"{'recipe':60} {'bytes':>6}  {'perplexity over full':24} {'pass keys':>9}")
    for recipe in chosen.recipes:
        begin = time.monotonic()
        nll, held = continued(bench, recipe, chosen.passages, chosen.stream)
        over = perplexity_ratio(nll, full, counts)
        keys = ""
        if chosen.passkeys:
            found = Passkey(cases=chosen.passkeys, tokens=PROMPT).measure(bench, Recipe.of(recipe)).metrics["passkey"]
            keys = f"{round(found.value * chosen.passkeys)}/{chosen.passkeys}"
        ratio = f"{over.value:.4f} [{over.low:.4f}, {over.high:.4f}]"
        print(f"{recipe:60} {held / whole:6.2%}  {ratio:24} {keys:>9}  {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
