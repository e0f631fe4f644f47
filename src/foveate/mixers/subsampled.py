"""Stochastically subsampled attention: random keys in training, all of them at evaluation, or an ensemble of draws."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from foveate.backbone import BackboneForCausalLM, Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import rotated, split_heads
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.mixers.softmax import SoftmaxMixer
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import Learned, by_seed, differences, over_seeds


@mixer("subsampled")
class Subsampled(Mixer):
    """Softmax attention with rotary positions whose layers, in training, each draw the keys that they read, anew in
    every pass.

    Only the paper's abstract could be read, so that the way to draw is ours. A text is cut into blocks of queries. A
    block reads its own keys, each up to itself, and m = keep n - block of the keys before it, drawn without
    replacement with P(key) ~ distance^-power (the distance to the block's begin; the largest of log P + Gumbel noise
    are drawn); n is the text's length, and all heads and all texts of a batch share a layer's draw. So n (block + m)
    scores are computed in place of n^2. At evaluation, and wherever a state goes along, all keys are read: the layer
    is then `softmax`. `ensemble` averages what a model says under several draws.

    Fields:
        keep: the fraction of a text's keys that a block reads in training, its own among them; one key before it at
            least.
        block: queries that share their keys.
        power: how much the draw prefers near keys; 0: all alike.
    """

    paper = Paper(
        "The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles",
        2023,
        "https://arxiv.org/abs/2306.01705",
    )
    claim = "generalises better than training with all keys, at 4 to 8 times less attention; several draws even more"
    grows = True

    keep: float = 0.25
    block: int = 8
    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise FoveateError(f"{self}: keep is a fraction of the keys: give a number above 0, 1 at most.")
        if self.block < 1 or self.power < 0:
            raise FoveateError(f"{self}: block must be 1 or more, power 0 or more.")

    def drawn(self, n: int) -> int:
        """Keys that a block of a text of n tokens draws among those before it."""
        return min(max(1, round(self.keep * n) - self.block), n)

    def build(self, shape: Shape) -> TokenMixer:
        return SubsampledMixer(shape, self)


class SubsampledMixer(SoftmaxMixer):
    """Args: the shape; the settings.

    Attributes:
        sampling: whether keys are drawn outside of training too.
    """

    def __init__(self, shape: Shape, settings: Subsampled):
        super().__init__(shape, shape.heads, None, True)
        self.settings, self.sampling = settings, False

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        if state is not None or not (self.training or self.sampling) or x.shape[1] <= self.settings.block:
            return super().forward(x, state)
        q, k, v = split_heads(self.qkv(x), 3 * self.heads).chunk(3, 2)
        places, there = self.draw(x.shape[1], x.device)
        return self.out(self.attend(rotated(q), rotated(k), v, places, there).flatten(2)), None

    def draw(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What each block draws: places of keys, int64 (blocks, m), and which are there at all, bool (blocks, m).

        The first blocks have fewer than m keys before them.
        """
        begins = torch.arange(0, n, self.settings.block, device=device).unsqueeze(1)
        distance = begins - torch.arange(n, device=device)
        noise = -torch.empty(distance.shape, device=device).exponential_().clamp_min(1e-20).log()
        liking = (noise - self.settings.power * distance.clamp_min(1).log()).masked_fill(distance < 1, -math.inf)
        places = liking.topk(self.settings.drawn(n), 1).indices
        return places, places < begins

    def attend(self, q: Tensor, k: Tensor, v: Tensor, places: Tensor, there: Tensor) -> Tensor:
        """Attention to a block's own keys and to those drawn; (batch, n, heads, d) each, and so is what comes."""
        n, block = q.shape[1], self.settings.block
        blocks = len(places)

        def own(x: Tensor) -> Tensor:  # batch, blocks, block, heads, d
            return functional.pad(x, (0, 0, 0, 0, 0, -n % block)).unflatten(1, (blocks, block))

        keys, values = (torch.cat([own(x), x[:, places]], 2) for x in (k, v))
        seen = torch.ones(block, block, dtype=torch.bool, device=q.device).tril().expand(blocks, -1, -1)
        mask = torch.cat([seen, there.unsqueeze(1).expand(-1, block, -1)], 2).unsqueeze(1)
        # Blocks go into the batch, so that attention is called once.
        queries, keys, values = (x.flatten(0, 1).transpose(1, 2) for x in (own(q), keys, values))
        mask = mask.repeat(len(q), 1, 1, 1)
        out = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return out.transpose(1, 2).unflatten(0, (-1, blocks)).flatten(1, 2)[:, :n]


@torch.no_grad()
def ensemble(model: BackboneForCausalLM, ids: Tensor, samples: int) -> Tensor:
    """The mean of what a model says under several draws of its keys: log-probabilities, (batch, n, vocabulary).

    Args:
        model: with `subsampled` layers; left as it was.
        ids: (batch, n), int64.
        samples: draws, at least 1. They are of PyTorch's global generator.

    Example:
        >>> from foveate.backbone import BackboneConfig
        >>> model = BackboneForCausalLM(BackboneConfig(vocab_size=20, mixer="subsampled")).eval()
        >>> ensemble(model, torch.randint(20, (1, 30)), samples=4).exp().sum(-1).allclose(torch.ones(1, 30))
        True
    """
    mixers = [each for each in model.modules() if isinstance(each, SubsampledMixer)]
    if not mixers:
        raise FoveateError("this model draws no keys: give one with layers of the mixer subsampled.")
    if samples < 1:
        raise FoveateError(f"the mean of {samples} draws is nothing: give 1 or more.")
    before, training = [each.sampling for each in mixers], model.training
    model.eval()
    for each in mixers:
        each.sampling = True
    try:
        said = [model(input_ids=ids).logits.float().log_softmax(-1) for _ in range(samples)]
    finally:
        for each, was in zip(mixers, before, strict=True):
            each.sampling = was
        model.train(training)
    return torch.stack(said).logsumexp(0) - math.log(samples)


@claim("subsampled")
class SubsampledGeneralisesBetter(Claim):
    statement: ClassVar[str] = (
        "training with a random quarter of the keys, and evaluating with all of them, generalises better than training "
        "with all, at 4 times less attention; an ensemble of several draws is better than one evaluation with all keys "
        "(abstract)"
    )
    setting: ClassVar[str] = (
        "two layers of width 128, the next byte of 74 KB of prose in passages of 128, each read some 55 times, so that "
        "there is something to generalise from; a quarter of the keys in training against all; then 8 draws against "
        "all keys on 256 test passages; 3 seeds, 1,000 steps of 32 passages each"
    )
    reads: ClassVar[bool] = False
    steps: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=128)
    length: int = 128
    draws: int = 8
    batches: int = 4

    def run(self, bench: Bench) -> Finding:
        task, ours = f"lm:text=prose,length={self.length}", Subsampled()
        found = by_seed(
            task,
            {"some keys": replace(self.sizes, mixer=str(ours)), "all keys": self.sizes},
            Settings(steps=self.steps, batch=32),
            device=bench.model.device,
            seeds=self.seeds,
            progress=lambda done: bench.progress(0.9 * done),
        )
        rows = [self.together(task, learned) for learned in found["some keys"]]
        bench.progress(1.0)
        gap = differences(found["some keys"], found["all keys"], "loss")
        gain = over_seeds([many - whole for whole, _, many in rows])
        overfit = over_seeds([x.scores["loss"] - x.report.losses[-1] for x in found["all keys"]])
        return Finding(
            {
                **{f"loss, {name} in training": over_seeds([x.scores["loss"] for x in found[name]]) for name in found},
                "some keys in training, less all": gap,
                "all keys: loss of new text less that of the last batch": overfit,
                "one draw, less all keys at evaluation": over_seeds([one - whole for whole, one, _ in rows]),
                f"{self.draws} draws, less all keys at evaluation": gain,
            },
            {
                "training with a quarter of the keys generalises better": gap.high < 0,
                f"the mean of {self.draws} draws is better than all keys": gain.high < 0,
            },
        )

    def together(self, task: str, learned: Learned) -> tuple[float, float, float]:
        """Loss of the same test passages: with all keys, one draw, and several."""
        totals = torch.zeros(3)
        judged = TRAIN_TASKS.parse(task)
        for number in range(self.batches):
            batch = judged.batch(64, "test", number, learned.model.device)
            said = [
                judged.answers(learned.model, batch),
                *(ensemble(learned.model, batch.inputs, samples) for samples in (1, self.draws)),  # type: ignore[arg-type]
            ]
            totals += torch.stack([judged.scores(each, batch)["loss"].mean() for each in said]).cpu()
        whole, one, many = (totals / self.batches).tolist()
        return whole, one, many
