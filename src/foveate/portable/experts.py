"""An MLP whose neurons are grouped into experts, of which each token uses a few.

This file travels with saved models: torch and transformers are all it needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


class Experts(nn.Module):
    """An MLP in blocks of neighbouring neurons, the experts; of each token's experts only the best `top_k` work.

    An expert's score is the mean of what its neurons would see: the mean of its keys, times the input. Keys are the
    rows of `gate`, or of `up` where there is no gate. So nothing is added to the MLP's weights.

    Args:
        hidden, intermediate: sizes; `intermediate` is a multiple of `experts`.
        experts: how many there are.
        top_k: how many of them work for a token, 1 to `experts`; all: the MLP as it was.
        act: the activation, by transformers' name.
        gated: whether there is a gate.
        bias: whether the maps that read have biases; `down_bias`: whether the one that writes has.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        experts: int,
        top_k: int,
        act: str,
        gated: bool = True,
        bias: bool = False,
        down_bias: bool = False,
    ):
        super().__init__()
        self.hidden, self.intermediate, self.experts, self.top_k = hidden, intermediate, experts, top_k
        self.act_name, self.act_fn = act, ACT2FN[act]
        self.gate = nn.Linear(hidden, intermediate, bias=bias) if gated else None
        self.up = nn.Linear(hidden, intermediate, bias=bias)
        self.down = nn.Linear(intermediate, hidden, bias=down_bias)
        self._means: tuple[Any, Tensor, Tensor | None] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "experts": self.experts,
            "top_k": self.top_k,
            "act": self.act_name,
            "gated": self.gate is not None,
            "bias": self.up.bias is not None,
            "down_bias": self.down.bias is not None,
        }

    def extra_repr(self) -> str:
        return f"experts={self.experts}, top_k={self.top_k}"

    @torch.no_grad()
    def means(self) -> tuple[Tensor, Tensor | None]:
        """The mean key of each expert, (experts, hidden), and the mean of its keys' biases, (experts,).

        They follow from the weights, and are not saved; they are worked out again when the weights have changed.
        """
        keys = self.up if self.gate is None else self.gate
        changed = tuple((p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in keys.parameters())
        if self._means is None or self._means[0] != changed:
            means = keys.weight.float().unflatten(0, (self.experts, -1)).mean(dim=1).to(keys.weight.dtype)
            biases = None if keys.bias is None else keys.bias.unflatten(0, (self.experts, -1)).mean(dim=1)
            self._means = (changed, means, biases)
        return self._means[1:]

    def chosen(self, tokens: Tensor) -> Tensor:
        """The experts that work for each of the tokens (token, hidden): LongTensor (token, top_k)."""
        means, biases = self.means()
        return nn.functional.linear(tokens, means, biases).topk(self.top_k, dim=-1).indices

    def inner(self, tokens: Tensor, neurons: slice) -> Tensor:
        """What some of the neurons give for tokens (token, hidden): (token, neuron)."""
        up = _part(self.up, tokens, neurons)
        if self.gate is None:
            return self.act_fn(up)
        return self.act_fn(_part(self.gate, tokens, neurons)) * up

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden) to (..., hidden)."""
        tokens = hidden_states.flatten(0, -2)
        whole = self.top_k == self.experts
        out = self.down(self.inner(tokens, slice(None))) if whole else self._of_chosen(tokens)
        return out.view_as(hidden_states)

    def _of_chosen(self, tokens: Tensor) -> Tensor:
        """Each expert once, for the tokens that chose it: weights are read where they lie, and no more of them."""
        chosen, size = self.chosen(tokens), self.intermediate // self.experts
        out = tokens.new_zeros(tokens.shape)
        if self.down.bias is not None:
            out = out + self.down.bias
        for expert in chosen.unique().tolist():
            neurons = slice(expert * size, (expert + 1) * size)
            weight = self.down.weight[:, neurons]
            if len(tokens) == 1:
                out = out + nn.functional.linear(self.inner(tokens, neurons), weight)
            else:
                those = (chosen == expert).any(dim=-1).nonzero().squeeze(1)
                added = nn.functional.linear(self.inner(tokens[those], neurons), weight)
                out = out.index_add(0, those, added.to(out.dtype))
        return out


def _part(linear: nn.Linear, tokens: Tensor, neurons: slice) -> Tensor:
    bias = None if linear.bias is None else linear.bias[neurons]
    return nn.functional.linear(tokens, linear.weight[neurons], bias)
