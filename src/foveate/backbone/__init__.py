"""The backbone: one model with slots for norm placement, token mixer and channel mixer, and what fills them."""

from foveate.backbone.cache import MixerCache
from foveate.backbone.config import BackboneConfig
from foveate.backbone.model import (
    Backbone,
    BackboneForCausalLM,
    BackboneForSequenceClassification,
    BackboneForValues,
)
from foveate.backbone.slots import (
    CHANNELS,
    MIXERS,
    NORMS,
    STACKS,
    Channel,
    ChannelMixer,
    Mixer,
    Norm,
    Order,
    Residual,
    Shape,
    Stack,
    State,
    TokenMixer,
    channel,
    mixer,
    norm,
    stack,
    state_bytes,
)

__all__ = [
    "CHANNELS",
    "MIXERS",
    "NORMS",
    "STACKS",
    "Backbone",
    "BackboneConfig",
    "BackboneForCausalLM",
    "BackboneForSequenceClassification",
    "BackboneForValues",
    "Channel",
    "ChannelMixer",
    "Mixer",
    "MixerCache",
    "Norm",
    "Order",
    "Residual",
    "Shape",
    "Stack",
    "State",
    "TokenMixer",
    "channel",
    "mixer",
    "norm",
    "stack",
    "state_bytes",
]
