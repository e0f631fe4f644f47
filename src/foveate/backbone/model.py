"""The backbone: embeddings, layers with slots, a norm, a head; a Hugging Face model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from foveate.backbone.cache import MixerCache
from foveate.backbone.config import BackboneConfig
from foveate.backbone.parts import ShortConv
from foveate.backbone.slots import CHANNELS, NORMS, STACKS, State, check_text
from foveate.errors import FoveateError


class Layer(nn.Module):
    """A token mixer and a channel mixer, each in its residual; (batch, n, width) to the same."""

    def __init__(self, config: BackboneConfig, index: int):
        super().__init__()
        shape, norm = config.shape(index), NORMS.parse(config.norm)
        self.conv = ShortConv(config.hidden_size, config.conv) if config.conv else None
        self.mixer = config.mixer_of(index).build(shape)
        self.mixer_residual = norm.build(shape)
        self.channel = CHANNELS.parse(config.channel).build(shape)
        self.channel_residual = norm.build(shape) if self.channel is not None else None

    def start(self, batch: int, like: Tensor) -> State:
        """The state before the first token."""
        held = self.mixer.start(batch, like)
        return held if self.conv is None else {**held, **self.conv.start(batch, like)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        after: State | None = None

        def mixed(h: Tensor) -> Tensor:
            nonlocal after
            last = None
            if self.conv is not None:
                h, last = self.conv(h, state)
            y, after = self.mixer(h, state)
            if last is not None:
                after = {**after, **last}  # type: ignore[dict-item]
            return y

        x = self.mixer_residual(x, mixed)
        if self.channel is not None:
            x = self.channel_residual(x, self.channel)  # type: ignore[misc]
        return x, after


@dataclass
class BackboneOutput(ModelOutput):
    """What a backbone gives.

    Attributes:
        loss: with labels or targets: a scalar, the mixers' and channel mixers' own losses included.
        logits: (batch, n, vocabulary), (batch, classes), or (batch, n, outputs) where outputs are values.
        past_key_values: with `use_cache`.
        hidden_states: with `output_hidden_states`: before the first layer and after each, (batch, n, width).
        last_hidden_state: what the head reads, (batch, n, width).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: MixerCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None  # where transformers looks for them; mixers have none to show
    last_hidden_state: Tensor | None = None


class Backbone(PreTrainedModel):
    """Base of the models: everything up to the head."""

    config_class = BackboneConfig
    base_model_prefix = ""
    _no_split_modules = ["Layer"]
    _is_stateful = True  # generate must not go back
    supports_gradient_checkpointing = False
    main_input_name = "input_ids"

    def __init__(self, config: BackboneConfig):
        super().__init__(config)
        width, norm = config.hidden_size, NORMS.parse(config.norm)
        self.embed = nn.Embedding(config.vocab_size, width) if config.vocab_size else None
        self.project = nn.Linear(config.input_size, width) if config.input_size else None
        if self.embed is not None:
            nn.init.normal_(self.embed.weight, std=0.02)
        self.embed_norm = nn.RMSNorm(width, eps=config.eps) if norm.embedding else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.order = STACKS.parse(config.stack).build(config.shape())
        self.norm = nn.RMSNorm(width, eps=config.eps) if norm.final else None
        if norm.small_start:
            self._shrink()

    @torch.no_grad()
    def _shrink(self) -> None:
        """Scale what writes into the residual stream down by sqrt(2 layers), as GPT-2 does, so that its variance
        at the start does not depend on the depth. Modules call that map `out`, or name the weights: `writers()`."""
        for layer in self.layers:
            for part in (layer.mixer, layer.channel):
                for weight in written(part):
                    weight.mul_(1 / math.sqrt(2 * len(self.layers)))

    def _init_weights(self, module: nn.Module) -> None:
        pass  # modules are made as they start; transformers would begin anew

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> Any:
        return self.embed

    def set_input_embeddings(self, value: Any) -> None:
        self.embed = value

    def hidden(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BackboneOutput:
        """Everything but the head.

        Args:
            input_ids: (batch, n), int64.
            inputs_embeds: instead, (batch, n, input_size) where inputs are vectors, else (batch, n, width).
            attention_mask: (batch, n): padding may only stand on the right, where no token before it can see it.

        Raises:
            FoveateError: no token, padding on the left, a cache of another kind or batch.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise FoveateError("a backbone reads input_ids or inputs_embeds: give one of them.")
        if input_ids is not None:
            if self.embed is None:
                raise FoveateError("this backbone reads vectors: give inputs_embeds, (batch, n, input_size).")
            x = self.embed(input_ids)
        else:
            x = inputs_embeds if self.project is None else self.project(inputs_embeds)
        _check_padding(attention_mask)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        cache = None
        if past_key_values is not None or use_cache:
            cache = MixerCache() if past_key_values is None else past_key_values
            if not isinstance(cache, MixerCache):
                raise FoveateError(
                    f"a {type(cache).__name__} can't hold a backbone's states: give a MixerCache, or none."
                )
        state = None
        if cache is not None:
            state = cache.text.state
            state = self.order.start(self.layers, x.shape[0], x) if state is None else state
        check_text(x, state if state is None else state.get("0"))
        seen: list[Tensor] = [x]
        hooks = [
            layer.register_forward_hook(lambda module, given, got: seen.append(got[0]))
            for layer in (self.layers if output_hidden_states else ())
        ]
        try:
            x, state = self.order(x, self.layers, state)
        finally:
            for hook in hooks:
                hook.remove()
        if cache is not None:
            cache.text.keep(state, x.shape[1])
        x = x if self.norm is None else self.norm(x)
        return BackboneOutput(
            past_key_values=cache,
            hidden_states=tuple(seen) if output_hidden_states else None,
            last_hidden_state=x,
        )

    def extra_loss(self) -> Tensor | float:
        """The sum of what modules added to the loss in the last forward."""
        total: Tensor | float = 0.0
        for layer in self.layers:
            for part in layer.modules():
                if (extra := getattr(part, "extra_loss", None)) is not None:
                    total = total + extra
        return total


class BackboneForCausalLM(Backbone, GenerationMixin):
    """A backbone that predicts the next token; `generate` works, with the mixers' own states as its cache.

    Args:
        config: with `vocab_size`.

    Example:
        >>> import torch
        >>> from foveate.backbone import BackboneConfig, BackboneForCausalLM
        >>> model = BackboneForCausalLM(BackboneConfig(vocab_size=50, mixer="linear"))
        >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    _tied_weights_keys = {"head.weight": "embed.weight"}

    def __init__(self, config: BackboneConfig):
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Logits, and the loss.

        Args:
            labels: (batch, n): the same text, as transformers has it (shifted here); -100 does not count.
            targets: (batch, n): what each position is to predict (not shifted); -100 does not count.
            logits_to_keep: of the last tokens only; 0: of all.
            Others: see `hidden`.
        """
        out = self.hidden(input_ids, inputs_embeds, attention_mask, past_key_values, use_cache, output_hidden_states)
        assert out.last_hidden_state is not None
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        if isinstance(logits_to_keep, Tensor):
            keep = logits_to_keep  # type: ignore[assignment]
        out.logits = self.head(out.last_hidden_state[:, keep])
        if labels is not None:
            targets = functional.pad(labels[:, 1:], (0, 1), value=-100)
        if targets is not None:
            out.loss = (
                functional.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
                + self.extra_loss()
            )
        return out


class BackboneForSequenceClassification(Backbone):
    """A backbone with a pooled head: the mean over the text, then a linear map to `output_size` classes."""

    def __init__(self, config: BackboneConfig):
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.output_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Logits (batch, classes), and the loss of targets (batch,). Padding, on the right, is left out of the mean."""
        out = self.hidden(input_ids, inputs_embeds, attention_mask, output_hidden_states=output_hidden_states)
        x = out.last_hidden_state
        assert x is not None
        there = torch.ones_like(x[..., 0]) if attention_mask is None else attention_mask.to(x.dtype)
        out.logits = self.head((x * there.unsqueeze(-1)).sum(1) / there.sum(1, keepdim=True))
        targets = labels if targets is None else targets
        if targets is not None:
            out.loss = functional.cross_entropy(out.logits.float(), targets) + self.extra_loss()
        return out


class BackboneForValues(Backbone):
    """A backbone that gives `output_size` numbers a token; the loss is the mean squared error."""

    main_input_name = "inputs_embeds"

    def __init__(self, config: BackboneConfig):
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.output_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        targets: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Values (batch, n, outputs) as `logits`, and the loss of targets of that shape; NaN does not count."""
        out = self.hidden(input_ids, inputs_embeds, attention_mask, past_key_values, use_cache, output_hidden_states)
        out.logits = self.head(out.last_hidden_state)
        if targets is not None:
            counts = ~targets.isnan()
            errors = (out.logits.float() - targets.nan_to_num()).square() * counts  # type: ignore[union-attr]
            out.loss = errors.sum() / counts.sum() + self.extra_loss()
        return out


def written(part: Any) -> list[Tensor]:
    """The weights with which a mixer or channel mixer writes into the residual stream."""
    if hasattr(part, "writers"):
        weights: list[Tensor] = part.writers()
        return weights
    out = getattr(part, "out", None)
    return [out.weight] if isinstance(out, nn.Linear) else []


def _check_padding(mask: Tensor | None) -> None:
    if mask is None or mask.ndim != 2 or torch.compiler.is_compiling():
        return
    if not bool((mask[:, :1] != 0).all()):
        raise FoveateError(
            "a backbone can't read texts that are padded on the left, as its state would hold the padding: give texts "
            "of one length, or one by one."
        )


AutoConfig.register("foveate", BackboneConfig, exist_ok=True)
AutoModelForCausalLM.register(BackboneConfig, BackboneForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(BackboneConfig, BackboneForSequenceClassification, exist_ok=True)
