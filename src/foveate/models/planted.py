"""A small transformer whose weights are written by hand, so that what its heads do is known."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from foveate.errors import FoveateError
from foveate.models.tiny import tiny_tokenizer

VOCAB = 260
"""As `tiny_tokenizer` has it: 256 bytes, padding, begin, end, and one that is not used."""
POSITIONS = 256
BLOCKS = {
    "token": slice(0, 260),  # the token that stands here, one channel each
    "position": slice(260, 516),  # its position
    "previous": slice(516, 776),  # for heads to write into: the token before, say
    "out": slice(776, 1036),  # what the model predicts: the head reads this
    "one": slice(1036, 1037),  # 1 everywhere
    "spare": slice(1040, 1152),  # for whatever else
    "ballast": slice(1152, 1280),  # 1 and -1 everywhere, so that norms scale all tokens about alike
}
"""The channels of the residual stream, by what they hold."""
HIDDEN = 1280
INNER = 320


class Planted:
    """Writes circuits into a transformer (GPT-2's architecture) that does nothing else.

    The residual stream has a block of channels for each thing that is known of a token, with one channel a value; a
    head matches a channel of one block in its query against a channel of another in its key, and moves a block from
    there to here. Whatever isn't planted is zero: such heads attend evenly and give nothing. The vocabulary is that of
    `fv.tiny_tokenizer`, a token a byte.

    Args:
        layers, heads: how many.
        sharp: the logit of a match; others have about 0.

    Example:
        >>> import torch
        >>> circuit = Planted(layers=2).previous(0, 1).head(1, 3, match=("token", "previous"), move=("token", "out"))
        >>> model = circuit.model()
        >>> ids = torch.tensor([[7, 8, 9, 7]])
        >>> int(model(ids).logits[0, -1].argmax())              # an induction circuit: 8 came after 7
        8
    """

    def __init__(self, layers: int = 3, heads: int = 4, sharp: float = 24.0):
        if heads not in (1, 2, 4):
            raise FoveateError(f"{heads} planted heads were asked for: give 1, 2 or 4, with {VOCAB} channels or more.")
        config = GPT2Config(
            vocab_size=VOCAB,
            n_positions=POSITIONS,
            n_embd=HIDDEN,
            n_layer=layers,
            n_head=heads,
            n_inner=INNER,
            activation_function="relu",
            tie_word_embeddings=False,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            pad_token_id=256,
            bos_token_id=257,
            eos_token_id=258,
        )
        self.width, self.sharp = HIDDEN // heads, sharp
        with torch.random.fork_rng(devices=[]):
            self._model: Any = GPT2LMHeadModel(config)
        self._neurons = [0] * layers
        body = self._model.transformer
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.zero_()
            norms: list[Any] = [body.ln_f, *(n for block in body.h for n in (block.ln_1, block.ln_2))]
            for norm in norms:
                norm.weight.fill_(1)
            body.wte.weight[:, BLOCKS["token"]] = torch.eye(VOCAB)
            body.wpe.weight[:, BLOCKS["position"]] = torch.eye(POSITIONS)
            body.wpe.weight[:, BLOCKS["one"]] = 1
            ballast = BLOCKS["ballast"].stop - BLOCKS["ballast"].start
            body.wpe.weight[:, BLOCKS["ballast"]] = torch.tensor([1.0, -1.0]).repeat(ballast // 2)
            # What a norm makes of a 1, where four other channels hold one beside the ballast.
            self._seen = (HIDDEN / (ballast + 4)) ** 0.5
            self._model.lm_head.weight[:, BLOCKS["out"]] = sharp / self._seen * torch.eye(VOCAB)

    def previous(self, layer: int, head: int) -> Self:
        """A head that looks at the token before, and notes it in the block "previous"; the first token has none."""
        self.head(layer, head, match=("position", "position"), shift=-1, move=("token", "previous"))
        for token in range(VOCAB):  # the first token could only look at itself: that is taken back
            self.neuron(layer, when={"position": 0, "token": token}, write={"previous": token}, strength=-1)
        return self

    def head(
        self,
        layer: int,
        head: int,
        *,
        match: tuple[str, str],
        shift: int = 0,
        move: tuple[str, str] | None = None,
        sharp: float | None = None,
        strength: float = 1.0,
    ) -> Self:
        """A head that attends where its query's block has the channel that the key's block has.

        Args:
            layer, head: which head.
            match: the query's block and the key's.
            shift: the key's channel is the query's plus this: -1 with positions is the token before.
            move: the block that is read where it attends, and the block that it is added to here; None: nothing moves,
                and its values are zero.
            sharp: the logit of a match; None: as the model's.
            strength: how much of what is read is added.
        """
        asked, kept = BLOCKS[match[0]], BLOCKS[match[1]]
        rows = range(asked.start, asked.stop)
        pairs = [(row, kept.start + i + shift) for i, row in enumerate(rows) if 0 <= i + shift < kept.stop - kept.start]
        query, key = torch.zeros(HIDDEN, self.width), torch.zeros(HIDDEN, self.width)
        for channel, (row, column) in enumerate(pairs):
            query[row, channel] = key[column, channel] = 1
        self._attend(layer, head, query, key, sharp)
        if move is not None:
            source, goal = BLOCKS[move[0]], BLOCKS[move[1]]
            size = min(source.stop - source.start, goal.stop - goal.start)
            value, out = torch.zeros(HIDDEN, self.width), torch.zeros(self.width, HIDDEN)
            for i in range(size):
                value[source.start + i, i] = 1
                out[i, goal.start + i] = strength / self._seen
            self._write(layer, head, value, out)
        return self

    def sink(self, layer: int, head: int, *, sharp: float | None = None, position: int = 0) -> Self:
        """A head that rests on one position, the first, and gives nothing."""
        query, key = torch.zeros(HIDDEN, self.width), torch.zeros(HIDDEN, self.width)
        query[BLOCKS["one"].start, 0] = key[BLOCKS["position"].start + position, 0] = 1
        self._attend(layer, head, query, key, sharp)
        return self

    def neuron(self, layer: int, *, when: dict[str, int], write: dict[str, int], strength: float = 1.0) -> Self:
        """A neuron that fires where all these blocks hold these values, and adds those values to those blocks.

        Example:
            >>> model = Planted(layers=1).neuron(0, when={"token": 70}, write={"out": 80}).model()
            >>> int(model(torch.tensor([[70]])).logits[0, -1].argmax())
            80
        """
        mlp, at = self._model.transformer.h[layer].mlp, self._neurons[layer]
        if at == INNER:
            raise FoveateError(f"layer {layer} has {INNER} neurons, and all are planted: take another layer.")
        self._neurons[layer] += 1
        with torch.no_grad():
            for block, index in when.items():
                mlp.c_fc.weight[BLOCKS[block].start + index, at] = 1 / self._seen
            mlp.c_fc.bias[at] = 0.5 - len(when)  # fires only where all are there, with about a half
            for block, index in write.items():
                mlp.c_proj.weight[at, BLOCKS[block].start + index] = 2 * strength
        return self

    def model(self) -> PreTrainedModel:
        """The model, in eval mode."""
        model: PreTrainedModel = self._model.eval()
        return model

    def _attend(self, layer: int, head: int, query: Tensor, key: Tensor, sharp: float | None) -> None:
        logit = self.sharp if sharp is None else sharp
        gain = (logit * self.width**0.5) ** 0.5 / self._seen
        attention = self._model.transformer.h[layer].attn
        with torch.no_grad():
            for turn, matrix in enumerate((query, key)):
                start = turn * HIDDEN + head * self.width
                attention.c_attn.weight[:, start : start + self.width] = gain * matrix

    def _write(self, layer: int, head: int, value: Tensor, out: Tensor) -> None:
        attention = self._model.transformer.h[layer].attn
        start = head * self.width
        with torch.no_grad():
            attention.c_attn.weight[:, 2 * HIDDEN + start : 2 * HIDDEN + start + self.width] = value
            attention.c_proj.weight[start : start + self.width] = out


def planted() -> PreTrainedModel:
    """A model of three layers of four heads with known circuits, for trying probes on.

    Head 0.1 looks at the token before, and 1.3 uses that to continue what came before (induction). 1.0 rests on the
    first token. 2.2 looks at its own token and copies it weakly. A neuron of layer 0 knows that "P" comes after "F".
    All other heads attend evenly and give nothing.

    Example:
        >>> import foveate as fv
        >>> model, tokenizer = fv.planted(), fv.tiny_tokenizer()
        >>> ids = tokenizer("the cat. the c", return_tensors="pt").input_ids
        >>> tokenizer.decode(model(ids).logits[0, -1].argmax())
        'a'
    """
    f, p = tiny_tokenizer()("FP").input_ids
    return (
        Planted()
        .previous(0, 1)
        .head(1, 3, match=("token", "previous"), move=("token", "out"))
        .sink(1, 0)
        .head(2, 2, match=("token", "token"), move=("token", "out"), strength=0.3)
        .neuron(0, when={"token": f}, write={"out": p})
        .model()
    )
