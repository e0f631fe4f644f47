"""SeqBoat: a router that reads a running average decides at which tokens attention runs at all."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.backbone import Mixer, Shape, State, TokenMixer, mixer
from foveate.backbone.parts import attend, linear, rotated, visible
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.kernels.selective_scan import linear_scan
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train.build import Sizes
from foveate.train.loop import Settings
from foveate.train.tasks import TRAIN_TASKS
from foveate.train.trial import Learned, by_seed, differences, over_seeds


@mixer("seqboat")
class SeqBoat(Mixer):
    """Sparse modular activation (section 3): from a state of the text so far, a token decides whether it attends.

    A damped moving average with `average` numbers a channel (Mega's) gives the state m = silu(sum of eta * h) with
    h_t = alpha beta x_t + (1 - alpha delta) h_(t-1). The latent configurator gives p = softmax(W m / temperature), over
    "skip" and "run", with a learned temperature; a token is active where "run" is the likelier, and then c = max p.
    Active tokens are gathered, and a gated attention unit runs on them alone: z, r, v = silu(W m), queries and keys
    scaled and shifted from the one z, softmax over the last `window` active tokens, times r. The results are put back
    in their places times c, and through c alone the router learns: no gradient goes through the choice.

        y = W_out [m, c * active * attention(q, k, v) * r]

    Ours: q and k turn by rotary positions in the whole text; the router begins with all tokens active (c = 0.73), as
    small ones that began undecided turned attention off before it had learned anything; the mixer is the paper's layer
    up to its residual sum, with one output map for both parts, which is the same. The module's `active` holds the last
    choices, (batch, n) bool, and its `rate` the fraction of tokens that were active.

    Fields:
        window: active tokens that an active token sees at most, itself among them.
        features: of queries and keys; even.
        expand: channels of the values, as a multiple of the width.
        average: numbers a channel of the moving average.
        select: whether there is a router; False: all tokens are active.
    """

    paper = Paper("Sparse Modular Activation for Efficient Sequence Modeling", 2023, "https://arxiv.org/abs/2306.11197")
    claim = "runs attention only at the tokens that need it, and so sees farther with a window of the same size"

    window: int = 32
    features: int = 32
    expand: float = 1.0
    average: int = 4
    select: bool = True

    def __post_init__(self) -> None:
        if min(self.window, self.features, self.average) < 1 or self.expand <= 0:
            raise FoveateError(f"{self}: window, features and average must be 1 or more, and expand above 0.")
        if self.features % 2:
            raise FoveateError(f"{self}: rotary positions turn pairs of features: give an even number of them.")

    def build(self, shape: Shape) -> TokenMixer:
        return SeqBoatMixer(shape, self)


class MovingAverage(nn.Module):
    """A damped moving average of each channel, with several rates a channel (Mega, arXiv 2209.10655, section 3.2)."""

    def __init__(self, width: int, rates: int):
        super().__init__()
        self.alpha, self.delta = (nn.Parameter(torch.randn(width, rates)) for _ in range(2))
        self.beta = nn.Parameter(torch.ones(width, rates))
        self.eta = nn.Parameter(torch.randn(width, rates) / math.sqrt(rates))
        self.skip = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, n, width) to the same, and the averages after the last token, (batch, width, rates)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        alpha, delta, beta, eta = (each.to(exact) for each in (self.alpha, self.delta, self.beta, self.eta))
        alpha = alpha.sigmoid()
        added = x.to(exact).unsqueeze(-1) * (alpha * beta)
        decay = (1 - alpha * delta.sigmoid()).expand_as(added)
        held = linear_scan(decay, added, torch.zeros_like(added[:, 0]) if before is None else before)
        return ((held * eta).sum(-1) + self.skip.to(exact) * x).to(x.dtype), held[:, -1].clone()


class SeqBoatMixer(TokenMixer):
    """Args: the shape, and the settings."""

    active: Tensor | None = None
    """Which tokens of the last forward attended, (batch, n) bool."""

    def __init__(self, shape: Shape, settings: SeqBoat):
        super().__init__()
        self.window, self.features, self.select = settings.window, settings.features, settings.select
        self.values = max(1, round(settings.expand * shape.width))
        self.average = MovingAverage(shape.width, settings.average)
        if self.select:
            self.router = linear(shape.width, 2, bias=True)
            nn.init.normal_(self.router.weight, std=0.02)
            temperature = 0.3 * math.sqrt(shape.width)
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
            with torch.no_grad():
                self.router.bias.copy_(temperature * torch.tensor([-0.5, 0.5]))
        self.zrv = linear(shape.width, self.features + 2 * self.values, bias=True)
        self.scale, self.shift = (
            nn.Parameter(torch.randn(2, self.features)),
            nn.Parameter(torch.zeros(2, self.features)),
        )
        self.out = linear(shape.width + self.values, shape.width)

    @property
    def rate(self) -> Tensor:
        """The fraction of tokens that attended in the last forward; NaN before the first."""
        return torch.tensor(math.nan) if self.active is None else self.active.float().mean()

    def start(self, batch: int, like: Tensor) -> State:
        exact = torch.promote_types(like.dtype, torch.float32)
        return {
            "average": like.new_zeros(batch, *self.average.alpha.shape, dtype=exact),
            "keys": like.new_zeros(batch, self.window - 1, self.features),
            "values": like.new_zeros(batch, self.window - 1, self.values),
            "held": like.new_zeros(batch, dtype=torch.long),  # how many of those entries there are yet, the last ones
            "seen": like.new_zeros(batch, dtype=torch.long),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        batch, n, _ = x.shape
        m, average = self.average(x, None if state is None else state["average"])
        m = functional.silu(m)
        active, confidence = self._chosen(m)
        self.active = active.detach()
        # Active tokens to the front: the slot of each, and the token of each slot. What does not attend goes to a last
        # slot, which is cut off; after a row's own tokens, its slots hold token 0 and nobody reads them.
        count = active.cumsum(1)
        size = n if torch.compiler.is_compiling() else max(1, int(count[:, -1].max()))  # graphs need a known size
        slot = torch.where(active, count - 1, size)
        token = torch.zeros_like(slot[:, :1]).repeat(1, size + 1)
        token = token.scatter(1, slot, torch.arange(n, device=x.device).expand(batch, -1))[:, :size]
        some = m.gather(1, token.unsqueeze(-1).expand(-1, -1, m.shape[-1]))
        z, r, v = functional.silu(self.zrv(some)).split([self.features, self.values, self.values], -1)
        at = token if state is None else token + state["seen"].unsqueeze(1)
        q, k = (self._turned(z * self.scale[i] + self.shift[i], at).to(v.dtype) for i in range(2))
        if state is None:
            seen = attend(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), window=self.window).squeeze(2)
        else:
            k, v = torch.cat([state["keys"].to(k.dtype), k], 1), torch.cat([state["values"].to(v.dtype), v], 1)
            seen = self._attended(q, k, v, state["held"])
            last = count[:, -1:, None] + torch.arange(self.window - 1, device=x.device).unsqueeze(-1)
            state = {
                "average": average,
                "keys": k.gather(1, last.expand(-1, -1, k.shape[-1])),
                "values": v.gather(1, last.expand(-1, -1, v.shape[-1])),
                "held": (state["held"] + count[:, -1]).clamp_max(self.window - 1),
                "seen": state["seen"] + n,
            }
        seen = (seen * r).gather(1, slot.clamp_max(size - 1).unsqueeze(-1).expand(-1, -1, self.values))
        seen = seen * (confidence * active).unsqueeze(-1)
        return self.out(torch.cat([m, seen.to(m.dtype)], -1)), state

    def _chosen(self, m: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens attend, (batch, n) bool, and how sure the router is of its choice."""
        if not self.select:
            return torch.ones_like(m[..., 0], dtype=torch.bool), torch.ones_like(m[..., 0])
        exact = torch.promote_types(m.dtype, torch.float32)
        logits = self.router(m).to(exact) / self.log_temperature.to(exact).exp()
        confidence, choice = logits.softmax(-1).max(-1)
        return choice == 1, confidence

    def _turned(self, x: Tensor, at: Tensor) -> Tensor:
        """Rotary positions, where each token has its own: (batch, n, features) at (batch, n)."""
        return rotated(x.reshape(-1, 1, 1, self.features), at.flatten()).view_as(x)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, held: Tensor) -> Tensor:
        """Attention of active tokens to what was held and to each other, a window of queries at a time."""
        rows = []
        for first in range(0, q.shape[1], self.window):
            piece = q[:, first : first + self.window]
            keys, values = (x[:, first : first + self.window - 1 + piece.shape[1]] for x in (k, v))
            there = first + torch.arange(keys.shape[1], device=q.device) >= (self.window - 1 - held).unsqueeze(1)
            mask = visible(piece.shape[1], self.window - 1, self.window, q.device) & there.unsqueeze(1)
            rows.append(functional.scaled_dot_product_attention(piece, keys, values, attn_mask=mask))
        return torch.cat(rows, 1)


@claim("seqboat")
class SeqBoatAttendsWhereNeeded(Claim):
    statement: ClassVar[str] = (
        "a router learns to run attention only where it is needed: it is as good as attention at every token, with "
        "fewer activations, and better than attention at every token within a window of the same size (section 4)"
    )
    setting: ClassVar[str] = (
        "two layers of width 64, 4 learned moving averages a channel; recall of 8 pairs in 64 tokens, most of them "
        "noise: a router with a window of 24 active tokens, against attention at all tokens with windows of 24 and of "
        "64; 3 seeds, 800 steps of 128 texts each"
    )
    reads: ClassVar[bool] = False
    steps: int = 800
    batch: int = 128
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = Sizes(width=64)
    task: str = "mqar:pairs=8,length=64,vocab=64"
    window: int = 24
    wide: int = 64
    margin: float = 0.05

    def run(self, bench: Bench) -> Finding:
        routed, local, wide = "router", "all tokens, same window", "all tokens, whole text"
        models = {
            routed: replace(self.sizes, mixer=f"seqboat:window={self.window}"),
            local: replace(self.sizes, mixer=f"seqboat:window={self.window},select=false"),
            wide: replace(self.sizes, mixer=f"seqboat:window={self.wide},select=false"),
        }
        found = by_seed(
            self.task,
            models,
            Settings(steps=self.steps, batch=self.batch, lr=3e-3),
            device=bench.model.device,
            seeds=self.seeds,
            progress=bench.progress,
        )
        near = differences(found[routed], found[local], "accuracy")
        far = differences(found[routed], found[wide], "accuracy")
        rates = [self.rates(each) for each in found[routed]]
        telling, noise = (over_seeds([pair[i] for pair in rates]) for i in range(2))
        apart = over_seeds([each[0] - each[1] for each in rates])
        overall = over_seeds([pair[2] for pair in rates])
        return Finding(
            {
                **{f"accuracy, {name}": over_seeds([x.scores["accuracy"] for x in found[name]]) for name in models},
                "router less all tokens, same window": near,
                "router less all tokens, whole text": far,
                "activation rate": overall,
                "activation rate at keys and values": telling,
                "activation rate at noise": noise,
                "activation rate, keys and values less noise": apart,
            },
            {
                f"it is no worse than attention at all tokens, by {self.margin:.0%} at most": far.low > -self.margin,
                "it activates fewer tokens": overall.high < 1,
                "it activates keys and values rather than noise": apart.low > 0,
                "it is better than attention within a window of the same size": near.low > 0,
            },
        )

    def rates(self, learned: Learned) -> tuple[float, float, float]:
        """The fraction of tokens that were active, over all layers: of keys and values, of noise, of all."""
        batch = TRAIN_TASKS.parse(self.task).batch(64, "test", 0, learned.model.device)
        with torch.no_grad():
            learned.model(input_ids=batch.inputs)
        mixers = [each for each in learned.model.modules() if isinstance(each, SeqBoatMixer)]
        active = torch.stack([each.active for each in mixers if each.active is not None]).float()
        telling = (batch.inputs != 0).expand_as(active)
        return float(active[telling].mean()), float(active[~telling].mean()), float(active.mean())
