"""Editing a fact: a rank-one change of one MLP's last map, that undoes itself.

An MLP's last map answers keys (what its neurons say at a token) with values (what it adds there). A fact is changed by
answering one key, that of the subject's last token, with another value, and all keys of ordinary text as before as far
as that goes.

Source: Locating and Editing Factual Associations in GPT (2022), section 3.1, equations 2 to 4. Ours: the key is that of
the prompt itself, not averaged over prompts with other beginnings, and the value is found without the second loss that
keeps what the subject is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from foveate.data.facts import Prompt, by_length
from foveate.errors import FoveateError
from foveate.models.anatomy import anatomy
from foveate.models.patching import Site, patched, recorded

STEPS, RATE, DECAY, FARTHEST = 20, 0.5, 0.5, 4.0
"""Of the search for a value: Adam's steps and rate, what its length costs, and how far it may go, in lengths of what
stood there (all but the steps as in the paper's code for GPT-2, as we remember it)."""


@torch.no_grad()
def chances(model: PreTrainedModel, ids: Tensor, answers: Tensor) -> Tensor:
    """The probability of each row's answer after it, float64 (batch,), on the CPU; `answers`: LongTensor (batch,)."""
    logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    return logits.softmax(-1).gather(1, answers[:, None])[:, 0].double().cpu()


def covariances(model: PreTrainedModel, ids: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """The mean of key times key of each layer's MLP over a text, ids (passage, token): float32 (inner, inner).

    Raises:
        FoveateError: a layer whose MLP has no single last map.

    Example:
        >>> import foveate as fv
        >>> covariances(fv.tiny("llama"), torch.arange(1, 41).view(2, 20), [1])[1].shape
        torch.Size([128, 128])
    """
    sums: dict[int, Tensor] = {}
    for passage in ids:
        for layer, keys in _keys(model, passage[None], layers).items():
            sums[layer] = sums.get(layer, 0) + keys[0].T @ keys[0]
    return {layer: total / ids.numel() for layer, total in sums.items()}


def keys_of(model: PreTrainedModel, prompts: Sequence[Prompt], layer: int) -> Tensor:
    """What a layer's neurons say at each prompt's last subject token, float32 (prompt, inner)."""
    found: dict[int, Tensor] = {}
    for group in by_length(prompts):
        ids = torch.cat([prompts[i].ids for i in group]).to(model.device)
        keys = _keys(model, ids, [layer])[layer][:, prompts[group[0]].end - 1]
        found.update(zip(group, keys, strict=True))
    return torch.stack([found[i] for i in range(len(prompts))])


@torch.no_grad()
def _keys(model: PreTrainedModel, ids: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """What goes into each layer's last map, float32 (batch, token, inner)."""
    found: dict[int, Tensor] = {}
    hooks = []
    try:
        for layer in layers:

            def note(module: Any, args: tuple[Tensor, ...], layer: int = layer) -> None:
                found[layer] = args[0].detach().float().reshape(*ids.shape, -1)

            hooks.append(_down(model, layer).register_forward_pre_hook(note))
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _down(model: PreTrainedModel, layer: int) -> Any:
    layers = anatomy(model).layers
    if not 0 <= layer < len(layers):
        raise FoveateError(f"there is no layer {layer} to edit: this model's are 0 to {len(layers) - 1}.")
    if not isinstance(down := layers[layer].down, torch.nn.Linear | Conv1D):
        raise FoveateError(f"the MLP of layer {layer} has no single last map, so no fact can be edited there.")
    return down


def values_for(
    model: PreTrainedModel, prompts: Sequence[Prompt], targets: Sequence[int], layer: int, *, steps: int = STEPS
) -> Tensor:
    """What a layer's MLP would have to say at each subject's last token for the model to answer with the targets.

    The model stays as it is, and so do its gradients. Values are clipped to `FARTHEST` lengths of the stream there.

    Returns:
        float32 (prompt, hidden): of the site "mlp".
    """
    _down(model, layer)
    found: dict[int, Tensor] = {}
    for group in by_length(prompts):
        where = prompts[group[0]].end - 1
        ids = torch.cat([prompts[i].ids for i in group]).to(model.device)
        goals = torch.tensor([targets[i] for i in group], device=model.device)
        sites = Site("mlp", layer), Site("residual", layer + 1)
        with torch.no_grad(), recorded(model, sites) as values:
            model(ids, use_cache=False, logits_to_keep=1)
        there = values[sites[0]][:, where].float()
        size = values[sites[1]][:, where].float().norm(dim=-1, keepdim=True)
        # With a norm after the MLP, what it says is scaled later: its own length is then the only measure.
        moved = torch.zeros_like(there).requires_grad_()
        adam = torch.optim.Adam([moved], lr=RATE)

        def patch(value: Tensor, moved: Tensor = moved, where: int = where) -> Tensor:
            new = value.clone()
            new[:, where] = value[:, where] + moved.to(value.dtype)
            return new

        for _ in range(steps):
            with torch.enable_grad(), patched(model, {sites[0]: patch}):
                logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
                loss = torch.nn.functional.cross_entropy(logits, goals, reduction="sum")
                loss = loss + DECAY * (moved.norm(dim=-1) / size[:, 0]).square().sum()
                (moved.grad,) = torch.autograd.grad(loss, [moved])
            adam.step()
            with torch.no_grad():
                moved *= (FARTHEST * size / moved.norm(dim=-1, keepdim=True).clamp(min=1e-9)).clamp(max=1)
        found.update(zip(group, (there + moved.detach()), strict=True))
    return torch.stack([found[i] for i in range(len(prompts))])


@contextmanager
def edited(model: PreTrainedModel, layer: int, key: Tensor, value: Tensor, covariance: Tensor) -> Iterator[None]:
    """While in force, a layer's MLP answers this key with this value, and other keys as before as far as that goes.

    Args:
        model: the model. Afterwards its weights are exactly as they were.
        layer: whose MLP.
        key: float (inner,), of `keys_of`.
        value: float (hidden,), of `values_for`.
        covariance: float (inner, inner), of `covariances`. A thousandth of its mean diagonal is added to the diagonal,
            so that it can be inverted after little text (ours).

    Raises:
        FoveateError: a layer whose MLP has no single last map.

    Example:
        >>> import foveate as fv
        >>> from foveate.data.facts import FACTS, prompt_of
        >>> model, prompt = fv.tiny("llama"), prompt_of(FACTS[0], fv.tiny_tokenizer())
        >>> known = covariances(model, torch.arange(1, 201).view(2, 100), [1])
        >>> goal = torch.tensor([65])
        >>> key, value = keys_of(model, [prompt], 1), values_for(model, [prompt], [65], 1)
        >>> before = chances(model, prompt.ids, goal)
        >>> with edited(model, 1, key[0], value[0], known[1]):
        ...     after = chances(model, prompt.ids, goal)
        >>> bool(after > 2 * before), torch.equal(chances(model, prompt.ids, goal), before)
        (True, True)
    """
    down = _down(model, layer)
    weight, flat = down.weight, isinstance(down, Conv1D)
    exact = covariance.double()
    exact = exact + (1e-3 * exact.diagonal().mean() + 1e-12) * torch.eye(
        len(exact), device=exact.device, dtype=exact.dtype
    )
    toward = torch.linalg.solve(exact, key.double().to(exact.device))
    with torch.no_grad():
        old = weight.detach().clone()
        map_ = (old.T if flat else old).double()
        said = map_ @ key.double().to(map_.device)
        if down.bias is not None:
            said = said + down.bias.double()
        weight_of_key = (key.double().to(said) @ toward.to(said)).clamp(min=1e-12)  # of no neuron that fires: 0
        change = torch.outer(value.double().to(said) - said, toward.to(said)) / weight_of_key
        weight += (change.T if flat else change).to(weight)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(old)
