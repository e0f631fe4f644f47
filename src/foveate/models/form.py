"""What a model is beside its stock architecture: the differences, found on a live model, and a model built by them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from foveate.errors import FoveateError
from foveate.models.anatomy import stock_type
from foveate.models.modelling import write_code
from foveate.models.source import reason
from foveate.portable import portable_classes
from foveate.portable.parts import OwnConfig, Thin, build, told

FORMAT = 1
"""The format of `config.thin`; raised when what older code would read of it means something else."""

_BIASES = ("attention_bias", "mlp_bias")
"""Settings with which stock classes give all maps of a sublayer a bias."""

_NOT_SHAPE = ("training", "gradient_checkpointing", "hidden_size", "intermediate_size", "embed_dim")
"""Attributes of modules that say nothing: states, and sizes that stock modules note and then don't use."""


@dataclass(frozen=True)
class Form:
    """How a model is rebuilt from its stock architecture.

    Attributes:
        config: the stock configuration; where there is `thin`, one of the type `thin_...` with the stock values.
        thin: what differs: `format`, `modules`, `attributes`, `configs` and `skeleton` (see `foveate.portable.parts`);
            None: nothing, the configuration alone gives every shape.
        zeros: biases that the configuration asks for and the model lacks: zeros stand for them.
    """

    config: PreTrainedConfig
    thin: dict[str, Any] | None = None
    zeros: tuple[str, ...] = ()


def form(model: PreTrainedModel) -> Form:
    """Find how a live model differs from what the stock class makes of its configuration.

    Raises:
        FoveateError: something in it could not be rebuilt: a class that is not portable, a hook.
    """
    _check_hooks(model)
    stock_config, stock_model = stock_classes(stock_type(model.config))
    for flags in _bias_settings(model.config):
        try:
            config = stock_config.from_dict(_settings(model, flags))
        except (StrictDataclassError, ValueError):  # sizes that the stock architecture does not have
            break
        skeleton, values = _skeleton(config, stock_model)
        modules = dict(_different(model, skeleton))
        zeros = tuple(f"{path}.bias" for path, change in modules.items() if change == ["resized", {"bias": None}])
        if not values and len(zeros) == len(modules) and not _attributes(model, skeleton):
            _check_names(model, skeleton, zeros)
            return Form(config, zeros=zeros)
        extra_biases = [name == "resized" and [*of] == ["bias"] for name, of in modules.values()]
        if values or not modules or not all(extra_biases):
            break
    thin_config: Any = make_thin(stock_config, stock_model, {}).config_class
    config = thin_config.from_dict(_settings(model))
    skeleton, values = _skeleton(config, stock_model)
    thin: dict[str, Any] = {"format": FORMAT, "skeleton": values, "modules": dict(_different(model, skeleton))}
    thin |= {"attributes": {}, "configs": _configs(model)}
    build(skeleton, thin, portable_classes())
    thin["attributes"] = _attributes(model, skeleton)
    _check_names(model, skeleton)
    return Form(config, thin)


def stock_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Transformers' own configuration class and causal language model of a model type."""
    try:
        config = CONFIG_MAPPING[model_type]
        model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
        return config, model
    except KeyError:
        raise FoveateError(
            f"transformers has no causal language model of the type {model_type!r} of its own, so a model of it can't "
            "be rebuilt: use another transformers, or another model."
        ) from None


def thin_class(config: dict[str, Any], place: str) -> type[PreTrainedModel]:
    """The class of a saved model of an uncommon shape, made of foveate's own portable modules: no code of its folder.

    Args:
        config: what its config.json holds.
        place: where it lies, for errors.

    Raises:
        FoveateError: written by a newer foveate, or damaged.
    """
    thin, parts = config.get("thin"), ("skeleton", "modules", "attributes", "configs")
    if not isinstance(thin, dict) or not all(isinstance(thin.get(part), dict) for part in parts):
        raise FoveateError(f"{place}: its config.json does not say what shape the model has: save the model again.")
    classes = portable_classes()
    unknown = sorted({str(change[0]) for change in thin["modules"].values()} - {*classes, "resized"})
    if thin.get("format") != FORMAT or unknown:
        what = f"has modules of a kind that is unknown here ({', '.join(unknown)})" if unknown else "has another format"
        raise FoveateError(
            f"{place} {what}: it was written by a newer foveate, or with a package that is missing here. Update, or "
            "open it with AutoModelForCausalLM and trust_remote_code=True, which runs the code in the folder."
        )
    return make_thin(*stock_classes(config["model_type"].removeprefix("thin_")), classes)


def make_thin(
    stock_config: type[PreTrainedConfig], stock_model: type[PreTrainedModel], classes: dict[str, type[nn.Module]]
) -> type[PreTrainedModel]:
    """The class of thin models of a stock architecture."""
    about = {"__module__": __name__}
    own = {"model_type": f"thin_{stock_config.model_type}", "validate": lambda config: None}
    config = type("ThinConfig", (stock_config,), about | own)

    def save_pretrained(self: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        """As of every model, and with the modelling file, which transformers knows nothing of here."""
        super(made, self).save_pretrained(folder, *args, **kwargs)
        write_code(Path(folder), self.config, stock_model)

    own_model = {"config_class": config, "portable": classes, "save_pretrained": save_pretrained}
    made: Any = type("ThinForCausalLM", (Thin, stock_model), about | own_model)
    return made


# ---- the stock side -------------------------------------------------------------------------------------------------


def _bias_settings(config: Any) -> list[tuple[str, ...]]:
    """Settings to try: as it is, then with biases that it could have."""
    off = [name for name in _BIASES if getattr(config, name, None) is False]
    return [(), *((name,) for name in off), *([tuple(off)] if len(off) == 2 else [])]


def _settings(model: PreTrainedModel, flags: Sequence[str] = ()) -> dict[str, Any]:
    """The stock configuration of a model, as config.json will give it; biases switched on by `flags`."""
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("thin", "auto_map", "model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    values |= dict.fromkeys(flags, True) | {"dtype": str(model.dtype).removeprefix("torch.")}
    if values.get("tie_word_embeddings") and not _is_tied(model):
        values["tie_word_embeddings"] = False
    return values


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the weights that the configuration ties are the same still."""
    try:
        pairs = model.get_expanded_tied_weights_keys(all_submodels=True).items()
        return all(model.get_parameter(one) is model.get_parameter(other) for one, other in pairs)
    except AttributeError:  # another module stands where one of them was
        return False


def _skeleton(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> tuple[PreTrainedModel, dict[str, int]]:
    """The stock model without memory, and the values that the configuration needed to have for that."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    one_head = {name: 1 for name in ("num_attention_heads", "num_key_value_heads") if hasattr(config, name)}
    error: Exception | None = None
    for values in ({}, one_head):
        try:
            with torch.device("meta"), told(config, values):
                return cls(config), values
        except (ValueError, RuntimeError, ZeroDivisionError) as reason_:  # heads that don't divide the width
            error = reason_
    assert error is not None
    raise FoveateError(
        f"{cls.__name__} can't be built with the shape of this model ({reason(error)}), so it can't be saved: cut "
        "other units."
    )


# ---- differences ----------------------------------------------------------------------------------------------------


def _different(live: nn.Module, stock: nn.Module, path: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The modules that differ: path, and [portable class, settings] or ["resized", parameter -> shape]."""
    if type(live) is portable_classes().get(type(live).__name__):
        settings = live.settings
        if json.loads(json.dumps(settings)) != settings:
            raise FoveateError(f"{path}: the settings of a {type(live).__name__} are no JSON values: {settings}.")
        yield path, [type(live).__name__, settings]
        return
    if type(live) is not type(stock) and not (path == "" and isinstance(live, type(stock))):
        raise FoveateError(
            f"{path or 'the model'} is a {type(live).__module__}.{type(live).__name__}, which can't be saved: only "
            f"transformers' own modules and portable ones can. Take off what put it there (for PEFT: merge_and_unload)."
        )
    shapes = {
        name: None if mine is None else list(mine.shape)
        for name, (mine, theirs) in _pairs(live._parameters, stock._parameters).items()
        if (None if mine is None else mine.shape) != (None if theirs is None else theirs.shape)
    }
    if shapes:
        yield path, ["resized", shapes]
    for name, (mine, theirs) in _pairs(live._modules, stock._modules).items():
        where = f"{path}.{name}".lstrip(".")
        if mine is not None and theirs is not None:
            yield from _different(mine, theirs, where)
        elif mine is not theirs:
            raise FoveateError(
                f"{where} is {'not ' if mine is None else ''}in this model, but "
                f"{'' if theirs is None else 'not '}missing in a {type(stock).__name__} of its configuration, so the "
                "model can't be rebuilt: settle() what was cut, or undo what was added."
            )


def _pairs(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    return {name: (one.get(name), other.get(name)) for name in [*one, *(name for name in other if name not in one)]}


def _attributes(model: nn.Module, rebuilt: nn.Module) -> dict[str, dict[str, Any]]:
    """Plain attributes that differ, by path: sizes and scales that a stock module worked out otherwise."""
    found = {}
    for path, module, other in _both(model, rebuilt):
        if isinstance(module, PreTrainedModel) or hasattr(module, "settings"):
            continue
        theirs = vars(other)
        differ = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str | None)
            and not name.startswith("_")
            and name not in _NOT_SHAPE
            and (name not in theirs or theirs[name] != value)
        }
        if differ:
            found[path] = differ
    return found


def _both(one: nn.Module, other: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    for path, module in one.named_modules():
        yield path, module, other.get_submodule(path)


def _configs(model: nn.Module) -> dict[str, dict[str, Any]]:
    own = {path: getattr(module, "config", None) for path, module in model.named_modules()}
    return {path: config.own for path, config in own.items() if isinstance(config, OwnConfig)}


def _check_names(model: nn.Module, rebuilt: nn.Module, zeros: Sequence[str] = ()) -> None:
    """Raise unless all tensors of the model are in the rebuilt one, in their shapes, and no others."""
    mine, theirs = _tensors(model), _tensors(rebuilt)
    for name in sorted({*mine, *theirs} - {*zeros}):
        if mine.get(name) != theirs.get(name):
            raise FoveateError(
                f"{name} has the shape {mine.get(name)} in this model and {theirs.get(name)} when it is rebuilt, so it "
                "can't be saved: settle() what was cut, and see that its modules are portable."
            )
    for path, module in model.named_modules():
        if hasattr(module, "settings") and module._non_persistent_buffers_set:
            raise FoveateError(
                f"{path}: a {type(module).__name__} has a buffer that is not saved "
                f"({', '.join(sorted(module._non_persistent_buffers_set))}): register it with persistent=True."
            )


def _tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    named = {**dict(model.named_buffers(remove_duplicate=False)), **model.state_dict()}
    return {name: tuple(tensor.shape) for name, tensor in named.items()}


def _check_hooks(model: nn.Module) -> None:
    """Raise where calls are not a module's own: what is hooked in could not be saved."""
    for path, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        foreign = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers")]
        if foreign or ("forward" in vars(module) and not hasattr(module, "_hf_hook")):
            what = getattr(foreign[0], "__qualname__", "a hook") if foreign else "another forward"
            raise FoveateError(
                f"{path or 'the model'} has {what} hooked in, which can't be saved: take it off first (leave the block "
                "of `apply`)."
            )
