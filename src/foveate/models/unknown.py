"""What to say about a model of an unknown family: the row to add to the table, as far as it can be seen."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from foveate.errors import FoveateError

# What linear maps are usually called, in attention modules and in MLPs.
_ATTENTION_WORDS = {
    "q": "q|query|wq|q_proj|q_lin",
    "k": "k|key|wk|k_proj|k_lin",
    "v": "v|value|wv|v_proj|v_lin",
    "qkv": "w?qkv|qkv_proj|query_key_value|c_attn",
    "o": "o|wo|o_proj|out_proj|c_proj|dense|out_lin",
}
_MLP_WORDS = {
    "gate": "gate_proj|w1",
    "up": "up_proj|w3|c_fc|fc1|fc_in|dense_h_to_4h",
    "gate_up": "gate_up_proj",
    "down": "down_proj|w2|c_proj|fc2|fc_out|dense_4h_to_h",
}
_WIDTH_WORDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_REMARKS = {
    "norms": "in the order in which they run",
    "projections": "q, k, v or qkv; o; gate and up, gate_up, or up; down",
    "qkv_layout": '"blocks" (queries, keys, values) or "heads" (those of one head after the other)',
    "positions": '"rotary" (in every layer, as two halves), "learned" or "other"',
}


def unknown_family(model: PreTrainedModel) -> FoveateError:
    """The error for a model whose type has no row: what was not found in it, and the row to register.

    What can't be seen stands as "?" in the row, and `Family` does not accept that.
    """
    kind, row = model.config.model_type, _guess(model)
    unseen = [name for name, value in row.items() if value == "?"]
    unseen += [f"the projection {role}" for role, path in row["projections"].items() if path == "?"]
    lines = []
    for name, value in ({"model_types": (kind,)} | row).items():
        text = repr(value).replace("'", '"')
        if isinstance(value, dict):
            pairs = [f'            "{role}": "{path}",\n' for role, path in value.items()]
            text = "{\n" + "".join(pairs) + "        }"
        lines.append(f"        {name}={text},{f'  # {_REMARKS[name]}' if name in _REMARKS else ''}\n")
    return FoveateError(
        f"{kind}: foveate's table of families has no row that says where a {type(model).__name__} keeps its "
        f"parts. Not found under a usual name: {', '.join(unseen) or 'nothing, all was found'}. To add it, "
        "compare this proposal with print(model), replace every '?' by what is right, and run it first:\n\n"
        "    from foveate.models import Family, register_family\n\n"
        f"    register_family(Family(\n{''.join(lines)}    ))"
    )


def _guess(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of a row, as far as they can be seen in the model, and "?" for the rest."""
    row: dict[str, Any] = {name: "?" for name in ("layers", "final_norm", "attention")}
    row |= {"mlp": None, "norms": (), "projections": {}, "positions": "other"}
    depth = getattr(model.config, "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            base, layer = model.get_submodule(path.rpartition(".")[0]), module[0]
            break
    else:
        return row
    row["layers"] = path

    for name, child in base.named_children():
        if _is_norm(child):
            row["final_norm"] = name  # the last one: others may stand before the layers
        elif "rotary" in name:
            row |= {"rotary": name, "positions": "rotary" if _rotates_halves(layer) else "other"}
    if "rotary" not in row and sum(isinstance(child, nn.Embedding) for child in base.children()) > 1:
        row["positions"] = "learned"

    for name, child in layer.named_children():
        if _is_norm(child):
            row["norms"] += (name,)
        elif "att" in name and any(True for _ in child.parameters()):  # no dropout
            row["attention"] = name
        elif re.search("mlp|ffn|feed_?forward", name):
            row["mlp"] = name

    seen = _linear_maps(layer, row["attention"], _ATTENTION_WORDS)
    seen |= _linear_maps(layer, row["mlp"], _MLP_WORDS)
    wanted = ["o", "down"]
    wanted += ["qkv"] if "qkv" in seen else ["q", "k", "v"]
    wanted += ["gate_up"] if "gate_up" in seen else ["up"]
    row["projections"] = {role: "?" for role in wanted} | seen
    if "qkv" in seen:
        row["qkv_layout"] = "?"
    widths = [name for name in _WIDTH_WORDS if hasattr(model.config, name)]
    return row | ({"intermediate": widths[0]} if widths else {})


def _linear_maps(layer: nn.Module, holder: str | None, words: Mapping[str, str]) -> dict[str, str]:
    if holder == "?":
        return {}
    names = [name for name, _ in layer.get_submodule(holder or "").named_children()]
    return {
        role: f"{holder}.{name}" if holder else name
        for role, pattern in words.items()
        for name in names
        if re.fullmatch(pattern, name, re.IGNORECASE)
    }


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _rotates_halves(layer: nn.Module) -> bool:
    """Whether the modelling code rotates the two halves of a head against each other, and not neighbours."""
    rotate = getattr(sys.modules[type(layer).__module__], "rotate_half", None)
    return rotate is not None and rotate(torch.arange(4.0)).tolist() == [-2, -3, 0, 1]
