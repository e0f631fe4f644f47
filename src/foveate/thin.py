"""`foveate thin`: a recipe made permanent, healed, measured, and saved so that it opens anywhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.data.text import load_text, tokens
from foveate.errors import FoveateError
from foveate.heal import HEALS, Heal, HealReport
from foveate.heal import heal as recover
from foveate.measure.bootstrap import Metric, median, perplexity, perplexity_ratio
from foveate.measure.clock import alternated, timed
from foveate.measure.shown import Shown
from foveate.methods import Recipe, RecipeLike, UnitScores, changed, check_permanent
from foveate.models.anatomy import anatomy
from foveate.models.load import known_tokenizer, load, model_name
from foveate.models.saved import Story, card, check_folder, is_plain, save
from foveate.models.surgery import layer_parameters
from foveate.models.work import prefill_flops, step_bytes
from foveate.plans import Plan, Uniform
from foveate.prune import Pruner
from foveate.tasks.base import decode, read, surprisal
from foveate.train import processes
from foveate.version import __version__

WINDOW = 1024
"""Tokens of each window of evaluation text that a thinned model is judged on."""
WINDOWS = 16
"""Such windows."""


def thin(
    model: PreTrainedModel,
    recipe: RecipeLike,
    *,
    heal: str = "none",
    regular: bool = False,
    calibration: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    work: Path | str | None = None,
) -> PreTrainedModel:
    """A smaller model: the recipe's cuts and conversions made permanent, and healed.

    Args:
        model: a Hugging Face causal language model; it stays as it is, and teaches where healing needs a teacher.
        recipe: methods that change the model itself (roles `prune`, `convert`, and fixed layers of `depth`).
        heal: how the smaller model recovers, such as `"distill:tokens=2M"` (see `foveate.heal`).
        regular: only shapes that a plain architecture has: budgets become `uniform`.
        calibration: token ids (1, length) that units are scored on; by default the text that is always there.
        tokenizer: the model's; by default the one that `load` gave with it.
        work: a folder where healing keeps its checkpoints, so that it goes on after a kill; None: it keeps none.

    Returns:
        a model in eval mode. `save_pretrained(folder)` writes a folder that opens anywhere, also where foveate is not
        installed: the plain architecture if all layers are alike, else with a short modelling file.

    Raises:
        FoveateError: a method that is only in force while applied (a cache policy, say), a shape that is not regular
            where it should be, and what the methods themselves raise.

    Example:
        >>> import foveate as fv, torch
        >>> model, text = fv.tiny("llama"), torch.arange(1, 65).unsqueeze(0)
        >>> small = fv.thin(model, "drop-attention:keep=0.5", calibration=text)
        >>> sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        True
    """
    asked, recipe = Recipe.of(recipe), permanent(recipe, regular)
    spec = HEALS.parse(heal)  # a mistake there is told before any work
    small, plans = changed(model, recipe, calibration=calibration, tokenizer=tokenizer)
    if regular and not is_plain(small):
        raise FoveateError(
            f"{asked} leaves layers of different shapes, and a regular shape was asked for: leave out --regular "
            "(regular=True), or cut whole layers, channels, heads or the residual stream."
        )
    report = recover(small, model, spec, tokenizer=tokenizer, work=work)
    if regular and not is_plain(small):  # biases that this architecture doesn't have, say
        raise FoveateError(
            f"healing by {spec} gives the model parts that its plain architecture lacks, and a regular shape was asked "
            "for: heal with distill or lora."
        )
    story = Story(
        name=f"{model_name(model)}, thinned",
        base_model=model_name(model),
        recipe=recipe.to_text(),
        shape="plain" if is_plain(small) else "irregular",
        plans=[plan.describe() for plan in plans],
        scores=[(score.kind, _spread(score)) for plan in plans for score in plan.scores],
        text=_text_used(calibration, report),
        heal={"how": report.spec, "tokens": report.tokens, "seconds": round(report.seconds)} if report.tokens else {},
        versions={"foveate": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )
    return _saving(small, story, tokenizer or known_tokenizer(model))


def _spread(score: UnitScores) -> list[list[float] | None]:
    """The lowest, the median and the highest score of each layer's units; None where none was scored.

    No mean: scores that are standardised within a layer have the same one everywhere.
    """
    rows = [row[~row.isnan()].double() for row in score.scores]
    return [[float(f(row)) for f in (torch.min, torch.median, torch.max)] if len(row) else None for row in rows]


def _text_used(calibration: Tensor | None, report: HealReport) -> dict[str, str]:
    said = "prose" if calibration is None else f"{calibration.shape[1]:,} tokens that were given"
    used = {"scores, where methods make any": f"{said}, its calibration part" if calibration is None else said}
    data = getattr(HEALS.parse(report.spec), "data", "")
    return used | ({"healing": f"{data}, {report.tokens:,} tokens in all"} if report.tokens else {})


def _saving(small: PreTrainedModel, story: Story, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """The model, of a class whose `save_pretrained` writes a folder that opens anywhere, with a card."""

    def save_pretrained(self: Any, folder: str | Path, **kwargs: Any) -> None:
        """Write a folder that opens anywhere, whole or not at all (see `foveate.models.saved.save`)."""
        if kwargs:
            raise FoveateError(f"a thinned model is saved as it is: leave {', '.join(kwargs)} out.")
        save(self, tokenizer, folder, card=card(self.story), extra={"foveate.json": json.dumps(self.story.to_json())})

    cls = type(small)
    small.__class__ = type(cls.__name__, (cls,), {"save_pretrained": save_pretrained, "__module__": cls.__module__})
    small.story = story  # type: ignore[assignment]
    return small


def permanent(recipe: RecipeLike, regular: bool = False) -> Recipe:
    """A recipe whose methods all change the model itself; with `regular`, its budgets are `uniform`.

    Raises:
        FoveateError: a method is only in force while it is applied.

    Example:
        >>> permanent("flap:keep=0.8", regular=True).to_text()
        'flap:keep=0.8,budget=uniform'
    """
    recipe = Recipe.of(recipe)
    check_permanent(recipe)
    if not regular:
        return recipe

    def alike(m: Any) -> Any:
        if not isinstance(m, Pruner):
            return m
        return dataclasses.replace(m, budget=Uniform(floor=m.budget.floor, multiple=m.budget.multiple))

    return Recipe(tuple(alike(m) for m in recipe.methods))


# ---- figures before and after ---------------------------------------------------------------------------------------


def figures(
    small: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str = "prose",
    windows: int = WINDOWS,
    batch: int = 1,
    repeats: int = 5,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, tuple[Metric, Metric]]:
    """What a smaller model is, and what that cost: name -> (before, after).

    Perplexity is over windows of 1,024 tokens of evaluation text (or of as many positions as the model has), with an
    interval of the ratio, paired window by window. Speed is timed in alternation with the original. The predicted
    speed-up is that of floating point operations for a prefill, of bytes read for a decoding step.

    Args:
        small, model: the smaller model and the original.
        tokenizer: of both.
        text: what `foveate.data.text.load_text` takes; its evaluation part is read.
        windows: windows of text.
        batch: sequences that are timed at once.
        repeats: rounds of timing.
    """
    both = (model, small)
    found: dict[str, tuple[Metric, Metric]] = {}

    def exact(name: str, of: Callable[[PreTrainedModel], float]) -> None:
        before, after = (Metric.exact(of(m)) for m in both)
        found[name] = (before, after)

    exact("parameters", lambda m: sum(p.numel() for p in m.parameters()))
    exact("parameters in the layers", layer_parameters)
    share = layer_parameters(small) / max(1, layer_parameters(model))
    found["parameters in the layers, ratio"] = (Metric.exact(1), Metric.exact(share))
    exact("bytes of weights", lambda m: sum(t.nbytes for t in (*m.parameters(), *m.buffers())))
    size = min(WINDOW, anatomy(model).max_positions)
    ids = tokens(load_text(text).evaluation, tokenizer, windows * size).view(windows, size)
    losses: list[list[float]] = [[], []]
    for i, window in enumerate(ids):
        for side, m in enumerate(both):
            logits, _ = read(m, window[None].to(m.device))
            losses[side].append(float(surprisal(logits[:, :-1], window[None, 1:].to(m.device)).double().sum()))
        progress(0.5 * (i + 1) / windows)
    counts = [size - 1] * windows
    found[f"perplexity on {text}"] = (perplexity(losses[0], counts), perplexity(losses[1], counts))
    one = Metric.exact(1)
    found[f"perplexity on {text}, ratio"] = (one, perplexity_ratio(losses[1], losses[0], counts))
    prompt = ids[:1].expand(batch, -1)[:, : size // 2]

    def once(m: PreTrainedModel) -> tuple[float, float]:
        there = prompt.to(m.device)
        prefill, (logits, cache) = timed(lambda: read(m, there, last=1), m.device)
        decoding, _ = timed(lambda: decode(m, logits.argmax(-1), cache, 16), m.device)
        return prefill, decoding

    sides = [lambda m=m: once(m) for m in both]  # type: ignore[misc]
    rounds = alternated(sides, repeats, lambda done: progress(0.5 + 0.5 * done))
    for i, name in enumerate(("prefill", "decoding")):
        faster = median([a[i] / b[i] for a, b in zip(*rounds, strict=True)])
        found[f"{name} speed-up"] = (one, faster)
    flops = [prefill_flops(m, prompt.to(m.device)) for m in both]
    moved = [step_bytes(m, prompt.to(m.device)) for m in both]
    found["prefill speed-up, predicted by operations"] = (one, Metric.exact(flops[0] / flops[1]))
    found["decoding speed-up, predicted by bytes"] = (one, Metric.exact(moved[0] / moved[1]))
    return found


def figures_table(found: dict[str, tuple[Metric, Metric]]) -> Table:
    """Figures before and after, for a terminal."""
    table = Table(box=SIMPLE_HEAD)
    for title in ("", "before", "after", "interval"):
        table.add_column(title, justify="left" if not title else "right")
    for name, (before, after) in found.items():
        interval = "" if after.low == after.high else f"{after.low:.4g} to {after.high:.4g}"
        table.add_row(name, _number(before.value), _number(after.value), interval)
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


# ---- the verb -------------------------------------------------------------------------------------------------------


def thin_to(
    model: str,
    recipe: RecipeLike,
    out: Path,
    *,
    heal: str = "none",
    regular: bool = False,
    text: str = "prose",
    dtype: str = "auto",
    device: str = "auto",
) -> Table | None:
    """Load a model, thin it, measure it, and save it in a folder; the table of figures before and after.

    A run that was killed goes on where healing was, if it is asked for in the same words again: until the folder is
    there, healing keeps its checkpoints beside it. Of several processes (`torchrun`), the first measures and saves,
    and the others return None.
    """
    out = Path(out).expanduser().absolute()
    check_folder(out)  # what can't be saved in the end is told now
    judged = load_text(text)
    permanent(recipe, regular)
    _check_unseen(HEALS.parse(heal), text)
    live, tokenizer = load(model, dtype=dtype, device=device)
    tokens(judged.evaluation, tokenizer, WINDOWS * WINDOW)  # or it says that the text is too short
    work = out.parent / f".{out.name}.heal"
    small = thin(live, recipe, heal=heal, regular=regular, tokenizer=tokenizer, work=work)
    if not processes.is_main():
        return None
    with Shown("before and after", once=False) as progress:
        found = figures(small, live, tokenizer, text=text, progress=progress)
    sides = ({name: pair[side].to_json() for name, pair in found.items()} for side in (0, 1))
    before, after = sides
    small.story = dataclasses.replace(small.story, name=out.name, before=before, after=after)  # type: ignore
    small.save_pretrained(out)
    shutil.rmtree(work, ignore_errors=True)
    return figures_table(found)


def _check_unseen(spec: Heal, text: str) -> None:
    """Raise where healing would read the very file that the figures are made on: of a file it reads the whole."""
    for data in str(getattr(spec, "data", "calibration")).split("+"):
        known = data in ("calibration", "samples", "prose", "code") or data.startswith("hub:")
        if not known and Path(data).expanduser().resolve() == Path(text).expanduser().resolve():
            raise FoveateError(
                f"healing was to read all of {data}, and the figures were to be made on a part of it, so that they "
                "would say nothing: give another data to heal on, or another text."
            )


def plan_only(
    model: str, recipe: RecipeLike, path: Path, *, regular: bool = False, dtype: str = "auto", device: str = "auto"
) -> list[Plan]:
    """Load a model, decide what a recipe would cut, and write that to a file: `plan:file=...` carries it out.

    Raises:
        FoveateError: the recipe is not one pruner.
    """
    live, tokenizer = load(model, dtype=dtype, device=device)
    chosen = permanent(recipe, regular)
    if len(chosen.methods) != 1:
        raise FoveateError(
            f"{chosen} has {len(chosen.methods)} methods, and a plan is one pruner's: make one for each in turn."
        )
    _, plans = changed(live, chosen, tokenizer=tokenizer)
    if not plans:
        raise FoveateError(f"{chosen} decides on no units to cut, so there is no plan: give a pruner, such as flap.")
    plans[0].save(path)
    return plans
