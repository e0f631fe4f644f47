"""Attention, state space models and gated RNNs as one linear recurrence, in matrices that can be looked at and run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.backbone.recurrence import recurrence as scan
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, function
from foveate.tasks.base import Bench


@dataclass(frozen=True)
class System:
    """A mixer's head as the linear system that a token steers: h_t = A_t h_(t-1) + B_t u_t, y_t = C_t h_t + D_t u_t.

    With `feature` numbers a channel of u (the state expansion), A_t = I x diag(a_t), B_t = I x b_t, C_t = I x c_t', and
    D_t = diag(d), x being the Kronecker product: h is the columns of the recurrence's memory S, one below the other.

    Attributes:
        a: what stays, above 0: (batch, n, heads, feature), (batch, n, heads) for all features, or None, all stays.
        b: how the input is written, (batch, n, heads, feature).
        c: how the state is read, the same.
        d: what goes by it, (heads, columns), or None.

    Example:
        >>> system = attention_system(torch.rand(1, 5, 2, 4), torch.rand(1, 5, 2, 4))
        >>> A, B, C, D = system.matrices(3, columns=6)      # of the first text and head, at the fourth token
        >>> A.shape, B.shape, C.shape, D.shape
        (torch.Size([24, 24]), torch.Size([24, 6]), torch.Size([6, 24]), torch.Size([6, 6]))
    """

    a: Tensor | None
    b: Tensor
    c: Tensor
    d: Tensor | None = None

    @property
    def feature(self) -> int:
        """Numbers that the state holds for each channel of the input."""
        return self.b.shape[-1]

    def matrices(self, t: int, columns: int, text: int = 0, head: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A_t (N, N), B_t (N, columns), C_t (columns, N), D_t (columns, columns), N = feature * columns."""
        one = torch.eye(columns, dtype=self.b.dtype, device=self.b.device)
        b, c = self.b[text, t, head], self.c[text, t, head]
        a = torch.ones_like(b) if self.a is None else self.a[text, t, head].expand_as(b)
        d = torch.zeros_like(one) if self.d is None else self.d[head].diag()
        return torch.kron(one, a.diag()), torch.kron(one, b[:, None]), torch.kron(one, c[None]), d


@function(
    "recurrence",
    role="mixer",
    paper=Paper(
        "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural "
        "Networks",
        2024,
        "https://arxiv.org/abs/2405.15731",
    ),
    claim="attention, state space models and gated rnns are one linear recurrence, softmax attention one without end",
)
def recurrence(system: System, inputs: Tensor, *, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run a system over inputs, in time linear in the length.

    Args:
        system: from `attention_system`, `selective_system`, `gated_system`, or one's own.
        inputs: u, (batch, n, heads, columns): attention's values, a state space model's channels.
        memory: h before the first token as S, (batch, heads, feature, columns); None: zeros.

    Returns:
        y, (batch, n, heads, columns), and S after the last token.

    Raises:
        FoveateError: the shapes don't fit, something that stays is not above 0.

    Example:
        >>> import foveate as fv, torch
        >>> from foveate.mixers.recurrence_forms import attention_system, gated_system
        >>> forget, enter, leave, u = torch.rand(4, 1, 5, 8, 1).unbind()
        >>> y, _ = fv.recurrence(gated_system(forget, enter, leave), u)
        >>> torch.allclose(y[:, 1], leave[:, 1] * (forget[:, 1] * enter[:, 0] * u[:, 0] + enter[:, 1] * u[:, 1]))
        True
    """
    if inputs.shape[:3] != system.b.shape[:3] or system.b.shape != system.c.shape:
        raise FoveateError(
            f"inputs of {tuple(inputs.shape)}, b of {tuple(system.b.shape)} and c of {tuple(system.c.shape)} don't "
            "fit: give the same batch, tokens and heads, and b and c the same features."
        )
    if system.a is not None and not bool((system.a > 0).all()):
        raise FoveateError("what stays (a) must be above 0: give a smallest number in place of 0.")
    y, memory = scan(system.c, system.b, inputs, None if system.a is None else system.a.log(), memory)
    return (y if system.d is None else y + system.d * inputs), memory


def attention_system(q: Tensor, k: Tensor, *, normalise: bool = True) -> System:
    """Attention whose weights are products of features, q_t . k_j over their sum up to t; inputs are the values.

    With e_t = q_t . sum_(j<=t) k_j: A_t = e_(t-1) / e_t, B_t = k_t / e_t, C_t = q_t. The normalisation is what stays.

    Args:
        q, k: features, (batch, n, heads, feature); with `normalise` such that all sums are above 0.
    """
    if not normalise:
        return System(None, k, q)
    total = (q * k.cumsum(1)).sum(-1)
    before = torch.cat([total[:, :1], total[:, :-1]], 1)
    return System(before / total, k / total.unsqueeze(-1), q)


def selective_system(step: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor | None = None) -> System:
    """A selective state space model: A_t = exp(-step_t rate), B_t = step_t b_t, C_t = c_t, D = skip.

    Args:
        step: the discretisation's, (batch, n, heads), above 0.
        rate: (heads,), one number a head, as Mamba-2 has it, or (heads, feature), with heads of one channel, as Mamba.
        b, c: (batch, n, heads, feature).
        skip: (heads, columns).
    """
    a = (-step * rate).exp() if rate.ndim == 1 else (-step.unsqueeze(-1) * rate).exp()
    return System(a, step.unsqueeze(-1) * b, c, skip)


def gated_system(forget: Tensor, enter: Tensor, leave: Tensor) -> System:
    """A gated RNN whose gates hang on the input alone: h_t = forget_t h_(t-1) + enter_t u_t, y_t = leave_t h_t.

    The LSTM without the state in its gates and without tanh; enter = 1 - forget and leave = 1 is the minimal GRU,
    enter = sqrt(1 - forget^2) the RG-LRU.

    Args:
        forget, enter, leave: (batch, n, channels, 1): a head is a channel, and the state holds one number for each.
    """
    return System(forget, enter, leave)


def taylor_features(x: Tensor, degree: int) -> Tensor:
    """Features whose products are the Taylor series of exp(q . k) up to a degree: 1 + d + .. + d^degree of them."""
    parts, power = [torch.ones_like(x[..., :1])], torch.ones_like(x[..., :1])
    for order in range(1, degree + 1):
        power = (power.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / math.sqrt(order)
        parts.append(power)
    return torch.cat(parts, -1)


def random_features(x: Tensor, directions: Tensor) -> Tensor:
    """Positive features whose products have exp(q . k) as their mean, exp(w . x - |x|^2 / 2) / sqrt(count), after
    Performers (arXiv 2009.14794, equation 7).

    Args:
        x: (..., d).
        directions: w, (count, d), normal.
    """
    return (x @ directions.mT - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(directions))


def by_matrices(system: System, inputs: Tensor) -> Tensor:
    """y of the first text and head, (n, columns), with h_t = A_t h_(t-1) + B_t u_t as written: slow."""
    n, columns = inputs.shape[1], inputs.shape[-1]
    h, rows = inputs.new_zeros(system.feature * columns), []
    for t in range(n):
        A, B, C, D = system.matrices(t, columns)
        h = A @ h + B @ inputs[0, t, 0]
        rows.append(C @ h + D @ inputs[0, t, 0])
    return torch.stack(rows)


@claim("recurrence")
class RecurrenceClaim(Claim):
    statement: ClassVar[str] = (
        "linear attention, selective state space models and gated RNNs are one time-varying linear recurrence of other "
        "parameters, linear attention is a selective model that decays by its normalisation, and softmax attention "
        "is approached as the state gets larger"
    )
    setting: ClassVar[str] = (
        "random texts of 96 tokens in float64: the recurrence against each model's own definition, written out token "
        "by token or pair by pair; and 16 texts of 64 tokens, heads of 4 channels, softmax attention against Taylor "
        "features of degree 0, 2, 4 and 6 (weights of an odd degree may be negative and add up to 0), and against 8 to "
        "2,048 random ones. Nothing is trained"
    )
    reads = False

    def run(self, bench: Bench) -> Finding:
        device = bench.model.device
        wrong = {name: check(device) for name, check in SAME.items()}
        bench.progress(0.3)
        taylor, random = _softmax_errors(device)
        bench.progress(1.0)
        metrics = {f"largest difference, {name}": Metric.exact(value) for name, value in wrong.items()}
        for kind, errors in (("Taylor", taylor), ("random", random)):
            for size, values in errors.items():
                metrics[f"error of softmax attention, {size} {kind} features"] = mean(values)
        return Finding(
            metrics,
            {
                **{f"{name}: the same to 1e-9": value < 1e-9 for name, value in wrong.items()},
                "the error falls with every even degree of the series": _falls(taylor),
                "the error falls with every fourfold of random features": _falls(random),
            },
        )


def _falls(errors: dict[int, list[float]]) -> bool:
    """Whether each size's errors are below those of the one before, by more than the paired interval."""
    sizes = list(errors)
    return all(
        mean([x - y for x, y in zip(errors[a], errors[b], strict=True)]).low > 0
        for a, b in zip(sizes, sizes[1:], strict=False)
    )


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def _linear_attention(device: torch.device) -> float:
    q, k, v = _random(device, 3, 2, 96, 3, 8).unbind()
    q, k = q.exp(), k.exp()
    weights = torch.einsum("bnhf,bmhf->bhnm", q, k).tril()
    own = torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v)
    return _apart(recurrence(attention_system(q, k), v)[0], own)


def _selective(device: torch.device, one_a_head: bool) -> float:
    heads, columns, feature = (3, 8, 4) if one_a_head else (24, 1, 4)
    u = _random(device, 2, 96, heads, columns)
    b, c = _random(device, 2, 2, 96, heads, feature).unbind()
    step, skip = _random(device, 2, 96, heads).exp(), _random(device, heads, columns)
    rate = _random(device, heads).exp() if one_a_head else _random(device, heads, feature).exp()
    h, rows = u.new_zeros(2, heads, columns, feature), []
    for t in range(96):
        stays = (-step[:, t, :, None] * rate.view(heads, -1)).exp().unsqueeze(2)
        h = stays * h + (step[:, t, :, None] * b[:, t]).unsqueeze(2) * u[:, t].unsqueeze(-1)
        rows.append((h * c[:, t].unsqueeze(2)).sum(-1) + skip * u[:, t])
    return _apart(recurrence(selective_system(step, rate, b, c, skip), u)[0], torch.stack(rows, 1))


def _gated(device: torch.device) -> float:
    forget, enter, leave = _random(device, 3, 2, 96, 24, 1).sigmoid().unbind()
    u = _random(device, 2, 96, 24, 1)
    h, rows = torch.zeros_like(u[:, 0]), []
    for t in range(96):
        h = forget[:, t] * h + enter[:, t] * u[:, t]
        rows.append(leave[:, t] * h)
    return _apart(recurrence(gated_system(forget, enter, leave), u)[0], torch.stack(rows, 1))


def _matrices(device: torch.device) -> float:
    u, b, c = _random(device, 1, 40, 1, 3), _random(device, 1, 40, 1, 4), _random(device, 1, 40, 1, 4)
    step, skip = _random(device, 1, 40, 1).exp(), _random(device, 1, 3)
    system = selective_system(step, _random(device, 1).exp(), b, c, skip)
    return _apart(recurrence(system, u)[0][0, :, 0], by_matrices(system, u))


def _same_model(device: torch.device) -> float:
    """Linear attention as a selective model: its step is the change of the log of the normalisation, where it may be
    below 0, other than a selective model's own."""
    q, k, v = _random(device, 3, 2, 96, 3, 8).unbind()
    q, k = q.exp(), k.exp()
    total = (q * k.cumsum(1)).sum(-1)
    step = total.log() - torch.cat([total[:, :1], total[:, :-1]], 1).log()
    b = k / (total * step.where(step != 0, 1.0)).unsqueeze(-1)
    model = selective_system(step.where(step != 0, 1.0), torch.ones(3, dtype=torch.double, device=device), b, q)
    return _apart(recurrence(model, v)[0], recurrence(attention_system(q, k), v)[0])


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


SAME: dict[str, Callable[[torch.device], float]] = {
    "linear attention": _linear_attention,
    "selective model, a decay a head (Mamba-2)": lambda device: _selective(device, True),
    "selective model, a decay a channel (Mamba)": lambda device: _selective(device, False),
    "gated RNN (quasi-LSTM)": _gated,
    "linear attention as a selective model, its step free": _same_model,
    "the matrices A, B, C, D": _matrices,
}


def _softmax_errors(device: torch.device) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """Relative errors of softmax attention in each text, by features: of Taylor series, and random."""
    q, k, v = _random(device, 3, 16, 64, 1, 4).unbind()
    q, k = q / 4**0.25, k / 4**0.25  # products are then over sqrt(d)
    scores = torch.einsum("bnhf,bmhf->bhnm", q, k)
    ahead = torch.ones(64, 64, dtype=torch.bool, device=device).triu(1)
    exact = torch.einsum("bhnm,bmhd->bnhd", scores.masked_fill(ahead, -torch.inf).softmax(-1), v)

    def errors(features: Callable[[Tensor], Tensor]) -> list[float]:
        near, _ = recurrence(attention_system(features(q), features(k)), v)
        return ((near - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).tolist()

    taylor = {sum(4**p for p in range(degree + 1)): degree for degree in (0, 2, 4, 6)}
    directions = _random(device, 2048, 4)
    return (
        {size: errors(lambda x, p=p: taylor_features(x, p)) for size, p in taylor.items()},  # type: ignore[misc]
        {m: errors(lambda x, m=m: random_features(x, directions[:m])) for m in (8, 32, 128, 512, 2048)},  # type: ignore[misc]
    )
