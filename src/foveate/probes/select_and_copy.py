"""Select and copy: heads that look at the right option of a multiple-choice question."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foveate.claims import Claim, Finding, claim, random_others
from foveate.data.text import tokens
from foveate.errors import FoveateError
from foveate.measure.bootstrap import Metric, mean
from foveate.methods import Paper, UnitScores, function
from foveate.models.anatomy import anatomy
from foveate.models.attention import Call, replaced_attention, weights_of
from foveate.models.circuits import require_plain_queries
from foveate.models.load import tokenizer_for
from foveate.models.patching import Site, recorded
from foveate.probes.base import Data, Probe, Reading, Role, Rows, counted, named, probe
from foveate.tasks.base import Bench

PAPER = Paper(
    "Listening to the Wise Few: Select-and-Copy Attention Heads for Multiple-Choice QA",
    2024,
    "https://arxiv.org/abs/2410.02343",
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDINGS = (
    'Question: Which of the options corresponds to "{answer}"?',
    "{name} bought a {answer} and went home.\nQuestion: What did {name} buy?",
    "There is a {answer} on the table, says {name}.\nQuestion: What is on the table?",
)
# Four letters each, so that prompts are equally long in bytes, too.
WORDS = (
    *("boat", "lamp", "ring", "coin", "door", "fork", "gate", "harp", "iron", "jeep"),
    *("kite", "leaf", "milk", "nest", "oven", "pear", "rope", "sand", "tent", "vase"),
    *("wool", "yarn", "bell", "cake", "drum", "fish", "glue", "book", "mask", "pipe"),
)
NAMES = ("Anna", "Mark", "Paul", "Kate", "Jack", "Lucy", "Adam", "Emma", "Ryan", "Eric", "Lisa", "Mary")
ERROR = 0.01
"""How likely any head at all is given the role by chance."""
BATCH = 8


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: the text before the options, the options, and which one is right."""

    text: str
    options: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Heard:
    """What is heard on questions, on the CPU.

    Attributes:
        qk: float32 (question, layer, head, option): products of the last token's query with the keys of the options'
            tokens, both as their maps make them, before positions.
        attention: of the same shape, the attention weights.
        letters: float32 (question, option): the logits of the options' letters.
    """

    qk: Tensor
    attention: Tensor
    letters: Tensor


def questions(count: int, seed: int, words: Sequence[str], options: int = 4) -> list[Question]:
    """Questions whose answer stands in their text; each place is right equally often, so that a fixed choice is chance.

    Example:
        >>> print(questions(1, 0, ["boat", "lamp"], options=2)[0].text)
        Question: Which of the options corresponds to "lamp"?
    """
    rng, made = random.Random(seed), []
    for i in range(count):
        drawn = tuple(rng.sample(list(words), options))
        right = (i // len(WORDINGS)) % options
        made.append(
            Question(WORDINGS[i % len(WORDINGS)].format(answer=drawn[right], name=rng.choice(NAMES)), drawn, right)
        )
    return made


@probe("select-and-copy")
class SelectAndCopy(Probe):
    """Which heads, at the end of a multiple-choice prompt, look at the option that is right.

    The file makes the questions itself; their answer is stated in the text before. An option is stood for by the last
    token of its line, the line break (as in the paper, whose figure 2b compares other tokens). A head's choice is the
    option with the highest product of query and key without positions (QK-score), or with the most attention (attention
    score). Scores are the fraction of questions where that is the right one. A head has the role where either is above
    guessing beyond doubt: a binomial bound, corrected for the number of heads (ours; the paper takes the best by
    validation). The best head is chosen by the first half of the questions, and its accuracy is told on the second.

    Fields:
        count: questions.
        options: options of each, 2 to 26.

    Example:
        >>> import foveate as fv
        >>> model = fv.tiny("llama")
        >>> reading = SelectAndCopy(count=8).measure(model, Data.of(model, fv.tiny_tokenizer()))
        >>> reading.roles, sorted(reading.scores)
        ([], ['attention select-and-copy', 'select-and-copy'])
    """

    paper: ClassVar[Paper | None] = PAPER
    claim: ClassVar[str] = (
        "some heads look at the right option of a question more surely than the model says its letter"
    )
    title: ClassVar[str] = "Which heads know the answer to a multiple-choice question?"

    count: int = 48
    options: int = 4

    def check(self, model: PreTrainedModel, data: Data) -> None:
        if self.count < 2 or not 2 <= self.options <= len(LETTERS):
            raise FoveateError(
                f"{self}: give 2 questions or more, of 2 to {len(LETTERS)} options: each option has a letter, and the "
                "head that one half of the questions chooses is judged by the other half."
            )
        require_plain_queries(self.name, anatomy(model))
        first = questions(1, data.seed, WORDS, self.options)[0]
        laid_out(model, data.tokenizer, first.text, first.options)

    def cost(self, model: PreTrainedModel, data: Data) -> float:
        return self.count * (30.0 + 5 * self.options)

    def measure(self, model: PreTrainedModel, data: Data) -> Reading:
        self.check(model, data)
        asked = questions(self.count, data.seed, WORDS, self.options)
        heard = hear(model, data.tokenizer, asked, data.progress)
        right = {"qk": _right(heard.qk, asked), "attention": _right(heard.attention, asked)}
        shares = {name: r.double().mean(0) for name, r in right.items()}
        scores = {
            "select-and-copy": UnitScores("head", shares["qk"]),
            "attention select-and-copy": UnitScores("head", shares["attention"]),
        }
        best = torch.maximum(*shares.values())
        least = clearly(self.count, 1 / self.options, 2 * best.numel()) / self.count
        roles = [
            Role(
                "head",
                layer,
                head,
                "select-and-copy",
                float(best[layer, head]),
                f"At the end of a multiple-choice question it singles out the right option in "
                f"{float(best[layer, head]):.0%} of cases.",
            )
            for layer, head in (best >= least).nonzero().tolist()
        ]
        roles.sort(key=lambda role: -role.score)
        half = self.count // 2
        layer, head = _first(right["qk"][:half].double().mean(0))
        judged = mean(right["qk"][half:, layer, head].double().tolist())
        letters = mean(_right(heard.letters, asked)[half:].double().tolist())
        found = f"{counted(len(roles), 'head')} ({named(roles)})" if roles else "no head"
        told = "that single out" if len(roles) > 1 else "that singles out"
        summary = (
            f"There {'are' if len(roles) > 1 else 'is'} {found} {told} the right option of a multiple-choice question. "
            f"The best, {layer}.{head}, is right in {judged.value:.0%} of new questions, the letter that the model "
            f"says in {letters.value:.0%}."
        )
        table = Rows(
            "Heads that choose best",
            ["head", "right by query and key", "right by attention"],
            [
                [f"{one}.{unit}", float(shares["qk"][one, unit]), float(shares["attention"][one, unit])]
                for one, unit in _best(best, 10)
            ],
        )
        metrics = {
            "best head's choice, on the half that did not choose it": judged,
            "the model's letter, on the same questions": letters,
            "guessing": Metric.exact(1 / self.options),
        }
        setting = {
            "count": self.count,
            "options": self.options,
            "least": least,
            "best": [layer, head],
            "seed": data.seed,
        }
        return Reading(
            "select-and-copy", SelectAndCopy.title, summary, metrics, scores, roles, [table], setting=setting
        )


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        option: index of the option that the heads choose.
        letter: index of the option whose letter has the highest logit.
        scores: of each option, what the heads give it.
        logits: of each option's letter.
        heads: the heads that chose, (layer, head).
    """

    option: int
    letter: int
    scores: list[float]
    logits: list[float]
    heads: list[tuple[int, int]]


@function(
    "choose",
    role="probe",
    paper=PAPER,
    claim="a select-and-copy head keeps to the right option when options change places, more than the letter does",
)
def choose(
    model: PreTrainedModel,
    question: str,
    options: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    heads: Sequence[tuple[int, int]] | UnitScores | None = None,
) -> Choice:
    """The option of a multiple-choice question by select-and-copy heads, and by the letter that the model says.

    Args:
        model: the model.
        question: the text before the options.
        options: 2 to 26 of them.
        tokenizer: the model's; by default the one that `load` gave with it.
        heads: whose QK-scores choose; with several, each head's scores are brought to the same spread and summed
            (ours). Of unit scores, such as those of the probe, the highest head is taken. None: the best head on 24
            questions of the probe's, which takes a few seconds: choose once, and give it.

    Raises:
        FoveateError: too few options, or an empty one; a prompt longer than the model's positions; an unknown head.

    Example:
        >>> import foveate as fv
        >>> model, tokenizer = fv.tiny("llama"), fv.tiny_tokenizer()
        >>> choice = choose(model, "Is snow white?", ["yes", "no"], tokenizer=tokenizer, heads=[(1, 2)])
        >>> choice.option in (0, 1), choice.letter in (0, 1), choice.heads
        (True, True, [(1, 2)])
    """
    tokenizer = tokenizer or tokenizer_for(model)
    laid_out(model, tokenizer, question, options)  # or it says what is wrong before heads are looked for
    if heads is None:
        picked = best_heads(model, tokenizer)
    elif isinstance(heads, UnitScores):
        picked = [_first(heads.scores)]
    else:
        picked = [(int(layer), int(head)) for layer, head in heads]
    parts = anatomy(model)
    if not picked:
        raise FoveateError("choose got an empty list of heads: name at least one (layer, head), or leave heads out.")
    for layer, head in picked:
        if not (0 <= layer < len(parts.layers) and 0 <= head < parts.heads):
            raise FoveateError(
                f"choose: there is no head {layer}.{head}: this model has layers 0 to {len(parts.layers) - 1} of heads "
                f"0 to {parts.heads - 1}."
            )
    heard = hear(model, tokenizer, [Question(question, tuple(options), 0)])
    each = torch.stack([heard.qk[0, layer, head] for layer, head in picked])
    if len(each) > 1:
        each = (each - each.mean(-1, keepdim=True)) / each.std(-1, keepdim=True).clamp_min(1e-12)
    scores, logits = each.sum(0), heard.letters[0]
    return Choice(int(scores.argmax()), int(logits.argmax()), scores.tolist(), logits.tolist(), picked)


def best_heads(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int = 24, most: int = 1, seed: int = 1
) -> list[tuple[int, int]]:
    """The heads whose QK-scores are right most often on questions about every other of the words."""
    asked = questions(count, seed, WORDS[::2])
    return _best(_right(hear(model, tokenizer, asked).qk, asked).double().mean(0), most)


def laid_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, options: Sequence[str]
) -> tuple[Tensor, list[int], list[int]]:
    """The prompt's token ids (token,), the last token of each option's line, and the tokens of the letters.

    What all letters begin with, as a space of its own, belongs to the prompt.
    """
    if not 2 <= len(options) <= len(LETTERS) or any(not option.strip() for option in options):
        raise FoveateError(
            f"a multiple-choice question with the options {list(options)} was asked: give 2 to {len(LETTERS)} of them, "
            "none empty."
        )
    lines = [f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False)]
    starts = [text + "\n" + "".join(lines[:i]) for i in range(len(lines) + 1)]
    prompt = starts[-1] + "Answer:"
    whole = _ids(prompt, tokenizer)
    # Where a prefix alone is cut otherwise at its end, the last token that both have stands for the option.
    ends = [len(commonprefix([whole, _ids(start, tokenizer)])) - 1 for start in starts[1:]]
    said = [_ids(f"{prompt} {letter}", tokenizer) for letter in LETTERS[: len(options)]]
    lead = commonprefix(said)
    letters = [ids[len(lead)] if len(ids) > len(lead) else -1 for ids in said]
    if len(set(letters)) < len(letters) or len(set(ends)) < len(ends) or lead[: ends[-1] + 1] != whole[: ends[-1] + 1]:
        raise FoveateError(
            "this tokenizer has no token for each option's letter and line, which the choice is read from: take "
            "another model, or give options that differ in letters."
        )
    limit = anatomy(model).max_positions
    if len(lead) > limit:
        raise FoveateError(
            f"a multiple-choice prompt of {len(lead)} tokens is longer than the {limit} positions of this model: give "
            "a shorter question or fewer options."
        )
    return torch.tensor(lead), ends, letters


@torch.no_grad()
def hear(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    progress: Callable[[float], None] = lambda done: None,
) -> Heard:
    """What all heads, and the letters, say on questions with equally many options, in batches of one length."""
    parts, laid = anatomy(model), [laid_out(model, tokenizer, q.text, q.options) for q in asked]
    alike: dict[int, list[int]] = defaultdict(list)
    for i, (ids, _, _) in enumerate(laid):
        alike[len(ids)].append(i)
    batches = [rows[i : i + BATCH] for rows in alike.values() for i in range(0, len(rows), BATCH)]
    shape = len(asked), len(parts.layers), parts.heads, len(asked[0].options)
    heard = Heard(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape[0], shape[-1]))
    layers, group = range(len(parts.layers)), parts.heads // parts.kv_heads
    require_plain_queries("select-and-copy", parts)
    queries = [[Site("query", layer, head) for head in range(parts.heads)] for layer in layers]
    keys = [[Site("key", layer, head // group) for head in range(parts.heads)] for layer in layers]
    training = model.training
    model.eval()
    try:
        for done, rows in enumerate(batches):
            ids = torch.stack([laid[i][0] for i in rows]).to(model.device)
            ends = torch.tensor([laid[i][1] for i in rows], device=model.device)

            def attention(call: Call, rows: list[int] = rows, ends: Tensor = ends) -> Tensor:
                weights = weights_of(call)
                last = weights[:, :, :, -1].flatten(1, 2)  # (batch, head, entry)
                looked = last.gather(-1, ends.to(last.device)[:, None].expand(-1, last.shape[1], -1))
                heard.attention[rows, call.layer] = looked.float().cpu()
                return (weights.to(call.value.dtype) @ call.value[:, :, None]).flatten(1, 2)

            sites = {site for layer in layers for site in (*queries[layer], *keys[layer])}
            with replaced_attention(model, attention, "select-and-copy"), recorded(model, sites) as values:
                logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float().cpu()
            at = torch.arange(len(rows))[:, None]
            for layer in layers:
                q = torch.stack([values[site][:, -1] for site in queries[layer]], 1).float().cpu()
                k = torch.stack([values[site].cpu()[at, ends.cpu()] for site in keys[layer]], 1).float()
                heard.qk[rows, layer] = (k @ q[..., None])[..., 0]
            for row, i in enumerate(rows):
                heard.letters[i] = logits[row, laid[i][2]]
            progress((done + 1) / len(batches))
    finally:
        model.train(training)
    return heard


def clearly(count: int, chance: float, tests: int) -> int:
    """The number of right ones of `count` that none of so many guessers reaches, but with a probability of `ERROR`.

    Example:
        >>> clearly(10, 0.5, 1), clearly(10, 0.5, 100)
        (10, 11)
    """
    tail, k = 0.0, count + 1
    while k > 0:
        more = math.comb(count, k - 1) * chance ** (k - 1) * (1 - chance) ** (count - k + 1)
        if (tail + more) * tests >= ERROR:
            break
        tail, k = tail + more, k - 1
    return k


def _right(scores: Tensor, asked: Sequence[Question]) -> Tensor:
    """Whether the highest of the last dimension is the right option: bool, one dimension less."""
    right = torch.tensor([q.right for q in asked])
    return scores.argmax(-1) == right.view(-1, *[1] * (scores.dim() - 2))


def _best(scores: Tensor, most: int) -> list[tuple[int, int]]:
    order = scores.flatten().nan_to_num(-math.inf).argsort(descending=True, stable=True)[:most]
    return [divmod(int(i), scores.shape[1]) for i in order]


def _first(scores: Tensor) -> tuple[int, int]:
    return _best(scores, 1)[0]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [int(i) for i in tokens(text, tokenizer)[0]]


TRIED, JUDGED = 48, 96
"""Questions that a head is chosen by, and questions that it is judged by, in the claims."""


@claim("select-and-copy")
class OneHeadKnowsMore(Claim):
    statement: ClassVar[str] = (
        "where the answer is stated in the question, the QK-score of one head chosen on other questions is right far "
        "more often than the letter with the highest logit (abstract; the synthetic data set, figure 5b)"
    )
    setting: ClassVar[str] = (
        "four options; the head with the best QK-score on 48 questions, judged on 96 about other words; against the "
        "letters' logits and 27 random heads"
    )

    def run(self, bench: Bench) -> Finding:
        best, asked, heard = _tried(bench)
        layers, heads = heard.qk.shape[1:3]
        right, attended = _right(heard.qk, asked).double(), _right(heard.attention, asked).double()
        head, letter = right[:, best[0], best[1]], _right(heard.letters, asked).double()
        drawn = torch.tensor(random_others(layers * heads, 27, [best[0] * heads + best[1]], seed=0))
        others = right.flatten(1)[:, drawn].mean(1)
        over_letter, over_random = mean((head - letter).tolist()), mean((head - others).tolist())
        return Finding(
            {
                f"right by QK-score of head {best[0]}.{best[1]}": mean(head.tolist()),
                "right by its attention": mean(attended[:, best[0], best[1]].tolist()),
                "right by the letters' logits": mean(letter.tolist()),
                "right by QK-score of random heads": mean(others.tolist()),
                "head over letters": over_letter,
                "head over random heads": over_random,
            },
            {
                "the head is right more often than the letter": over_letter.low > 0,
                "the head is right more often than random heads": over_random.low > 0,
            },
        )


@claim("choose")
class OrderMattersLess(Claim):
    statement: ClassVar[str] = (
        "a select-and-copy head chooses the right option in either order of the options more often than the letter's "
        "logit does (permutation accuracy, figure 3)"
    )
    setting: ClassVar[str] = (
        "the head of the claim select-and-copy; 96 questions of four options about other words, each also with its "
        "options in reverse; right is who is right both times"
    )

    def run(self, bench: Bench) -> Finding:
        best, asked, heard = _tried(bench, part=0.5)
        turned = [Question(q.text, q.options[::-1], len(q.options) - 1 - q.right) for q in asked]
        again = hear(bench.model, bench.tokenizer, turned, lambda part: bench.progress(0.5 + part / 2))
        pairs = ((heard, asked), (again, turned))
        both = torch.stack([_right(h.qk[:, best[0], best[1]], q) for h, q in pairs]).all(0).double()
        letter = torch.stack([_right(h.letters, q) for h, q in pairs]).all(0).double()
        over = mean((both - letter).tolist())
        return Finding(
            {
                f"right in both orders, head {best[0]}.{best[1]}": mean(both.tolist()),
                "right in both orders, letters": mean(letter.tolist()),
                "head over letters": over,
            },
            {"the head is right in both orders more often than the letter": over.low > 0},
        )


def _tried(bench: Bench, part: float = 1.0) -> tuple[tuple[int, int], list[Question], Heard]:
    """The head that questions on half of the words choose; questions on the other half, and what is heard on them."""
    best = best_heads(bench.model, bench.tokenizer, count=TRIED)[0]
    bench.progress(part / 3)
    asked = questions(JUDGED, 2, WORDS[1::2])
    heard = hear(bench.model, bench.tokenizer, asked, lambda done: bench.progress(part * (1 + 2 * done) / 3))
    return best, asked, heard
