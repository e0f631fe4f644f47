"""Concept depth: at which layer a linear probe can tell whether a text is true, or kind, or follows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.claims import Claim, Finding, claim
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric
from foveate.methods import Paper, UnitScores, apply
from foveate.models.anatomy import anatomy
from foveate.models.patching import Site, recorded
from foveate.probes.base import Data, Lines, Reading, Rows, probe, quiet
from foveate.probes.base import Probe as Base
from foveate.probes.concept_texts import Labelled, tasks
from foveate.tasks.base import Bench

RIDGE = 0.1
"""Weight decay of the linear probes, where a standardised state has length one."""
SHUFFLES = 20
"""Probes trained and judged on shuffled labels: what these reach, at their best depths, is chance."""
NEAR = 0.95
"""Of the best layer's accuracy: from here on a concept counts as there."""
BATCH = 32
DRAWS = 500


@probe("concept-depth")
class ConceptDepth(Base):
    """At which depth a model's states tell true facts from false ones, praise from blame, what follows from what not.

    A linear probe is trained on the last token's state at every depth, and judged on texts whose telling words it has
    not seen. A concept's depth is the first at which its accuracy is 95% of the best depth's; it is told only where
    the best depth beats all depths of 20 probes that are trained and judged on shuffled labels.

    Ours: texts are made of templates (the paper takes nine data sets), the probe is a ridge regression with a closed
    form (the paper's is a logistic regression), and depth is by the share of the best, as a fraction of the layers.
    The scores say how much accuracy each layer adds.

    Fields: `file`, a text file with a label, a tab and a text in each line, two labels in all: probed instead.

    Source: Exploring Concept Depth: How Large Language Models Acquire Knowledge at Different Layers? (2024).

    Example:
        >>> import foveate as fv
        >>> model, tokenizer = fv.tiny("llama"), fv.tiny_tokenizer()
        >>> found = depth_of(model, tokenizer, ["aa", "ab", "ba", "bb"] * 4, [0, 1, 0, 1] * 4)
        >>> found.accuracy.shape
        torch.Size([5])
    """

    paper: ClassVar[Paper | None] = Paper(
        "Exploring Concept Depth: How Large Language Models Acquire Knowledge at Different Layers?",
        2024,
        "https://arxiv.org/abs/2404.07066",
    )
    claim: ClassVar[str] = "simple concepts are there in early layers, complex ones in later layers"
    title: ClassVar[str] = "At which depth does it know what a text says?"
    default: ClassVar[bool] = True

    file: str | None = None

    def check(self, model: PreTrainedModel, data: Data) -> None:
        anatomy(model)
        for task in self._tasks(data.seed):
            _check(model, data.tokenizer, task)

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        return float(sum(len(data.tokenizer(text).input_ids) for t in self._tasks(data.seed) for text in t.texts))

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        todo, found = self._tasks(data.seed), dict[str, Concept]()
        for turn, task in enumerate(todo):

            def progress(done: float, turn: int = turn) -> None:
                data.progress((turn + done) / len(todo))

            found[task.name] = concept(model, data.tokenizer, task, progress)
        return _reading(found, len(anatomy(model).layers), {"file": self.file, "ridge": RIDGE, "near": NEAR})

    def _tasks(self, seed: int) -> list[Labelled]:
        return tasks(seed) if self.file is None else [_from_file(self.file)]


def _reading(found: dict[str, Concept], layers: int, setting: dict[str, object]) -> Reading:
    clear = {name: each for name, each in found.items() if each.clear}
    said = [f"{name} after {round(each.depth().value * layers)}" for name, each in clear.items()]
    unclear = [name for name in found if name not in clear]
    summary = f"Of {layers} layers, concepts can be read from the states: {', '.join(said)}. " if said else ""
    if unclear:
        summary += f"No layer tells {' or '.join(unclear)} texts apart better than chance."
    metrics = {f"{name}: depth, fraction of layers": each.depth() for name, each in clear.items()}
    metrics |= {f"{name}: accuracy of the best layer": each.best() for name, each in found.items()}
    curves = Lines(
        "What a linear probe can tell at each depth",
        "layers passed",
        "accuracy on texts with other words",
        {name: list(enumerate(each.accuracy.tolist())) for name, each in found.items()},
    )
    rows = Rows(
        "Beside chance",
        ["texts", "best accuracy", "best with shuffled labels", "texts judged"],
        [[n, round(float(e.accuracy.max()), 3), round(e.chance, 3), e.correct.shape[1]] for n, e in found.items()],
    )
    scores = {name: UnitScores("layer", each.accuracy.diff()[:, None]) for name, each in found.items()}
    return Reading("concept-depth", ConceptDepth.title, summary.strip(), metrics, scores, [], [curves, rows], setting)


# ---- one concept ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Concept:
    """How well linear probes tell two sorts of text apart, at each depth.

    Attributes:
        correct: bool (depth, text): which of the texts that are judged are told rightly; depth 0 is the embedding.
        groups: (text,): texts of a group share their telling word, and are drawn together for intervals.
        chance: the best accuracy, over depths, of any probe on shuffled labels.
    """

    correct: Tensor
    groups: Tensor
    chance: float

    @property
    def accuracy(self) -> Tensor:
        """Accuracy at each depth: float64 (depth,)."""
        return self.correct.double().mean(1)

    @property
    def clear(self) -> bool:
        """Whether some depth is better than chance at its best."""
        return float(self.accuracy.max()) > self.chance

    def best(self) -> Metric:
        """Accuracy at the best depth."""
        return _metric(float(self.accuracy.max()), self._drawn().amax(1))

    def depth(self) -> Metric:
        """The first depth with 95% of the best accuracy, as a fraction of the layers."""
        return _metric(float(near_best(self.accuracy[None])[0]), self.depths())

    def depths(self) -> Tensor:
        """The same of many sets of texts, drawn from those that were judged: (draw,)."""
        return near_best(self._drawn())

    def _drawn(self) -> Tensor:
        """Accuracies of drawn sets, (draw, depth)."""
        names, index = self.groups.unique(return_inverse=True)
        sums = torch.zeros(len(self.correct), len(names), dtype=torch.float64)
        sums.index_add_(1, index, self.correct.double())
        draws = torch.randint(len(names), (DRAWS, len(names)), generator=torch.Generator().manual_seed(0))
        return (sums[:, draws].sum(-1) / index.bincount().double()[draws].sum(-1)).T


def near_best(accuracy: Tensor) -> Tensor:
    """The first depth with 95% of the best accuracy, as a fraction of the layers: of (n, depth) float64 (n,).

    Example:
        >>> near_best(torch.tensor([[0.5, 0.6, 0.96, 1.0, 0.97]]))
        tensor([0.5000], dtype=torch.float64)
    """
    return (accuracy >= NEAR * accuracy.amax(1, keepdim=True)).long().argmax(1).double() / (accuracy.shape[1] - 1)


def _metric(value: float, drawn: Tensor) -> Metric:
    low, high = drawn.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Metric(value, low, high)


def depth_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[object],
    *,
    seed: int = 0,
) -> Concept:
    """How well two sorts of texts of your own are told apart at each depth.

    Every third text, drawn at random, is judged; probes are trained on the rest.

    Args:
        model, tokenizer: a causal language model and its tokenizer.
        texts: at least 12.
        labels: of each text, one of two.
        seed: decides which texts are judged.

    Raises:
        FoveateError: labels of one class or of more than two, too few texts, a text that is too long.
    """
    task = _own("your own", texts, labels, seed)
    _check(model, tokenizer, task)
    return concept(model, tokenizer, task)


def concept(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Labelled,
    progress: Callable[[float], None] = lambda done: None,
) -> Concept:
    """How well a task's texts are told apart at each depth."""
    states = last_states(model, tokenizer, task.texts, progress).double()
    labels, judged = torch.tensor(task.labels), torch.tensor(task.judged)
    signs = 2.0 * labels.double() - 1
    generator = torch.Generator().manual_seed(0)
    # The labels, and then shuffles of them, on both sides: what a probe reaches on those is chance.
    learnt, asked = (
        torch.stack([y, *(y[torch.randperm(len(y), generator=generator)] for _ in range(SHUFFLES))], dim=1)
        for y in (signs[~judged], signs[judged])
    )
    told = torch.stack([ridge(at[~judged], learnt, at[judged]) for at in states])
    correct = (told > 0) == (asked > 0)
    chance = float(correct[..., 1:].double().mean(1).max())
    return Concept(correct[..., 0], torch.tensor(task.groups)[judged], chance)


def ridge(x: Tensor, goals: Tensor, new: Tensor) -> Tensor:
    """What linear maps from standardised states to goals, with weight decay, say of new states.

    Args:
        x: (text, hidden), float64. goals: (text, n). new: (other text, hidden).

    Returns:
        (other text, n).

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
        >>> ridge(x, torch.tensor([[-1.0], [-1.0], [1.0], [1.0]]).double(), x).sign().flatten().tolist()
        [-1.0, -1.0, 1.0, 1.0]
    """
    center, spread = x.mean(0), x.std(0)
    # A channel that does not vary says nothing; rounding errors in it would.
    scale = torch.where(spread > 1e-5 * (center.abs() + 1e-12), 1 / spread, 0.0) / x.shape[1] ** 0.5
    a, b = (x - center) * scale, (new - center) * scale
    middle = goals.mean(0)
    weights = torch.linalg.solve(a @ a.T + RIDGE * torch.eye(len(a), dtype=a.dtype), goals - middle)
    return b @ (a.T @ weights) + middle


@torch.no_grad()
def last_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    progress: Callable[[float], None] = lambda done: None,
) -> Tensor:
    """The residual stream at each text's last token, before every layer and after the last: (depth, text, hidden)."""
    parts = anatomy(model)
    sites = [Site("residual", at) for at in range(len(parts.layers) + 1)]
    ids = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    states = torch.zeros(len(sites), len(ids), parts.hidden)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        # Filled up at the end, where no token of the text looks.
        batch = torch.nn.utils.rnn.pad_sequence([ids[at] for at in rows], batch_first=True).to(model.device)
        last = torch.tensor([len(ids[at]) - 1 for at in rows], device=model.device)
        with quiet(model), recorded(model, sites) as values:
            model(batch, use_cache=False, logits_to_keep=1)
        for depth, site in enumerate(sites):
            states[depth, rows] = values[site][torch.arange(len(rows), device=model.device), last].float().cpu()
        progress(min(1.0, (start + BATCH) / len(order)))
    return states


# ---- texts of one's own ---------------------------------------------------------------------------------------------


def _own(name: str, texts: Sequence[str], labels: Sequence[object], seed: int = 0) -> Labelled:
    if len(texts) != len(labels):
        raise FoveateError(
            f"concept-depth: there are {len(texts)} texts and {len(labels)} labels: give one label a text."
        )
    kinds = sorted({str(label) for label in labels})
    if len(kinds) != 2:
        raise FoveateError(
            f"concept-depth: the texts have {len(kinds)} different label{'' if len(kinds) == 1 else 's'} "
            f"({', '.join(kinds[:3])}), and a probe tells two sorts apart: give texts of two."
        )
    judged, yes = [False] * len(texts), [str(label) == kinds[1] for label in labels]
    for kind in (False, True):
        of_kind = [at for at, each in enumerate(yes) if each == kind]
        if len(of_kind) < 6:
            raise FoveateError(
                f"concept-depth: only {len(of_kind)} texts are labelled {kinds[kind]}: give 6 or more of either sort."
            )
        random.Random(seed).shuffle(of_kind)
        for at in of_kind[: len(of_kind) // 3]:
            judged[at] = True
    return Labelled(name, list(texts), yes, list(range(len(texts))), judged)


def _from_file(name: str) -> Labelled:
    try:
        lines = [line for line in Path(name).expanduser().read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise FoveateError(f"concept-depth: the file {name} can't be read ({why}): give a text file.") from error
    pairs = [line.split("\t", 1) for line in lines]
    if any(len(pair) < 2 or not pair[1].strip() for pair in pairs):
        raise FoveateError(f"concept-depth: a line of {name} has no tab: write a label, a tab and a text in each.")
    return _own(Path(name).stem, [pair[1] for pair in pairs], [pair[0] for pair in pairs])


def _check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Labelled) -> None:
    limit = anatomy(model).max_positions
    sizes = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in task.texts]
    if max(sizes) > limit or min(sizes) < 1:
        raise FoveateError(
            f"concept-depth: a text of the {task.name} ones has {max(sizes) if max(sizes) > limit else 0} tokens, and "
            f"the model reads 1 to {limit}: give other texts."
        )


# ---- the claim ------------------------------------------------------------------------------------------------------


@claim("concept-depth")
class ComplexComesLater(Claim):
    statement: ClassVar[str] = (
        "simple tasks are told in shallow layers, complex ones need deeper layers; noise in the input and quantised "
        "weights move both deeper (abstract)"
    )
    setting: ClassVar[str] = (
        "the templates' texts with seed 1; 12 random letters in front of every text; weights rounded blockwise to 8 "
        "and to 4 bits; intervals of depths resample the words that are judged, the same for both sides of a difference"
    )

    def run(self, bench: Bench) -> Finding:
        layers, plain = len(anatomy(bench.model).layers), tasks(1)
        letters = random.Random(1)
        noisy = [
            Labelled(t.name, [f"{_letters(letters)} {text}" for text in t.texts], t.labels, t.groups, t.judged)
            for t in plain
        ]
        found: dict[str, dict[str, Concept]] = {}
        for turn, (name, recipe, texts) in enumerate(
            [
                ("", "full", plain),
                ("noise", "full", noisy),
                ("8 bits", "blockwise:bits=8", plain),
                ("4 bits", "blockwise:bits=4", plain),
            ]
        ):
            with apply(bench.model, recipe, tokenizer=bench.tokenizer):
                found[name] = {t.name: concept(bench.model, bench.tokenizer, t) for t in texts}
            bench.progress((turn + 1) / 4)
        whole = found[""]
        metrics = {f"{name}: accuracy of the best layer": each.best() for name, each in whole.items()}
        metrics |= {f"{name}: best with shuffled labels": Metric.exact(each.chance) for name, each in whole.items()}
        metrics |= {f"{name}: depth": each.depth() for name, each in whole.items()}
        checks = {f"{name} is told better than chance": each.clear for name, each in whole.items()}
        for name in ("factual", "emotional"):
            later = _metric(
                whole["inferential"].depth().value - whole[name].depth().value,
                whole["inferential"].depths() - whole[name].depths(),
            )
            metrics[f"inferential deeper than {name} by"] = later
            checks[f"{name} before inferential"] = later.low > 0
        for name in ("noise", "8 bits", "4 bits"):
            shifts = [_shift(whole[t.name], found[name][t.name]) for t in plain]
            metrics[f"deeper by {name}, mean of the tasks"] = (
                shift := _metric(sum(v for v, _ in shifts) / 3, torch.stack([d for _, d in shifts]).mean(0))
            )
            checks[f"{name}: deeper"] = shift.low > 0
        metrics["one layer, as a fraction"] = Metric.exact(1 / layers)
        return Finding(metrics, checks)


def _shift(before: Concept, after: Concept) -> tuple[float, Tensor]:
    return after.depth().value - before.depth().value, after.depths() - before.depths()


def _letters(source: random.Random) -> str:
    return "".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=12))
