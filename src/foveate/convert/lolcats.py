"""LoLCATs: attention becomes linear attention with learned feature maps, taught to answer as softmax attention does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, Streams, claim
from foveate.convert.base import Converter
from foveate.convert.linear import layers_to_convert, path_of, stand_in
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.heal.trial import ON_CPU, ON_GPU, recovered
from foveate.measure.bootstrap import Metric, median
from foveate.measure.shown import Shown
from foveate.methods import Paper, Target, apply, method
from foveate.models.anatomy import anatomy
from foveate.models.stored import stored, text_digest
from foveate.portable.linear import LolcatsAttention
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity

PIECE = 512
"""Tokens of calibration text that are read at once."""
LEARNED = ("map_q", "map_k", "mix")

Modules = dict[int, LolcatsAttention]
"""Layer -> the attention that is to stand there."""


@method("lolcats")
class Lolcats(Converter):
    """Attention becomes softmax over a sliding window and linear attention over all before; its state stays constant.

    The feature maps are [softmax(W x), softmax(-W x)], of rotated queries and keys; both kinds of attention share one
    denominator, in which each head weighs the window by a learned number (see `LolcatsAttention`). They are taught by
    attention transfer: each layer reads the hidden states of the model as it was, and its answers, before the output
    projection, are to be those of softmax attention, by mean squared error. All layers learn in the same pass over
    calibration text, each by itself, and what they learn is kept on disk. The second step of the paper, LoRA, is
    healing.

    Ours: keys have one map a KV head (the authors give each query head its own copy of the keys, and so a memory of its
    own); maps begin as the identity, or where `feature` is not the head size as a random rotation; and learning rates
    fall linearly to zero.

    Fields:
        window: tokens that softmax attention sees; 0: linear attention alone.
        feature: rows of W; the features of a head are twice that. None: the head size.
        tokens: calibration text that is learned from; 0: no attention transfer.
        steps: updates on each piece of 512 tokens.
        lr: learning rate of Adam.
        layers: which layers: `all`, `even`, `odd`, or numbers and ranges joined by a slash, such as `0-9/12`.

    Example:
        >>> import foveate as fv, torch
        >>> model, text = fv.tiny("llama"), torch.arange(1, 201).unsqueeze(0)
        >>> full = model(text).logits
        >>> with fv.apply(model, "lolcats:window=200,tokens=0"):  # a window that holds all of the text
        ...     torch.allclose(model(text).logits, full, atol=1e-4)
        True
    """

    paper: ClassVar[Paper | None] = Paper(
        "LoLCATs: On Low-Rank Linearizing of Large Language Models", 2024, "https://arxiv.org/abs/2410.10254"
    )
    claim: ClassVar[str] = "linear attention that has learned to answer as softmax attention did costs far less quality"

    window: int = 64
    feature: int | None = None
    tokens: int = 16384
    steps: int = 4
    lr: float = 0.05
    layers: str = "all"

    def __post_init__(self) -> None:
        if self.window < 0 or self.tokens < 0 or self.steps < 1 or self.lr <= 0 or (self.feature or 1) < 1:
            raise FoveateError(f"{self}: window and tokens must be 0 or more, feature, steps and lr above 0.")

    def converted(self, target: Target) -> dict[str, nn.Module]:
        model = target.model
        modules = untrained(target, self.window, self.feature, self.layers, self.name)
        if self.tokens:
            ids = target.calibration(self.tokens)

            def learn() -> dict[str, Tensor]:
                with Shown("feature maps of linear attention") as progress:
                    transfer(model, modules, ids, self.steps, self.lr, progress)
                return {f"{i}.{name}": getattr(module, name) for i, module in modules.items() for name in LEARNED}

            version = f"1 {self.window} {self.feature} {self.steps} {self.lr} {self.layers} {text_digest(ids)}"
            learned = stored(model, "lolcats", version, learn)
            with torch.no_grad():
                for name, value in learned.items():
                    layer, _, last = name.partition(".")
                    getattr(modules[int(layer)], last).copy_(value)
        parts = anatomy(model)
        for module in modules.values():
            for name in LEARNED:
                parameter = getattr(module, name)
                parameter.data = parameter.data.to(model.dtype)
        return {path_of(parts.layers[i], parts): module for i, module in modules.items()}


def untrained(target: Target, window: int, feature: int | None, layers: str, who: str) -> Modules:
    """Linear attention for the layers that are named, sharing their projections; maps in float32, as they begin."""
    parts, modules = anatomy(target.model), {}
    features = feature or parts.head_dim
    generator = torch.Generator().manual_seed(0)
    begin = torch.eye(parts.head_dim)
    if features != parts.head_dim:
        wide = torch.randn(max(features, parts.head_dim), min(features, parts.head_dim), generator=generator)
        turn = torch.linalg.qr(wide).Q
        begin = turn if parts.head_dim >= features else turn.T
    for layer in layers_to_convert(target, layers, who):
        new = stand_in(LolcatsAttention, layer, parts, window=window, feature=features)
        like = next(layer.attention.parameters())
        for name in LEARNED:
            shape = getattr(new, name).shape
            value = torch.zeros(shape) if name == "mix" else begin.expand(shape).clone()
            setattr(new, name, nn.Parameter(value.to(like.device), like.requires_grad))
        modules[layer.index] = new
    return modules


@contextmanager
def watched(model: PreTrainedModel, layers: Sequence[int], see: Callable[..., None]) -> Iterator[None]:
    """Calls `see(layer, hidden states, position embeddings, answers)` as each layer's softmax attention has answered.

    Answers are what goes into the output projection, (batch, n, heads x head_dim).
    """
    answers: dict[int, Tensor] = {}
    parts = anatomy(model)
    with ExitStack() as hooks:
        for index in layers:
            layer = parts.layers[index]

            def before_o(module: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
                answers[index] = args[0]

            def after(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, index: int = index
            ) -> None:
                see(index, kwargs["hidden_states"], kwargs["position_embeddings"], answers.pop(index))

            assert layer.o is not None
            hooks.callback(layer.o.register_forward_pre_hook(before_o).remove)
            hooks.callback(layer.attention.register_forward_hook(after, with_kwargs=True).remove)
        yield


@torch.no_grad()
def transfer(
    model: PreTrainedModel,
    modules: Modules,
    ids: Tensor,
    steps: int,
    lr: float,
    progress: Callable[[float, str], None] = lambda done, note: None,
) -> None:
    """Attention transfer: teach the modules to answer as the layers of the model do, on token ids (1, length)."""
    learned = {i: [getattr(module, name).requires_grad_() for name in LEARNED] for i, module in modules.items()}
    optimizers = {i: torch.optim.Adam(parameters, lr=lr) for i, parameters in learned.items()}
    pieces = [piece for piece in ids.split(PIECE, 1) if piece.shape[1] == min(PIECE, ids.shape[1])]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    errors: list[float] = []

    def teach(index: int, hidden: Tensor, position: tuple[Tensor, Tensor], answers: Tensor) -> None:
        module, optimizer = modules[index], optimizers[index]
        given = module.projected(hidden, position)
        with torch.enable_grad():
            for step in range(steps):
                loss = (module.attended(*given)[0].float() - answers.float()).square().mean()
                slopes = torch.autograd.grad(loss, learned[index], materialize_grads=True)  # no window: no mix
                for parameter, slope in zip(learned[index], slopes, strict=True):
                    parameter.grad = slope
                optimizer.step()
                if step == 0:
                    errors.append(float(loss.detach() / answers.float().square().mean()))

    with watched(model, list(modules), teach):
        for done, place in enumerate(order):
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = lr * (1 - done / len(order))
            errors.clear()
            anatomy(model).base(pieces[place], use_cache=False)
            progress((done + 1) / len(order), f"relative error {sum(errors) / len(errors):.3f}")


@torch.no_grad()
def transfer_errors(model: PreTrainedModel, modules: Modules, ids: Tensor) -> dict[int, tuple[float, float]]:
    """Layer -> mean squared error of its answers on token ids (1, length), and mean square of softmax's answers."""
    found = {}

    def compare(index: int, hidden: Tensor, position: tuple[Tensor, Tensor], answers: Tensor) -> None:
        mine = modules[index].attended(*modules[index].projected(hidden, position))[0]
        found[index] = (float((mine - answers).float().square().mean()), float(answers.float().square().mean()))

    with watched(model, list(modules), compare):
        anatomy(model).base(ids, use_cache=False)
    return found


@claim("lolcats")
class TransferClosesTheGap(Claim):
    statement: ClassVar[str] = (
        "linear attention that was trained to match the outputs of softmax attention keeps far more quality than one "
        "that was not; with LoRA after it, most of the gap to the original closes (abstract)"
    )
    setting: ClassVar[str] = (
        f"all layers, window 64; 3,072 tokens of calibration text for attention transfer; then LoRA of rank 8 on "
        f"{ON_CPU:,} tokens of it (on a GPU {ON_GPU:,}); 1,024 tokens of evaluation text, and 512 for "
        "the layers' errors"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=1024, chunk=64), of=8)
        full = streams.read("full")
        taught, begun = Lolcats(tokens=3072), Lolcats(tokens=0)
        ids = tokens(bench.text.evaluation, bench.tokenizer, 512).to(bench.model.device)
        learned, plain = (_errors(bench, m, ids) for m in (taught, begun))
        with_transfer, without = streams.read(taught), streams.read(begun)
        linear = streams.read(Lolcats(tokens=3072, window=0))
        window = streams.read("window:entries=64")
        way = "lora:rank=8,alpha=16,lr=5e-4"
        healed = streams.read("full", on=recovered(bench, taught, way))
        only_lora = streams.read("full", on=recovered(bench, begun, way))
        closed = 1 - math.log(with_transfer.over(full).value) / math.log(without.over(full).value)
        falls = [learned[i][0] / plain[i][0] for i in plain]
        return Finding(
            {
                "perplexity, softmax attention": full.perplexity,
                "over softmax: with attention transfer": with_transfer.over(full),
                "over softmax: without": without.over(full),
                "over softmax: linear attention alone, with transfer": linear.over(full),
                "over softmax: the window alone": window.over(full),
                "over softmax: with attention transfer, then LoRA": healed.over(full),
                "over softmax: LoRA only": only_lora.over(full),
                "gap closed by transfer, of the nats": Metric.exact(closed),
                "layers' error after transfer, over before: median": median(falls),
                "layers' error after transfer, over before: worst layer": Metric.exact(max(falls)),
            },
            {
                "the error falls in every layer": max(falls) < 1,
                "better with transfer than without": with_transfer.below(without),
                "more than half of the gap closes": closed > 0.5,
                "after LoRA better with transfer than without": healed.below(only_lora),
                "LoRA closes more of it": healed.below(with_transfer),
                "window and linear attention better than linear attention alone": with_transfer.below(linear),
                "window and linear attention better than the window alone": with_transfer.below(window),
            },
        )


def _errors(bench: Bench, converter: Lolcats, ids: Tensor) -> dict[int, tuple[float, float]]:
    with apply(bench.model, converter, tokenizer=bench.tokenizer):
        found = {layer.index: layer.attention for layer in anatomy(bench.model).layers}
    return transfer_errors(bench.model, found, ids)  # type: ignore[arg-type]
