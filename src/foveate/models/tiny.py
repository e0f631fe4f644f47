"""Tiny random models of every supported family, and a tokenizer: whole pipelines without a download."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from foveate.errors import FoveateError

_PAD, _BOS, _EOS = 256, 257, 258  # after the 256 bytes
_COMMON: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": _PAD,
    "bos_token_id": _BOS,
    "eos_token_id": _EOS,
    # Ten times the usual, so that attention is far from uniform and logits depend on the context.
    "initializer_range": 0.2,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 128}
# A head size that is not hidden_size / heads, as these families have it, finds code that mixes the two up.
_GEMMA: dict[str, Any] = {
    **_GROUPED,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 512,
    # Tied to embeddings that Gemma scales up, a random head would only repeat the token it has just read.
    "tie_word_embeddings": False,
}

_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": None},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GEMMA, "attn_implementation": "eager"},  # older transformers pick sdpa, without the softcap
    "gemma3_text": {**_GEMMA, "sliding_window_pattern": 2},  # local and global layers in turn, as in Gemma 2
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "gpt_neox": {"intermediate_size": 128},
    "gpt2": {"n_inner": 128},
    "opt": {"ffn_dim": 128, "init_std": _COMMON["initializer_range"]},
}

TINY_FAMILIES: tuple[str, ...] = tuple(_SETTINGS)
"""The families that `tiny` builds, by their `config.model_type`."""


def tiny(family: str, *, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A small randomly initialised model of a family: for tests of a technique, in milliseconds on a CPU.

    Four layers, hidden size 64, four heads (two key-value heads where the family shares them), head size 16
    or 8, a vocabulary of 260, 1,024 positions, float32, in eval mode. Its answers mean nothing, but they
    depend on the whole context. In the Gemmas local and global layers alternate, with a window of 512 that
    short texts do not feel: `tiny("gemma2", sliding_window=16)` shows it at work. Mistral has none unless
    you give one.

    Args:
        family: one of `TINY_FAMILIES`.
        seed: decides the weights; PyTorch's global generator is left as it was.
        **config_overrides: settings of the family's configuration in place of those above.

    Raises:
        FoveateError: the family is unknown, or its configuration has no such setting.

    Example:
        >>> model = tiny("llama", num_hidden_layers=2)
        >>> logits = model(torch.tensor([[72, 105, 33]])).logits
        >>> logits.shape, logits.dtype
        (torch.Size([1, 3, 260]), torch.float32)
    """
    if family not in _SETTINGS:
        raise FoveateError(f"There is no tiny {family!r}{_nearest(family, TINY_FAMILIES)}.")
    default = AutoConfig.for_model(family)
    for name in config_overrides:
        if not hasattr(default, name):  # transformers would take it without a word
            near = _nearest(name, default.to_dict())
            raise FoveateError(f"{family}'s configuration has no setting {name!r}{near}.")
    config = AutoConfig.for_model(family, **{**_COMMON, **_SETTINGS[family], **config_overrides})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # all ones, they would give every key of some families the same length
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for the models of `tiny`, built in memory: one token a byte of the text's UTF-8.

    It has padding (on the left, as generation wants it), an end-of-text token and a plain chat template, and
    adds no special tokens by itself.

    Example:
        >>> tokenizer = tiny_tokenizer()
        >>> ids = tokenizer("héllo").input_ids
        >>> len(ids), tokenizer.decode(ids)
        (6, 'héllo')
        >>> tokenizer.apply_chat_template(
        ...     [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        ... )
        'user: Hi\\nassistant: '
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<bos>", "<eos>"])  # in this order: 256, 257, 258
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=_COMMON["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    )


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known))
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(known)}"
