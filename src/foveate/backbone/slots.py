"""The slots of the backbone, and what fills them: token mixers, norm placements, channel mixers, stacks.

What fills a slot is a `Part`, a frozen dataclass of its settings with a text form (`based:feature=16,window=64`), and
`build` makes the module of one layer. So a backbone's configuration is text, and a new technique is one file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar, dataclass_transform

from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.methods import PARTS, Part, load_rooms
from foveate.specs import Registry

C = TypeVar("C", bound=type)

State: TypeAlias = dict[str, Tensor]
"""All that a token mixer remembers of a text: tensors by name, each with the batch as its first dimension."""


@dataclass(frozen=True)
class Shape:
    """Where a module is to fit in.

    Attributes:
        width: channels of the residual stream.
        heads: heads of the token mixer; they divide the width.
        layer, layers: which layer of how many, from 0.
        eps: of norms.
    """

    width: int
    heads: int
    layer: int = 0
    layers: int = 1
    eps: float = 1e-6

    @property
    def head(self) -> int:
        """Channels of a head."""
        return self.width // self.heads


class TokenMixer(nn.Module):
    """How tokens exchange information, in one layer: the module that a `Mixer` builds.

    `forward(x, state)` takes (batch, n, width) and gives (y, state), y of the same shape. Without a state the text
    begins here, and none is given back (training keeps nothing). With one, from `start` or from the last call, the
    text goes on where it was, in pieces of any length: the numbers are those of the whole text at once. A state that
    was given is not written into, but for tensors that only the new state uses.
    """

    extra_loss: Tensor | None = None
    """What the last forward adds to the training loss (a balance of experts, say): a scalar, or None."""

    def start(self, batch: int, like: Tensor) -> State:
        """The state before the first token, on the device and in the dtype of `like`."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Mixer(Part):
    """A token mixer's settings: `"softmax:kv_heads=2"`. A technique overrides `build`.

    Class attributes: `name`, `paper`, `claim` as of every technique; `grows`, whether the state grows with the text;
    `causal`, whether a token sees none after it (what sees both sides can't go step by step).
    """

    role: ClassVar[str] = "mixer"
    field: ClassVar[str] = "mixer"
    grows: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @abstractmethod
    def build(self, shape: Shape) -> TokenMixer:
        """The module of one layer. Raises FoveateError where the settings don't fit the shape."""


class Residual(nn.Module):
    """One sublayer's way in and out of the residual stream: `forward(x, body)` gives the stream after it.

    Args of forward:
        x: the residual stream, (batch, n, width).
        body: the sublayer, a function of (batch, n, width) to the same.
    """

    def forward(self, x: Tensor, body: Callable[[Tensor], Tensor]) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Norm(Part):
    """Where normalisation stands: `"pre"`, `"mix:post=0.25"`. A technique overrides `build`.

    Class attributes: `embedding`, whether embeddings are normalised before the first layer; `final`, whether the last
    layer's output is normalised before the head; `small_start`, whether what writes into the residual stream starts the
    smaller the more layers there are.
    """

    role: ClassVar[str] = "block"
    field: ClassVar[str] = "norm"
    embedding: ClassVar[bool] = False
    final: ClassVar[bool] = True
    small_start: ClassVar[bool] = True

    @abstractmethod
    def build(self, shape: Shape) -> Residual:
        """One sublayer's residual; each layer has two, one round its token mixer, one round its channel mixer."""


class ChannelMixer(nn.Module):
    """What a layer does to each token by itself, (batch, n, width) to the same: the module that a `Channel` builds."""

    extra_loss: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Channel(Part):
    """A channel mixer's settings: `"gated:times=2.67"`, `"moe:experts=8,active=2"`. A technique overrides `build`."""

    role: ClassVar[str] = "block"
    field: ClassVar[str] = "channel"

    @abstractmethod
    def build(self, shape: Shape) -> ChannelMixer | None:
        """The module of one layer; None: layers have none."""


class Order(nn.Module):
    """In which order a text goes through the layers: the module that a `Stack` builds; the plain one, each after each.

    The state of a whole backbone is a dictionary: a layer's state by its number, and what the order itself remembers.
    """

    def start(self, layers: nn.ModuleList, batch: int, like: Tensor) -> dict[str, Any]:
        """The state before the first token."""
        return {str(i): layer.start(batch, like) for i, layer in enumerate(layers)}  # type: ignore[operator]

    def forward(
        self, x: Tensor, layers: nn.ModuleList, state: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """(batch, n, width) to the same, through all layers."""
        after: dict[str, Any] = {}
        for i, layer in enumerate(layers):
            x, after[str(i)] = layer(x, None if state is None else state[str(i)])
        return x, None if state is None else after


@dataclass(frozen=True, kw_only=True)
class Stack(Part):
    """How layers are stacked: `"plain"`. A technique overrides `build`."""

    role: ClassVar[str] = "block"
    field: ClassVar[str] = "stack"

    @abstractmethod
    def build(self, shape: Shape) -> Order:
        """The order in which a text goes through the layers."""


MIXERS: Registry[Mixer] = Registry("mixer", load_rooms)
NORMS: Registry[Norm] = Registry("norm placement", load_rooms)
CHANNELS: Registry[Channel] = Registry("channel mixer", load_rooms)
STACKS: Registry[Stack] = Registry("stack", load_rooms)
Mixer.registry, Norm.registry, Channel.registry, Stack.registry = MIXERS, NORMS, CHANNELS, STACKS
PARTS.extend([MIXERS, NORMS, CHANNELS, STACKS])


@dataclass_transform(frozen_default=True, kw_only_default=True)
def mixer(name: str) -> Callable[[C], C]:
    """Class decorator: register a token mixer under its short name."""
    return MIXERS.register(name)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def norm(name: str) -> Callable[[C], C]:
    """Class decorator: register a norm placement under its short name."""
    return NORMS.register(name)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def channel(name: str) -> Callable[[C], C]:
    """Class decorator: register a channel mixer under its short name."""
    return CHANNELS.register(name)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def stack(name: str) -> Callable[[C], C]:
    """Class decorator: register a way to stack layers under its short name."""
    return STACKS.register(name)


def state_bytes(state: Any) -> int:
    """Bytes that a state holds: of whole storages, so that a view into something larger counts as what it keeps.

    Args:
        state: a `State`, or lists or dictionaries of them.

    Example:
        >>> import torch
        >>> state_bytes({"memory": torch.zeros(2, 3)[:, :1]})
        24
    """
    from torch.utils._pytree import tree_leaves

    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tree_leaves(state)}
    return sum(storages.values())


def check_text(x: Tensor, state: State | None) -> None:
    """Raise FoveateError where there is no token, or the state is another batch's."""
    if x.shape[1] == 0:
        raise FoveateError("the text has length 0: give at least one token.")
    if state and (held := next(iter(state.values())).shape[0]) != x.shape[0]:
        raise FoveateError(
            f"the state holds {held} texts, but {x.shape[0]} came: begin with no state, or give as many as before."
        )
