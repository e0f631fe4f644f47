"""A backbone's configuration: sizes, and what stands in its slots, as text."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from foveate.backbone.slots import CHANNELS, MIXERS, NORMS, STACKS, Shape
from foveate.errors import FoveateError
from foveate.specs import split_outside


class BackboneConfig(PreTrainedConfig):
    """Sizes and slots of a backbone, under transformers' names for what both have.

    Args:
        vocab_size: tokens; 0: inputs are vectors of `input_size` numbers, and `inputs_embeds` is what comes in.
        hidden_size: channels of the residual stream.
        num_hidden_layers, num_attention_heads: layers; heads of each token mixer.
        mixer: a token mixer, `"softmax:kv_heads=2"`; several joined by `+` take turns, layer by layer.
        norm, channel, stack: a norm placement, a channel mixer, an order of layers.
        conv: tokens of a causal convolution before each token mixer; 0: none.
        input_size, output_size: numbers a token, of inputs that are vectors, and of outputs (values or classes).
        tie_word_embeddings: whether the head's weights are the embedding's.
        eps: of norms.

    Raises:
        FoveateError: heads that don't divide the width, a slot's text that can't be read, sizes below 1.

    Example:
        >>> from foveate.backbone import BackboneConfig
        >>> BackboneConfig(hidden_size=64, mixer="softmax+linear").mixer_of(1).to_text()
        'linear'
    """

    model_type = "foveate"

    def __init__(
        self,
        vocab_size: int = 260,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        mixer: str = "softmax",
        norm: str = "pre",
        channel: str = "gated",
        stack: str = "plain",
        conv: int = 0,
        input_size: int = 0,
        output_size: int = 0,
        tie_word_embeddings: bool = True,
        eps: float = 1e-6,
        **kwargs: Any,
    ):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.mixer, self.norm, self.channel, self.stack, self.conv = mixer, norm, channel, stack, conv
        self.input_size, self.output_size, self.eps = input_size, output_size, eps
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)  # type: ignore[call-arg]
        self._check()

    def _check(self) -> None:
        for name, least in (
            ("hidden_size", 1),
            ("num_hidden_layers", 1),
            ("num_attention_heads", 1),
            ("conv", 0),
            ("vocab_size", 0),
        ):
            if getattr(self, name) < least:
                raise FoveateError(f"{name}={getattr(self, name)} can't be: give {least} or more.")
        if self.hidden_size % self.num_attention_heads:
            fits = [h for h in range(1, self.hidden_size + 1) if self.hidden_size % h == 0]
            near = sorted(sorted(fits, key=lambda h: abs(h - self.num_attention_heads))[:2])
            raise FoveateError(
                f"{self.num_attention_heads} heads don't divide a width of {self.hidden_size}: give "
                f"{' or '.join(map(str, near))} heads, or another width."
            )
        self.mixers  # noqa: B018 - raises where a text can't be read
        NORMS.parse(self.norm)
        CHANNELS.parse(self.channel)
        STACKS.parse(self.stack)

    @property
    def mixers(self) -> list[Any]:
        """The token mixers that take turns."""
        return [MIXERS.parse(each) for each in split_outside(self.mixer, "+")]

    def mixer_of(self, layer: int) -> Any:
        """The token mixer of a layer."""
        mixers = self.mixers
        return mixers[layer % len(mixers)]

    def shape(self, layer: int = 0) -> Shape:
        """What a module of that layer has to fit in."""
        return Shape(self.hidden_size, self.num_attention_heads, layer, self.num_hidden_layers, self.eps)
