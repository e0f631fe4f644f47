"""Low rank: each linear map becomes two thin ones, by its singular values on calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, Streams, claim
from foveate.convert.base import Converter, numbers
from foveate.convert.maps import LinearMap, check_which, like, linear_maps
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper, Target, UnitScores, apply, check_fraction, method
from foveate.models.anatomy import anatomy
from foveate.models.surgery import layer_parameters
from foveate.plans import Spread, Uniform
from foveate.portable.low_rank import LowRankLinear
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity

RIDGE = 1e-6
"""Part of an input's mean energy that is added to each of its directions, so that none counts for nothing."""


@method("low-rank")
class LowRank(Converter):
    """Replace linear maps by two factors each, W ~ U (U' W), with as many ranks as a budget allows.

    U are the first left singular vectors of W (`aware=false`, as in PELA), or of W S, where S S' is the covariance of
    what the map reads on calibration text (`aware=true`): then the error of the map's *output* on that text is the
    least that a map of this rank can have. That is the truncation-aware whitening of SVD-LLM (2024,
    https://arxiv.org/abs/2403.07378, section 3.1): with W S = U T V' it takes U_r T_r V_r' S^-1, which is U_r U_r' W.
    S is the Cholesky factor, found by a QR decomposition of the inputs; neither the covariance nor an inverse is ever
    made.

    Two factors of rank r have r (in + out) parameters; at r = in * out / (in + out) that is no less than the map has.
    So a map that keeps that many ranks stays as it is.

    A covariance of many inputs wants many tokens: SVD-LLM takes hundreds of thousands. With fewer than a few times the
    inputs' width, the factors fit those very tokens, and others badly.

    What is not here: PELA trains the factors between compression and use, by feature distillation from the original
    and with a regulariser that bounds how far weights move. Healing is a step of its own and follows any technique;
    SVD-LLM's own update of the factors is not here either.

    Fields:
        keep: the fraction of the converted maps' parameters that stays, in (0, 1]; 1 converts nothing.
        aware: whether calibration text decides which directions matter.
        maps: which maps are converted, "all", "attention" or "mlp" (of the decoder layers).
        layers: which layers: `all`, `even`, `odd`, or numbers and ranges joined by a slash, such as `0-9/12`.
        budget: how ranks are spread. `uniform`: the same fraction for every map, as in SVD-LLM. `global`: by the part
            of a map's (output) energy that a rank holds for a parameter, over the whole model; this use of singular
            values is ours.
        tokens: of calibration text, where `apply` is given none; read in passages of 512.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with fv.apply(model, "low-rank:keep=0.5,maps=mlp", calibration=torch.arange(1, 65).unsqueeze(0)):
        ...     model.model.layers[0].mlp.gate_proj.down  # 21 * (64 + 128) is half of 64 * 128
        Linear(in_features=64, out_features=21, bias=False)
    """

    paper: ClassVar[Paper | None] = Paper(
        "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
        2023,
        "https://arxiv.org/abs/2310.10700",
    )
    claim: ClassVar[str] = "at equal rank, factors that know the inputs lose far less than a plain SVD's"

    keep: float
    aware: bool = True
    maps: str = "all"
    layers: str = "all"
    budget: Spread = Uniform()
    tokens: int = 8192

    def __post_init__(self) -> None:
        check_fraction(self.name, self.keep)
        if self.tokens < 1:
            raise FoveateError(f"low-rank: tokens={self.tokens} is below 1: give the tokens to read.")
        check_which(self.maps, self.name)

    def converted(self, target: Target) -> dict[str, nn.Module]:
        parts = anatomy(target.model)
        layers = numbers(self.layers, len(parts.layers), self.name)
        if self.keep == 1:
            return {}
        maps = linear_maps(parts, self.maps, self.name, layers)
        if self.aware:
            bases = bases_on(target.model, maps, in_passages(target.calibration(self.tokens)))
        else:
            bases = {each.path: basis(each.weight) for each in maps}
        return factors(maps, bases, self.keep, self.budget)


Basis = tuple[Tensor, Tensor]
"""Directions of a map's output, and the energy in each."""


def factors(maps: Sequence[LinearMap], bases: Mapping[str, Basis], keep: float, budget: Spread) -> dict[str, nn.Module]:
    """Path -> the two factors that stand in, for the maps whose rank under the budget pays.

    Args:
        maps: the maps.
        bases: of each, by path, as `basis` gives them.
        keep: the fraction of the maps' parameters that stays.
        budget: how ranks are spread.
    """
    # The same fraction of each layer depends on no other layer, whatever their widths.
    layers = sorted({each.layer for each in maps}) if isinstance(budget, Uniform) else [None]
    found: dict[str, nn.Module] = {}
    for layer in layers:
        these = [each for each in maps if layer is None or each.layer == layer]
        ranks = ranks_for(these, [bases[each.path][1] for each in these], keep, budget)
        found |= {
            each.path: factorised(each, bases[each.path][0][:, :rank])
            for each, rank in zip(these, ranks, strict=True)
            if rank < paying(each.weight)
        }
    return found


PASSAGE = 512
"""Tokens of a passage, at most."""


def in_passages(ids: Tensor) -> Tensor:
    """A long text (1, n) as passages (n // 512, 512), without what is left over; others as they are."""
    if len(ids) > 1 or ids.shape[1] < 2 * PASSAGE:
        return ids
    return ids[0, : ids.shape[1] // PASSAGE * PASSAGE].view(-1, PASSAGE)


def paying(weight: Tensor) -> int:
    """The rank from which on two factors cost as much as the map (out, in) itself."""
    rows, columns = weight.shape
    return max(1, rows * columns // (rows + columns))


def basis(weight: Tensor, root: Tensor | None = None) -> Basis:
    """Directions of a map's output, the most energetic first, and the energy in each.

    Args:
        weight: (out, in).
        root: S (in, in) where S S' is the inputs' covariance; None: all directions of the input count the same.

    Returns:
        (out, ranks) orthonormal columns in the weight's dtype, and float64 (ranks,) of fractions of the whole
        energy. There are as many as pay (`paying`).
    """
    exact = weight.double()
    vectors, values, _ = torch.linalg.svd(exact if root is None else exact @ root.double(), full_matrices=False)
    energy = values.square() / values.square().sum().clamp(min=1e-300)
    count = paying(weight)
    return vectors[:, :count].to(weight.dtype), energy[:count]


def factorised(each: LinearMap, vectors: Tensor) -> LowRankLinear:
    """A map with its outputs projected onto orthonormal directions (out, rank). The bias stays."""
    weight, bias = each.weight, each.module.bias
    rows, columns = weight.shape
    new: LowRankLinear = like(LowRankLinear(columns, rows, vectors.shape[1], bias is not None), each.module)
    with torch.no_grad():
        new.up.weight.copy_(vectors)
        new.down.weight.copy_(vectors.double().T @ weight.double())
        if bias is not None:
            new.up.bias.copy_(bias)
    return new


def ranks_for(maps: Sequence[LinearMap], energies: Sequence[Tensor], keep: float, budget: Spread) -> list[int]:
    """How many ranks each map keeps, so that a fraction `keep` of all their parameters stays.

    A rank is a unit like a head or a channel: any budget over units spreads them. It is scored by the part of its
    map's energy that it holds, for a parameter.
    """
    layers, roles = max(each.layer for each in maps) + 1, list(dict.fromkeys(each.role for each in maps))
    scores, costs = [], []
    for role in roles:
        these = [(each, energy) for each, energy in zip(maps, energies, strict=True) if each.role == role]
        score = torch.full((layers, max(len(energy) for _, energy in these)), torch.nan, dtype=torch.float64)
        cost = torch.zeros(layers, 1)
        for each, energy in these:
            cost[each.layer] = sum(each.weight.shape)
            score[each.layer, : len(energy)] = energy.cpu() / sum(each.weight.shape)
        scores.append(UnitScores(role, score))
        costs.append(cost)
    whole = sum(each.weight.numel() for each in maps)
    units = sum(float((cost * ~score.scores.isnan()).sum()) for score, cost in zip(scores, costs, strict=True))
    stays = dict(zip(roles, budget.spend(scores, costs, units - keep * whole), strict=True))
    ranks = [int(stays[each.role][each.layer].sum()) for each in maps]
    kept = sum(
        each.weight.numel() if rank >= paying(each.weight) else rank * sum(each.weight.shape)
        for each, rank in zip(maps, ranks, strict=True)
    )
    step = sum(sum(each.weight.shape) for each in maps) * max(2, budget.multiple) / 2  # a rank each, or half a multiple
    if kept > keep * whole + 0.02 * whole + step:
        raise FoveateError(
            f"low-rank: keep={keep} was asked for, and with this budget {kept / whole:.2f} of the parameters stay: "
            "keep more, or lower the budget's floor or multiple."
        )
    return ranks


@torch.no_grad()
def bases_on(model: PreTrainedModel, maps: Sequence[LinearMap], calibration: Tensor) -> dict[str, Basis]:
    """The basis of each map by its path, for what it reads on calibration text.

    The model is run once, and each map's inputs are dealt with when they come by, so that those of all maps are never
    there together.

    Args:
        model: the model.
        maps: maps in it.
        calibration: token ids (batch, length).
    """
    found: dict[str, Basis] = {}
    last: tuple[Any, Any] = (None, None)  # maps that read the same input, q, k and v say, share its root
    with ExitStack() as hooks:
        for each in maps:

            def before(module: nn.Module, args: tuple[Any, ...], each: LinearMap = each) -> None:
                nonlocal last
                if last[0] is not args[0]:
                    last = (args[0], input_root(args[0].flatten(0, -2)))
                found[each.path] = basis(each.weight, last[1])

            hooks.callback(each.module.register_forward_pre_hook(before).remove)
        anatomy(model).base(calibration, use_cache=False)
    return found


def input_root(rows: Tensor) -> Tensor:
    """S, float32 (in, in), where S S' is the sum of x x' over rows x (n, in), plus a ridge."""
    rows = rows.float()
    weak = (RIDGE * rows.square().mean() * len(rows)).sqrt()
    ridge = weak * torch.eye(rows.shape[1], device=rows.device)
    return torch.linalg.qr(torch.cat([rows, ridge]), mode="r").R.T


@claim("low-rank")
class AwareLosesLess(Claim):
    statement: ClassVar[str] = (
        "low-rank factors keep most of a model (abstract, after an intermediate training that is not done here); "
        "factors that know the inputs lose far less than a plain SVD's (SVD-LLM, abstract)"
    )
    setting: ClassVar[str] = (
        "80% of the parameters of all linear maps kept, no healing; 8,192 tokens of calibration text, 2,048 of "
        "evaluation text; ranks the same fraction everywhere, and spread by energy"
    )

    def run(self, bench: Bench) -> Finding:
        streams = Streams(bench, Perplexity(tokens=2048, chunk=256), of=4)
        whole = layer_parameters(bench.model)
        full = streams.read("full")
        aware, plain, spread = (
            streams.read(f"low-rank:keep=0.8{more}") for more in ("", ",aware=false", ",budget=global")
        )
        with apply(bench.model, "low-rank:keep=0.8,aware=false", tokenizer=bench.tokenizer):
            kept = layer_parameters(bench.model) / whole
        return Finding(
            {
                "perplexity, whole model": full.perplexity,
                "over whole: activation-aware": aware.over(full),
                "over whole: plain SVD": plain.over(full),
                "over whole: activation-aware, budget=global": spread.over(full),
                "activation-aware over plain": aware.over(plain),
                "parameters of the layers, fraction": Metric.exact(kept),
            },
            {
                "activation-aware below plain SVD at equal rank": aware.below(plain),
                "the parameters are what keep says (within 1%)": abs(kept - 0.8) < 0.01,
                "little loss without healing (within 10%)": aware.over(full).value < 1.10,
            },
        )
