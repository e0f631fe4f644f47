"""The anatomy of a Hugging Face causal language model: its layers, attention, MLPs, norms, heads and sizes.

Techniques ask for `anatomy(model)` and never for a class. What differs from family to family stands in the
table in `foveate.models.family`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from foveate.errors import FoveateError
from foveate.models.family import Family, families, register_family
from foveate.models.unknown import unknown_family

__all__ = ["Anatomy", "Family", "LayerParts", "anatomy", "families", "register_family"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LayerParts:
    """The parts of one decoder layer. A part that the layer does not have is None.

    `names` has the path from the layer of every part that is there, by the attribute's name, so that it can
    be swapped: `layer.module.set_submodule(layer.names["q"], new)`, or for the attention
    `setattr(layer.module, layer.attention_name, new)`.

    Attributes:
        index: the layer's place in the model, from 0.
        module: the decoder layer. Its forward takes and returns hidden states (batch, token, hidden).
        attention: the attention module. Its forward returns (output, attention weights or None).
        mlp: the MLP; None where its projections hang on the layer itself (OPT). Either way the output of
            `down` is what the MLP adds to the residual stream, but for dropout and a norm after it.
        norms: path -> norm on the residual stream, in the order in which they run.
        sliding_window: how many entries a token attends to at most here, its own included; None: no bound.
        q, k, v, qkv, o: the attention's linear maps; all None where a technique has put another module in its
            place. `Anatomy.qkv_layout` says how the output of `qkv` is laid out.
        gate, up, gate_up, down: the MLP's linear maps. `gate_up` gives all gates, then all ups.
            All weights are (out, in), but for GPT-2's, which are (in, out): transformers' `Conv1D`.
    """

    index: int
    module: nn.Module
    attention: nn.Module
    mlp: nn.Module | None
    norms: dict[str, nn.Module]
    sliding_window: int | None
    names: dict[str, str]
    q: nn.Module | None = None
    k: nn.Module | None = None
    v: nn.Module | None = None
    qkv: nn.Module | None = None
    o: nn.Module | None = None
    gate: nn.Module | None = None
    up: nn.Module | None = None
    gate_up: nn.Module | None = None
    down: nn.Module | None = None

    @property
    def attention_name(self) -> str:
        """The path of the attention module, from the layer."""
        return self.names["attention"]

    @property
    def mlp_name(self) -> str | None:
        """The path of the MLP, from the layer; None where `mlp` is None."""
        return self.names.get("mlp")

    def __repr__(self) -> str:
        return f"LayerParts(index={self.index}, sliding_window={self.sliding_window}, names={self.names})"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Anatomy:
    """A model's parts and sizes, as `anatomy(model)` gives them. The modules are the model's own, not copies.

    Attributes:
        family: `config.model_type`, of a thinned model its stock architecture's.
        model: the causal language model (the one inside, where PEFT had wrapped it).
        base: the module that holds the layers.
        layers: the decoder layers, in order.
        embedding: the token embedding.
        final_norm: the norm after the last layer; None where there is none (OPT-350m).
        head: the map from the last hidden states to logits (`lm_head`).
        rotary: the module with the rotary frequencies; None where positions are not rotary.
        heads, kv_heads, head_dim, hidden, intermediate, vocab: sizes, by the configuration.
        max_positions: how many positions the model was made for; sys.maxsize where it states none (ALiBi).
        positions, qkv_layout: as in `Family`.
    """

    family: str
    model: PreTrainedModel
    base: nn.Module
    layers: list[LayerParts]
    embedding: nn.Module
    final_norm: nn.Module | None
    head: nn.Module
    rotary: nn.Module | None
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    max_positions: int
    positions: Literal["rotary", "learned", "other"]
    qkv_layout: Literal["blocks", "heads"]

    def inv_freq(self, layer_index: int) -> Tensor | None:
        """The inverse frequencies with which a layer rotates its queries and keys.

        At position p the dimensions i and i + n of a head turn together by the angle p * inv_freq[i], where n
        is len(inv_freq); dimensions from 2n on stay as they are. Some scalings (YaRN) also stretch the turned
        dimensions by a constant, the same at every position.

        Args:
            layer_index: which layer. Gemma 3's local and global layers have different frequencies.

        Returns:
            (n,), float32, on the rotary module's device; None where positions are not rotary.

        Example:
            >>> from foveate.models.tiny import tiny
            >>> anatomy(tiny("gpt_neox")).inv_freq(0)  # rotates a quarter of the head's 16 dimensions
            tensor([1.0000, 0.0100])
            >>> anatomy(tiny("gpt2")).inv_freq(0) is None
            True
        """
        if self.rotary is None:
            return None
        by_kind = f"{_layer_kind(self.model.config, layer_index)}_inv_freq"
        name = by_kind if hasattr(self.rotary, by_kind) else "inv_freq"
        return self.rotary.get_buffer(name).float()

    @property
    def rotary_is_static(self) -> bool:
        """Whether the rotary frequencies are fixed. Dynamic NTK and LongRoPE change them with the length."""
        kinds = getattr(self.rotary, "rope_type", "default")
        all_kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        return not any("dynamic" in kind or kind == "longrope" for kind in all_kinds)

    def require_static_rotary(self) -> None:
        """Raise FoveateError if the rotary frequencies change with the length: keys can't be moved then."""
        if not self.rotary_is_static:
            kind = getattr(self.rotary, "rope_type", None)
            raise FoveateError(
                "The position of a cached key was to be changed, but the rotary frequencies of this "
                f"{self.family} model change with the length of the text (rope type {kind!r}), so that its "
                "old rotation is not known. Use a technique that leaves positions alone, or another model."
            )

    def __repr__(self) -> str:
        return (
            f"Anatomy({self.family}: layers={len(self.layers)}, heads={self.heads}, "
            f"kv_heads={self.kv_heads}, head_dim={self.head_dim}, hidden={self.hidden}, "
            f"intermediate={self.intermediate}, vocab={self.vocab}, "
            f"max_positions={self.max_positions}, positions={self.positions})"
        )


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a causal language model. Quick: call it again after modules have been swapped.

    Args:
        model: a causal language model of a registered family, also inside PEFT's wrapper. An attention module
            or MLP may have been replaced by a foreign one without projections; these are None then.

    Raises:
        FoveateError: the family is unknown (the message shows the row to register), or a part is not where
            the family's row says.

    Example:
        >>> from foveate.models.tiny import tiny
        >>> parts = anatomy(tiny("gemma2", sliding_window=16))
        >>> parts.heads, parts.kv_heads, parts.head_dim
        (4, 2, 8)
        >>> [layer.sliding_window for layer in parts.layers]
        [16, None, 16, None]
        >>> parts.layers[0].q
        Linear(in_features=64, out_features=32, bias=False)
    """
    model = getattr(model, "get_base_model", lambda: model)()  # PEFT's wrapper has one
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise FoveateError(
            f"The anatomy of a {type(model).__name__} was asked for, which is no causal language model of "
            "transformers: load it with AutoModelForCausalLM."
        )
    config = model.config
    row = families().get(stock_type(config))
    if row is None and is_encoder(config):
        raise FoveateError(
            f"{config.model_type} is an encoder: each of its tokens sees all others, and nothing is generated token "
            "by token. foveate works on causal language models (decoders): give one, such as a Llama, Qwen or GPT-2."
        )
    if row is None:
        raise unknown_family(model)
    layers = cast(nn.ModuleList, _part(model, row.layers, config))
    base = model.get_submodule(row.layers.rpartition(".")[0])
    no_final_norm = getattr(base, row.final_norm, 0) is None
    heads, hidden = config.num_attention_heads, config.hidden_size
    unbounded = row.positions == "other" and not hasattr(config, "max_position_embeddings")
    return Anatomy(
        family=stock_type(config),
        model=model,
        base=base,
        layers=[_layer(module, index, config, row) for index, module in enumerate(layers)],
        embedding=model.get_input_embeddings(),
        final_norm=None if no_final_norm else _part(base, row.final_norm, config),
        head=model.get_output_embeddings(),
        rotary=_part(base, row.rotary, config) if row.positions == "rotary" else None,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        hidden=hidden,
        intermediate=getattr(config, row.intermediate, None) or 4 * hidden,
        vocab=config.vocab_size,
        max_positions=sys.maxsize if unbounded else config.max_position_embeddings,
        positions=row.positions,
        qkv_layout=row.qkv_layout,
    )


def is_encoder(config: Any) -> bool:
    """Whether a configuration is that of a masked language model, and not told to be a decoder."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def stock_type(config: Any) -> str:
    """The model type of the stock architecture that a model has, or had before it was thinned."""
    kind: str = config.model_type
    return kind.removeprefix("thin_")


def _layer(module: nn.Module, index: int, config: Any, row: Family) -> LayerParts:
    names = {"attention": row.attention} | ({"mlp": row.mlp} if row.mlp else {})
    parts = {name: _part(module, path, config) for name, path in names.items()}
    for role, path in row.projections.items():
        holder = _part(module, path.rpartition(".")[0], config)
        # A foreign module in place of the model's own need not have projections.
        if type(holder).__module__ == type(module).__module__:
            names[role], parts[role] = path, _part(module, path, config)
    sliding = _layer_kind(config, index) in (None, "sliding_attention")
    return LayerParts(
        index=index,
        module=module,
        attention=parts.pop("attention"),
        mlp=parts.pop("mlp", None),
        norms={path: _part(module, path, config) for path in row.norms},
        sliding_window=getattr(config, "sliding_window", None) if sliding else None,
        names=names,
        **parts,
    )


def _layer_kind(config: Any, index: int) -> str | None:
    """In families whose layers differ "sliding_attention" or "full_attention", otherwise None."""
    kinds = getattr(config, "layer_types", None)
    return kinds[index] if kinds else None


def _part(parent: nn.Module, path: str, config: Any) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError:
        raise FoveateError(
            f"{config.model_type}: its row in the table of families places a part at {path!r} in "
            f"{type(parent).__name__}, and there is none. If the model has been changed, undo that; if this "
            "version of transformers has the part elsewhere, call register_family with a row that says where."
        ) from None
