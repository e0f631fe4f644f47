"""The verbs as commands, and no logic: what they do stands in the modules that they call."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.errors import FoveateError
from foveate.version import __version__

if TYPE_CHECKING:
    from rich.progress import TaskID

app = typer.Typer(
    help="See where a model's compute matters, spend it only there, and prove what that cost in quality.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """The program `foveate`: 0 = done, 1 = something failed, 2 = can't be done as asked, 130 = stopped."""
    try:
        app()
    except FoveateError as error:
        print(f"foveate: {error}", file=sys.stderr)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _foveate(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def compare(
    model: Annotated[
        str | None, typer.Argument(help="smollm2-135m, a folder, a GGUF file, or a Hub id; none with `--mixers`.")
    ] = None,
    recipes: Annotated[
        list[str] | None,
        typer.Option(help="`full,h2o:keep=0.2,drop-attention:keep=0.8+h2o:keep=0.2`; else the profile's."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="`perplexity:tokens=4096,passkey`; else the profile's.")
    ] = None,
    mixers: Annotated[
        list[str] | None,
        typer.Option(
            help="Train small models with these mixers instead: `softmax,linear`; or a contest: `recall`, `frontier`."
        ),
    ] = None,
    train: Annotated[
        list[str] | None, typer.Option(help="With `--mixers`: `width=64,layers=2,steps=600,lr=1e-3/3e-3,seeds=0/1/2`.")
    ] = None,
    profile: Annotated[str, typer.Option(help="Recipes and tasks in a word: `quick`, `standard`.")] = "quick",
    text: Annotated[str, typer.Option(help="What tasks read: `prose`, `code`, a file, `hub:NAME`.")] = "prose",
    out: Annotated[
        Path | None, typer.Option(help="The run's folder, where a stopped run goes on; else `runs/...`.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="`float32`, `bfloat16`, `float16`, or `auto`.")] = "auto",
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`, or `auto`.")] = "auto",
    seed: Annotated[int, typer.Option(help="Set before every cell.")] = 0,
    workers: Annotated[int, typer.Option(help="Child processes to spread cells over; 0: run here.")] = 0,
    ray: Annotated[str | None, typer.Option(help="A Ray cluster: `local`, `auto`, `host:port`.")] = None,
) -> None:
    """Measure recipes on tasks, or token mixers: a table, advice, and a page."""
    from rich.console import Console

    from foveate.compare import Interrupted, default_out
    from foveate.compare import compare as run
    from foveate.compare.mixers import asked_for, compare_mixers
    from foveate.specs import split_specs

    chosen = [spec for each in recipes for spec in split_specs(each)] if recipes is not None else None
    asked = [spec for each in tasks for spec in split_specs(each)] if tasks is not None else None
    comparison: Any
    try:
        if mixers is not None:
            defaults = {"--profile": (profile, "quick"), "--text": (text, "prose"), "--dtype": (dtype, "auto")}
            others = [name for name, (given, default) in defaults.items() if given != default]
            arguments = asked_for(model, recipes, mixers, asked, train, out, seed=seed, others=others)
            out = arguments["out"]
            comparison = compare_mixers(**arguments, device=device, workers=workers, ray=ray)
        elif model is None or train is not None:
            raise FoveateError("compare needs a model, such as smollm2-135m, or --mixers (which --train is for).")
        else:
            out = out or default_out(model, profile, chosen, asked)
            comparison = run(
                model,
                chosen,
                asked,
                profile=profile,
                out=out,
                text=text,
                dtype=dtype,
                device=device,
                seed=seed,
                workers=workers,
                ray=ray,
            )
    except Interrupted as stopped:
        print(f"foveate: {stopped}", file=sys.stderr)
        raise typer.Exit(130) from None
    Console().print(comparison.table())
    print(f"{comparison.advice()}\n\n{out / 'report.html'}\n{out / 'results.jsonl'}")
    for cell in comparison.failed:
        print(f"failed: {cell['task']} · {cell['recipe']}: {cell['reason']}", file=sys.stderr)
    raise typer.Exit(1 if comparison.failed else 0)


@app.command()
def catalog(
    role: Annotated[str | None, typer.Option(help="Only this role: `cache`, `depth` or `prune`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What techniques are here, from which papers, and which claims were verified."""
    from rich.console import Console

    from foveate.catalog import table, to_json

    if as_json:
        print(json.dumps(to_json(role), indent=2))
    else:
        Console().print(table(role))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """What is installed, on which devices things will run, and why."""
    from rich.console import Console

    from foveate.doctor import report, show

    sections = report()
    if as_json:
        print(json.dumps({section.title: section.facts for section in sections}, indent=2))
    else:
        Console().print(show(sections))


@app.command()
def thin(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a folder, a GGUF file, or a Hub id.")],
    recipe: Annotated[str, typer.Argument(help="What to cut and convert: `flap:keep=0.8`, `plan:file=plan.json`, ...")],
    out: Annotated[Path | None, typer.Option(help="The folder of the smaller model.")] = None,
    heal: Annotated[
        str, typer.Option(help="How it recovers: `none`, `bias`, `lora:...`, `distill:tokens=2M`, `minilm:...`.")
    ] = "none",
    regular: Annotated[
        bool, typer.Option("--regular", help="Only shapes that a plain architecture has: all layers alike.")
    ] = False,
    plan: Annotated[
        Path | None,
        typer.Option(help="Print the plan, write it here, stop; the method `plan` carries it out."),
    ] = None,
    text: Annotated[str, typer.Option(help="What it is judged on: `prose`, `code`, a file, `hub:NAME`.")] = "prose",
    dtype: Annotated[str, typer.Option(help="`float32`, `bfloat16`, `float16`, or `auto`.")] = "auto",
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`, or `auto`.")] = "auto",
) -> None:
    """Make a model smaller for good: cut, heal, measure, save."""
    from rich.console import Console

    from foveate.thin import plan_only, thin_to

    console = Console()
    if plan is not None and out is not None:
        print("foveate: --plan writes a plan and stops, --out makes the model: give one of them.", file=sys.stderr)
        raise typer.Exit(2)
    if plan is not None:
        for made in plan_only(model, recipe, plan, regular=regular, dtype=dtype, device=device):
            console.print(made.table())
        print(plan)
        return
    if out is None:
        print("foveate: thin needs --out, the folder for the smaller model, or --plan.", file=sys.stderr)
        raise typer.Exit(2)
    try:
        table = thin_to(model, recipe, out, heal=heal, regular=regular, text=text, dtype=dtype, device=device)
    except KeyboardInterrupt:
        print("foveate: stopped. The same command goes on from the last checkpoint, if there was one.", file=sys.stderr)
        raise typer.Exit(130) from None
    if table is not None:  # of several processes, one tells
        console.print(table)
        print(out)


@app.command()
def read(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a folder, a GGUF file, or a Hub id.")],
    probes: Annotated[
        list[str] | None,
        typer.Option(help="`sinks,induction`, with fields as in `sinks:alpha=4`; else those that are quick."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder, where a stopped reading goes on; else `runs/...`.")
    ] = None,
    text: Annotated[str, typer.Option(help="What is read: `prose`, `code`, a file, `hub:NAME`.")] = "prose",
    passage: Annotated[
        Path | None, typer.Option(help="A text file: the page shows each head's attention over its start.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a passage of text; else 512 at most.")] = None,
    passages: Annotated[int, typer.Option(help="Passages of each kind of text.")] = 4,
    seed: Annotated[int, typer.Option(help="Decides what is drawn at random.")] = 0,
    dtype: Annotated[str, typer.Option(help="`float32`, `bfloat16`, `float16`, or `auto`.")] = "auto",
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`, or `auto`.")] = "auto",
) -> None:
    """Show what a model's heads, layers and tokens do: a table, scores to spend, and a page."""
    from rich.console import Console

    from foveate.read import default_out
    from foveate.read import read as run
    from foveate.read.passage import passage_text
    from foveate.specs import split_specs

    chosen = [spec for each in probes for spec in split_specs(each)] if probes is not None else None
    out = out or default_out(model)
    try:
        found = run(
            model,
            chosen,
            out=out,
            text=text,
            passage=passage_text(passage),
            length=length,
            passages=passages,
            seed=seed,
            dtype=dtype,
            device=device,
        )
    except KeyboardInterrupt:
        print("foveate: stopped. The same command goes on with the probes that are missing.", file=sys.stderr)
        raise typer.Exit(130) from None
    Console().print(found.table())
    print(f"{found.summary()}\n\n{out / 'anatomy.html'}\n{out / 'reading.json'}")


@app.command()
def train(
    task: Annotated[str, typer.Argument(help="`mqar:pairs=8,length=64`, `lm:text=code`, ...")] = "mqar",
    mixer: Annotated[str, typer.Option(help="`softmax`, `based:window=16`; `a+b`: in turns.")] = "softmax",
    out: Annotated[Path | None, typer.Option(help="The folder, where a stopped run goes on; else `runs/...`.")] = None,
    width: Annotated[int, typer.Option(help="Channels of the residual stream.")] = 64,
    layers: Annotated[int, typer.Option(help="Layers.")] = 2,
    heads: Annotated[int, typer.Option(help="Heads of the token mixer.")] = 4,
    norm: Annotated[str, typer.Option(help="Norm placement: `pre`, `post`, ...")] = "pre",
    channel: Annotated[str, typer.Option(help="Channel mixer: `gated`, `mlp`, ...")] = "gated",
    stack: Annotated[str, typer.Option(help="How layers are stacked.")] = "plain",
    conv: Annotated[int, typer.Option(help="Tokens of a convolution before each token mixer; 0: none.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps at most.")] = 1000,
    batch: Annotated[int, typer.Option(help="Examples of a step, over all processes.")] = 64,
    lr: Annotated[float, typer.Option(help="The highest learning rate of AdamW.")] = 1e-3,
    warmup: Annotated[float, typer.Option(help="The fraction of the run in which it rises.")] = 0.1,
    schedule: Annotated[str, typer.Option(help="What it does then: `cosine`, `wsd`.")] = "cosine",
    decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.1,
    clip: Annotated[float, typer.Option(help="The gradient's norm at most.")] = 1.0,
    until: Annotated[float | None, typer.Option(help="Stop when the first metric reaches that.")] = None,
    pieces: Annotated[int, typer.Option(help="Parts of a batch that go through one after the other.")] = 1,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`, or `auto`.")] = "auto",
    parallel: Annotated[str, typer.Option(help="Under torchrun: `ddp` or `fsdp`.")] = "ddp",
    tracker: Annotated[str | None, typer.Option(help="`tensorboard`, `wandb`, ... as well.")] = None,
) -> None:
    """Train a small model with any token mixer on a task: figures, and a model in a folder."""
    from rich.console import Console

    from foveate.train import Settings, Sizes
    from foveate.train import train as run
    from foveate.train.run import default_out

    sizes = Sizes(
        mixer=mixer, width=width, layers=layers, heads=heads, norm=norm, channel=channel, stack=stack, conv=conv
    )
    settings = Settings(
        steps=steps,
        batch=batch,
        lr=lr,
        warmup=warmup,
        schedule=schedule,
        decay=decay,
        clip=clip,
        until=until,
        seed=seed,
        pieces=pieces,
        compile=compile,
    )
    out = out or default_out(task, sizes, settings)
    try:
        got = run(task, sizes=sizes, settings=settings, out=out, device=device, parallel=parallel, tracker=tracker)
    except KeyboardInterrupt:
        print("foveate: stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        raise typer.Exit(130) from None
    if got is not None:  # of several processes, one tells
        Console().print(got.table())
        print(out)


@app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Methods; all by default.")] = None,
    role: Annotated[str | None, typer.Option(help="Only this role: `cache`, `depth` or `prune`.")] = None,
    model: Annotated[str, typer.Option(help="What the experiments are made on.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="`float32`, `bfloat16`, `float16`, or `auto`.")] = "auto",
    out: Annotated[Path, typer.Option(help="Where claims/NAME.json and claims.md go.")] = Path("docs"),
) -> None:
    """Run the experiments that could refute what the methods claim."""
    from rich.console import Console
    from rich.progress import Progress

    from foveate.verify import verify as run

    with Progress(console=Console(stderr=True)) as bars:
        rows: dict[str, TaskID] = {}

        def progress(name: str, done: float) -> None:
            if name not in rows:
                rows[name] = bars.add_task(name, total=1.0)
            bars.update(rows[name], completed=done)

        verdicts = run(names or [], role=role, model=model, dtype=dtype, out=out, progress=progress)
    for verdict in verdicts:
        print(f"{verdict.method}: {verdict.status}")
        for words, held in verdict.checks.items():
            print(f"  {'yes' if held else 'no '}  {words}")
    print(f"\n{out / 'claims.md'}")


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a folder, a GGUF file, or a Hub id.")],
    params: Annotated[float | None, typer.Option(help="The share of the layers' parameters that is to stay.")] = None,
    speed: Annotated[float | None, typer.Option(help="How many times as fast it is to be, such as 1.5.")] = None,
    memory: Annotated[str | None, typer.Option(help="Weights and cache in all: `4GiB`, `300MiB`.")] = None,
    axes: Annotated[
        str | None, typer.Option(help="What may leave: `attention,mlp,layer,kv_head,channel,rank,cache`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder, where a stopped search goes on.")] = Path("search"),
    calibration_tokens: Annotated[int, typer.Option(help="Calibration text that a step is measured on.")] = 1024,
    evaluation_tokens: Annotated[int, typer.Option(help="Evaluation text of the verdict.")] = 4096,
    context: Annotated[int, typer.Option(help="Tokens that the cache is to hold, for `--memory`.")] = 2048,
    phase: Annotated[str, typer.Option(help="What is to be faster: `decode` or `prefill`.")] = "decode",
    text: Annotated[str, typer.Option(help="What is read: `prose`, `code`, a file, `hub:NAME`.")] = "prose",
    dtype: Annotated[str, typer.Option(help="`float32`, `bfloat16`, `float16`, or `auto`.")] = "auto",
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`, or `auto`.")] = "auto",
) -> None:
    """Search across techniques for the least loss at a budget."""
    from rich.console import Console

    from foveate.search import search as run

    found = run(
        model,
        params=params,
        speed=speed,
        memory=memory,
        axes=axes.split(",") if axes is not None else None,
        out=out,
        calibration_tokens=calibration_tokens,
        evaluation_tokens=evaluation_tokens,
        context=context,
        phase=phase,
        text=text,
        dtype=dtype,
        device=device,
    )
    Console().print(found.table())
    print(f"{found.summary()}\n\n{found.recipe}\n{out / 'report.html'}")
