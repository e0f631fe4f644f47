"""Units cut out of a live model, undone or for good: the one place where weights are sliced.

Every map that reads or writes a width is cut with it, so a technique says which units go, and never touches a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from foveate.errors import FoveateError
from foveate.models.anatomy import Anatomy, LayerParts, anatomy
from foveate.models.caches import partial_cache
from foveate.models.family import families
from foveate.portable.parts import NoAttention, NoMlp, NoNorm, resized, set_heads

KINDS = {
    "layer": "whole decoder layers",
    "attention": "attention sublayers",
    "mlp": "MLP sublayers",
    "kv_head": "KV heads, each with the query heads that it serves",
    "head": "query heads; in a layer each KV head keeps as many",
    "channel": "MLP neurons",
    "hidden": "channels of the residual stream, the same in all layers",
}
"""The kinds of unit that can be cut, in the order in which they are."""


class Surgery:
    """Changes to a live model, in the order they were made, that `undo` takes back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def swap(self, owner: nn.Module, path: str, new: nn.Module) -> None:
        """Put a module in the place of the one at a dotted path."""
        place, _, name = path.rpartition(".")
        self.set(owner.get_submodule(place), name, new)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Give an attribute another value."""
        there, old = hasattr(owner, name), getattr(owner, name, None)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, old) if there else delattr(owner, name))

    def heads(self, attention: nn.Module, heads: int, kv_heads: int) -> None:
        """Tell an attention module how many heads it has now."""
        before = {name: value for name, value in vars(attention).items() if not name.startswith("_")}
        set_heads(attention, heads, kv_heads)
        self._undo.append(lambda: vars(attention).update(before))

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


# ---- what can be cut ----------------------------------------------------------------------------------------------


def unit_counts(model: PreTrainedModel, kind: str) -> list[int]:
    """How many units of a kind each layer has now; `hidden` has one entry, for all layers.

    Raises:
        FoveateError: there is no such kind.

    Example:
        >>> from foveate.models.tiny import tiny
        >>> unit_counts(tiny("llama"), "channel"), unit_counts(tiny("llama"), "hidden")
        ([128, 128, 128, 128], [64])
    """
    parts = anatomy(model)
    if kind == "hidden":
        return [parts.hidden]
    count = {
        "layer": lambda layer: int(has_attention(layer) or has_mlp(layer)),
        "attention": lambda layer: int(has_attention(layer)),
        "mlp": lambda layer: int(has_mlp(layer)),
        "kv_head": lambda layer: _heads(layer, parts)[1],
        "head": lambda layer: _heads(layer, parts)[0],
        "channel": _channels,
    }.get(kind)
    if count is None:
        raise FoveateError(f"there is no unit called {kind!r}: there are {', '.join(KINDS)}.")
    return [count(layer) for layer in parts.layers]


def unit_costs(model: PreTrainedModel, kind: str) -> list[float]:
    """Parameters that leave with one unit of a kind, for each layer; of `hidden`, those in the layers.

    Example:
        >>> from foveate.models.tiny import tiny
        >>> unit_costs(tiny("llama"), "channel")[0]   # a row of gate and up, a column of down
        192.0
    """
    parts = anatomy(model)
    if kind == "hidden":
        return [layer_parameters(model) / parts.hidden]
    counts = unit_counts(model, kind)

    def cost(layer: LayerParts) -> float:
        if kind == "layer":
            return count_parameters(layer.module)
        if kind in ("attention", "mlp"):
            maps = [layer.attention] if kind == "attention" else _mlp_maps(layer)
            norms = [layer.norms[path] for path in _norms_of(layer, attention=kind == "attention")]
            parameters = sum(count_parameters(m) for m in (*maps, *norms))
            return parameters if maps else parameters + count_parameters(layer.mlp)
        if kind == "channel":
            return sum(count_parameters(m) for m in _mlp_maps(layer)) / counts[layer.index]
        if kind == "kv_head" or counts[layer.index] == _heads(layer, parts)[1]:  # each with a KV head of its own
            return count_parameters(layer.attention) / counts[layer.index]
        reads = layer.q if layer.q is not None else layer.qkv
        share = counts[layer.index] / (counts[layer.index] + 2 * _heads(layer, parts)[1]) if layer.q is None else 1.0
        return (count_parameters(reads) * share + count_parameters(layer.o)) / counts[layer.index]

    return [cost(layer) if counts[layer.index] else 0.0 for layer in parts.layers]


def layer_parameters(model: PreTrainedModel) -> int:
    """Parameters of all decoder layers: what is left of a model without embeddings, final norm and head.

    Weights that layers share count once.

    Example:
        >>> from foveate.models.tiny import tiny
        >>> layer_parameters(tiny("llama"))
        147968
    """
    seen = {id(p): p.numel() for layer in anatomy(model).layers for p in layer.module.parameters()}
    return sum(seen.values())


def count_parameters(module: nn.Module | None) -> int:
    """Parameters of a module; 0 for None."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def has_attention(layer: LayerParts) -> bool:
    """Whether the layer still attends."""
    return not isinstance(layer.attention, NoAttention)


def has_mlp(layer: LayerParts) -> bool:
    """Whether the layer still has an MLP."""
    return not isinstance(layer.mlp if layer.down is None else layer.down, NoMlp)


def _channels(layer: LayerParts) -> int:
    """Neurons of the MLP; none where it has no map that could be cut."""
    return size_in(layer.down) if isinstance(layer.down, nn.Linear | Conv1D) else 0


def _mlp_maps(layer: LayerParts) -> list[nn.Module]:
    return [m for m in (layer.gate, layer.up, layer.gate_up, layer.down) if m is not None]


def _heads(layer: LayerParts, parts: Anatomy) -> tuple[int, int]:
    """Query and KV heads that the projections of a layer have now; none where it has no projections."""
    if layer.o is None:
        return 0, 0
    heads = size_in(layer.o) // parts.head_dim
    if layer.k is not None:
        return heads, size_out(layer.k) // parts.head_dim
    return heads, (size_out(layer.qkv) // parts.head_dim - heads) // 2


def size_in(module: Any) -> int:
    """The width that a linear map reads."""
    return int(module.nx if isinstance(module, Conv1D) else module.in_features)


def size_out(module: Any) -> int:
    """The width that a linear map writes."""
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)


# ---- cutting ------------------------------------------------------------------------------------------------------

Means = dict[tuple[int, str], Tensor]
"""(layer, "o" or "down") -> what this map reads on average, float32 (in features); (layer, "attention" or "mlp") ->
what the sublayer adds on average, float32 (hidden)."""


def cut(model: PreTrainedModel, kind: str, keep: list[Tensor], surgery: Surgery, means: Means | None = None) -> None:
    """Cut the units of one kind that are not kept out of a live model.

    Args:
        model: changed in place.
        kind: one of `KINDS`.
        keep: for each layer, the indices of the units that stay, ascending; for `hidden`, one entry for all.
        surgery: takes note of what is done, so that it can be undone.
        means: where given, what a map read on average from the units that leave becomes part of its bias, and
            what a sublayer that leaves added on average, a constant.

    Raises:
        FoveateError: an unknown kind, nothing left in a layer, parts that a technique has replaced.
    """
    parts = anatomy(model)
    counts = unit_counts(model, kind)
    _check(kind, keep, counts, parts)
    _check_sharing(kind, parts, any(len(kept) < count for kept, count in zip(keep, counts, strict=True)))
    if kind == "hidden":
        return _cut_hidden(parts, keep[0], surgery)
    for layer, kept, count in zip(parts.layers, keep, counts, strict=True):
        if len(kept) == count:
            continue
        means_here = {name: mean for (index, name), mean in (means or {}).items() if index == layer.index}
        if kind in ("attention", "layer") and has_attention(layer):
            _drop_attention(layer, surgery, means_here.get("attention"))
        if kind in ("mlp", "layer") and has_mlp(layer):
            _drop_mlp(layer, surgery, means_here.get("mlp"))
        if kind == "channel":
            _cut_channels(layer, kept, surgery, means_here.get("down"))
        if kind in ("head", "kv_head"):
            _cut_heads(layer, parts, kind, kept, surgery, means_here.get("o"))


@contextmanager
def undone(model: PreTrainedModel) -> Iterator[Surgery]:
    """Surgery that is undone at the end of the block. Inside, layers that hold no cache are borne."""
    surgery = Surgery()
    with partial_cache(model):
        try:
            yield surgery
        finally:
            surgery.undo()


def narrow(module: nn.Module | None, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Module:
    """A copy of a linear map, embedding or norm with only some outputs (`rows`) and inputs (`columns`).

    An embedding's outputs are its columns, as its weight lies. A norm has rows only.
    """
    if not isinstance(module, nn.Linear | Conv1D | nn.Embedding) and not _is_norm(module):
        raise FoveateError(
            f"a {type(module).__name__} can't be cut: prune a model before its parts are converted or wrapped."
        )
    assert module is not None
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(module, "bias", None)
    if isinstance(module, Conv1D):
        new = _select(weight, columns, rows)
    elif weight.ndim == 2:
        new = _select(weight, rows, columns)
    else:
        new = _select(weight, rows, None)
    shapes: dict[str, list[int] | None] = {"weight": list(new.shape)}
    if bias is not None:
        bias = _select(bias, rows, None)
        shapes["bias"] = list(bias.shape)
    small = resized(module, shapes)
    with torch.no_grad():
        small.weight.copy_(new)  # type: ignore[operator]
        if bias is not None:
            small.bias.copy_(bias)  # type: ignore[operator]
    return small


def _is_norm(module: Any) -> bool:
    parameters = [p for p in getattr(module, "_parameters", {}).values() if p is not None]
    return 0 < len(parameters) <= 2 and all(p.ndim == 1 for p in parameters) and hasattr(module, "weight")


def _select(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    tensor = tensor if rows is None else tensor[rows.to(tensor.device)]
    return tensor if columns is None else tensor[:, columns.to(tensor.device)]


def _check(kind: str, keep: list[Tensor], counts: list[int], parts: Anatomy) -> None:
    if len(keep) != len(counts):
        raise FoveateError(
            f"units of {len(keep)} layers were given, but this model has {len(counts)}: make a plan for it."
        )
    inside = kind in ("head", "kv_head", "channel")  # units of a sublayer, which has to keep some
    for index, (kept, count) in enumerate(zip(keep, counts, strict=True)):
        if (
            len(kept)
            and not count
            and kind in ("head", "kv_head", "channel")
            and _is_foreign(parts.layers[index], kind)
        ):
            raise FoveateError(
                f"the {'MLP' if kind == 'channel' else 'attention'} of layer {index} has been converted and can't be "
                "cut: prune a model before its parts are converted."
            )
        if len(kept) and int(kept.max()) >= count:
            raise FoveateError(
                f"layer {index} has {count} units of the kind {kind}, and unit {int(kept.max())} was to be kept: make "
                "a plan for this model."
            )
        if (inside or kind == "hidden") and count and not len(kept):
            raise FoveateError(
                f"every {kind} of layer {index} would leave: keep more, or drop the whole sublayer (kind "
                f"{'mlp' if kind == 'channel' else 'attention'})."
            )
    if kind == "layer" and not any(len(kept) for kept in keep):
        raise FoveateError("every layer would leave: keep more.")
    if kind == "hidden" and parts.family.startswith("gemma"):
        raise FoveateError(
            f"the residual stream of a {parts.family} model can't be cut, because its embeddings are scaled by their "
            "width: cut channels, heads or layers."
        )


def _is_foreign(layer: LayerParts, kind: str) -> bool:
    """Whether the layer has the sublayer, in a form that has no units of the kind."""
    return has_mlp(layer) if kind == "channel" else has_attention(layer)


def _check_sharing(kind: str, parts: Anatomy, something_leaves: bool) -> None:
    """Whole sublayers can't leave where one may hold what others read."""
    if kind not in ("layer", "attention", "mlp") or not something_leaves:
        return
    for layer in parts.layers:
        for path, module in layer.module.named_modules():
            if hasattr(module, "tie"):
                raise FoveateError(
                    f"layer {layer.index} shares what its {path} holds with other layers, so none of them can leave: "
                    "prune a model before its parts are converted."
                )


def _drop_attention(layer: LayerParts, surgery: Surgery, mean: Tensor | None) -> None:
    gone = NoAttention(layer.index, None if mean is None else len(mean))
    _constant(gone, mean, layer.attention)
    surgery.swap(layer.module, layer.attention_name, gone)
    for name in _norms_of(layer, attention=True):
        surgery.swap(layer.module, name, NoNorm())


def _drop_mlp(layer: LayerParts, surgery: Surgery, mean: Tensor | None) -> None:
    gone = NoMlp(None if mean is None else len(mean))
    _constant(gone, mean, layer.down)
    if layer.mlp_name is not None:
        surgery.swap(layer.module, layer.mlp_name, gone)
    else:  # OPT's maps hang on the layer itself: what runs before the last is for nothing, and costs next to it
        surgery.swap(layer.module, layer.names["up"], NoNorm())
        surgery.swap(layer.module, layer.names["down"], gone)
    for name in _norms_of(layer, attention=False):
        surgery.swap(layer.module, name, NoNorm())


def _constant(gone: NoAttention | NoMlp, mean: Tensor | None, like: nn.Module | None) -> None:
    if mean is not None and like is not None:
        first = next(like.parameters())
        gone.value = nn.Parameter(mean.detach().to(first.device, first.dtype).clone(), first.requires_grad)


def _norms_of(layer: LayerParts, attention: bool) -> list[str]:
    """Paths of the norms that run for one sublayer only: the first half is the attention's."""
    half = len(layer.norms) // 2
    return list(layer.norms)[:half] if attention else list(layer.norms)[half:]


def _cut_channels(layer: LayerParts, kept: Tensor, surgery: Surgery, mean: Tensor | None) -> None:
    width = size_in(layer.down)
    for role in ("gate", "up"):
        if (module := getattr(layer, role)) is not None:
            surgery.swap(layer.module, layer.names[role], narrow(module, rows=kept))
    if layer.gate_up is not None:
        rows = torch.cat([kept, kept + width])
        surgery.swap(layer.module, layer.names["gate_up"], narrow(layer.gate_up, rows=rows))
    surgery.swap(layer.module, layer.names["down"], _narrow_input(layer.down, kept, mean))


def _cut_heads(
    layer: LayerParts, parts: Anatomy, kind: str, kept: Tensor, surgery: Surgery, mean: Tensor | None
) -> None:
    dim = parts.head_dim
    heads, kv_heads = _heads(layer, parts)
    group = heads // kv_heads
    if kind == "kv_head" or group == 1:
        kv_kept = kept
        kept = (kept[:, None] * group + torch.arange(group)).flatten()
    else:
        kv_kept = torch.arange(kv_heads)
        each = torch.bincount(kept // group, minlength=kv_heads)
        if len(each.unique()) > 1:
            raise FoveateError(
                f"layer {layer.index}: its KV heads would keep {each.tolist()} query heads, and attention needs as "
                "many for each: keep as many in each group, or cut units of the kind kv_head."
            )
    q, kv = _spans(kept, dim), _spans(kv_kept, dim)
    fewer_kv = len(kv_kept) < kv_heads
    if layer.qkv is not None:
        if parts.qkv_layout == "heads":
            rows = _spans(kept, 3 * dim)
        else:
            rows = torch.cat([q, heads * dim + kv, (heads + kv_heads) * dim + kv])
        surgery.swap(layer.module, layer.names["qkv"], narrow(layer.qkv, rows=rows))
    else:
        surgery.swap(layer.module, layer.names["q"], narrow(layer.q, rows=q))
        if fewer_kv:
            surgery.swap(layer.module, layer.names["k"], narrow(layer.k, rows=kv))
            surgery.swap(layer.module, layer.names["v"], narrow(layer.v, rows=kv))
    for name, rows, size in (("q_norm", q, heads * dim), ("k_norm", kv, kv_heads * dim)):
        norm = getattr(layer.attention, name, None)  # OLMo 2 norms all heads at once
        if norm is not None and norm.weight.shape[0] == size and len(rows) < size:
            surgery.swap(layer.attention, name, narrow(norm, rows=rows))
    surgery.swap(layer.module, layer.names["o"], _narrow_input(layer.o, q, mean))
    surgery.heads(layer.attention, len(kept), len(kv_kept))


def _spans(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def _narrow_input(module: nn.Module | None, kept: Tensor, mean: Tensor | None) -> nn.Module:
    """A linear map that reads fewer inputs; the mean of those that left goes on in its bias."""
    small: Any = narrow(module, columns=kept)
    if mean is None:
        return small
    assert module is not None
    weight: Tensor = module.weight  # type: ignore[assignment]
    lost = mean.to(weight.device, torch.float32).clone()
    lost[kept.to(weight.device)] = 0
    exact = weight.detach().float()
    bias = lost @ exact if isinstance(module, Conv1D) else exact @ lost
    if small.bias is None:
        small.bias = nn.Parameter(torch.zeros_like(bias, dtype=weight.dtype), requires_grad=weight.requires_grad)
    with torch.no_grad():
        small.bias += bias.to(small.bias.dtype)
    return small


def _cut_hidden(parts: Anatomy, kept: Tensor, surgery: Surgery) -> None:
    if len(kept) == parts.hidden:
        return
    model: Any = parts.model
    if getattr(parts.base, "project_in", None) is not None:
        raise FoveateError(
            "this OPT has embeddings of another width than its layers: its residual stream can't be cut."
        )
    embedding: Any = narrow(parts.embedding, columns=kept)
    head: Any = narrow(parts.head, columns=kept)
    tied = parts.head.weight is parts.embedding.weight  # type: ignore[union-attr]
    if tied:
        head.weight = embedding.weight
    for old, new in ((parts.embedding, embedding), (parts.head, head)):
        surgery.swap(model, _path(model, old), new)
    for module in parts.base.children():  # learned positions
        if isinstance(module, nn.Embedding) and module is not embedding:
            surgery.swap(model, _path(model, module), narrow(module, columns=kept))
    if parts.final_norm is not None:
        surgery.swap(model, _path(model, parts.final_norm), narrow(parts.final_norm, rows=kept))
    for layer in parts.layers:
        for path, norm in layer.norms.items():
            if not isinstance(norm, NoNorm):
                surgery.swap(layer.module, path, narrow(norm, rows=kept))
        _narrow_constant(layer.attention, kept, surgery)
        _narrow_constant(layer.mlp if layer.mlp is not None else layer.down, kept, surgery)
        for role in ("q", "k", "v", "qkv", "gate", "up", "gate_up"):
            module = getattr(layer, role)
            if module is not None and not isinstance(module, NoNorm):
                surgery.swap(layer.module, layer.names[role], narrow(module, columns=kept))
        for role in ("o", "down"):
            module = getattr(layer, role)
            if module is not None and not isinstance(module, NoMlp):
                surgery.swap(layer.module, layer.names[role], narrow(module, rows=kept))
        foreign = layer.attention if has_attention(layer) and layer.q is None and layer.qkv is None else None
        foreign = layer.mlp if has_mlp(layer) and layer.down is None else foreign
        if foreign is not None:
            raise FoveateError(
                f"layer {layer.index} holds a {type(foreign).__name__}, which can't be cut: prune a model before its "
                "parts are converted."
            )
    surgery.set(model.config, "head_dim", parts.head_dim)  # where there was none, it was hidden / heads
    surgery.set(model.config, "hidden_size", len(kept))
    if hasattr(model.config, "word_embed_proj_dim"):  # OPT
        surgery.set(model.config, "word_embed_proj_dim", len(kept))


def _narrow_constant(module: Any, kept: Tensor, surgery: Surgery) -> None:
    """What a sublayer that left adds, with fewer channels."""
    if isinstance(module, NoAttention | NoMlp) and module.value is not None:
        value = module.value.detach()[kept.to(module.value.device)].clone()
        surgery.set(module, "value", nn.Parameter(value, module.value.requires_grad))
        surgery.set(module, "size", len(kept))


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module)


# ---- for good -----------------------------------------------------------------------------------------------------


def settle(model: PreTrainedModel) -> None:
    """Make what was cut a model of its own: empty layers leave, and the configuration says what there is now.

    Where layers differ in heads or MLP width, the configuration keeps what the model had.
    """
    parts = anatomy(model)
    config: Any = model.config
    stays = [layer for layer in parts.layers if has_attention(layer) or has_mlp(layer) or _adds(layer)]
    if not stays:
        raise FoveateError("every layer would leave: keep more.")
    config.head_dim = parts.head_dim
    if len(stays) < len(parts.layers):
        _remove_layers(parts, stays)
    heads = {_heads(layer, parts) for layer in stays if layer.o is not None}
    if len(heads) == 1:
        config.num_attention_heads, kv_heads = heads.pop()
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = kv_heads
    widths = {_channels(layer) for layer in stays if _channels(layer)}
    if len(widths) == 1:
        setattr(config, families()[parts.family].intermediate, widths.pop())


def _adds(layer: LayerParts) -> bool:
    """Whether a sublayer that left a layer adds a constant still."""
    gone = (layer.attention, layer.mlp if layer.mlp is not None else layer.down)
    return any(getattr(module, "value", None) is not None for module in gone)


def _remove_layers(parts: Anatomy, stays: list[LayerParts]) -> None:
    config: Any = parts.model.config
    kept = {layer.index for layer in stays}
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = [kind for index, kind in enumerate(kinds) if index in kept]
    config.num_hidden_layers = len(stays)
    holder: Any = parts.model.get_submodule(families()[parts.family].layers)
    for index in reversed(range(len(holder))):
        if index not in kept:
            del holder[index]
    for index, layer in enumerate(stays):
        for module in layer.module.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 (mypy takes a module's attributes for tensors)
