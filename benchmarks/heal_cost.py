"""What healing costs on this device: tokens a second of sampling and of each way to heal, on the default model.

Run: python benchmarks/heal_cost.py [--seconds 20] [--batch 64] [--compile]
"""

from __future__ import annotations

import argparse
import copy
import time

import torch

import foveate as fv
from foveate.models.surgery import Surgery, cut, settle, unit_counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samples", default="1M")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    teacher, tokenizer = fv.load(options.model)
    thin = copy.deepcopy(teacher)
    cut(thin, "channel", [torch.arange(n * 3 // 4) for n in unit_counts(thin, "channel")], Surgery())
    settle(thin)
    common = f"batch={options.batch},length=512,tokens=1B,seconds={options.seconds}"
    common += f",compile={str(options.compile).lower()}"
    for spec in ("distill:hidden=0", "distill:hidden=0.1", "lora:rank=16", "minilm:values=1"):
        student = copy.deepcopy(thin)
        report = fv.heal(student, teacher, f"{spec},{common}", tokenizer=tokenizer)
        print(f"{spec:20} {report.tokens / report.seconds:12,.0f} tokens/s, loss {report.curve[-1][1]:.4f}")
    start = time.perf_counter()
    spec = f"distill:data=samples,samples={options.samples},tokens={options.samples},seconds=1,batch=1"
    fv.heal(copy.deepcopy(thin), teacher, spec, tokenizer=tokenizer)
    print(f"sampling {options.samples}: {time.perf_counter() - start:.0f} s, with loading and a second of training")


if __name__ == "__main__":
    main()
