"""Normalisation after the addition in the first layers, before the sublayer in the others."""

from __future__ import annotations

from typing import ClassVar

from foveate.backbone import Norm, Residual, Shape, norm
from foveate.blocks.norms.post import PostResidual
from foveate.blocks.norms.pre import PreResidual
from foveate.blocks.norms.trial import deep_models, figures, paired
from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.methods import Paper
from foveate.tasks.base import Bench
from foveate.train import Settings, Sizes


@norm("mix-ln")
class MixLN(Norm):
    """norm(x + f(x)) in the first floor(post * L) of L layers, x + f(norm(x)) in the others.

    Post-norm gives deep layers large gradients and starves the first ones; pre-norm does the reverse. Here each stands
    where its gradients are large. The last post-norm hands a stream of variance 1 to the first pre-norm layer.

    Fields:
        post: the fraction of the layers that are post-norm, from the first; so few layers that it comes to less than
            one have none.
    """

    paper = Paper(
        "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN",
        2024,
        "https://arxiv.org/abs/2412.13795",
    )
    claim = "learns better than pre-norm and post-norm, with gradients that are more alike over layers"

    post: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.post < 1:
            raise FoveateError(
                f"mix-ln: post={self.post:g} of the layers can't be post-norm: give a fraction above 0 and below 1, or "
                "use pre or post."
            )

    def build(self, shape: Shape) -> Residual:
        # 0.58 * 50 is a little below 29, and 29 is meant.
        return (PostResidual if shape.layer < int(self.post * shape.layers + 1e-9) else PreResidual)(shape)


@claim("mix-ln")
class MixLNClaim(Claim):
    statement: ClassVar[str] = (
        "post-norm in the first quarter of the layers and pre-norm in the others predicts better than either in all "
        "layers, with gradients that are more even over layers, and deep layers that matter more than pre-norm's"
    )
    setting: ClassVar[str] = (
        "byte models of 12 layers and width 96 learn prose and code for 400 steps of 32 passages of 128 bytes, with 3 "
        "seeds, pre, post and mix-ln on the same batches, all matrices started alike; profiles over 64 validation "
        "passages. Short training of small models: the paper trains from 70 million weights up, and far longer"
    )
    reads = False
    steps: int = 400
    layers: int = 12
    width: int = 96
    length: int = 128
    batch: int = 32
    examples: int = 512
    seeds: tuple[int, ...] = (0, 1, 2)

    def run(self, bench: Bench) -> Finding:
        settings = Settings(steps=self.steps, batch=self.batch)
        found = deep_models(
            {
                name: (Sizes(width=self.width, layers=self.layers, norm=name), settings)
                for name in ("pre", "post", "mix-ln")
            },
            length=self.length,
            examples=self.examples,
            seeds=self.seeds,
            device=bench.model.device,
            progress=bench.progress,
        )
        mix, others = found["mix-ln"], ("pre", "post")
        loss = {name: paired(mix, found[name], lambda run: run.loss) for name in others}
        start = {name: paired(mix, found[name], lambda run: run.start.spread("gradient")) for name in others}
        end = {name: paired(mix, found[name], lambda run: run.end.spread("gradient")) for name in others}
        damage = paired(mix, found["pre"], lambda run: run.end.deep("damage"))
        return Finding(
            {
                **figures(found),
                **{f"nats a byte, mix-ln less {name}": each for name, each in loss.items()},
                **{f"unevenness of gradients at the start, mix-ln less {name}": each for name, each in start.items()},
                **{f"unevenness of gradients at the end, mix-ln less {name}": each for name, each in end.items()},
                "nats lost without one layer of the deep half, mix-ln less pre": damage,
            },
            {
                **{f"it predicts better than {name}": each.high < 0 for name, each in loss.items()},
                **{
                    f"its gradients are more even than {name}'s at the end": each.high < 0 for name, each in end.items()
                },
                "without one layer of the deep half it loses more than pre": damage.low > 0,
            },
        )
