"""In-context graph: whether words move to their neighbours as a model reads a walk over a map that it never saw."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.claims import Claim, Finding, claim
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores
from foveate.models.anatomy import anatomy
from foveate.models.patching import Site, recorded
from foveate.probes.base import Data, Grid, Lines, Panel, Probe, Reading, clear_heads, probe, quiet
from foveate.tasks.base import Bench
from foveate.tasks.copying import NOUNS

SIDE = 4
SHUFFLES = 20
LEAST = 0.05
"""By how much the energy has to fall, more than the control's, for a layer to have the role."""


@probe("in-context-graph")
class InContextGraph(Probe):
    """Whether a model's picture of familiar words comes to mirror a map that only the text gives.

    Sixteen words are put on a grid of 4 x 4, at random, and the text is a walk over it, from neighbour to neighbour.
    After every layer, each word's representations are averaged over the latest `window` words. How well they mirror
    the map is told by the Dirichlet energy: the mean squared distance between neighbours, here over that between any
    two words, so that 1 is no map and lower is more of one (how it is normalised is ours). It is read window
    by window; the fall is what the first has more than the later half of them on average. All are as long, so what
    nearness in the text alone makes is in each. The control is the same text with the grid's places shuffled,
    `SHUFFLES` times: a layer has the role "map in context" if its energy falls by `LEAST` more than theirs on average,
    and by more than any of theirs. Then, the representations' first two principal components over the later half, and
    how much of the grid's coordinates they tell (R2).

    The first word is not counted. In tokenizers that cut words up, the words are single letters.

    Fields:
        walks: texts, each with its own words, places and walk.
        steps: words of a text that are counted, or as many as the model has positions.
        window: words that are averaged over; the paper's is 50.

    Source: ICLR: In-Context Learning of Representations (2025). That heads which mix in the word
    before would already draw such a map is shown in In-context learning of representations can be explained by
    induction circuits (2026): so look at the fall, not at the level.

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama")
        >>> reading = InContextGraph(walks=1, steps=200).measure(model, Data.of(model, fv.tiny_tokenizer()))
        >>> reading.scores["map"].scores.shape, reading.roles
        (torch.Size([4, 1]), [])
    """

    paper: ClassVar[Paper | None] = Paper(
        "ICLR: In-Context Learning of Representations", 2025, "https://arxiv.org/abs/2501.00070"
    )
    claim: ClassVar[str] = "with growing context, a model's picture of words comes to mirror how the text connects them"
    title: ClassVar[str] = "Does the model draw a map of what the text connects?"

    walks: int = 6
    steps: int = 700
    window: int = 50

    def __post_init__(self) -> None:
        if self.walks < 1 or self.window < SIDE * SIDE or self.steps < 2 * self.window:
            raise FoveateError(
                f"{self}: give at least 1 walk, a window of at least {SIDE * SIDE} words, and steps of at least two "
                "windows."
            )

    def check(self, model: PreTrainedModel, data: Data) -> None:
        self.length(model)
        words_of(data)

    def length(self, model: PreTrainedModel) -> int:
        """Words of a text on this model."""
        room = anatomy(model).max_positions - 2  # for a begin token, and the word that is not counted
        if room < 2 * self.window:
            raise FoveateError(
                f"{self}: two windows of {self.window} words are more than the {room} words that this model has "
                f"positions for: give window={room // 2} or less."
            )
        return min(self.steps, room)

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        return float(self.walks * self.length(model))

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        with quiet(model):
            return self._measure(model, data)

    def _measure(self, model: PreTrainedModel, data: Data) -> Reading:
        walks = [walk(data, self.length(model) + 1, data.seed * 1000 + i) for i in range(self.walks)]
        found = [look(model, each, self.window, data, (i, self.walks)) for i, each in enumerate(walks)]
        layers = range(len(anatomy(model).layers))
        energy = torch.stack([each.energy for each in found])  # (walk, mapping, layer, context)
        first, last = energy[..., 0], energy[..., energy.shape[-1] // 2 :].mean(-1)
        falls = first - last
        gained = falls[:, 0] - falls[:, 1:].mean(1)  # (walk, layer)
        clear = falls[:, 0].mean(0) > falls[:, 1:].mean(0).max(0).values
        scores = UnitScores("layer", gained.mean(0)[:, None])
        roles = clear_heads(
            scores,
            LEAST,
            "map in context",
            lambda s: (
                f"As the text goes on, connected words move together here: their distance falls by {s:.0%} of "
                "that between any two words."
            ),
        )
        roles = [role for role in roles if clear[role.layer]]
        best = int(gained.mean(0).argmax())
        at = found[0].contexts
        start, end = mean(first[:, 0, best].tolist()), mean(last[:, 0, best].tolist())
        metrics = {
            "energy at first, clearest layer": start,
            "energy later, clearest layer": end,
            "energy later, places shuffled": mean(last[:, 1:, best].mean(1).tolist()),
            "coordinates told by two components (R2)": mean([float(each.told[best, 0]) for each in found]),
            "the same, places shuffled": mean([float(each.told[best, 1:].mean()) for each in found]),
            "chance of a neighbour as the next word, at the start": mean([each.legal[0] for each in found]),
            "chance of a neighbour as the next word, at the end": mean([each.legal[-1] for each in found]),
        }
        shown = sorted({0, layers[len(layers) // 2], layers[-1], best})
        curves = {
            f"after layer {layer}": list(zip(map(float, at), energy[:, 0, layer].mean(0).tolist(), strict=True))
            for layer in shown
        }
        curves[f"after layer {best}, places shuffled"] = list(
            zip(map(float, at), energy[:, 1:, best].mean((0, 1)).tolist(), strict=True)
        )
        panels: list[Panel] = [
            Lines("Distance of connected words over that of any two", "words read", "1: no map", curves),
            *(
                Grid(
                    f"Component {i + 1} of the words after layer {best}, each where it stands on the map (walk 1)",
                    "column",
                    "row",
                    found[0].components[best, :, i].view(SIDE, SIDE).tolist(),
                )
                for i in range(2)
            ),
        ]
        summary = (
            f"While it read walks over a map that it had never seen, the model moved connected words together in "
            f"{len(roles)} of {len(layers)} layers, the most after layer {best}: their distance, over that of any two "
            f"words, went from {start.value:.2f} to {end.value:.2f}."
            if roles
            else "No layer clearly moved words together that a text connects, as more of the text was read."
        )
        return Reading(
            "in-context-graph",
            InContextGraph.title,
            summary,
            metrics,
            {"map": scores},
            roles,
            panels,
            {"walks": self.walks, "steps": at[-1], "window": self.window, "least": LEAST, "seed": data.seed},
        )


@dataclass(frozen=True)
class Walk:
    """A text: the words' tokens by their node, (16,); the nodes in the order of the text, (word,); its ids."""

    words: Tensor
    nodes: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Look:
    """What a model made of a walk.

    Attributes:
        contexts: words read by the end of each window.
        energy: (mapping, layer, context): of the true places, then of shuffled ones; 1 where neighbours are as far from
            each other as any two.
        told: (layer, mapping): R2 of the grid's coordinates, by the first two principal components.
        components: (layer, 16, 2): these components of the words.
        legal: for each context, the probability on neighbours as the next word, over the window.
    """

    contexts: list[int]
    energy: Tensor
    told: Tensor
    components: Tensor
    legal: list[float]


def words_of(data: Data) -> list[int]:
    """Tokens that are a word each, with the space before it; else those of single letters.

    Raises:
        FoveateError: there are fewer than 16 of either.
    """
    for texts in ([f" {noun}" for noun in NOUNS], list("abcdefghijklmnopqrstuvwxyz")):
        cut = [tokens(text, data.tokenizer)[0].tolist() for text in texts]
        alone = sorted({ids[0] for ids in cut if len(ids) == 1})
        if len(alone) >= SIDE * SIDE:
            return alone
    raise FoveateError(
        f"in-context-graph needs {SIDE * SIDE} words that are one token each, and this tokenizer cuts up common nouns "
        "and single letters: leave this probe out."
    )


def adjacency() -> Tensor:
    """Which nodes of the grid are neighbours, bool (16, 16).

    Example:
        >>> int(adjacency().sum())                  # 24 edges, both ways
        48
    """
    row, column = torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE
    return (row[:, None] - row).abs() + (column[:, None] - column).abs() == 1


def walk(data: Data, steps: int, seed: int, *, anywhere: bool = False) -> Walk:
    """A walk over a grid of words drawn anew; with `anywhere`, each step goes to any other word: there is no map."""
    rng, edges = random.Random(seed), adjacency()
    words = torch.tensor(rng.sample(words_of(data), SIDE * SIDE))
    goals = [[j for j in range(SIDE * SIDE) if (j != i if anywhere else edges[i, j])] for i in range(SIDE * SIDE)]
    nodes = [rng.randrange(SIDE * SIDE)]
    while len(nodes) < steps:
        nodes.append(rng.choice(goals[nodes[-1]]))
    at = torch.tensor(nodes)
    begin = [i for i in data.tokenizer("")["input_ids"] if i == data.tokenizer.bos_token_id]  # where it adds one
    return Walk(words, at, torch.cat([torch.tensor(begin, dtype=torch.long), words[at]]))


@torch.no_grad()
def look(model: PreTrainedModel, text: Walk, window: int, data: Data, turn: tuple[int, int] = (0, 1)) -> Look:
    """Read a walk, and measure the map after every layer, over all words but the first."""
    layers, edges = len(anatomy(model).layers), adjacency()
    nodes = text.nodes[1:]  # models keep something else at a text's first token, often a hundred times as large
    steps, skip = len(nodes), len(text.ids) - len(nodes)
    contexts = list(range(window, steps + 1, window))
    sites = [Site("residual", layer + 1) for layer in range(layers)]
    with recorded(model, sites) as values:
        logits: Any = model(text.ids[None].to(model.device), use_cache=False).logits[0, skip:]
    words = text.words.to(logits.device)
    chances = (logits[:, words].float() - logits.float().logsumexp(-1, keepdim=True)).exp().cpu()
    legal = (chances * edges[nodes]).sum(-1)
    rolls = torch.Generator().manual_seed(data.seed)
    orders = [torch.arange(SIDE * SIDE), *(torch.randperm(SIDE * SIDE, generator=rolls) for _ in range(SHUFFLES))]
    maps = torch.stack([edges[order][:, order] for order in orders])
    energy, told = torch.zeros(1 + SHUFFLES, layers, len(contexts)), torch.zeros(layers, 1 + SHUFFLES)
    components = torch.zeros(layers, SIDE * SIDE, 2)
    places = torch.stack([torch.arange(SIDE * SIDE) // SIDE, torch.arange(SIDE * SIDE) % SIDE], dim=-1).double()
    for layer, site in enumerate(sites):
        states = values[site][0, skip:].double().cpu()
        for i, end in enumerate(contexts):
            means, there = class_means(states[end - window : end], nodes[end - window : end])
            energy[:, layer, i] = dirichlet(means, there, maps)
        half = steps // 2
        means, there = class_means(states[half:], nodes[half:])
        means = means - means[there].mean(0)
        means[~there] = 0
        axes = torch.linalg.svd(means, full_matrices=False)
        components[layer] = axes.U[:, :2] * axes.S[:2]
        told[layer] = torch.stack([_told(components[layer].double(), p) for p in (places[order] for order in orders)])
        data.progress((turn[0] + (layer + 1) / layers) / turn[1])
    return Look(contexts, energy, told, components, [float(legal[end - window : end].mean()) for end in contexts])


def class_means(states: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """The mean state of each node, (16, hidden), and which nodes there are, bool (16,)."""
    counts = torch.bincount(nodes, minlength=SIDE * SIDE)
    sums = torch.zeros(SIDE * SIDE, states.shape[1], dtype=states.dtype).index_add_(0, nodes, states)
    return sums / counts.clamp(min=1)[:, None], counts > 0


def dirichlet(means: Tensor, there: Tensor, edges: Tensor) -> Tensor:
    """The mean squared distance along the edges over that between any two; nodes that are not there are left out.

    Args:
        means: (16, hidden), float64.
        there: bool (16,).
        edges: bool (..., 16, 16).

    Returns:
        (...), 1 where all nodes are at one place.

    Example:
        >>> means = (torch.arange(16)[:, None] // SIDE).double()           # rows of the grid on a line
        >>> round(float(dirichlet(means, torch.ones(16, dtype=torch.bool), adjacency())), 3)
        0.188
    """
    apart = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").square()
    pairs = there[:, None] & there & ~torch.eye(SIDE * SIDE, dtype=torch.bool)
    any_two, along = apart[pairs].mean(), pairs & edges
    near = (apart * along).sum((-1, -2)) / along.sum((-1, -2)).clamp(min=1)
    return near / any_two if any_two > 0 else torch.ones_like(near)


def _told(components: Tensor, places: Tensor) -> Tensor:
    """R2 of both coordinates together, by a line through the components."""
    given = torch.cat([components, torch.ones(len(components), 1, dtype=components.dtype)], dim=1)
    left = places - given @ torch.linalg.lstsq(given, places, driver="gelsd").solution
    return 1 - left.square().sum() / (places - places.mean(0)).square().sum()


WALKS = 8


@claim("in-context-graph")
class MapsFromContext(Claim):
    statement: ClassVar[str] = (
        "with more context the energy of the words' representations on the hidden grid falls, and their first two "
        "principal components come to mirror the grid (abstract; seen on Llama-3.1-8B)"
    )
    setting: ClassVar[str] = (
        f"{WALKS} walks of 700 words over grids of 4 x 4 common nouns, windows of 50 words, after the layer as "
        "deep as the paper's, 26 of 32; controls: the places shuffled 20 times, and as many texts of the "
        "same kind in which any word may follow any other"
    )

    def run(self, bench: Bench) -> Finding:
        model, probe = bench.model, InContextGraph()

        def data(seed: int, start: float, share: float) -> Data:
            return Data(bench.tokenizer, bench.text, seed=seed, progress=lambda d: bench.progress(start + share * d))

        layers = len(anatomy(model).layers)
        layer = min(layers - 1, round(layers * 26 / 32))
        sides: dict[str, list[Look]] = {}
        for turn, (name, anywhere) in enumerate((("walks", False), ("no map", True))):
            reads = data(2, 0.5 * turn, 0.5)
            texts = [walk(reads, probe.length(model) + 1, 2000 + i, anywhere=anywhere) for i in range(WALKS)]
            sides[name] = [look(model, text, probe.window, reads, (i, WALKS)) for i, text in enumerate(texts)]

        def falls(looks: list[Look], shuffled: bool) -> Metric:
            rows = []
            for each in looks:
                energy = each.energy[1:, layer].mean(0) if shuffled else each.energy[0, layer]
                rows.append(float(energy[0] - energy[len(energy) // 2 :].mean()))
            return mean(rows)

        fall, shuffled, without = (
            falls(sides["walks"], False),
            falls(sides["walks"], True),
            falls(sides["no map"], False),
        )
        told, by_chance, unmapped = (
            mean([float(each.told[layer, which].mean()) for each in sides[name]])
            for name, which in (("walks", slice(0, 1)), ("walks", slice(1, None)), ("no map", slice(0, 1)))
        )
        late = mean([float(e.energy[0, layer, e.energy.shape[-1] // 2 :].mean()) for e in sides["walks"]])
        return Finding(
            {
                "layer": Metric.exact(layer),
                "fall of the energy": fall,
                "fall of the energy, places shuffled": shuffled,
                "fall of the energy, no map": without,
                "energy in the later half": late,
                "coordinates told by two components (R2)": told,
                "the same, places shuffled": by_chance,
                "the same, no map": unmapped,
                "probability on neighbours, first window": mean([each.legal[0] for each in sides["walks"]]),
                "probability on neighbours, last window": mean([each.legal[-1] for each in sides["walks"]]),
            },
            {
                "the energy falls with context": fall.low > 0,
                "by more than with shuffled places or no map": fall.low > max(shuffled.high, without.high),
                "two components tell more of the grid than of shuffled places or no map": told.low
                > max(by_chance.high, unmapped.high),
            },
        )
