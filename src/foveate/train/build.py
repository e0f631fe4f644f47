"""From a task and sizes to a backbone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.backbone import (
    Backbone,
    BackboneConfig,
    BackboneForCausalLM,
    BackboneForSequenceClassification,
    BackboneForValues,
)
from foveate.errors import FoveateError
from foveate.train.tasks import TrainTask

HEADS = {"lm": BackboneForCausalLM, "classes": BackboneForSequenceClassification, "values": BackboneForValues}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes and slots of a backbone to train; see `BackboneConfig`."""

    mixer: str = "softmax"
    width: int = 64
    layers: int = 2
    heads: int = 4
    norm: str = "pre"
    channel: str = "gated"
    stack: str = "plain"
    conv: int = 0


def build(task: TrainTask, sizes: Sizes | None = None, *, seed: int = 0) -> Backbone:
    """A backbone with random weights that fits a task; PyTorch's global generator is left as it was.

    Raises:
        FoveateError: what can't be built, or a mixer that would read a task's answers.

    Example:
        >>> from foveate.train import Sizes, build
        >>> from foveate.train.tasks import TRAIN_TASKS
        >>> type(build(TRAIN_TASKS.parse("mqar"), Sizes(mixer="linear"))).__name__
        'BackboneForCausalLM'
    """
    sizes = sizes or Sizes()
    config = BackboneConfig(
        vocab_size=task.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        mixer=sizes.mixer,
        norm=sizes.norm,
        channel=sizes.channel,
        stack=sizes.stack,
        conv=sizes.conv,
        input_size=task.sizes[0],
        output_size=task.sizes[1],
    )
    both = [mixer.name for mixer in config.mixers if not mixer.causal]
    if both and task.head != "classes":
        raise FoveateError(
            f"{', '.join(both)} sees what comes after a token, and {task} asks for it: it would read the answers. Give "
            "a causal mixer, or a task whose answer is a class of the whole text, such as listops."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return HEADS[task.head](config)
