"""Core context aware attention: one core token for each group of those before, and the last tokens as they are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import linear, rotated, split_heads
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.trial import by_seed, differences, over_seeds

POOLINGS = ("significance", "mean")


@mixer("core-context")
class CoreContext(Mixer):
    """Attention to merged groups of tokens and to the last tokens, in one softmax.

    Tokens are in groups of g. Once a group is whole, each head merges it into a core token by the significance that its
    last token gives to each of its tokens, with rotary positions on queries and keys already:

        a = softmax(q_last' [k_1 .. k_g] / sqrt(d)),   core key = sum_j a_j k_j,   core value = sum_j a_j v_j

    A token reads the core tokens of all groups that are wholly before the last w tokens (globality), and every token
    after those groups, itself among them (locality: w to w + g - 1 tokens), and one softmax over both fuses them. So it
    reads every token before it once, merged or raw, by some L / g + w keys. That is the released code; the paper's
    first version merges hidden states, and core tokens have keys and values of their own.

    Fields:
        group: tokens that make a core token (g).
        window: tokens that stay raw at least (w).
        pooling: `significance`, or `mean` (a = 1 / g), the paper's ablation.
    """

    paper = Paper(
        "Core Context Aware Attention for Long Context Language Modeling", 2024, "https://arxiv.org/abs/2412.12465"
    )
    claim = "models long texts nearly as attention to all tokens does, from a key for each group of them"
    grows = True

    group: int = 8
    window: int = 16
    pooling: str = "significance"

    def __post_init__(self) -> None:
        if self.group < 1 or self.window < 1:
            raise FoveateError(f"{self}: group and window must be 1 or more.")
        if self.pooling not in POOLINGS:
            raise FoveateError(f"{self}: there is no pooling {self.pooling!r}: give significance or mean.")

    def build(self, shape: Shape) -> TokenMixer:
        if shape.head % 2:
            raise FoveateError(
                f"core-context: rotary positions need heads of an even size, not {shape.head}: give another number of "
                "heads."
            )
        return CoreContextMixer(shape, self)


class CoreContextMixer(TokenMixer):
    """Args: the shape; the settings.

    The state has the core tokens so far, `core_keys` and `core_values` (batch, cores, heads, d), and the raw tokens
    that the next one still reads, `keys` and `values` (batch, w + g - 2 at most, heads, d), the open group among them.
    """

    def __init__(self, shape: Shape, settings: CoreContext):
        super().__init__()
        self.settings, self.heads, self.head = settings, shape.heads, shape.head
        self.qkv = linear(shape.width, 3 * shape.width)
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        names = ("keys", "values", "core_keys", "core_values")
        return {name: like.new_zeros(batch, 0, self.heads, self.head) for name in names}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        n, g = x.shape[1], self.settings.group
        # How many tokens went by is in the state's sizes: whole groups in cores, and raw tokens begin with a group.
        seen = 0 if state is None else state["core_keys"].shape[1] * g + state["keys"].shape[1] % g
        begin = 0 if state is None else seen - state["keys"].shape[1]
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 2)
        q, k = rotated(q, seen), rotated(k, seen)
        if state is not None:
            k, v = torch.cat([state["keys"], k], 1), torch.cat([state["values"], v], 1)
        old, new = seen // g, (seen + n) // g
        cores = self._merged(q[:, g - 1 - seen % g :: g][:, : new - old], k, v, old * g - begin)
        if state is not None:
            cores = (torch.cat([state["core_keys"], cores[0]], 1), torch.cat([state["core_values"], cores[1]], 1))
        y = self._attended(q, k, v, *cores, seen, begin)
        if state is not None:
            first = int(self._first(seen + n)) - begin
            state = {
                "keys": k[:, first:].clone(),
                "values": v[:, first:].clone(),
                "core_keys": cores[0],
                "core_values": cores[1],
            }
        return self.out(y.flatten(2)), state

    def _first(self, place: Tensor | int) -> Tensor | int:
        """The first raw token that the token at a place reads: the groups before it are wholly before its window."""
        groups = (place + 1 - self.settings.window) // self.settings.group
        return self.settings.group * (groups.clamp_min(0) if isinstance(groups, Tensor) else max(0, groups))

    def _merged(self, q: Tensor, k: Tensor, v: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Keys and values of core tokens, (batch, groups, heads, d), in the dtype of k and v.

        Args:
            q: of each group's last token, (batch, groups, heads, d).
            k, v: (batch, held + n, heads, d).
            at: where the first group begins among them.
        """
        groups, g = q.shape[1], self.settings.group
        k, v = (x[:, at : at + groups * g].unflatten(1, (groups, g)) for x in (k, v))
        if self.settings.pooling == "mean":
            return k.mean(2), v.mean(2)
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = (q.unsqueeze(2).to(dtype) * k.to(dtype)).sum(-1) / math.sqrt(self.head)
        weights = scores.softmax(2).unsqueeze(-1)
        return (weights * k).sum(2).to(k.dtype), (weights * v).sum(2).to(v.dtype)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, core_k: Tensor, core_v: Tensor, seen: int, begin: int
    ) -> Tensor:
        """One softmax over core tokens and raw ones; (batch, n, heads, d). `begin` is the place of the first raw one.

        A whole text is read in blocks of queries as long as the widest window, which see their own raw keys and those
        of the block before: scores are n (L / g + 2 w + 2 g), and never n L.
        """
        n, cores = q.shape[1], core_k.shape[1]
        q, k, v, core_k, core_v = (x.transpose(1, 2) for x in (q, k, v, core_k, core_v))
        place = torch.arange(seen, seen + n, device=q.device)
        raw = torch.arange(begin, begin + k.shape[2], device=q.device).unsqueeze(0)
        size, widest = n, self.settings.window + self.settings.group - 1
        if seen == 0 and n > 2 * widest:
            size = widest
            place = torch.arange(n + -n % size, device=q.device)
            q, k, v = (functional.pad(x, (0, 0, 0, -n % size)) for x in (q, k, v))
            k, v = (torch.cat([functional.pad(x, (0, 0, size, 0))[:, :, :-size], x], 2) for x in (k, v))
            k, v = (x.unflatten(2, (2, -1, size)).transpose(2, 3).flatten(3, 4) for x in (k, v))
            raw = place.view(-1, size)
            raw = torch.cat([raw - size, raw], 1)
        else:
            k, v = k.unsqueeze(2), v.unsqueeze(2)
        first = self._first(place)
        assert isinstance(first, Tensor)
        place, first = (each.view(-1, size, 1) for each in (place, first))
        ends = self.settings.group * torch.arange(1, cores + 1, device=q.device)
        raw = raw.unsqueeze(1)
        visible = torch.cat([(ends <= first).expand(-1, size, -1), (raw >= first) & (raw <= place)], 2)
        scores = torch.cat(
            [(q @ core_k.mT).unflatten(2, (-1, size)), q.unflatten(2, (-1, size)) @ k.mT],
            -1,
        )
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = (scores.to(dtype) / math.sqrt(self.head)).masked_fill(~visible, -math.inf)
        far, near = scores.softmax(-1).to(v.dtype).split([cores, k.shape[-2]], -1)
        y = far.flatten(2, 3) @ core_v + (near @ v).flatten(2, 3)
        return y[:, :, :n].transpose(1, 2)


@claim("core-context")
class CoreContextIsNearlyAttention(Claim):
    statement: ClassVar[str] = (
        "with a core token for each group of tokens and a window of raw ones, long texts are modelled nearly as well "
        "as with attention to all tokens, at a fraction of the keys; the significance of tokens is what keeps a far "
        "one findable, as neither a window nor the mean of each group does"
    )
    setting: ClassVar[str] = (
        "two layers of width 64 with short convolutions, groups of 8 and a window of 16; the next byte of prose and "
        "code in passages of 256, 300 steps of 32, against all tokens and against a window of 23; and one marked token "
        "among 96, whose successor is asked for at the end, 600 steps of 64, against the window, all tokens, and "
        "groups merged by their mean; 3 seeds"
    )
    reads: ClassVar[bool] = False
    lm_steps: int = 300
    steps: int = 600
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64, conv=3)
    lm: str = "lm:length=256"
    recall: str = "induction:length=96"
    settings: CoreContext = CoreContext()
    margin: float = 0.05

    def run(self, bench: Bench) -> Finding:
        ours, device = self.settings, bench.model.device
        core, mean, window, whole = "core tokens", "means of groups", "a window alone", "all tokens"
        mixers = {
            core: str(ours),
            mean: str(replace(ours, pooling="mean")),
            window: f"softmax:window={ours.window + ours.group - 1}",
            whole: "softmax",
        }
        models = {name: replace(self.sizes, mixer=text) for name, text in mixers.items()}
        text = by_seed(
            self.lm,
            {name: models[name] for name in (core, window, whole)},
            Settings(steps=self.lm_steps, batch=32, lr=3e-3),
            device=device,
            seeds=self.seeds,
            progress=lambda done: bench.progress(0.4 * done),
        )
        needle = by_seed(
            self.recall,
            models,
            Settings(steps=self.steps, lr=3e-3),
            device=device,
            seeds=self.seeds,
            progress=lambda done: bench.progress(0.4 + 0.6 * done),
        )
        worse = differences(text[core], text[whole], "loss")
        local = differences(text[core], text[window], "loss")
        over_window = differences(needle[core], needle[window], "accuracy")
        over_mean = differences(needle[core], needle[mean], "accuracy")
        length = 1024
        held = self.held(length)
        return Finding(
            {
                **{f"loss, {name}": over_seeds([x.scores["loss"] for x in text[name]]) for name in text},
                "loss, core tokens less all tokens": worse,
                "loss, core tokens less a window alone": local,
                **{
                    f"needle found, {name}": over_seeds([x.scores["accuracy"] for x in needle[name]]) for name in needle
                },
                "needle found, core tokens less a window alone": over_window,
                "needle found, core tokens less means of groups": over_mean,
                f"keys held of {length} tokens": over_seeds([held]),
            },
            {
                f"the loss is at most {self.margin} nats above that of all tokens": worse.high < self.margin,
                "it finds far tokens that a window doesn't": over_window.low > 0,
                "it finds far tokens that means of groups don't": over_mean.low > 0,
                "a text costs L / g + w + g keys at most": held <= length / ours.group + ours.window + ours.group,
            },
        )

    def held(self, length: int) -> int:
        """Keys that a layer holds after a text, core and raw."""
        module = self.settings.build(Shape(self.sizes.width, self.sizes.heads))
        x = torch.zeros(1, length, self.sizes.width)
        with torch.no_grad():
            _, state = module(x, module.start(1, x))
        assert state is not None
        return state["core_keys"].shape[1] + state["keys"].shape[1]
