"""Flow-Attention: linear attention in which what sources give and sinks take is conserved, so that they compete."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import linear, split_heads
from foveate.backbone.recurrence import recurrence
from foveate.claims import Claim, Finding, claim
from foveate.measure.bootstrap import Metric
from foveate.measure.clock import alternated, timed
from foveate.methods import Paper
from foveate.mixers.linear import LinearMixer
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import Learned, by_seed, differences, over_seeds

EPS = 1e-6


@mixer("flow")
class Flow(Mixer):
    """Attention as a flow from sources (values) to sinks (results), with capacities phi(q_i) . phi(k_j), phi = sigmoid.

    The flow into a sink, and out of a source, both from what came so far (the authors' causal version):

        I_t = q_t . sum_(j<=t) k_j,    O_t = k_t . sum_(i<=t) q_i.

    Where each source gives as much as any other (k_j over O_j), and each sink takes as much (q_i over I_i), what is
    left to tell sinks and sources apart is

        I'_t = q_t . sum_(j<=t) k_j j / O_j / t,    O'_t = k_t . sum_(i<=t) q_i i / I_i / t,

    by which sources compete, c_t = t exp(O'_t) / sum_(j<=t) exp(O'_j), and sinks are allocated their share:

        y_t = sigmoid(I'_t) sum_(j<=t) (q_t . k_j / I_t) c_j v_j:

    the recurrence with A = 1, k = phi(k) and v = c v. O' is kept within [-1, 1], as the authors do. The state is the
    recurrence's and four running sums of a head's channels. Without masks all flows of a text are known at once, and
    these sums are over the whole text; what a source gives to later sinks is not seen here.
    """

    paper = Paper(
        "Flowformer: Linearizing Transformers with Conservation Flows", 2022, "https://arxiv.org/abs/2202.06258"
    )
    claim = "makes linear attention choose among tokens, by conserving what each gives and takes, in linear time"

    def build(self, shape: Shape) -> TokenMixer:
        return FlowMixer(shape)


class FlowMixer(TokenMixer):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.head = shape.heads, shape.head
        self.qkv = linear(shape.width, 3 * shape.width)
        self.out = linear(shape.width, shape.width)

    def start(self, batch: int, like: Tensor) -> State:
        zeros = like.new_zeros(batch, self.heads, self.head, dtype=torch.promote_types(like.dtype, torch.float))
        return {
            "memory": zeros.unsqueeze(-1).repeat(1, 1, 1, self.head),
            "sources": zeros,  # sums of k, and of k j / O
            "conserved_sources": zeros.clone(),
            "sinks": zeros.clone(),  # sums of q, and of q i / I
            "conserved_sinks": zeros.clone(),
            "competition": zeros[..., 0].clone(),  # the sum of exp(O')
            "seen": like.new_zeros(batch, dtype=torch.long),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        before = self.start(x.shape[0], x) if state is None else state
        after: State = {}

        def summed(name: str, new: Tensor) -> Tensor:
            """The running sum over all tokens so far, (batch, n, ...)."""
            total = new.cumsum(1) + before[name].unsqueeze(1)
            after[name] = total[:, -1].clone()
            return total

        q, k, v = split_heads(self.qkv(x), 3 * self.heads).to(before["sinks"].dtype).chunk(3, 2)
        q, k = q.sigmoid(), k.sigmoid()
        count = before["seen"][:, None] + torch.arange(1, x.shape[1] + 1, device=x.device)
        count = count.unsqueeze(-1).to(q.dtype)  # batch, n, 1
        after["seen"] = before["seen"] + x.shape[1]
        taken = _dot(q, summed("sources", k))  # batch, n, heads
        given = _dot(k, summed("sinks", q))
        left_to_sink = _dot(q, summed("conserved_sources", k * (count / given).unsqueeze(-1))) / count
        left_to_source = _dot(k, summed("conserved_sinks", q * (count / taken).unsqueeze(-1))) / count
        force = left_to_source.clamp(-1.0, 1.0).exp()
        share = force / summed("competition", force) * count
        y, after["memory"] = recurrence(
            q / taken.unsqueeze(-1), k, v * share.unsqueeze(-1), None, None if state is None else state["memory"]
        )
        y = (y * left_to_sink.sigmoid().unsqueeze(-1)).to(x.dtype)
        return self.out(y.flatten(2)), None if state is None else after


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return ((a + EPS) * (b + EPS)).sum(-1)


@torch.no_grad()
def attention(module: FlowMixer | LinearMixer, x: Tensor) -> Tensor:
    """The map that a mixer's output is a weighted sum of values by, (batch, heads, n, n), rows adding up to 1: by plain
    sums over all pairs, without flow's allocation, which scales whole rows.

    Args:
        x: what the mixer reads, (batch, n, width).
    """
    q, k, _ = split_heads(module.qkv(x), 3 * module.heads).transpose(1, 2).double().chunk(3, 1)
    if isinstance(module, LinearMixer):
        weights = ((functional.elu(q) + 1) @ (functional.elu(k) + 1).mT).tril()
    else:
        q, k = q.sigmoid(), k.sigmoid()
        pairs = (q @ k.mT).tril()
        taken = pairs.sum(-1, keepdim=True)
        count = torch.arange(1, x.shape[1] + 1, device=x.device)
        left = ((k @ (q * count[:, None] / taken).mT).tril().sum(-1) / count).clamp(-1, 1).exp()
        weights = pairs * (left / left.cumsum(-1) * count).unsqueeze(-2)
    return weights / weights.sum(-1, keepdim=True)


@claim("flow")
class FlowClaim(Claim):
    statement: ClassVar[str] = (
        "conserving the flow into sinks and out of sources makes linear attention informative without a bias towards "
        "near tokens: better than linear attention on long sequences, with maps less uniform, in linear time"
    )
    setting: ClassVar[str] = (
        "bytes of text, passages of 256; 2 layers of width 64 with flow and with linear attention, 3 seeds, 600 steps "
        "of 32 passages; the entropy of the maps in 8 test passages, over that of uniform ones; times of one layer of "
        "width 64 on 4,096 and 16,384 tokens. The paper's Long-Range Arena is not run"
    )
    reads = False
    steps: int = 600
    seeds: tuple[int, ...] = (0, 1, 2)
    length: int = 256
    tokens: tuple[int, int] = (4096, 16384)

    def run(self, bench: Bench) -> Finding:
        device = bench.model.device
        text = f"lm:length={self.length}"
        models = {name: Sizes(mixer=name) for name in ("flow", "linear")}
        settings = Settings(steps=self.steps, batch=32, lr=3e-3)
        found = by_seed(text, models, settings, device=device, seeds=self.seeds, progress=bench.progress)
        ids = TRAIN_TASKS.parse(text).batch(8, "test", 0, device).inputs
        uniform = {name: [_uniformity(run, ids) for run in runs] for name, runs in found.items()}
        gain = differences(found["flow"], found["linear"], "loss")
        sharper = over_seeds([a - b for a, b in zip(uniform["flow"], uniform["linear"], strict=True)])
        wrong = _conserved(found["flow"][0], ids)
        times = _times(device, self.tokens)
        slower = over_seeds([b / a for a, b in zip(*times, strict=True)])
        return Finding(
            {
                **{f"loss, {name}": over_seeds([r.scores["loss"] for r in runs]) for name, runs in found.items()},
                "loss of flow less that of linear": gain,
                **{f"entropy of maps over uniform, {name}": over_seeds(each) for name, each in uniform.items()},
                "entropy of flow less that of linear": sharper,
                "largest error of a conserved flow": Metric.exact(wrong),
                "time for 4 times the tokens": slower,
            },
            {
                "normalised flows are 1 to 1e-5": wrong < 1e-5,
                "a lower loss than linear attention": gain.high < 0,
                "less uniform maps": sharper.high < 0,
                "time grows about linearly: under 6 for 4 times the tokens": slower.value < 6,
            },
        )


@torch.no_grad()
def _read(run: Learned, ids: Tensor) -> list[tuple[FlowMixer | LinearMixer, Tensor]]:
    """Each layer's mixer, and what it reads."""
    seen: list[tuple[FlowMixer | LinearMixer, Tensor]] = []
    hooks = [
        layer.mixer.register_forward_pre_hook(lambda module, given: seen.append((module, given[0])))  # type: ignore[union-attr]
        for layer in run.model.layers
    ]
    try:
        run.model(input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _uniformity(run: Learned, ids: Tensor) -> float:
    """The mean entropy of rows, from the second on, over that of equal weights."""
    found = []
    for module, x in _read(run, ids):
        rows = attention(module, x)[:, :, 1:]
        most = torch.arange(2, rows.shape[-1] + 1, device=x.device).double().log()
        found.append(float((torch.special.entr(rows).sum(-1) / most).mean()))
    return sum(found) / len(found)


@torch.no_grad()
def _conserved(run: Learned, ids: Tensor) -> float:
    """How far a sink's incoming flow over I, and a source's outgoing flow over O, are from 1 at most."""
    worst = 0.0
    for module, x in _read(run, ids):
        q, k, _ = split_heads(module.qkv(x), 3 * module.heads).double().sigmoid().chunk(3, 2)
        sources, sinks = k.cumsum(1), q.cumsum(1)
        taken = (q / _dot(q, sources).unsqueeze(-1) * sources).sum(-1)
        given = (k / _dot(k, sinks).unsqueeze(-1) * sinks).sum(-1)
        worst = max(worst, float((taken - 1).abs().max()), float((given - 1).abs().max()))
    return worst


@torch.no_grad()
def _times(device: torch.device, tokens: tuple[int, int]) -> list[list[float]]:
    """Seconds of one layer on so many tokens, in 3 rounds."""
    module = FlowMixer(Shape(64, 4)).to(device)
    texts = [torch.randn(1, n, 64, device=device) for n in tokens]
    return alternated([lambda x=x: timed(lambda: module(x), device)[0] for x in texts], 3)  # type: ignore[misc]
