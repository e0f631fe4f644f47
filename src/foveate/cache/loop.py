"""A decode loop of static shapes: on a GPU one step is a CUDA graph, captured once and replayed for every token.

Between two tokens, plain decoding waits for Python to launch a thousand small kernels, and a cache that grows or evicts
makes new tensors. Here entries lie in slots (`slots.py`), tokens and positions in buffers that stay where they are, and
the next token is chosen on the device: nothing waits for the host.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel

from foveate.cache.attend import attend, attend_and_receive
from foveate.cache.base import CachePolicy
from foveate.cache.entries import CacheView
from foveate.cache.policy_cache import PolicyCache
from foveate.cache.slots import SlotCache, SlotLayer
from foveate.errors import FoveateError
from foveate.models.anatomy import Anatomy, anatomy
from foveate.models.caches import with_cache

_NAME = "foveate-loop"
_LOOPS: weakref.WeakKeyDictionary[nn.Module, DecodeLoop] = weakref.WeakKeyDictionary()
"""Which loop is at work on an attention module: how the attention interface finds its way back."""

_EAGER_STEPS = 3
"""Steps that run as they are before one is captured: kernels are compiled and workspaces made in them."""


class DecodeLoop:
    """Decodes token by token after a prompt: what the policy's cache would give, with shapes that never change.

    The entries move from the cache given into slots, and leave it empty. The model is called as it is, through
    transformers' attention interface, so every supported family works. A padded prompt must have been read with
    `position_ids` that count real tokens, as `generate` passes them.

    On a CUDA device steps are captured in a graph after the first few; elsewhere the same steps run one by one.

    Args:
        model: the model that read the prompt; in the `with fv.apply(...)` block, where there is one.
        cache: the prompt's `past_key_values`: of a policy in force, or the model's own `DynamicCache`.
        room: tokens that will follow at most: memory for them is taken now. None = any number, where every KV head
            has a budget.
        attention_mask: (batch, tokens), which tokens of the prompt are real; only for the model's own cache.
        compile: put the model's norms, MLPs and rotations, and the bookkeeping of the cache, through torch.compile.
        graph: whether steps are captured on a CUDA device.

    Attributes:
        cache: the `SlotCache` that holds the entries now.
        plain_because: why attention runs in plain PyTorch, as a sentence; None where the kernel runs.

    Raises:
        FoveateError: the policy or the model needs what slots don't have: an order, merging, codes, a window.

    Example:
        >>> import foveate as fv, torch
        >>> model, prompt = fv.tiny("llama"), torch.arange(1, 41).unsqueeze(0)
        >>> with fv.apply(model, "h2o:entries=8"), torch.no_grad():
        ...     out = model(prompt, use_cache=True)
        ...     loop = fv.DecodeLoop(model, out.past_key_values)
        ...     ids = loop.generate(out.logits[:, -1:].argmax(-1), 20)
        >>> ids.shape, loop.cache.layers[0].held().tolist()
        (torch.Size([1, 20]), [[8, 8]])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        *,
        room: int | None = None,
        attention_mask: Tensor | None = None,
        compile: bool = False,
        graph: bool = True,
    ):
        self.parts = anatomy(model)
        self.model = self.parts.model
        policy = cache.policy if isinstance(cache, PolicyCache) else None
        _check(self.parts, policy, cache, room)
        renumbers = policy is not None and policy.renumbers(self.parts)
        self.cache = SlotCache(
            cache,
            room=room,
            valid=attention_mask,
            inv_freq=self.parts.inv_freq,
            renumbers=renumbers,
            latest=policy is not None and _tried(policy, self.parts)[1],
        )
        device, batch = self.cache.device, self.cache.next.shape[0]
        self.captures, self.compile = graph and device.type == "cuda", compile
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.temperature = torch.ones((), device=device)
        self.decode: Callable[..., Tensor]
        self.decode, self.plain_because = _decoder(self.cache, self.parts)
        self.eager_steps: dict[bool, int] = {}
        self.aside = torch.cuda.Stream(device) if self.captures else None
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by whether the next token is sampled

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Read one token a sequence, LongTensor (batch, 1): the logits of the next, (batch, vocab)."""
        self._begin(ids, 1)
        with self._at_work():
            return self._run(sampled=False).clone()

    @torch.no_grad()
    def generate(self, ids: Tensor, steps: int, *, temperature: float = 0.0) -> Tensor:
        """Read one token a sequence, LongTensor (batch, 1), and go on from there: the `steps` next, (batch, steps).

        Args:
            ids: the first token, such as the prompt's most likely next one.
            steps: tokens to generate. None of them ends a sequence.
            temperature: 0 = always the most likely token; above, sampled from softmax(logits / temperature).
        """
        if temperature < 0:
            raise FoveateError(f"temperature={temperature} is negative: give 0 for the most likely token, or more.")
        self._begin(ids, steps)
        self.temperature.fill_(temperature)
        out = torch.empty(len(self.ids), steps, dtype=torch.int64, device=self.ids.device)
        with self._at_work():
            for i in range(steps):
                self._run(sampled=temperature > 0)
                out[:, i : i + 1].copy_(self.ids)
        return out

    def _begin(self, ids: Tensor, tokens: int) -> None:
        if ids.shape != self.ids.shape:
            raise FoveateError(
                f"the loop reads one token a sequence, {tuple(self.ids.shape)}, and was given {tuple(ids.shape)}."
            )
        if self.parts.positions == "learned" and self.cache.get_seq_length() + tokens > self.parts.max_positions:
            raise FoveateError(
                f"{self.cache.get_seq_length()} tokens were read and {tokens} more were asked for, but this "
                f"{self.parts.family} model has {self.parts.max_positions} positions."
            )
        self.cache.take(tokens)
        self.ids.copy_(ids)

    def _run(self, sampled: bool) -> Tensor:
        """One step: logits (batch, vocab), in a buffer that the next step may overwrite; `ids` has the next token."""
        done = self.eager_steps.get(sampled, 0)
        if not self.captures:
            return self._step(sampled)
        if done < _EAGER_STEPS:
            self.eager_steps[sampled] = done + 1
            stream = torch.cuda.current_stream(self.cache.device)
            assert self.aside is not None  # by __init__
            self.aside.wait_stream(stream)
            with torch.cuda.stream(self.aside):  # as what is captured: libraries set themselves up by stream
                logits = self._step(sampled)
            stream.wait_stream(self.aside)
            return logits
        if sampled not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):  # nothing runs yet
                    logits = self._step(sampled)
            except RuntimeError as error:
                raise FoveateError(
                    f"a step of this {self.parts.family} model"
                    f"{'' if self.cache.policy is None else f' under {self.cache.policy}'} could not be captured in a "
                    f"CUDA graph ({str(error).splitlines()[0]}): make the loop with graph=False."
                ) from error
            self.graphs[sampled] = graph, logits
        graph, logits = self.graphs[sampled]
        graph.replay()
        return logits

    def _step(self, sampled: bool) -> Tensor:
        out = self.model(input_ids=self.ids, position_ids=self.cache.next, **with_cache(self.cache), use_cache=True)
        logits: Tensor = out.logits[:, -1]
        if sampled:
            # The largest of p / e, where e is exponential, falls on each token with its probability p.
            weights = (logits.float() / self.temperature).softmax(-1)
            chosen = (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        self.ids.copy_(chosen)
        self.cache.next.add_(1)
        return logits

    def attention(self, module: nn.Module, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """One layer of a step, after its new entries have come in: (batch, 1, head, head_dim)."""
        layer, now = self.layer_of[module], self.cache.next
        out = self.decode(layer, layer.moved_keys(now), query, scaling, softcap)
        layer.evict(query, now)
        return out[:, None]

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The model's attention is the loop's until the block ends."""
        before = self.model.config._attn_implementation
        self.layer_of = {part.attention: self.cache.layers[part.index] for part in self.parts.layers}
        for module in self.layer_of:
            _LOOPS[module] = self
        self.model.set_attn_implementation(_NAME)
        try:
            with _compiled(self.parts, self.cache) if self.compile else nullcontext():
                yield
        finally:
            self.model.set_attn_implementation(before)
            for module in self.layer_of:
                _LOOPS.pop(module, None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: (batch, head, 1, head_dim) in, (batch, 1, head, head_dim) out."""
    return _LOOPS[module].attention(
        module, query, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap
    ), None


AttentionInterface.register(_NAME, _attention)


# ---- attention over slots ----------------------------------------------------------------------------------------


def _decoder(cache: SlotCache, parts: Anatomy) -> tuple[Callable[..., Tensor], str | None]:
    """What attends over the slots of a layer: the kernel, or plain PyTorch and why."""
    from foveate.kernels.decode import Workspace, ragged_decode, unavailable  # imports Triton: only for a loop

    layers = cache.filled
    dim = layers[0].keys.shape[-1]
    reason = unavailable(cache.device, layers[0].keys.dtype, dim)
    if reason is None and layers[0].values.shape[-1] != dim:
        reason = "The kernel takes keys and values of the same head_dim."
    if reason is not None:
        return functools.partial(_plain, forget=cache.forget), reason
    largest = max(layers, key=lambda layer: len(layer.keys))
    query = torch.empty(len(cache.next), parts.heads, dim, device="meta")
    watched = any(layer.received is not None for layer in layers)
    workspace = Workspace.allocate(query, largest.keys, largest.offsets, received=watched)

    def decode(layer: SlotLayer, keys: Tensor, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        return ragged_decode(
            query[:, :, 0],
            keys,
            layer.values,
            layer.offsets,
            layer.lengths,
            scaling=scaling,
            received=layer.received,
            forget=cache.forget,
            softcap=softcap,
            workspace=workspace,
        )

    return decode, None


def _plain(
    layer: SlotLayer, keys: Tensor, query: Tensor, scaling: float, softcap: float | None, *, forget: float
) -> Tensor:
    """The same on the padded form: any device, dtype and head_dim."""
    keys, values = layer.padded(keys), layer.padded(layer.values)
    order = torch.arange(layer.slots, device=query.device)
    mask = (order < layer.lengths.view(layer.batch, layer.kv_heads, 1))[:, :, None]
    if layer.received is None:
        return attend(query, keys, values, mask, causal=False, scaling=scaling, softcap=softcap)[:, :, 0]
    out, received = attend_and_receive(query, keys, values, mask, None, scaling=scaling, softcap=softcap)
    flat = received.flatten()
    layer.received.mul_(forget).add_(flat if layer.gather is None else flat[layer.flatten])
    return out[:, :, 0]


# ---- torch.compile -----------------------------------------------------------------------------------------------


@functools.cache
def _compile(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    return torch.compile(function, dynamic=dynamic)


@contextmanager
def _compiled(parts: Anatomy, cache: SlotCache) -> Iterator[None]:
    """Inside, what lies between matrix multiplications and attention runs as few kernels: norms, MLPs, rotations, and
    the bookkeeping of slots. What is compiled stays so; the model is put back at the end."""
    norms = [module for module in parts.model.modules() if "Norm" in type(module).__name__]
    mlps = [layer.mlp for layer in parts.layers if layer.mlp is not None]
    places: list[tuple[Any, str, Any]] = [
        (module, "forward", functools.partial(_compile(type(module).forward, dynamic=False), module))
        for module in [*norms, *mlps]
        if "forward" not in vars(module)  # somebody else has been here
    ]
    for layer in cache.filled:
        for name in ("append", "moved_keys", "evict"):
            places.append((layer, name, functools.partial(_compile(getattr(SlotLayer, name)), layer)))
    for modeling in {sys.modules[type(layer.attention).__module__] for layer in parts.layers}:
        rotate = getattr(modeling, "apply_rotary_pos_emb", None)
        if rotate is not None:
            places.append((modeling, "apply_rotary_pos_emb", _compile(rotate, dynamic=False)))
    before = [(place, name, vars(place).get(name)) for place, name, _ in places]
    try:
        for place, name, compiled in places:
            setattr(place, name, compiled)
        with torch._dynamo.config.patch(recompile_limit=64):  # a version for each batch size, of loop after loop
            yield
    finally:
        for place, name, own in before:
            if own is None:
                delattr(place, name)
            else:
                setattr(place, name, own)


# ---- what slots can't do -----------------------------------------------------------------------------------------


def _check(parts: Anatomy, policy: CachePolicy | None, cache: Cache, room: int | None) -> None:
    """Raise FoveateError where decoding from slots would not be what the policy's own cache gives."""
    instead = "decode with plain forwards or generate."
    if parts.positions == "rotary" and not parts.rotary_is_static:
        raise FoveateError(
            f"the rotary frequencies of this {parts.family} model change with the length, which a loop of static "
            f"shapes never looks at: {instead}"
        )
    longest = None if room is None else cache.get_seq_length() + room
    windows = [layer.sliding_window for layer in parts.layers if layer.sliding_window is not None]
    if windows and (longest is None or longest > min(windows)):
        raise FoveateError(
            f"this {parts.family} model has layers with a window of {min(windows)} tokens, which slots don't have: "
            f"give a room with which the text stays within it, or {instead}"
        )
    if policy is None:
        return
    if policy.grows:
        raise FoveateError(f"{policy}: the budget grows with every token, but slots are fixed: {instead}")
    if policy.merges:
        raise FoveateError(f"{policy}: entries that go are merged into others, which slots don't do: {instead}")
    if any(getattr(layer, "coder", None) is not None for layer in cache.layers):
        raise FoveateError(f"{policy}: entries are held as codes, which slots don't do: {instead}")
    if type(policy).observe is not CachePolicy.observe or not _tried(policy, parts)[0]:
        raise FoveateError(
            f"{policy}: scores hang on the order of entries or on earlier forwards, and slots have neither: {instead}"
        )


def _tried(policy: CachePolicy, parts: Anatomy) -> tuple[bool, bool]:
    """Tried on made-up entries: whether they score the same in any order, and nothing is noted for later; and whether
    the score is the position."""
    random = torch.Generator().manual_seed(0)
    entries, dim = 1024, parts.head_dim  # more than what a policy looks at together, such as a window
    keys, values = torch.randn(2, 1, parts.kv_heads, entries, dim, generator=random)
    query = torch.randn(1, parts.heads, 1, dim, generator=random)
    positions = torch.arange(4, 4 + entries, dtype=torch.int32).expand(1, parts.kv_heads, -1)
    received = None if policy.watches() is None else torch.rand(1, parts.kv_heads, entries, generator=random)
    now = torch.tensor([[3 + entries]])
    inv_freq = parts.inv_freq(0)
    state: dict[str, Tensor] = {}

    def score(order: Tensor) -> Tensor:
        view = CacheView(
            0,
            keys[:, :, order],
            values[:, :, order],
            positions[..., order],
            None if received is None else received[..., order],
            now[..., None] + 1,
            query,
            now,
            None,
            None if inv_freq is None else inv_freq.cpu(),
            state,
        )
        return policy.score(view).float()

    order = torch.randperm(entries, generator=random)
    scored = score(torch.arange(entries))
    any_order = torch.allclose(scored[..., order], score(order), atol=1e-5) and not state
    return any_order, torch.equal(scored, positions.float())
