"""Distillation from the original: the student learns its next-token distributions and its hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.heal.base import heal, way
from foveate.heal.train import Trained, last_hidden, logits_of
from foveate.measure.bootstrap import perplexity, perplexity_ratio
from foveate.methods import Paper
from foveate.models.anatomy import anatomy
from foveate.models.surgery import Surgery, cut, settle
from foveate.tasks.base import Bench, passages, surprisal

CHUNK = 1024
"""Tokens whose logits are there at a time."""


@dataclass(frozen=True, kw_only=True)
class Distilled(Trained):
    """The fields of ways to heal that learn from the original's logits and hidden states.

    Fields:
        logits: the weight of the forward KL divergence, original to student, of next-token distributions.
        temperature: divides both logits there; the divergence is multiplied by its square.
        hidden: the weight of the hidden states' distance: of each token after each layer, the squared difference over
            the original's square.
        text: the weight of the next token's own surprisal in the text.
    """

    logits: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.1
    text: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0 or min(self.logits, self.hidden, self.text) < 0:
            raise FoveateError(f"{self}: temperature must be above 0, and no weight below 0.")
        if not any((self.logits, self.hidden, self.text)):
            raise FoveateError(f"{self}: logits, hidden and text all weigh 0, so that there is nothing to learn.")

    def objective(self, student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> nn.Module:
        return Distillation(student, teacher, self, rows)


@way("distill")
class Distill(Distilled):
    """All of the student's weights learn.

    Forward KL on the logits and a distance of hidden states, as is common for pruned models; how the two are weighed
    and measured is ours. A layer of the student learns from the layer of the original whose hidden states are nearest
    to its own before healing, in order. Where the student's residual stream is narrower, they are compared through a
    linear map, fitted to begin with, learned along, and thrown away.

    Example:
        >>> from foveate.heal import HEALS
        >>> HEALS.parse("distill:tokens=300k,data=samples,hidden=0")
        Distill(tokens='300k', ... data='samples', ...)
    """

    paper = Paper(
        "Compact Language Models via Pruning and Knowledge Distillation", 2024, "https://arxiv.org/abs/2407.14679"
    )
    claim = (
        "distilled from the original on a small part of the training text, a pruned model recovers most of its quality"
    )


class Distillation(nn.Module):
    """The loss of distillation, a mean over tokens: `forward(ids (batch, length)) -> scalar`."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, spec: Distilled, rows: Tensor):
        super().__init__()
        self.student = student
        self.models = (student, teacher)  # in a tuple, the teacher is no submodule
        self.spec = spec
        self.pairs: list[tuple[int, int]] = []
        self.map: nn.Linear | None = None
        if spec.hidden:
            with torch.no_grad(), spec.mixed(rows.device):
                mine, theirs = (_states(model, rows)[1] for model in self.models)
            self.pairs = matched(mine, theirs)
            if mine[0].shape[-1] != theirs[0].shape[-1]:
                self.map = nn.Linear(mine[0].shape[-1], theirs[0].shape[-1], bias=False, device=rows.device)
                x = torch.cat([mine[i].flatten(0, 1).float() for i, _ in self.pairs])
                y = torch.cat([theirs[j].flatten(0, 1).float() for _, j in self.pairs])
                ridge = 1e-4 * (x.square().mean() * len(x)) * torch.eye(x.shape[1], device=x.device)
                self.map.weight.data = torch.linalg.solve(x.T @ x + ridge, x.T @ y).T.contiguous()

    def forward(self, ids: Tensor) -> Tensor:
        spec, (student, teacher) = self.spec, self.models
        last, mine = _states(student, ids, [i for i, _ in self.pairs])
        goal, theirs = last.detach(), list[Tensor]()
        if spec.logits or self.pairs:
            with torch.no_grad():
                goal, theirs = _states(teacher, ids, [j for _, j in self.pairs])
        loss = torch.zeros((), device=ids.device)
        if spec.logits or spec.text:
            loss = loss + logit_loss(student, teacher, last, goal, ids, spec.logits, spec.temperature, spec.text)
        if self.pairs:
            distances = [distance(self._mapped(s), t) for s, t in zip(mine, theirs, strict=True)]
            loss = loss + spec.hidden * torch.stack(distances).mean()
        return loss

    def _mapped(self, state: Tensor) -> Tensor:
        return state if self.map is None else self.map(state)


def distance(state: Tensor, goal: Tensor) -> Tensor:
    """The squared difference of hidden states (batch, length, hidden), of each token over the goal's square: a mean.

    Token by token, since the few tokens of a huge norm (attention sinks) would otherwise be all that counts.
    """
    goal = goal.float()
    return ((state.float() - goal).square().sum(-1) / goal.square().sum(-1).clamp(min=1e-6)).mean()


def matched(mine: list[Tensor], theirs: list[Tensor]) -> list[tuple[int, int]]:
    """Which layer of the original each layer of the student learns from: (student's, original's), in order.

    The same layer where both have as many; of equal width, those that are nearest in sum, in order, the last from the
    last; else evenly.

    Args:
        mine, theirs: hidden states after each layer, (batch, length, hidden).

    Example:
        >>> import torch
        >>> from foveate.heal.distill import matched
        >>> states = [torch.randn(1, 8, 4) for layer in range(4)]
        >>> matched([states[0], states[3]], states), matched([states[1], states[2], states[3]], states)
        ([(0, 0), (1, 3)], [(0, 1), (1, 2), (2, 3)])
    """
    n, m = len(mine), len(theirs)
    if n == m:
        return [(i, i) for i in range(n)]
    if n > m or mine[0].shape[-1] != theirs[0].shape[-1]:
        return [(i, max(1, round((i + 1) * m / n)) - 1) for i in range(n)]
    far = torch.stack([torch.stack([distance(a, b) for b in theirs]) for a in mine]).double().cpu()
    far[-1, :-1] = torch.inf  # what the final norm reads
    best = torch.full((n, m), torch.inf, dtype=torch.float64)  # the least sum up to (i, j), with i learning from j
    best[0] = far[0]
    for i in range(1, n):
        best[i, 1:] = far[i, 1:] + best[i - 1].cummin(0).values[:-1]
    pairs, until = [], m
    for i in reversed(range(n)):
        until = int(best[i, :until].argmin())
        pairs.append((i, until))
    return pairs[::-1]


def _states(model: PreTrainedModel, ids: Tensor, layers: list[int] | None = None) -> tuple[Tensor, list[Tensor]]:
    """What the head reads, and hidden states after some layers, or all; (batch, length, hidden) each."""
    parts = anatomy(model)
    asked = range(len(parts.layers)) if layers is None else layers
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[index] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [parts.layers[index].module.register_forward_hook(keep(index)) for index in set(asked)]
    try:
        last = last_hidden(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return last, [found[index] for index in asked]


# ---- the logits' part, a chunk of tokens at a time ------------------------------------------------------------------


def logit_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    last: Tensor,
    goal: Tensor,
    ids: Tensor,
    logits: float = 1.0,
    temperature: float = 1.0,
    text: float = 0.0,
) -> Tensor:
    """`logits` times the forward KL divergence, plus `text` times the next token's surprisal: a mean over tokens, nats.

    The logits of all tokens are never there at once: each chunk's loss and gradients are made together, and of its
    logits nothing is kept.

    Args:
        student, teacher: give the heads.
        last, goal: what they read, (batch, length, hidden) each, of the student and of the teacher.
        ids: the tokens, (batch, length).
        logits, temperature, text: as the fields of `Distilled`.
    """
    batch, length = ids.shape
    last, goal = last.flatten(0, 1), goal.flatten(0, 1)
    following = torch.cat([ids[:, 1:], ids.new_full((batch, 1), -100)], dim=1).flatten()

    def chunk(hidden: Tensor, part: slice) -> Tensor:
        mine = logits_of(student, hidden)
        loss = mine.new_zeros(())
        if logits:
            with torch.no_grad():
                theirs = (logits_of(teacher, goal[part]) / temperature).log_softmax(-1)
            own = (mine / temperature).log_softmax(-1)
            divergence = torch.nn.functional.kl_div(own, theirs, reduction="sum", log_target=True)
            loss = loss + logits * temperature**2 * divergence / (batch * length)
        if text:
            surprisal = torch.nn.functional.cross_entropy(mine, following[part], ignore_index=-100, reduction="sum")
            loss = loss + text * surprisal / (batch * (length - 1))
        return loss

    head = [p for p in anatomy(student).head.parameters() if p.requires_grad]
    total: Tensor = _Chunks.apply(last, chunk, *head)
    return total


class _Chunks(torch.autograd.Function):
    """A sum over chunks of rows whose gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, loss: Callable[[Tensor, slice], Tensor], *weights: Tensor) -> Tensor:
        total = torch.zeros((), device=rows.device, dtype=torch.promote_types(rows.dtype, torch.float32))
        grads = [torch.zeros_like(rows), *map(torch.zeros_like, weights)]
        for start in range(0, len(rows), CHUNK):
            part = slice(start, min(start + CHUNK, len(rows)))
            with torch.enable_grad():
                piece = rows[part].detach().requires_grad_()
                here = loss(piece, part)
                found = torch.autograd.grad(here, [piece, *weights])
            total += here.detach()
            grads[0][part] = found[0]
            for grad, more in zip(grads[1:], found[1:], strict=True):
                grad += more
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        rows, *weights = (grad * saved for saved in ctx.saved_tensors)
        return rows, None, *weights


# ---- what is claimed, tried -----------------------------------------------------------------------------------------

TOKENS = 16384
"""Tokens that each student of the claim learns from."""


@claim("distill")
class DistillationRecoversMore(Claim):
    statement: ClassVar[str] = (
        "pruned models recover by distillation from the original, from far fewer tokens than training from scratch "
        "takes, and better than by plain retraining (abstract, and the paper's comparison of losses)"
    )
    setting: ClassVar[str] = (
        f"3 evenly spaced layers cut; students of that shape learn from the same {TOKENS:,} tokens of calibration "
        "text, 1,024 a step, by distillation, by plain next-token training, and by the latter from random weights; 16 "
        "passages of 256 tokens of evaluation text; the paper has up to 94 billion tokens"
    )

    def run(self, bench: Bench) -> Finding:
        original = bench.model
        layers = len(anatomy(original).layers)
        gone = {layers * (2 * i + 1) // 6 for i in range(3)}
        cut_one = copy.deepcopy(original)
        cut(cut_one, "layer", [torch.arange(int(index not in gone)) for index in range(layers)], Surgery())
        settle(cut_one)
        plain = "logits=0,hidden=0,text=1"
        arms = {"cut": None, "distilled": "hidden=0.1", "retrained": plain, "from scratch": plain}
        texts = passages(bench, 16, 256)
        counts = [255] * len(texts)

        def read(model: PreTrainedModel) -> list[float]:
            with torch.no_grad():
                return [float(surprisal(model(ids).logits[:, :-1], ids[:, 1:]).sum()) for ids in texts]

        nll = {"whole": read(original)}
        for number, (name, spec) in enumerate(arms.items()):
            student = copy.deepcopy(cut_one)
            if name == "from scratch":
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(0)
                    blank = type(original)(copy.deepcopy(student.config))
                student.load_state_dict({k: v.to(student.dtype) for k, v in blank.state_dict().items()})
            if spec is not None:
                # The rate of each is usual for it: weights that know nothing yet can take larger steps.
                rate = "1e-3" if name == "from scratch" else "1e-4"
                spec = f"distill:{spec},tokens={TOKENS},batch=4,length=256,lr={rate}"
                heal(student, original, spec, tokenizer=bench.tokenizer, progress=False)
            nll[name] = read(student)
            bench.progress((number + 1) / len(arms))
        over = {name: perplexity_ratio(nll[name], nll["whole"], counts) for name in arms}
        against = {n: perplexity_ratio(nll["distilled"], nll[n], counts) for n in arms if n != "distilled"}
        return Finding(
            {"perplexity, whole model": perplexity(nll["whole"], counts)}
            | {f"over whole: {name}": each for name, each in over.items()}
            | {f"distilled over {name}": each for name, each in against.items()},
            {f"distilled is better than {name}": each.high < 1 for name, each in against.items()},
        )
