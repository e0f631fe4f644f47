"""The table of families: where the models of each keep their parts. A new family is a new row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from foveate.errors import FoveateError

_LLAMA_PROJECTIONS = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the models of one family keep their parts, as dotted paths. The defaults are Llama's.

    Attributes:
        model_types: the values of `config.model_type` that this row describes.
        layers: path of the list of decoder layers, from the model.
        final_norm: path of the norm after the last layer, from the module that holds the list.
        rotary: path of the module with the rotary frequencies, from the same; used if `positions` is rotary.
        attention: path of the attention module, from the layer.
        mlp: path of the MLP, from the layer; None where the layer itself holds the MLP's projections.
        norms: paths of the norms on the residual stream, from the layer, in the order in which they run.
        projections: paths of the linear maps, from the layer: `q`, `k`, `v` or `qkv` in one; `o`; `gate` and
            `up` or `gate_up` in one, or `up` alone; `down`.
        qkv_layout: how the output of `qkv` is laid out: "blocks" (all queries, all keys, all values) or
            "heads" (query, key and value of the first head, then of the next ...).
        positions: "rotary" (every layer rotates the first dimensions of a head, as two halves), "learned" (an
            embedding is added to the tokens'), or "other" (ALiBi, rotated neighbours ...).
        intermediate: the configuration's name for the MLP's width; where it has none, that is 4 x hidden.

    Raises:
        FoveateError: a field, or the path of a projection, is still the "?" of a proposed row.

    Example:
        >>> Family(model_types=("my_llama",), norms=("norm_1", "norm_2")).attention
        'self_attn'
    """

    model_types: tuple[str, ...]
    layers: str = "model.layers"
    final_norm: str = "norm"
    rotary: str = "rotary_emb"
    attention: str = "self_attn"
    mlp: str | None = "mlp"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    projections: Mapping[str, str] = field(default_factory=lambda: dict(_LLAMA_PROJECTIONS))
    qkv_layout: Literal["blocks", "heads"] = "blocks"
    positions: Literal["rotary", "learned", "other"] = "rotary"
    intermediate: str = "intermediate_size"

    def __post_init__(self) -> None:
        open_fields = [name for name, value in vars(self).items() if value == "?"]
        open_fields += [role for role, path in self.projections.items() if path == "?"]
        if open_fields:
            raise FoveateError(
                f"The row for {', '.join(self.model_types)} still has a '?' for {', '.join(open_fields)}: "
                "put in its place what print(model) or the modelling code shows."
            )


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make the models of a family known to `anatomy`. A model type that is known already gets the new row.

    Example:
        >>> register_family(Family(model_types=("my_llama",)))
        >>> families()["my_llama"].layers
        'model.layers'
    """
    _FAMILIES.update(dict.fromkeys(family.model_types, family))


def families() -> dict[str, Family]:
    """The registered rows, by model type."""
    return dict(_FAMILIES)


register_family(Family(model_types=("llama", "mistral", "qwen2", "qwen3")))
register_family(
    Family(
        model_types=("gemma2", "gemma3_text"),
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    )
)
register_family(Family(model_types=("olmo2",), norms=("post_attention_layernorm", "post_feedforward_layernorm")))
register_family(
    Family(
        model_types=("phi3",),
        projections={
            "qkv": "self_attn.qkv_proj",
            "o": "self_attn.o_proj",
            "gate_up": "mlp.gate_up_proj",
            "down": "mlp.down_proj",
        },
    )
)
register_family(
    Family(
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        final_norm="final_layer_norm",
        attention="attention",
        projections={
            "qkv": "attention.query_key_value",
            "o": "attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
        qkv_layout="heads",
    )
)
register_family(
    Family(
        model_types=("gpt2",),
        layers="transformer.h",
        final_norm="ln_f",
        attention="attn",
        norms=("ln_1", "ln_2"),
        projections={"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
        positions="learned",
        intermediate="n_inner",
    )
)
register_family(
    Family(
        model_types=("opt",),
        layers="model.decoder.layers",
        final_norm="final_layer_norm",
        mlp=None,
        norms=("self_attn_layer_norm", "final_layer_norm"),
        projections={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.out_proj",
            "up": "fc1",
            "down": "fc2",
        },
        positions="learned",
        intermediate="ffn_dim",
    )
)
