"""Looking at values inside a model and changing them: recording, ablation, activation patching, path patching.

A **site** is a place that holds a value for each token: the residual stream before a layer, what a sublayer adds to it,
what a head gives, a head's query, key or value. `recorded` notes values at sites, `patched` puts others in their place.
All causal experiments are made of these two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.errors import FoveateError
from foveate.models.anatomy import Anatomy, LayerParts, anatomy
from foveate.models.attention import Call, replaced_attention, weights_of

Kind = Literal["residual", "attention", "mlp", "head", "query", "key", "value"]


class Site(NamedTuple):
    """A place in a model that holds a value for each token, (batch, token, width).

    Attributes:
        kind: "residual": the stream as it enters the layer, width hidden (of the layer after the last one, as it enters
            the final norm). "attention", "mlp": what the attention module, or the MLP's last map, puts out, width
            hidden (in families with a norm after it, before that norm). "head": what a query head gives to the
            attention's last map, width head_dim. "query": of a query head, "key" and "value": of a KV head, as the map
            makes them, before positions; width head_dim.
        layer: index of the layer.
        head: of "head" and "query" the query head, of "key" and "value" the KV head; else None.
    """

    kind: Kind
    layer: int
    head: int | None = None


Patch = Callable[[Tensor], Tensor] | Tensor
"""New values for a site: a tensor (batch or 1, token, width), or a function from the old ones to the new ones."""


def head_sites(parts: Anatomy) -> list[Site]:
    """The site of every query head of a model, layer by layer.

    Example:
        >>> import foveate as fv
        >>> len(head_sites(fv.anatomy(fv.tiny("llama"))))
        16
    """
    return [Site("head", layer.index, head) for layer in parts.layers for head in range(parts.heads)]


@contextmanager
def patched(model: PreTrainedModel, patches: Mapping[Site, Patch]) -> Iterator[None]:
    """While in force, every forward has other values at these sites.

    Args:
        model: a causal language model of a known family.
        patches: what stands at each site. Several heads of a layer may be patched at once.

    Raises:
        FoveateError: a site that the model does not have.

    Example:
        >>> import foveate as fv, torch
        >>> model, ids = fv.tiny("llama"), torch.arange(1, 9).unsqueeze(0)
        >>> with patched(model, {Site("head", 2, 1): torch.zeros_like}):    # head 2.1 gives nothing
        ...     without = model(ids).logits
        >>> torch.equal(without, model(ids).logits)
        False
    """
    parts = anatomy(model)
    with ExitStack() as hooks:
        for (module, before), group in _by_hook(parts, patches).items():
            shape: list[int] = []
            if (layer := _layer_that_flattens(parts, module)) is not None:
                hooks.callback(_noting(layer, shape).remove)
            hooks.callback(_hook(module, before, group, shape).remove)
        yield


@contextmanager
def recorded(model: PreTrainedModel, sites: Iterable[Site]) -> Iterator[dict[Site, Tensor]]:
    """While in force, every forward notes the values at these sites: the last forward's, without gradient.

    Yields:
        site -> (batch, token, width), on the model's device.

    Example:
        >>> import foveate as fv, torch
        >>> model = fv.tiny("llama")
        >>> with recorded(model, [Site("residual", 4), Site("head", 0, 3)]) as values:
        ...     _ = model(torch.arange(1, 9).unsqueeze(0))
        >>> values[Site("residual", 4)].shape, values[Site("head", 0, 3)].shape
        (torch.Size([1, 8, 64]), torch.Size([1, 8, 16]))
    """
    values: dict[Site, Tensor] = {}

    def keeping(site: Site) -> Callable[[Tensor], Tensor]:
        def keep(value: Tensor) -> Tensor:
            values[site] = value.detach().clone()
            return value

        return keep

    with patched(model, {site: keeping(site) for site in sites}):
        yield values


def ablated(
    model: PreTrainedModel, heads: Iterable[tuple[int, int]], means: Mapping[Site, Tensor] | None = None
) -> AbstractContextManager[None]:
    """While in force, these query heads, (layer, head), give nothing; with `means`, that constant for every token.

    Args:
        model: the model.
        heads: which heads.
        means: for each head's site what it gives on average, (head_dim,).

    Example:
        >>> import foveate as fv, torch
        >>> model, ids = fv.tiny("llama"), torch.arange(1, 9).unsqueeze(0)
        >>> with ablated(model, [(0, 1), (3, 2)]):
        ...     without = model(ids).logits
    """

    def patch(site: Site) -> Patch:
        if means is None:
            return torch.zeros_like
        return lambda value: means[site].to(value).expand_as(value)

    sites = [Site("head", layer, head) for layer, head in heads]
    return patched(model, {site: patch(site) for site in sites})


@torch.no_grad()
def means_of(model: PreTrainedModel, ids: Tensor, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """What each site holds on average over the tokens of `ids`, LongTensor (batch, token): float32 (width,)."""
    with recorded(model, sites) as values:
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    return {site: values[site].float().flatten(0, 1).mean(0) for site in sites}


def at(positions: Sequence[int] | slice, value: Tensor) -> Callable[[Tensor], Tensor]:
    """A patch at some positions only: there the values are those of `value`, elsewhere they stay.

    Args:
        positions: which tokens.
        value: (batch or 1, token, width), as long as the text.

    Example:
        >>> at([1], torch.ones(1, 3, 2))(torch.zeros(1, 3, 2))[0, :, 0].tolist()
        [0.0, 1.0, 0.0]
    """
    where = positions if isinstance(positions, slice) else list(positions)

    def patch(old: Tensor) -> Tensor:
        new = old.clone()
        new[:, where] = value[:, where].to(new)
        return new

    return patch


@contextmanager
def knocked_out(model: PreTrainedModel, blocked: Mapping[int, Tensor]) -> Iterator[None]:
    """While in force, some attention edges of some layers are blocked; the rest of each row is made to sum to one.

    For whole texts without a cache and without padding.

    Args:
        model: the model.
        blocked: layer -> bool (query, entry), or (head, query, entry): which edges are blocked. A query that could see
            nothing any more gives zero.

    Raises:
        FoveateError: a layer that the model does not have; something else stands in for its attention.

    Example:
        >>> import foveate as fv, torch
        >>> model, ids = fv.tiny("llama"), torch.arange(1, 9).unsqueeze(0)
        >>> edges = torch.zeros(8, 8, dtype=torch.bool)
        >>> edges[7, 2] = True                              # the last token can't look at token 2
        >>> with knocked_out(model, {layer: edges for layer in range(4)}):
        ...     logits = model(ids, use_cache=False).logits
    """

    count = len(anatomy(model).layers)
    if strange := [layer for layer in blocked if not 0 <= layer < count]:
        raise FoveateError(f"attention knockout: there is no layer {strange[0]}: this model's are 0 to {count - 1}.")

    def attention(call: Call) -> Tensor:
        group = call.query.shape[1] // call.key.shape[1]
        allowed = None
        if call.layer in blocked:
            edges = blocked[call.layer].to(call.query.device)
            allowed = ~(edges if edges.dim() == 2 else edges.unflatten(0, (-1, group)))
        weights = weights_of(call, allowed).nan_to_num(0.0)  # of a row without any edge
        return (weights.to(call.value.dtype) @ call.value[:, :, None]).flatten(1, 2)

    with replaced_attention(model, attention, "attention knockout"):
        yield


# ---- experiments ----------------------------------------------------------------------------------------------------

Score = Callable[[Tensor], Tensor]
"""What an experiment is judged by: from logits (batch, token, vocab) to a number, or a number for each row."""


@torch.no_grad()
def activation_patching(
    model: PreTrainedModel,
    ids: Tensor,
    values: Mapping[Site, Tensor],
    sites: Sequence[Site],
    score: Score,
    *,
    positions: Sequence[int] | slice = slice(None),
    progress: Callable[[float], None] = lambda done: None,
) -> Tensor:
    """The score of `ids` when one site at a time holds what it held in another run.

    Args:
        model: the model.
        ids: LongTensor (batch, token): the text that is read.
        values: what the sites held in the other run (of `recorded`), on texts of the same length.
        sites: which sites, one after the other.
        score: what is measured.
        positions: the tokens at which a site is patched.
        progress: called with the fraction done.

    Returns:
        (sites,) or (sites, batch), float64 on the CPU.

    Source: Investigating Gender Bias in Language Models Using Causal Mediation Analysis (2020), section 3.
    """
    found = []
    for done, site in enumerate(sites):
        with patched(model, {site: at(positions, values[site])}):
            found.append(score(model(ids, use_cache=False).logits).double().cpu())
        progress((done + 1) / len(sites))
    return torch.stack(found)


@torch.no_grad()
def path_patching(
    model: PreTrainedModel,
    ids: Tensor,
    other: Tensor,
    senders: Sequence[Site],
    receivers: Sequence[Site],
    score: Score,
    *,
    positions: Sequence[int] | slice = slice(None),
    freeze_mlps: bool = False,
    progress: Callable[[float], None] = lambda done: None,
) -> Tensor:
    """The score of `ids` when one sender at a time says what it says on `other`, and only the receivers hear it.

    Every other head (and MLP, with `freeze_mlps`) gives what it gives on `ids`, so that the change reaches the
    receivers along the residual stream alone, not through heads between.

    Args:
        model: the model.
        ids, other: LongTensor (batch, token), of the same shape: the text that is read, and the one that senders know.
        senders: heads or sublayers, one after the other.
        receivers: what hears them: queries, keys, values of heads, or the residual stream at the end.
        score: what is measured.
        positions: the tokens at which receivers hear.
        freeze_mlps: whether MLPs, too, stay as they are on `ids`.
        progress: called with the fraction done.

    Returns:
        (senders,) or (senders, batch), float64 on the CPU.

    Source: Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small (2022), section
    3.1.
    """
    parts = anatomy(model)
    frozen = head_sites(parts)
    if freeze_mlps:
        frozen += [Site("mlp", layer.index) for layer in parts.layers]
    with recorded(model, frozen) as here:
        model(ids, use_cache=False, logits_to_keep=1)
    with recorded(model, senders) as there:
        model(other, use_cache=False, logits_to_keep=1)
    found = []
    for done, sender in enumerate(senders):
        still: dict[Site, Patch] = {site: here[site] for site in frozen if site != sender}
        with patched(model, still | {sender: there[sender]}), recorded(model, receivers) as heard:
            model(ids, use_cache=False, logits_to_keep=1)
        with patched(model, {site: at(positions, heard[site]) for site in receivers}):
            found.append(score(model(ids, use_cache=False).logits).double().cpu())
        progress((done + 1) / len(senders))
    return torch.stack(found)


# ---- where sites are ------------------------------------------------------------------------------------------------


def _by_hook(
    parts: Anatomy, patches: Mapping[Site, Patch]
) -> dict[tuple[nn.Module, bool], list[tuple[slice | list[int], Patch]]]:
    """Patches by the module that holds their sites and whether that is its input; each with the channels it takes."""
    groups: dict[tuple[nn.Module, bool], list[tuple[slice | list[int], Patch]]] = {}
    for site, patch in patches.items():
        module, before, channels = _place(parts, Site(*site))
        groups.setdefault((module, before), []).append((channels, patch))
    return groups


def _place(parts: Anatomy, site: Site) -> tuple[nn.Module, bool, slice | list[int]]:
    """The module that a site belongs to, whether it is its input, and which channels of it."""
    count, everything = len(parts.layers), slice(None)
    if site.kind not in get_args(Kind):
        raise FoveateError(f"{site}: there is no such kind of site: {', '.join(get_args(Kind))}.")
    if not 0 <= site.layer < count + (site.kind == "residual"):
        raise FoveateError(f"{site}: this model's layers are 0 to {count - 1}: name one of them.")
    if site.kind == "residual":
        if site.layer < count:
            return parts.layers[site.layer].module, True, everything
        return parts.final_norm if parts.final_norm is not None else parts.head, True, everything
    layer = parts.layers[site.layer]
    if site.kind == "attention":
        return layer.attention, False, everything
    if site.kind == "mlp":
        return _there(layer.down, site), False, everything
    heads = parts.kv_heads if site.kind in ("key", "value") else parts.heads
    if site.head is None or not 0 <= site.head < heads:
        raise FoveateError(f"{site}: this model has heads 0 to {heads - 1} there: name one of them.")
    if site.kind == "head":
        return _there(layer.o, site), True, _slots(site.head, parts)
    name = site.kind[0]
    alone = getattr(layer, name)
    if alone is not None:
        return alone, False, _slots(site.head, parts)
    return _there(layer.qkv, site), False, _fused(layer, site, parts)


def _there(module: nn.Module | None, site: Site) -> nn.Module:
    if module is None:
        raise FoveateError(
            f"{site}: layer {site.layer} has no such map, since another module stands in its place: take a model that "
            "was not converted."
        )
    return module


def _slots(at: int, parts: Anatomy) -> slice:
    return slice(at * parts.head_dim, (at + 1) * parts.head_dim)


def _fused(layer: LayerParts, site: Site, parts: Anatomy) -> slice:
    """The channels of a head's query, key or value in the output of `qkv`."""
    head, turn = cast(int, site.head), "qkv".index(site.kind[0])
    if parts.qkv_layout == "heads":
        return _slots(3 * head + turn, parts)
    before = (0, parts.heads, parts.heads + parts.kv_heads)[turn]
    return _slots(before + head, parts)


def _layer_that_flattens(parts: Anatomy, module: nn.Module) -> nn.Module | None:
    """The layer whose own last map this is (OPT): such a layer puts the tokens of all rows into one line for it."""
    return next((layer.module for layer in parts.layers if layer.mlp is None and layer.down is module), None)


def _noting(layer: nn.Module, shape: list[int]) -> Any:
    """A hook that notes how many rows and tokens go into a layer."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape[:] = (args[0] if args else kwargs["hidden_states"]).shape[:2]

    return layer.register_forward_pre_hook(enter, with_kwargs=True)


def _hook(module: nn.Module, before: bool, group: Sequence[tuple[slice | list[int], Patch]], shape: list[int]) -> Any:
    """The hook that changes a module's input or output; `shape`: rows and tokens, where the value has them as one."""

    def change(whole: Tensor) -> Tensor:
        value = whole.view(*shape, -1) if shape else whole
        new = value.clone() if any(channels != slice(None) for channels, _ in group) else value
        for channels, patch in group:
            old = value[..., channels]
            given = patch(old) if callable(patch) else patch.to(old).expand_as(old)
            if channels == slice(None):
                new = given
            else:
                new[..., channels] = given
        return new.reshape(whole.shape)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return (), {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if before:
        return module.register_forward_pre_hook(enter, with_kwargs=True)
    return module.register_forward_hook(leave)
