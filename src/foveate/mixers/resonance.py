"""Synaptic Resonance: a fast-weight memory whose pathways are reinforced by relevance, and decay without it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import attend, cached, linear, rotated, split_heads
from foveate.backbone.recurrence import recurrence
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import Learned, by_seed, differences, over_seeds


@mixer("resonance")
class Resonance(Mixer):
    """Attention within a window, and a Hebbian memory of the whole text that adds to it.

        c_t = trace c_(t-1) + (1 - trace) k_t                     the context
        r_t = sigmoid(a (k_t . c_(t-1)) + b)                      how relevant the token is in it
        M_t = exp(-delta (1 - r_t)) M_(t-1) + r_t k_t v_t'        reinforced if it is, decayed if not
        y_t = W (attention_t + sigmoid(W_g x_t) * rms(M_t' q_t))

    q and k have length 1 in the memory; a (times sqrt(head)), b and delta are learned, one each a head, and the gate is
    one a head.

    Only the abstract could be read, and it has no equation: it says that matrices of synaptic weights are adjusted
    continuously, in training and inference, by contextual relevance, within an existing transformer. All of the above
    is our reading of that: that relevance is likeness to a running average of keys, that the memory is an outer product
    of keys and values as in Hebb's rule, that it decays where relevance is low, the gate, and the window.

    Fields:
        window: tokens that attention sees.
        trace: what stays of the context at a token.
        relevance: whether r_t hangs on the context; false: r_t = sigmoid(b), plain fast weights.
    """

    paper = Paper(
        "Exploring Synaptic Resonance in Large Language Models: A Novel Approach to Contextual Memory Integration",
        2025,
        "https://arxiv.org/abs/2502.10699",
    )
    claim = "keeps context longer, and bears noise, by weights that relevance reinforces"

    window: int = 16
    trace: float = 0.9
    relevance: bool = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise FoveateError(f"{self}: window must be at least 1, as a token sees itself.")
        if not 0 < self.trace < 1:
            raise FoveateError(f"{self}: trace is what stays of the context at a token: give a number between 0 and 1.")

    def build(self, shape: Shape) -> TokenMixer:
        return ResonanceMixer(shape, self)


class ResonanceMixer(TokenMixer):
    def __init__(self, shape: Shape, settings: Resonance):
        super().__init__()
        if shape.head % 2:
            raise FoveateError(
                f"resonance: rotary positions need heads of an even size, not {shape.head}: give another number."
            )
        self.heads, self.head, self.eps, self.settings = shape.heads, shape.head, shape.eps, settings
        self.qkv = linear(shape.width, 3 * shape.width)
        self.gate = linear(shape.width, shape.heads, bias=True)
        self.sharp = nn.Parameter(torch.ones(shape.heads)) if settings.relevance else None
        self.bias = nn.Parameter(torch.zeros(shape.heads))
        self.fall = nn.Parameter(torch.linspace(-4.0, -1.0, shape.heads))  # delta = softplus of it: 0.02 to 0.3
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        empty = like.new_zeros(batch, 0, self.heads, self.head)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {
            "memory": like.new_zeros(batch, self.heads, self.head, self.head, dtype=dtype),
            "context": like.new_zeros(batch, self.heads, 1, self.head, dtype=dtype),
            "keys": empty,
            "values": empty.clone(),
            "seen": like.new_zeros(batch, dtype=torch.long),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 2)
        dtype = torch.promote_types(x.dtype, torch.float32)
        heard, context, memory = self.recalled(q.to(dtype), k.to(dtype), v.to(dtype), state)
        at = 0 if state is None else state["seen"]
        q, k = rotated(q, at), rotated(k, at)
        if state is not None:
            held, state = cached(state, self.settings.window - 1, keys=k, values=v)
            k, v, state = held["keys"], held["values"], {**state, "context": context, "memory": memory}
        near = attend(q, k, v, window=self.settings.window)
        gate = torch.sigmoid(self.gate(x)).unsqueeze(-1)
        return self.out((near + gate * heard.to(near.dtype)).flatten(2)), state

    def recalled(self, q: Tensor, k: Tensor, v: Tensor, state: State | None) -> tuple[Tensor, Tensor, Tensor]:
        """rms(M_t' q_t), (batch, n, heads, d), and context and memory after the last token; in float32 at least."""
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        relevant, context = self.relevant(k, None if state is None else state["context"])
        kept = -functional.softplus(self.fall.to(k.dtype)) * (1 - relevant)
        y, memory = recurrence(q, relevant.unsqueeze(-1) * k, v, kept, None if state is None else state["memory"])
        return y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt(), context, memory

    def relevant(self, k: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """r_t, (batch, n, heads), and the context after the last token, (batch, heads, 1, d)."""
        trace, one = self.settings.trace, torch.ones_like(k[..., :1])
        decay = torch.full((self.heads,), math.log(trace), device=k.device, dtype=k.dtype)
        until, context = recurrence(one, (1 - trace) * one, k, decay, context)
        bias = self.bias.to(k.dtype)
        if self.sharp is None:
            return torch.sigmoid(bias).expand(k.shape[:3]), context
        before = (until - (1 - trace) * k) / trace  # the token itself is no context of its own
        likeness = (k * before).sum(-1) * math.sqrt(self.head)
        return torch.sigmoid(self.sharp.to(k.dtype) * likeness + bias), context


@claim("resonance")
class ResonanceClaim(Claim):
    statement: ClassVar[str] = (
        "weights that contextual relevance reinforces lower the perplexity, make the model bear noisy inputs better, "
        "and retain what came long before"
    )
    setting: ClassVar[str] = (
        "our reading of it (the paper's abstract has no equations), 2 layers of width 64, 3 seeds: next bytes of "
        "passages of 128 (400 steps of 32), also with a tenth of the bytes read replaced at random; and recall of 4 "
        "pairs in 64 tokens (400 steps of 64); against attention within the same window, and the memory without "
        "relevance"
    )
    reads = False
    steps: int = 400
    batch: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64)
    text: str = "lm:length=128"
    recall: str = "mqar:pairs=4,length=64,vocab=64"
    window: int = 16
    noise: float = 0.1

    def run(self, bench: Bench) -> Finding:
        mixers = {
            "resonance": f"resonance:window={self.window}",
            "fast weights": f"resonance:window={self.window},relevance=false",
            "attention": f"softmax:window={self.window}",
        }
        models = {name: replace(self.sizes, mixer=each) for name, each in mixers.items()}
        settings = Settings(steps=self.steps, batch=self.batch, lr=2e-3)
        device, seeds = bench.model.device, self.seeds
        text = by_seed(
            self.text, models, settings, device=device, seeds=seeds, progress=lambda done: bench.progress(done / 2)
        )
        for each in (one for group in text.values() for one in group):
            each.scores["worse by noise"] = self.noisy(each) - each.scores["loss"]
        recall = by_seed(
            self.recall,
            models,
            replace(settings, batch=2 * self.batch, lr=3e-3),
            device=device,
            seeds=seeds,
            progress=lambda done: bench.progress(0.5 + done / 2),
        )
        others = ("fast weights", "attention")
        lower = {name: differences(text["resonance"], text[name], "loss") for name in others}
        noise = {name: differences(text["resonance"], text[name], "worse by noise") for name in others}
        far = {name: differences(recall["resonance"], recall[name], "accuracy") for name in others}
        return Finding(
            {
                **{f"loss, {name}": over_seeds([x.scores["loss"] for x in text[name]]) for name in mixers},
                **{f"loss, resonance less {name}": each for name, each in lower.items()},
                **{
                    f"nats lost by noise, {n}": over_seeds([x.scores["worse by noise"] for x in text[n]])
                    for n in mixers
                },
                **{f"nats lost by noise, resonance less {name}": each for name, each in noise.items()},
                **{f"recall, {name}": over_seeds([x.scores["accuracy"] for x in recall[name]]) for name in mixers},
                **{f"recall, resonance less {name}": each for name, each in far.items()},
            },
            {
                "its loss is lower than that of attention within the same window": lower["attention"].high < 0,
                "it loses less by noise": noise["attention"].high < 0,
                "it recalls more from beyond the window": far["attention"].low > 0,
                "relevance, and not the memory alone, lowers the loss": lower["fast weights"].high < 0,
            },
        )

    def noisy(self, learned: Learned) -> float:
        """The loss on test passages of which a fraction of the inputs is replaced."""
        task, model = TRAIN_TASKS.parse(self.text), learned.model
        losses = []
        for number in range(4):
            batch = task.batch(64, "test", number, model.device, seed=1_000_003)
            draw = torch.Generator().manual_seed(number)
            hit = torch.rand(batch.inputs.shape, generator=draw) < self.noise
            other = torch.randint(task.vocabulary, batch.inputs.shape, generator=draw)
            inputs = torch.where(hit.to(model.device), other.to(model.device), batch.inputs)
            with torch.no_grad():
                losses.append(task.scores(task.answers(model, batch._replace(inputs=inputs)), batch)["loss"].mean())
        return float(torch.stack(losses).mean())
