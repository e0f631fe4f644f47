"""A converted model beside the original: perplexity, time of a decoded token and bytes of the state, against length.

The converted model is the original under a recipe (-r), or a saved one (-c). Perplexity is of the evaluation text, read
in pieces onto the cache, between one length and the next. Decoding is timed in alternation with the original, on random
tokens, greedily, as plain forwards. Perplexity beyond the positions that a model was made for says little of it.

    python benchmarks/linear_decode.py                                  # smollm2-135m under liger
    python benchmarks/linear_decode.py -r lolcats -o lolcats.json
    python benchmarks/linear_decode.py FOLDER -c CONVERTED_FOLDER -l 1024 8192 32768 -b 16
    python benchmarks/linear_decode.py --smoke
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import foveate as fv
from foveate.data.text import load_text, tokens
from foveate.errors import FoveateError
from foveate.measure.clock import alternated, timed
from foveate.models.caches import cache_bytes
from foveate.models.tiny import tiny, tiny_tokenizer
from foveate.tasks.base import surprisal

START = time.perf_counter()
SIDES = ("original", "converted")


def say(words: str) -> None:
    print(f"[{time.perf_counter() - START:4.0f} s] {words}", flush=True)


def late(args: argparse.Namespace, what: str) -> bool:
    """Whether the time is up; says what is left out."""
    if up := time.perf_counter() - START > 60 * args.minutes:
        say(f"{what}: left out, the {args.minutes:g} minutes are over (-m gives more)")
    return up


def load(name: str, args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if args.smoke:
        return tiny("llama"), tiny_tokenizer()
    return fv.load(name, dtype=args.dtype, device=args.device, trust_remote_code=args.trust)


def free(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def perplexities(model: PreTrainedModel, ids: Tensor, lengths: list[int], piece: int) -> list[float]:
    """Perplexity of the tokens from each length to the next, of a text (1, n) read in pieces; of what was read."""
    cache, last, nll = DynamicCache(config=model.config), None, []
    for part in ids[:, : lengths[-1]].split(piece, 1):
        logits = model(part, past_key_values=cache, use_cache=True).logits
        before = logits[:, :-1] if last is None else torch.cat([last, logits[:, :-1]], 1)
        nll.append(surprisal(before, part[:, part.shape[1] - before.shape[1] :])[0].double().cpu())
        last = logits[:, -1:]
    losses = torch.cat(nll)
    starts = [0, *lengths[:-1]]
    return [math.exp(min(float(losses[a:b].mean()), 700)) for a, b in zip(starts, lengths, strict=True)]


class Decoding:
    """A model that has read `length` random tokens in each of `batch` rows, and decodes on."""

    def __init__(self, model: PreTrainedModel, length: int, args: argparse.Namespace):
        self.model, self.cache = model, DynamicCache(config=model.config)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size - 3, (args.batch, length), generator=generator).to(model.device)
        self.prefill, self.next = timed(lambda: self._read(ids, args.piece), model.device)
        self.bytes = cache_bytes(self.cache)

    def _read(self, ids: Tensor, piece: int) -> Tensor:
        for part in ids.split(piece, 1):
            logits = self.model(part, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits.argmax(-1)

    def step(self, steps: int) -> float:
        """Milliseconds a decoded token, all rows at once."""

        def work() -> None:
            for _ in range(steps):
                self.next = self._read(self.next, 1)

        return 1000 * timed(work, self.model.device)[0] / steps


def at_length(models: list[PreTrainedModel], length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Decode time, prefill time and bytes of both models after `length` tokens."""
    for model in models[:1]:
        free(model)
    sides = [Decoding(model, length, args) for model in models]
    times = alternated([lambda side=side: side.step(args.steps) for side in sides], args.rounds)  # type: ignore[misc]
    ratios = [original / converted for original, converted in zip(*times, strict=True)]
    row: dict[str, Any] = {"length": length, "speed-up": statistics.median(ratios), "speed-ups": ratios}
    for name, side, ms in zip(SIDES, sides, times, strict=True):
        row[name] = {"ms": statistics.median(ms), "all_ms": ms, "bytes": side.bytes, "prefill_s": side.prefill}
    return row


def table(rows: list[dict[str, Any]]) -> None:
    print(f"{'':>8} | {'perplexity':^21} | {'ms a token':^29} | {'state, MiB':^21} | {'prefill, s':^21}")
    names = f"{'original':>10} {'converted':>10}"
    print(f"{'tokens':>8} | {names} | {names} {'ratio':>7} | {names} | {names}")
    for row in rows:
        both = [row.get(name, {}) for name in SIDES]

        def cells(key: str, scale: float, digits: int, both: list[dict[str, Any]] = both) -> str:
            return " ".join(f"{side[key] * scale:10.{digits}f}" if key in side else f"{'-':>10}" for side in both)

        ratio = f"{row['speed-up']:7.2f}" if "speed-up" in row else f"{'-':>7}"
        print(
            f"{row['length']:8} | {cells('perplexity', 1, 2)} | {cells('ms', 1, 2)} {ratio} | "
            f"{cells('bytes', 2**-20, 2)} | {cells('prefill_s', 1, 2)}"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="the original: a name or a folder")
    parser.add_argument("-r", "--recipe", default="liger", help="what converts it (liger)")
    parser.add_argument("-c", "--converted", help="the folder of a converted model, in place of a recipe")
    parser.add_argument("-d", "--device", default="auto", help="cpu, cuda, cuda:1 ... (auto)")
    parser.add_argument("-t", "--dtype", default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "-l", "--lengths", type=int, nargs="+", help="tokens; GPU: 1024 4096 16384 32768, CPU: 256 1024"
    )
    parser.add_argument("-b", "--batch", type=int, help="rows decoded at once; GPU: 16, CPU: 1")
    parser.add_argument("-s", "--steps", type=int, help="tokens of a timing; GPU: 32, CPU: 4")
    parser.add_argument("-k", "--rounds", type=int, default=5, help="timings of each side (5)")
    parser.add_argument("-p", "--piece", type=int, help="tokens a forward when text is read; GPU: 2048, CPU: 256")
    parser.add_argument("-x", "--text", default="prose", help="what perplexity is of; prose, code, a file, hub:NAME")
    parser.add_argument("-m", "--minutes", type=float, default=4.5, help="what has not begun by then is left out (4.5)")
    parser.add_argument("-o", "--out", type=Path, help="a JSON file for the figures, written as they come")
    parser.add_argument("--trust", action="store_true", help="run the code that comes with a folder")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, on a CPU")
    args = parser.parse_args()
    gpu = not args.smoke and (args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available()))
    defaults: dict[str, tuple[Any, Any]] = {
        "lengths": ([1024, 4096, 16384, 32768], [32, 64] if args.smoke else [256, 1024]),
        "batch": (16, 1),
        "steps": (32, 4),
        "piece": (2048, 256),
    }
    for name, (on_gpu, on_cpu) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if gpu else on_cpu)
    args.lengths = sorted(set(args.lengths))
    return args


@torch.no_grad()
def main() -> None:
    args = arguments()
    with ExitStack() as stack:
        original, tokenizer = load(args.model, args)
        if args.converted:
            converted, what = load(args.converted, args)[0], args.converted
        else:
            converted, what = load(args.model, args)[0], args.recipe
            stack.enter_context(fv.apply(converted, args.recipe, tokenizer=tokenizer))
        models, rows = [original, converted], [{"length": length} for length in args.lengths]
        cuda = original.device.type == "cuda"
        found: dict[str, Any] = {
            "device": torch.cuda.get_device_name(original.device) if cuda else "CPU",
            "dtype": str(original.dtype),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": args.model,
            "converted": what,
            "batch": args.batch,
            "text": args.text,
            "positions": getattr(original.config, "max_position_embeddings", None),
            "rows": rows,
        }
        say(", ".join(f"{key} {value}" for key, value in found.items() if key != "rows"))

        def keep() -> None:
            if args.out is not None:
                args.out.write_text(json.dumps(found, indent=1) + "\n")

        for row in rows:
            if late(args, f"decoding after {row['length']} tokens"):
                break
            try:
                row.update(at_length(models, row["length"], args))
                say(f"decoding after {row['length']} tokens: original over converted {row['speed-up']:.2f}")
            except torch.OutOfMemoryError:
                free(original)
                say(f"decoding after {row['length']} tokens: out of memory (give a smaller -b)")
            keep()
        ids = tokens(load_text(args.text).evaluation, tokenizer)[:, : args.lengths[-1]].to(original.device)
        reached = [n for n in args.lengths if n <= ids.shape[1]]
        if len(reached) < len(args.lengths):
            say(f"the text has {ids.shape[1]} tokens: perplexity of longer ones is left out")
        for name, model in zip(SIDES, models, strict=True):
            if reached and not late(args, f"perplexity, {name}"):
                for row, value in zip(rows, perplexities(model, ids, reached, args.piece), strict=False):
                    row.setdefault(name, {})["perplexity"] = value  # type: ignore[attr-defined]
                keep()
        table(rows)


if __name__ == "__main__":
    try:
        main()
    except FoveateError as error:
        sys.exit(f"error: {error}")
