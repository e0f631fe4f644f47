"""Token mixers on this machine: growth with the length, layers against kernels, training speed, decoding.

    growth      forward and backward of a layer: time and peak memory against the length, with the fitted exponents
    layer       the same of a linear layer against its kernel (the recurrence on the same numbers) and bare products
    throughput  training tokens a second of the softmax backbone against transformers' Llama of the same shape
    decode      time of a token and bytes of the state, after texts of several lengths

Timings that are compared are taken in alternation, in one process, after a warm-up; intervals are 95% bootstrap ones.
Layers run in bfloat16 by autocast, from float32 weights, as training does; decoding runs with bfloat16 weights.

    python benchmarks/mixers.py growth --mixers softmax linear lightning --json growth.json
    python benchmarks/mixers.py layer --compile
    python benchmarks/mixers.py throughput --batch 8 16 32
    python benchmarks/mixers.py growth layer decode --plain          # without flash-linear-attention's kernels
    python benchmarks/mixers.py growth layer throughput decode --smoke
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import MIXERS, BackboneConfig, BackboneForCausalLM, Shape, TokenMixer, fast, state_bytes
from foveate.backbone.recurrence import recurrence
from foveate.errors import FoveateError
from foveate.measure.bootstrap import median
from foveate.measure.clock import alternated, peak_bytes, timed

START = time.perf_counter()


def say(words: str) -> None:
    print(f"[{time.perf_counter() - START:4.0f} s] {words}", flush=True)


def built(text: str, args: argparse.Namespace) -> TokenMixer:
    torch.manual_seed(0)
    return MIXERS.parse(text).build(Shape(args.width, args.heads, 0, 1)).to(args.device)


def rounded(args: argparse.Namespace) -> Any:
    return torch.autocast(args.device.type, torch.bfloat16)


def there_and_back(layer: Callable[..., Any], x: Tensor, weights: list[Tensor], args: argparse.Namespace) -> None:
    with rounded(args):
        y, _ = layer(x)
    torch.autograd.grad(y.sum(), [x, *weights], allow_unused=True)


def late(args: argparse.Namespace, what: str) -> bool:
    """Whether the time is up; says what is left out."""
    if up := time.perf_counter() - START > 60 * args.minutes:
        say(f"{what}: left out, the {args.minutes:g} minutes are over (--minutes gives more)")
    return up


def free(args: argparse.Namespace) -> None:
    if args.device.type == "cuda":
        torch.cuda.empty_cache()


# ---- growth -------------------------------------------------------------------------------------------------------


def growth(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each mixer, seconds and peak bytes at each length, and exponents over the upper half of the lengths."""
    for text in args.mixers:
        if late(args, f"growth: {text}"):
            continue
        row: dict[str, Any] = {"mixer": text, "lengths": [], "seconds": [], "bytes": [], "stopped": ""}
        try:
            layer = built(text, args)
            weights = [p for p in layer.parameters() if p.requires_grad]
            run = torch.compile(layer, dynamic=False) if args.compile else layer
            for n in args.lengths:
                x = torch.randn(1, n, args.width, device=args.device, requires_grad=True)

                def work(x: Tensor = x, run: Any = run, weights: list[Tensor] = weights) -> None:
                    there_and_back(run, x, weights, args)

                work()  # compilation, and kernels' choice
                peak, (took, _) = peak_bytes(lambda work=work: timed(work, args.device), args.device)  # type: ignore[misc]
                repeats = args.repeats if took < 0.5 else 2
                seconds = [timed(work, args.device)[0] for _ in range(repeats)]
                row["lengths"].append(n)
                row["seconds"].append(seconds)
                row["bytes"].append(peak)
                say(f"growth: {text}, {n} tokens: {1000 * statistics.median(seconds):.2f} ms, {peak / 2**20:.0f} MiB")
                if took > args.patience:
                    row["stopped"] = f"over {args.patience:g} s"
                    break
        except torch.OutOfMemoryError:
            row["stopped"] = "out of memory"
        except Exception as error:  # one mixer's, which is told, and not the end of the run
            row["stopped"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if row["stopped"]:
            say(f"growth: {text} stopped after {len(row['lengths'])} lengths: {row['stopped']}")
        row |= exponents(row)
        layer = run = weights = x = work = None  # type: ignore[assignment]
        free(args)
        yield row


def exponents(row: dict[str, Any]) -> dict[str, Any]:
    """Slopes of log time (with an interval over the repeats) and log memory over log length."""
    upper = slice(len(row["lengths"]) // 2 if len(row["lengths"]) > 4 else 0, None)
    x = [math.log(n) for n in row["lengths"][upper]]
    if len(x) < 2:
        return {}

    def slope(values: Any) -> float:
        return statistics.linear_regression(x, [math.log(max(v, 1e-12)) for v in values]).slope

    by_repeat = [slope(each) for each in zip(*row["seconds"][upper], strict=False)]  # slow ones have fewer
    return {"time_exponent": median(by_repeat).to_json(), "memory_exponent": slope(row["bytes"][upper])}


def growth_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(f"\n{'mixer':28} {'time ~ n^':>18} {'memory ~ n^':>12}   ms at each length")
    for row in rows:
        e = row.get("time_exponent")
        exponent = "-" if e is None else f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]"
        memory = f"{row['memory_exponent']:.2f}" if e else "-"
        times = "  ".join(
            f"{n}: {1000 * statistics.median(s):.2f}" for n, s in zip(row["lengths"], row["seconds"], strict=True)
        )
        print(f"{row['mixer'][:28]:28} {exponent:>18} {memory:>12}   {times}  {row['stopped']}")


# ---- a layer against its kernel -----------------------------------------------------------------------------------


def layers(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each mixer that is the recurrence and maps around it: seconds of both, and their ratio."""
    for text in args.mixers:
        for n in args.layer_lengths:
            if late(args, f"layer: {text}, {n}"):
                break
            try:
                layer = built(text, args)
                batch = max(1, args.layer_tokens // n)
                x = torch.randn(batch, n, args.width, device=args.device, requires_grad=True)
                calls, products = parts(layer, x, args)
                if not calls:
                    break  # no linear mixer
                weights = [p for p in layer.parameters() if p.requires_grad]
                run: Any = torch.compile(layer, dynamic=False) if args.compile else layer
                sides = [
                    lambda run=run, x=x, weights=weights: there_and_back(run, x, weights, args),
                    lambda calls=calls: kernels(calls, args),
                    lambda products=products: bare(products, args),
                ]
                for side in sides:
                    side()
                got = alternated([lambda side=side: timed(side, args.device)[0] for side in sides], args.rounds)
                ratio = median([a / (b + c) for a, b, c in zip(*got, strict=True)])
                row = {"mixer": text, "length": n, "batch": batch, "ratio": ratio.to_json()}
                row |= dict(
                    zip(("layer", "kernel", "products"), (statistics.median(each) for each in got), strict=True)
                )
                say(f"layer: {text}, {batch} x {n}: {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
                yield row
            except Exception as error:  # one mixer's
                say(f"layer: {text}, {n}: {type(error).__name__}: {str(error).splitlines()[:1]}")
            layer = calls = products = run = x = None  # type: ignore[assignment]
            free(args)


def parts(layer: TokenMixer, x: Tensor, args: argparse.Namespace) -> tuple[list[Any], list[tuple[Tensor, Tensor]]]:
    """What a layer gives to the recurrence, and to linear maps (input and weight), in one forward."""
    calls: list[Any] = []
    products: list[tuple[Tensor, Tensor]] = []

    def recorded(*given: Any, **named: Any) -> Any:
        kept = [each.detach().requires_grad_() if isinstance(each, Tensor) else each for each in given]
        calls.append((kept, {k: v.detach() if isinstance(v, Tensor) else v for k, v in named.items()}))
        return recurrence(*given, **named)

    def seen(module: nn.Linear, given: Any, got: Any) -> None:
        products.append((given[0].detach().requires_grad_(), module.weight))

    modules = [m for name, m in list(sys.modules.items()) if name.startswith("foveate.mixers.")]
    users = [(m, name) for m in modules for name, value in list(vars(m).items()) if value is recurrence]
    hooks = [m.register_forward_hook(seen) for m in layer.modules() if isinstance(m, nn.Linear)]
    try:
        for module, name in users:
            setattr(module, name, recorded)
        with rounded(args), torch.no_grad():
            layer(x)
    finally:
        for module, name in users:
            setattr(module, name, recurrence)
        for hook in hooks:
            hook.remove()
    return calls, products


def kernels(calls: list[Any], args: argparse.Namespace) -> None:
    for given, named in calls:
        learned = [each for each in given if isinstance(each, Tensor) and each.ndim > 1]
        with rounded(args):
            y, _ = recurrence(*given, **named)
        torch.autograd.grad(y, learned, torch.ones_like(y), allow_unused=True)


def bare(products: list[tuple[Tensor, Tensor]], args: argparse.Namespace) -> None:
    for given, weight in products:
        with rounded(args):
            y = functional.linear(given, weight)
        torch.autograd.grad(y, [given, weight], torch.ones_like(y))


def layers_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(f"\n{'mixer':28} {'batch x n':>12} {'layer over kernel and products':>32}   ms: layer, kernel, products")
    for row in rows:
        r = row["ratio"]
        times = ", ".join(f"{1000 * row[name]:.2f}" for name in ("layer", "kernel", "products"))
        shape = f"{row['batch']} x {row['length']}"
        print(f"{row['mixer'][:28]:28} {shape:>12} {r['value']:>14.2f} [{r['low']:.2f}, {r['high']:.2f}]      {times}")


# ---- training speed -----------------------------------------------------------------------------------------------

SMALL = {"vocab": 300, "width": 64, "layers": 2, "heads": 4}
WHOLE = {"vocab": 32_000, "width": 768, "layers": 12, "heads": 12}


class Training:
    """A model that takes steps on random tokens."""

    def __init__(self, model: nn.Module, ids: Tensor, args: argparse.Namespace):
        self.model, self.ids, self.args = model.to(args.device).train(), ids, args
        fused = args.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=fused)
        self.loss: Any = self._loss if args.eager else torch.compile(self._loss, dynamic=False)

    def _loss(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def steps(self, count: int) -> float:
        """Seconds a step."""

        def work() -> None:
            for _ in range(count):
                with rounded(self.args):
                    loss = self.loss(self.ids)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

        return timed(work, self.args.device)[0] / count


def throughput(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each batch size, tokens a second and the use of the peak by both models, and the ratio."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SMALL if args.smoke else WHOLE
    inner = 8 * round(2.67 * size["width"] / 8)  # the gated channel mixer's
    llama = LlamaConfig(
        vocab_size=size["vocab"],
        hidden_size=size["width"],
        intermediate_size=inner,
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    own = BackboneConfig(
        vocab_size=size["vocab"],
        hidden_size=size["width"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        mixer=args.backbone,
    )
    for batch in args.batch:
        if late(args, f"throughput: batch {batch}"):
            break
        try:
            torch.compiler.reset()
            torch.manual_seed(0)
            ids = torch.randint(size["vocab"], (batch, args.length), device=args.device)
            sides = [Training(BackboneForCausalLM(own), ids, args), Training(LlamaForCausalLM(llama), ids, args)]
            for name, side in zip(("backbone", "llama"), sides, strict=True):
                took, _ = timed(lambda side=side: side.steps(3), args.device)  # type: ignore[misc]
                say(f"throughput: {name}, batch {batch}: compiled and warm after {took:.0f} s")
            got = alternated([lambda side=side: side.steps(args.steps) for side in sides], args.rounds)  # type: ignore[misc]
            head = head_seconds(size, batch, args)
            row: dict[str, Any] = {"batch": batch, "length": args.length, "backbone_is": args.backbone}
            for name, side, seconds in zip(("backbone", "llama"), sides, got, strict=True):
                rates = [batch * args.length / each for each in seconds]
                params = sum(p.numel() for p in side.model.parameters())
                attention = 12 * size["layers"] * size["width"] * args.length  # of a token, forward and backward
                speed = median(rates)
                row[name] = {
                    "parameters": params,
                    "tokens_per_second": speed.to_json(),
                    "mfu": speed.value * (6 * params + attention / 2) / args.peak,  # what a causal mask leaves
                    "mfu_without_mask": speed.value * (6 * params + attention) / args.peak,  # as PaLM's authors count
                    "seconds_per_step": seconds,
                }
            row["ratio"] = median([theirs / ours for ours, theirs in zip(*got, strict=True)]).to_json()
            row["head_and_loss"] = {"seconds": head, "of_the_backbone_step": head / statistics.median(got[0])}
            if args.device.type == "cuda":
                row["peak_gib"] = torch.cuda.max_memory_allocated(args.device) / 2**30
            say(f"throughput: batch {batch}: backbone over llama {row['ratio']['value']:.3f}")
            yield row
        except torch.OutOfMemoryError:
            say(f"throughput: batch {batch}: out of memory")
        sides = []
        free(args)


def head_seconds(size: dict[str, int], batch: int, args: argparse.Namespace) -> float:
    """Forward and backward of the head and the loss alone."""
    x = torch.randn(batch * args.length, size["width"], device=args.device, requires_grad=True)
    weight = torch.randn(size["vocab"], size["width"], device=args.device, requires_grad=True)
    ids = torch.randint(size["vocab"], (batch * args.length,), device=args.device)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(x, weight).float(), ids)

    run: Any = loss if args.eager else torch.compile(loss, dynamic=False)

    def work() -> None:
        with rounded(args):
            total = run(x, weight)
        torch.autograd.grad(total, [x, weight])

    work()
    return min(timed(work, args.device)[0] for _ in range(3))


def throughput_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(f"\n{'batch':>6} {'model':>10} {'parameters':>12} {'tokens/s':>12} {'MFU':>7} {'ratio':>22}")
    for row in rows:
        for name in ("backbone", "llama"):
            r, side = row["ratio"], row[name]
            ratio = f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" if name == "backbone" else ""
            speed = side["tokens_per_second"]["value"]
            print(f"{row['batch']:6} {name:>10} {side['parameters']:12,} {speed:12,.0f} {side['mfu']:7.1%} {ratio:>22}")
        print(f"{'':6} head and loss take {row['head_and_loss']['of_the_backbone_step']:.0%} of the backbone's step")


# ---- decoding -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each mixer, seconds of a step and bytes of the state of one layer, after each length."""
    for text in args.mixers:
        if late(args, f"decode: {text}"):
            continue
        row: dict[str, Any] = {"mixer": text, "lengths": [], "seconds": [], "bytes": [], "stopped": ""}
        try:
            layer = built(text, args).to(torch.bfloat16).eval()
            x = torch.randn(1, 4096, args.width, device=args.device, dtype=torch.bfloat16)
            state, read = layer.start(1, x), 0
            for n in args.decode_lengths:
                while read < n:
                    piece = min(4096, n - read)
                    state = layer(x[:, :piece], state)[1]  # type: ignore[assignment]
                    read += piece

                def steps(layer: TokenMixer = layer, x: Tensor = x, state: Any = state) -> None:
                    after = state
                    for _ in range(args.tokens):
                        _, after = layer(x[:, :1], after)

                steps()
                seconds = [timed(steps, args.device)[0] / args.tokens for _ in range(args.repeats)]
                row["lengths"].append(n)
                row["seconds"].append(seconds)
                row["bytes"].append(state_bytes(state))
        except torch.OutOfMemoryError:
            row["stopped"] = "out of memory"
        except Exception as error:  # one mixer's
            row["stopped"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        say(f"decode: {text} {row['stopped']}")
        layer = state = None  # type: ignore[assignment]
        free(args)
        yield row


def decode_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    print(f"\n{'mixer':28} ms a token (KiB of state) after each length, one layer")
    for row in rows:
        cells = [
            f"{n}: {1000 * statistics.median(s):.3f} ({b / 1024:.0f})"
            for n, s, b in zip(row["lengths"], row["seconds"], row["bytes"], strict=True)
        ]
        print(f"{row['mixer'][:28]:28} {'  '.join(cells)}  {row['stopped']}")


MEASURES: dict[str, tuple[Callable[..., Iterator[dict[str, Any]]], Callable[..., None]]] = {
    "growth": (growth, growth_table),
    "layer": (layers, layers_table),
    "throughput": (throughput, throughput_table),
    "decode": (decode, decode_table),
}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=MEASURES)
    parser.add_argument("--mixers", nargs="+", help="as text, softmax:window=64; all causal ones, softmax first")
    parser.add_argument("--lengths", type=int, nargs="+", help="growth: tokens (2048, doubled up to 131072)")
    parser.add_argument("--layer-lengths", type=int, nargs="+", help="layer: tokens of a text (2048 16384)")
    parser.add_argument("--layer-tokens", type=int, default=16384, help="layer: tokens of a batch (16384)")
    parser.add_argument("--decode-lengths", type=int, nargs="+", help="decode: tokens read (1024, times 4 to 65536)")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="growth, decode: timings of each (5)")
    parser.add_argument("--rounds", type=int, default=15, help="layer, throughput: alternations (15)")
    parser.add_argument("--tokens", type=int, default=32, help="decode: tokens of a timing (32)")
    parser.add_argument(
        "--patience", type=float, default=5.0, help="growth: seconds after which no longer text is tried"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="what has not begun by then is left out (9)")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32], help="throughput: texts of a step")
    parser.add_argument("--length", type=int, default=2048, help="throughput: tokens of a text (2048)")
    parser.add_argument("--steps", type=int, default=5, help="throughput: steps of a timing (5)")
    parser.add_argument("--backbone", default="softmax", help="throughput: the backbone's mixer (softmax)")
    parser.add_argument("--peak", type=float, default=989e12, help="throughput: the device's FLOP a second (989e12)")
    parser.add_argument("--compile", action="store_true", help="growth, layer: layers are compiled")
    parser.add_argument("--eager", action="store_true", help="throughput: models are not compiled")
    parser.add_argument("--plain", action="store_true", help="without flash-linear-attention's kernels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="a file for all figures, written as they come")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU")
    args = parser.parse_args(given)
    args.device = torch.device("cpu" if args.smoke else args.device)
    if args.smoke:
        args.width, args.heads, args.repeats, args.rounds, args.steps, args.tokens = 32, 4, 2, 2, 1, 2
        args.layer_tokens, args.batch, args.length, args.eager = 128, [2], 32, True
    sizes = {
        "lengths": ([64, 128, 256], [2048 << i for i in range(7)]),
        "layer_lengths": ([64], [2048, 16384]),
        "decode_lengths": ([16, 64], [1024, 4096, 16384, 65536]),
    }
    for name, (smoke, whole) in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, smoke if args.smoke else whole)
    if args.mixers is None:
        causal = sorted(name for name, cls in MIXERS.all().items() if cls.causal)
        args.mixers = ["softmax", *(name for name in causal if name != "softmax")]
    for text in args.mixers:
        MIXERS.parse(text)
    return args


def main(given: list[str] | None = None) -> dict[str, Any]:
    args = arguments(given)
    cuda = args.device.type == "cuda"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(args.device) if cuda else "CPU",
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    with fast.plain() if args.plain else contextlib.nullcontext():
        found["kernels"] = fast.unavailable() or "flash-linear-attention"
        say(f"{found['device']}, torch {found['torch']}, kernels: {found['kernels']}")
        for what in args.what:
            measure, table = MEASURES[what]
            rows: list[dict[str, Any]] = []
            found[what] = rows
            for row in measure(args):
                rows.append(row)
                if args.json is not None:
                    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            table(rows, args)
    return found


if __name__ == "__main__":
    try:
        main()
    except FoveateError as error:
        sys.exit(f"error: {error}")
