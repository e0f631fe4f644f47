"""EMoE: the neurons of a dense MLP, grouped by their keys into experts, of which each token uses a few."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from foveate.claims import Claim, Finding, Streams, claim
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Change, Paper, Recipe, Target, apply, method
from foveate.models.anatomy import LayerParts, anatomy
from foveate.models.surgery import Surgery, has_mlp
from foveate.portable.experts import Experts
from foveate.portable.parts import NoNorm
from foveate.tasks.base import Bench
from foveate.tasks.perplexity import Perplexity

ROUNDS = 20
"""Rounds of clustering at most."""


@method("emoe")
class EMoE(Change):
    """Split every dense MLP into experts, and let only the `top_k` best of them work for each token.

    The neurons are clustered by their keys, the rows of the gate's map (of `up`, where there is no gate), at length 1,
    into clusters of equal size. An expert's score for a token is the mean of its keys times the input, which is
    the mean of its neurons' pre-activations; the best experts' neurons work as they did before, with no weight. No
    parameter is new: neurons are put in another order, so that each expert is a block, and mean keys are worked
    out from the weights. With `top_k = experts` the MLP gives what it gave.

    As in the paper, but for three things. The paper fine-tunes with the experts in place, which is where it sees its
    gains, and puts them into some layers; here the model is used as it is, and all layers have experts. And
    clusters of equal size are found in turns of k-means where neurons ask for a place and the nearest get it,
    where the paper's code solves a flow problem.

    Fields:
        experts: experts of each MLP; its width must be a multiple of that.
        top_k: of these, how many work for a token.

    Errors: FoveateError where a width is no multiple, or an MLP's maps have been replaced.

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama")
        >>> before = sum(p.numel() for p in model.parameters())
        >>> with fv.apply(model, "emoe:experts=8,top_k=4"):
        ...     out = model(torch.arange(1, 11).unsqueeze(0))
        ...     sum(p.numel() for p in model.parameters()) == before
        True
    """

    role: ClassVar[str] = "depth"
    paper: ClassVar[Paper | None] = Paper(
        "Emergent Mixture-of-Experts: Can Dense Pre-trained Transformers Benefit from Emergent Modular Structures?",
        2023,
        "https://arxiv.org/abs/2310.10908",
    )
    claim: ClassVar[str] = "a dense MLP's neurons form clusters, and a token needs a few of them"

    experts: int
    top_k: int

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise FoveateError(f"{self}: top_k must be from 1 to experts={self.experts}.")

    def grouped(self, keys: Tensor, layer: int) -> Tensor:
        """The order in which neurons stand, expert by expert: LongTensor (neurons,). Keys are (neuron, hidden)."""
        return balanced_clusters(keys, self.experts)

    def change(self, target: Target, surgery: Surgery) -> None:
        parts = anatomy(target.model)
        for layer in parts.layers:
            if not has_mlp(layer):
                continue
            experts = self._experts(layer, _activation(target.model))
            if layer.mlp_name is not None:
                surgery.swap(layer.module, layer.mlp_name, experts)
            else:  # OPT's maps hang on the layer itself: what stands before the last hands on the input
                surgery.swap(layer.module, layer.names["up"], NoNorm())
                surgery.swap(layer.module, "activation_fn", NoNorm())
                surgery.swap(layer.module, layer.names["down"], experts)

    def _experts(self, layer: LayerParts, act: str) -> Experts:
        gate, up, both = (_map(module, layer) for module in (layer.gate, layer.up, layer.gate_up))
        if both is not None:  # all gates, then all ups
            gate, up = _halves(both)
        last = _map(layer.down, layer)
        if up is None or last is None:
            raise FoveateError(
                f"{self.name}: layer {layer.index} holds a {type(layer.mlp).__name__} whose maps aren't known: put "
                "emoe before what replaces MLPs."
            )
        down, down_bias = last
        width = down.shape[1]
        if width % self.experts:
            raise FoveateError(
                f"{self}: the MLP of layer {layer.index} has {width} neurons, which can't be split into {self.experts} "
                "experts of equal size: give a number that divides it."
            )
        order = self.grouped((up if gate is None else gate)[0], layer.index).to(down.device)
        bias, gated = up[1] is not None, gate is not None
        with torch.device(down.device):
            made = Experts(down.shape[0], width, self.experts, self.top_k, act, gated, bias, down_bias is not None).to(
                down.dtype
            )
        with torch.no_grad():
            for linear, given in ((made.gate, gate), (made.up, up)):
                if linear is not None and given is not None:
                    linear.weight.copy_(given[0][order])
                    if given[1] is not None:
                        linear.bias.copy_(given[1][order])
            made.down.weight.copy_(down[:, order])
            if down_bias is not None:
                made.down.bias.copy_(down_bias)
        first = next(p for m in (layer.up, layer.gate_up) if m is not None for p in m.parameters())
        return made.requires_grad_(first.requires_grad).train(layer.module.training)


Map = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias."""


def _map(module: nn.Module | None, layer: LayerParts) -> Map | None:
    """Weight (out, in) and bias of a linear map; None where there is none."""
    if module is None:
        return None
    if not isinstance(module, nn.Linear | Conv1D):
        raise FoveateError(
            f"emoe: layer {layer.index} holds a {type(module).__name__}, whose neurons can't be moved: put emoe "
            "before what converts or wraps its maps."
        )
    weight = module.weight.detach()
    bias: Tensor | None = None if module.bias is None else module.bias.detach()
    return (weight.T if isinstance(module, Conv1D) else weight), bias


def _halves(both: Map) -> tuple[Map, Map]:
    """Two maps that lie in one, one after the other."""
    (a, b), biases = both[0].chunk(2), (None, None) if both[1] is None else both[1].chunk(2)
    return (a, biases[0]), (b, biases[1])


def _activation(model: PreTrainedModel) -> str:
    """The name of the MLPs' activation: families call it differently."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next(str(value) for name in names if (value := getattr(model.config, name, None)) is not None)


@torch.no_grad()
def balanced_clusters(keys: Tensor, clusters: int) -> Tensor:
    """Group vectors by direction into clusters of equal size.

    Args:
        keys: (neuron, hidden); the number of neurons is a multiple of `clusters`.
        clusters: how many.

    Returns:
        LongTensor (neuron,), on the CPU: the neurons of the first cluster, ascending, then those of the next.

    Example:
        >>> east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> sorted(balanced_clusters(torch.stack([east, north, north, east, north, east]), 2).view(2, 3).tolist())
        [[0, 3, 5], [1, 2, 4]]
    """
    keys = nn.functional.normalize(keys.float(), dim=-1)
    first = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))[:clusters]
    centres, of = keys[first.to(keys.device)], None
    for _ in range(ROUNDS):
        before, of = of, _places(keys @ centres.T)
        if before is not None and torch.equal(of, before):
            break
        centres = torch.stack([keys[of == cluster].mean(dim=0) for cluster in range(clusters)])
    assert of is not None
    return of.argsort(stable=True).cpu()


def _places(likeness: Tensor) -> Tensor:
    """A cluster for each neuron, as many in each: neurons ask in the order of their liking, and the most alike stay.

    Args:
        likeness: (neuron, cluster).

    Returns:
        LongTensor (neuron,). No neuron and cluster would both rather have each other.
    """
    neurons, clusters = likeness.shape
    room = neurons // clusters
    liked = likeness.argsort(dim=1, descending=True, stable=True)
    asked = torch.zeros(neurons, dtype=torch.long, device=likeness.device)  # how many have turned a neuron down
    while True:
        of = liked.gather(1, asked[:, None]).squeeze(1)
        value = likeness.gather(1, of[:, None]).squeeze(1)
        order = value.argsort(descending=True, stable=True)
        order = order[of[order].argsort(stable=True)]  # cluster by cluster, the most alike first
        counts = of.bincount(minlength=clusters)
        rank = torch.arange(neurons, device=of.device) - (counts.cumsum(0) - counts)[of[order]]
        turned_down = order[rank >= room]
        if not len(turned_down):
            return of
        asked[turned_down] += 1


@dataclass(frozen=True, kw_only=True)
class _RandomExperts(EMoE):
    """The control, for the claim: neurons are grouped at random."""

    seed: int = 0

    def grouped(self, keys: Tensor, layer: int) -> Tensor:
        return torch.randperm(len(keys), generator=torch.Generator().manual_seed(1000 * self.seed + layer))


def captured(model: PreTrainedModel, ids: Tensor, recipe: EMoE) -> list[float]:
    """The part of the MLPs' activation (sum of absolute values) in the chosen experts, for each block of 64 tokens.

    The model runs with all experts, so that what is chosen from is the same for every grouping.

    Args:
        model: the model.
        ids: token ids, LongTensor (1, length).
        recipe: how neurons are grouped, and how many experts are chosen.
    """
    found: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...]) -> None:
        states = args[0].flatten(0, -2)
        mass = module.inner(states, slice(None)).abs().float().unflatten(1, (module.experts, -1)).sum(dim=-1)
        module.top_k = recipe.top_k
        found.append(mass.gather(1, module.chosen(states)).sum(dim=1) / mass.sum(dim=1))
        module.top_k = module.experts

    with torch.no_grad(), apply(model, replace(recipe, top_k=recipe.experts)):
        for module in model.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(look)
        model(ids, use_cache=False)
    by_token = torch.stack(found).mean(dim=0)
    return [float(block.mean()) for block in by_token.split(64)]


@claim("emoe")
class NeuronsFormClusters(Claim):
    statement: ClassVar[str] = (
        "a pre-trained MLP has modules without having been made with any: clusters of its keys, chosen by mean key, do "
        "better than random groups (abstract and ablations; that fine-tuning with them generalises better is not tried)"
    )
    setting: ClassVar[str] = (
        "16 experts in every MLP; 1,024 tokens of evaluation text; the part of the activation that the best 4 and "
        "8 hold, and perplexity with 12 and 8 of 16, against two random groupings"
    )

    def run(self, bench: Bench) -> Finding:
        ids = tokens(bench.text.evaluation, bench.tokenizer, 1024).to(bench.model.device)
        streams = Streams(bench, Perplexity(tokens=1024, chunk=128), of=7)
        with torch.no_grad():
            before = bench.model(ids[:, :256], use_cache=False).logits
            with apply(bench.model, Recipe.of("emoe:experts=16,top_k=16")):
                off = float(
                    (bench.model(ids[:, :256], use_cache=False).logits - before).abs().max() / before.abs().max()
                )
        metrics = {"largest error of a logit with all experts, over the largest logit": Metric.exact(off)}
        checks = {"all experts: the same logits (to 1e-3)": off < 1e-3}
        for top_k in (4, 8):
            ours = captured(bench.model, ids, EMoE(experts=16, top_k=top_k))
            metrics[f"activation in {top_k} of 16: clusters"] = mean(ours)
            for seed in (0, 1):
                control = captured(bench.model, ids, _RandomExperts(experts=16, top_k=top_k, seed=seed))
                metrics[f"activation in {top_k} of 16: random groups {seed + 1}"] = mean(control)
                more = mean([a - b for a, b in zip(ours, control, strict=True)])
                checks[f"{top_k} of 16 hold more than of random groups {seed + 1}"] = more.low > 0
        full = streams.read("full")
        metrics["perplexity, whole model"] = full.perplexity
        for top_k in (12, 8):
            stream = streams.read(EMoE(experts=16, top_k=top_k))
            metrics[f"over whole, {top_k} of 16: clusters"] = stream.over(full)
            for seed in (0, 1):
                random = streams.read(_RandomExperts(experts=16, top_k=top_k, seed=seed))
                metrics[f"over whole, {top_k} of 16: random groups {seed + 1}"] = random.over(full)
                checks[f"perplexity with {top_k} of 16: better than random groups {seed + 1}"] = stream.below(random)
        return Finding(metrics, checks)
