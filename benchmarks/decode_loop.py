"""How fast the decode loop is on a Llama of 8B parameters at a context of 32k tokens.

    PYTHONPATH=src python benchmarks/decode_loop.py           # a CUDA card; ends within five minutes
    PYTHONPATH=src python benchmarks/decode_loop.py --smoke   # a CPU, tiny sizes: times mean nothing

(a) The full cache in the loop: tokens a second by batch size, up to what memory allows.
(b) Budgets, at as many bytes of cache as the largest batch of (a) has: so many more sequences fit.
(c) transformers' generate with its static cache and its own compiled decoding, at one batch size, beside (a).

The weights are random, and the caches are filled with random entries: what is timed doesn't depend on them. (b) is
timed in rounds in which (a) and all budgets take turns, each time on a cache made anew, since no two fit into memory;
(a) and (c) take turns on caches that lie side by side. A ratio is the median over rounds, in brackets the least and the
most. A step of (c) is the difference between two calls of generate that differ in the number of tokens only; its static
cache has the context's length, all of which its attention reads and masks, but only a short prompt is read into it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from foveate.cache.base import CachePolicy
from foveate.cache.entries import Limits, PolicyLayer
from foveate.cache.loop import DecodeLoop
from foveate.cache.packed import Entries
from foveate.cache.policy_cache import PolicyCache
from foveate.errors import FoveateError
from foveate.measure.clock import alternated, timed
from foveate.methods import Recipe, Target
from foveate.models.caches import cache_bytes

BUDGETS = ("h2o:keep=0.2", "window:keep=0.2", "h2o:keep=0.2,budget=pyramid", "streaming:keep=0.2")
FULL = "window:keep=1"  # nothing is evicted or watched: in the loop, the same steps as on the model's own cache
START = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", flush=True)


# ---- the model, and caches full of random entries -------------------------------------------------------------------


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Random weights, made on the device."""
    size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 96}
    if not args.smoke:
        size = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
    config = LlamaConfig(
        **size,
        num_key_value_heads=2 if args.smoke else 8,
        vocab_size=300 if args.smoke else 128256,
        max_position_embeddings=131072,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,  # (c) must not stop early
    )
    with torch.device(args.device):
        model = LlamaForCausalLM._from_config(config, dtype=args.dtype)
    return model.eval().requires_grad_(False).to(args.device)


class RandomLayer(PolicyLayer):
    """A layer as after a prompt of `context` tokens, made when it is asked for: never two at a time."""

    def fill(self, model: LlamaForCausalLM, batch: int, context: int, limits: Limits) -> None:
        self.model, self.batch, self.context, self.limits = model, batch, context, limits
        self.dtype, self.device, self.is_initialized = model.dtype, model.device, True

    @property
    def padded(self) -> Entries:
        config = self.model.config
        limit = self.limits.of[self.index].clamp(max=self.context)
        most = min(self.limits.most[self.index], self.context)
        shape = (self.batch, config.num_key_value_heads, most)
        order = torch.arange(most, device=self.device)
        rank = order - (most - limit)  # empty slots first
        positions = torch.where(rank < self.policy.sinks, rank, self.context - limit + rank).int()
        dim = config.hidden_size // config.num_attention_heads
        return Entries(
            torch.empty(*shape, dim, dtype=self.dtype, device=self.device).normal_(),
            torch.empty(*shape, dim, dtype=self.dtype, device=self.device).normal_(),
            positions.masked_fill(rank < 0, -1).expand(shape),
            None if self.policy.watches() is None else torch.rand(shape, device=self.device),
        )


def make_loop(model: LlamaForCausalLM, text: str, batch: int, args: argparse.Namespace, room: int) -> DecodeLoop:
    """A loop as after a prompt of the context's length, under a policy."""
    policy = Recipe.of(text).methods[0]
    assert isinstance(policy, CachePolicy)
    weights = policy.weights(Target(model, None, lambda: torch.zeros(1, 1), None))
    cache = PolicyCache(policy, model.config.num_hidden_layers, None, weights, None, False)
    cache.counts = cache.prompt = torch.full((batch,), args.context)
    cache.seen = args.context
    cache.limits = limits = cache._limits(model.device)
    cache.layers = [RandomLayer(i, policy, None) for i in range(len(cache.layers))]
    for layer in cache.layers:
        layer.fill(model, batch, args.context, limits)
    bounded = policy.capacity(args.context, None) is not None
    loop = DecodeLoop(model, cache, room=None if bounded else room, compile=args.compile)
    if args.device == "cuda" and loop.plain_because is not None:
        raise FoveateError(f"the kernel does not run here, and this benchmark is about it. {loop.plain_because}")
    return loop


# ---- timing ---------------------------------------------------------------------------------------------------------


def speed(loop: DecodeLoop, steps: int, warm: int) -> float:
    """Tokens a second, all sequences together."""
    batch, device = len(loop.ids), loop.ids.device
    ids = torch.ones(batch, 1, dtype=torch.int64, device=device)
    loop.generate(ids, warm)
    seconds, _ = timed(lambda: loop.generate(ids, steps), device)
    return batch * steps / seconds


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def once(model: LlamaForCausalLM, text: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Make a loop, time it, and let go of it."""
    free()
    loop = make_loop(model, text, batch, args, room=args.warm + args.steps)
    size = cache_bytes(loop.cache)
    rate = speed(loop, args.steps, args.warm)
    return {"recipe": text, "batch": batch, "cache_bytes": size, "tokens_per_second": rate}


def ratio(over: list[float], under: list[float]) -> str:
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def late(args: argparse.Namespace, what: str, needs: float) -> bool:
    """Whether the time left is too short; says so."""
    left = args.minutes * 60 - (time.perf_counter() - START)
    if left < needs:
        say(f"{what}: left out, {left:.0f} s are left and it needs about {needs:.0f}")
    return left < needs


# ---- the three parts ------------------------------------------------------------------------------------------------


def per_sequence(model: LlamaForCausalLM, text: str, args: argparse.Namespace) -> int:
    """Bytes of cache that one more sequence takes."""
    sizes = [cache_bytes(make_loop(model, text, n, args, args.warm + args.steps).cache) for n in (1, 2)]
    free()
    return sizes[1] - sizes[0]


def sweep(model: LlamaForCausalLM, args: argparse.Namespace) -> list[dict[str, Any]]:
    """(a): the full cache, by batch size."""
    free()
    if args.device == "cuda":
        room = torch.cuda.mem_get_info()[0] - args.reserve * 2**30
        largest = int(room / per_sequence(model, FULL, args))
    else:
        largest = 4
    if largest < 1:
        raise FoveateError(f"not even one sequence of {args.context} tokens fits: give a shorter --context.")
    batches = sorted({n for n in (1, args.static_batch, largest // 2, largest) if 1 <= n <= largest})
    found = []
    for batch in batches:
        try:
            found.append(once(model, FULL, batch, args))
        except torch.OutOfMemoryError:
            say(f"(a) batch {batch}: out of memory (give a larger --reserve)")
            continue
        rate = found[-1]["tokens_per_second"]
        say(
            f"(a) full, batch {batch}: {rate:.0f} tokens/s, {1000 * batch / rate:.2f} ms a step, "
            f"{found[-1]['cache_bytes'] / 2**30:.1f} GiB of cache"
        )
    if not found:
        raise FoveateError("no batch of the full cache fits into memory: give a larger --reserve.")
    return found


def budgets(model: LlamaForCausalLM, best: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """(b): at the same bytes of cache as the full cache's best batch."""
    batches = {text: int(best["cache_bytes"] / per_sequence(model, text, args)) for text in args.budgets}
    batches = {text: batch for text, batch in batches.items() if batch}
    sides = [(FULL, best["batch"]), *batches.items()]
    rounds: dict[str, list[dict[str, Any]]] = {text: [] for text, _ in sides}
    for turn in range(args.rounds):
        begin = time.perf_counter()
        for text, batch in sides if turn % 2 == 0 else reversed(sides):
            if text not in rounds:
                continue
            try:
                rounds[text].append(once(model, text, batch, args))
            except torch.OutOfMemoryError:
                say(f"(b) {text}, batch {batch}: out of memory beside its cache (give a larger --reserve)")
                del rounds[text]
        say(f"(b) round {turn + 1} of {args.rounds} done")
        if late(args, "(b) further rounds", 1.1 * (time.perf_counter() - begin) + args.keep_for_c):
            break
    full = [row["tokens_per_second"] for row in rounds.pop(FULL, [])]
    found = []
    for text, rows in rounds.items():
        rates = [row["tokens_per_second"] for row in rows]
        row = {**rows[0], "tokens_per_second": rates, "full": full}
        row["ratio"] = ratio(rates, full) if len(rates) == len(full) else "-"
        found.append(row)
        print(
            f"(b) {text}, batch {row['batch']}: {statistics.median(rates):.0f} tokens/s, "
            f"{row['cache_bytes'] / 2**30:.1f} GiB of cache; over (a) at batch {best['batch']}: {row['ratio']}"
        )
    return found


def static(model: LlamaForCausalLM, args: argparse.Namespace, fits: int) -> dict[str, Any] | None:
    """(c): transformers' generate with its static cache, beside (a), at one batch size."""
    batch = min(args.static_batch, fits)
    free()
    steps, few, prompt = args.steps, 8, 8
    room = (args.rounds + 2) * (args.warm + steps)
    loop = make_loop(model, FULL, batch, args, room=room)
    cache = StaticCache(config=model.config, max_cache_len=args.context)
    ids = torch.ones(batch, prompt, dtype=torch.int64, device=model.device)

    def generate(tokens: int) -> Tensor:
        cache.reset()
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )

    def ours() -> float:
        return speed(loop, steps, args.warm)

    def theirs() -> float:
        short, _ = timed(lambda: generate(few), model.device)
        long, _ = timed(lambda: generate(few + steps), model.device)
        return batch * steps / (long - short)

    try:
        begin = time.perf_counter()
        for _ in range(2):  # compiled, and recorded
            generate(few)
        say(f"(c) warm after {time.perf_counter() - begin:.0f} s")
        compiled = hasattr(model, "_compiled_call")
        if args.device == "cuda" and not compiled:
            say("(c) generate did NOT compile its decoding here: the comparison is with its plain forwards")
        a, c = alternated([ours, theirs], args.rounds)
    except torch.OutOfMemoryError:
        say(f"(c) batch {batch}: out of memory; give a smaller --static-batch")
        return None
    found = {"batch": batch, "loop": a, "static": c, "compiled": compiled, "ratio": ratio(a, c)}
    print(
        f"(c) batch {batch}: static cache {statistics.median(c):.0f} tokens/s"
        f"{' (compiled)' if compiled else ''}, the loop {statistics.median(a):.0f}; loop over static: {found['ratio']}"
    )
    return found


# ---- the whole ------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--context", type=int, help="tokens of the prompt (32768)")
    parser.add_argument("--steps", type=int, help="tokens timed (64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--static-batch", type=int, default=8, help="batch size of (c): two caches must fit (8)")
    parser.add_argument("--reserve", type=float, default=10.0, help="GiB left free beside the largest cache (10)")
    parser.add_argument("--minutes", type=float, default=4.8, help="further rounds are left out after (4.8)")
    parser.add_argument("--only", default="abc", help="parts to run, such as ab")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("budgets", nargs="*", default=BUDGETS, help=f"recipes of (b): {', '.join(BUDGETS)}")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        raise FoveateError("there is no CUDA device: run with --smoke to try the benchmark on a CPU.")
    args.device, args.dtype = ("cpu", torch.float32) if args.smoke else ("cuda", torch.bfloat16)
    args.compile = args.compile and not args.smoke
    args.context = args.context or (64 if args.smoke else 32768)
    args.steps = args.steps or (8 if args.smoke else 64)
    args.warm = 2 if args.smoke else 8  # more than the loop's eager steps
    args.keep_for_c = 90.0 if "c" in args.only and not args.smoke else 0.0
    return args


@torch.no_grad()
def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    head = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "memory_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 1) if args.device == "cuda" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": version("triton"),
        "context": args.context,
        "steps": args.steps,
        "compile": args.compile,
    }
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    model = make_model(args)
    say(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}B parameters in {args.dtype}")
    found: dict[str, Any] = {"head": head, "argv": sys.argv[1:]}
    parts: dict[str, Callable[[], Any]] = {
        "a": lambda: sweep(model, args),
        "b": lambda: budgets(model, max(found["a"], key=lambda row: row["tokens_per_second"]), args),
        "c": lambda: static(model, args, fits=max(row["batch"] for row in found["a"])),
    }
    for name in "abc":
        if (name in args.only or name == "a") and not (name == "c" and late(args, "(c)", args.keep_for_c / 2)):
            found[name] = parts[name]()
            if args.out is not None:  # what there is, should a later part fail
                args.out.write_text(json.dumps(found, indent=1))
    if args.device == "cuda":
        say(f"most memory allocated: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def version(package: str) -> str:
    try:
        return str(__import__(package).__version__)
    except ImportError:
        return "not installed"


if __name__ == "__main__":
    try:
        main()
    except FoveateError as error:
        sys.exit(f"error: {error}")
