"""Texts for `concept-depth`: labelled by what they say, and split so that no telling word is on both sides."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Labelled:
    """Texts of two sorts.

    Attributes:
        name: what tells them apart.
        texts, labels: each with its label.
        groups: a number for each text; those with the same share their telling word.
        judged: which texts are kept for judging; no group is on both sides.
    """

    name: str
    texts: list[str]
    labels: list[bool]
    groups: list[int]
    judged: list[bool]


KINDS = {
    "an animal": "dog horse cow lion tiger rabbit sheep goat wolf bear monkey fox",
    "a fruit": "apple banana pear peach plum grape lemon mango cherry melon kiwi strawberry",
    "a color": "red blue green yellow purple pink brown black white gray violet crimson",
    "a country": "France Germany Italy Spain Japan China India Brazil Canada Mexico Egypt Russia",
    "a tool": "hammer saw drill wrench screwdriver chisel shovel rake axe pliers mallet spade",
    "a vehicle": "car bus truck train bicycle motorcycle tram van taxi tractor scooter boat",
    "a planet": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    "a sport": "football tennis basketball hockey golf baseball rugby cricket boxing swimming volleyball judo",
    "a metal": "iron copper tin zinc lead nickel aluminum steel titanium brass bronze platinum",
    "a job": "doctor teacher lawyer nurse farmer baker plumber carpenter engineer pilot soldier butcher",
}
CAPITALS = (
    "France Paris,Germany Berlin,Italy Rome,Spain Madrid,Japan Tokyo,China Beijing,Russia Moscow,Egypt Cairo,"
    "Greece Athens,Austria Vienna,Portugal Lisbon,Ireland Dublin,Poland Warsaw,Hungary Budapest,Norway Oslo,"
    "Sweden Stockholm,Finland Helsinki,Denmark Copenhagen,Turkey Ankara,Iran Tehran,Iraq Baghdad,Cuba Havana,"
    "Peru Lima,Chile Santiago,Kenya Nairobi,Thailand Bangkok,Vietnam Hanoi,Canada Ottawa,Australia Canberra,"
    "Belgium Brussels"
)
GOOD = (
    "wonderful great excellent amazing beautiful fantastic lovely brilliant delightful superb perfect charming "
    "enjoyable pleasant fabulous marvelous impressive outstanding splendid terrific magnificent joyful inspiring fun "
    "nice good awesome incredible cheerful gorgeous glorious exciting refreshing heartwarming satisfying remarkable"
)
BAD = (
    "terrible awful horrible bad disgusting boring dreadful ugly poor disappointing nasty unpleasant miserable "
    "painful annoying stupid pathetic lousy hideous depressing tedious dull ridiculous worthless appalling gross "
    "horrid frustrating sad mediocre useless offensive atrocious sickening dismal tasteless"
)
FEELINGS = (
    "I thought the film was {}.",
    "The food in this place is {}.",
    "To me her new song sounds {}.",
    "We found that the hotel was {}.",
)
NAMES = "Anna Ben Carl Diana Emma Frank Grace Henry Julia Kevin Laura Mark Nora Oscar Paul Rose Sam Tom Lucy Jack"
RELATIONS = "taller older faster stronger richer heavier younger smarter"
THINGS = "apples books coins cards stones pencils shirts bottles"


def tasks(seed: int = 0) -> list[Labelled]:
    """The three tasks, from simple to complex: "factual", "emotional", "inferential".

    Example:
        >>> [(task.name, len(task.texts), sum(task.labels) / len(task.labels)) for task in tasks()]
        [('factual', 292, 0.5), ('emotional', 144, 0.5), ('inferential', 240, 0.5)]
    """
    return [_factual(seed), _emotional(seed), _inferential(seed)]


def _halves(items: list[str], source: random.Random) -> list[list[str]]:
    """Two thirds to learn from and a third to be judged by, drawn at random."""
    items = source.sample(items, len(items))
    cut = round(len(items) * 2 / 3)
    return [items[:cut], items[cut:]]


class _Made:
    def __init__(self, name: str):
        self.task = Labelled(name, [], [], [], [])

    def add(self, text: str, label: bool, group: int, judged: bool) -> None:
        for field, value in zip(("texts", "labels", "groups", "judged"), (text, label, group, judged), strict=True):
            getattr(self.task, field).append(value)


def _factual(seed: int) -> Labelled:
    """Each word once with its own kind and once with another, each country with its capital and with another's."""
    source, made, group = random.Random(seed), _Made("factual"), 0
    kinds = list(KINDS)
    for at, kind in enumerate(kinds):
        for judged, words in enumerate(_halves(KINDS[kind].split(), source)):
            for turn, word in enumerate(words):
                other = kinds[(at + 1 + turn % (len(kinds) - 1)) % len(kinds)]
                for label, said in ((True, kind), (False, other)):
                    made.add(f"{word[0].upper()}{word[1:]} is {said}.", label, group, bool(judged))
                group += 1
    for judged, pairs in enumerate(_halves(CAPITALS.split(","), source)):
        both = [pair.split() for pair in pairs]
        for at, (country, city) in enumerate(both):
            for label, said in ((True, city), (False, both[at - 1][1])):
                made.add(f"The capital of {country} is {said}.", label, group, bool(judged))
            group += 1
    return made.task


def _emotional(seed: int) -> Labelled:
    source, made, group = random.Random(seed), _Made("emotional"), 0
    for label, words in ((True, GOOD), (False, BAD)):
        for judged, part in enumerate(_halves(words.split(), source)):
            for word in part:
                for form in source.sample(FEELINGS, 2):
                    made.add(form.format(word), label, group, bool(judged))
                group += 1
    return made.task


def _inferential(seed: int) -> Labelled:
    """What follows from two comparisons, or from two amounts; both labels with the same words."""
    source, made, group = random.Random(seed), _Made("inferential"), 0
    names, relations, things = (_halves(words.split(), source) for words in (NAMES, RELATIONS, THINGS))
    amounts = _halves([f"{a} {b}" for a in range(2, 20) for b in range(a + 1, 20)], source)
    for judged, count in ((0, 40), (1, 20)):
        for _ in range(count):
            a, b, c = source.sample(names[judged], 3)
            more = source.choice(relations[judged])
            given = [f"{a} is {more} than {b}", f"{b} is {more} than {c}"]
            source.shuffle(given)
            for label, (first, second) in ((True, (a, c)), (False, (c, a))):
                made.add(f"{'. '.join(given)}. So {first} is {more} than {second}.", label, group, bool(judged))
            group += 1
        for at in range(count):
            a, b = source.sample(names[judged], 2)
            few, many = source.choice(amounts[judged]).split()
            n, m = (many, few) if at % 2 else (few, many)
            thing, word = source.choice(things[judged]), source.choice(["more", "fewer"])
            true = (a, b) if (word == "more") == (n == many) else (b, a)
            for label, (first, second) in ((True, true), (False, true[::-1])):
                text = f"{a} has {n} {thing} and {b} has {m}. So {first} has {word} {thing} than {second}."
                made.add(text, label, group, bool(judged))
            group += 1
    return made.task
