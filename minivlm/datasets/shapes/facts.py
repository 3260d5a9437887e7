"""The facts of a scene of the shapes world: what a question can ask, and its answer.

    ("top left",)                       "circle"   what stands there
    ("red circle",)                     "top left" where it stands, if there is but one
    ("circle", "larger than", "star")   "no"       how the two compare, if there is but one of each

Each function here goes through all facts of one form; questions.py puts them into words.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from minivlm.datasets.shapes.scenes import CLASSES, COLOURS, PLACES, SEEN, SHAPES, UNSEEN, SceneObject
from minivlm.datasets.shapes.text import noun

SHAPE, COLOUR = SceneObject._fields.index("shape"), SceneObject._fields.index("colour")
NUMBERS = ("zero", "one", "two", "three")
PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
SEEN_PAIRS, UNSEEN_PAIRS = ({CLASSES[i] for i in pairs} for pairs in (SEEN, UNSEEN))
PAIR_NAMES = [(c, s, f"{c} {s}", noun(SceneObject(s, c))) for s in SHAPES for c in COLOURS]
PARTNERS = {  # of each shape its colours in training, and of each colour its shapes
    name: tuple(other for other in others if {f"{name} {other}", f"{other} {name}"} & SEEN_PAIRS)
    for names, others in ((COLOURS, SHAPES), (SHAPES, COLOURS))
    for name in names
}

Objects = tuple[SceneObject, ...]


class Fact(NamedTuple):
    words: tuple[str, ...]  # what the question names
    answer: str
    about: Objects  # the objects that the answer is about; () where it denies that there are any


def pair(thing: SceneObject) -> str:
    """ "red circle" """
    return f"{thing.colour} {thing.shape}"


def once(objects: Objects, attribute: int) -> list[SceneObject]:
    """The objects that "the red shape" or "the circle" can only mean."""
    values = [thing[attribute] for thing in objects]
    return [thing for thing in objects if values.count(thing[attribute]) == 1]


def at_place(objects: Objects, *, answer: int) -> Iterator[Fact]:
    return (Fact((thing.place,), thing[answer], (thing,)) for thing in objects)


def of_one(objects: Objects, *, named: int, answer: int) -> Iterator[Fact]:
    return (Fact((thing[named],), thing[answer], (thing,)) for thing in once(objects, named))


def places(objects: Objects) -> Iterator[Fact]:
    pairs = [pair(thing) for thing in objects]
    return (Fact((name,), o.place, (o,)) for name, o in zip(pairs, objects, strict=True) if pairs.count(name) == 1)


def places_of_one(objects: Objects, *, named: int) -> Iterator[Fact]:
    ending = " shape" if named == COLOUR else ""
    return (Fact((thing[named] + ending,), thing.place, (thing,)) for thing in once(objects, named))


def count_all(objects: Objects) -> Iterator[Fact]:
    yield Fact((), NUMBERS[len(objects)], objects)


def count_each(objects: Objects, *, attribute: int) -> Iterator[Fact]:
    for value in SHAPES if attribute == SHAPE else COLOURS:
        same = tuple(thing for thing in objects if thing[attribute] == value)
        yield Fact((PLURALS.get(value, value),), NUMBERS[len(same)], same)


def exists(objects: Objects, *, near: bool) -> Iterator[Fact]:
    """Every pair that is there; of the others, those that share a colour or a shape with an object, or those that don't.

    A pair that training never shows is not asked about, except in scenes that show such a pair.
    """
    there = defaultdict(tuple)
    for thing in objects:
        there[pair(thing)] += (thing,)
    asked = PAIR_NAMES if there.keys() & UNSEEN_PAIRS else [names for names in PAIR_NAMES if names[2] in SEEN_PAIRS]
    colours, shapes = {thing.colour for thing in objects}, {thing.shape for thing in objects}
    for colour, shape, name, with_article in asked:
        if name in there:
            yield Fact((with_article,), "yes", there[name])
        elif near == (colour in colours or shape in shapes):
            yield Fact((with_article,), "no", ())


def more(objects: Objects) -> Iterator[Fact]:
    """Ties are left out: without them, one answer is as frequent as the other."""
    for attribute, ending in ((SHAPE, ""), (COLOUR, " shapes")):
        for a, b in itertools.permutations(count_each(objects, attribute=attribute), 2):
            if a.answer != b.answer:
                holds = NUMBERS.index(a.answer) > NUMBERS.index(b.answer)
                yield Fact((a.words[0] + ending, b.words[0] + ending), "yes" if holds else "no", a.about + b.about)


Relations = Callable[[SceneObject, SceneObject], Iterator[tuple[str, bool]]]


def compared(objects: Objects, *, relations: Relations) -> Iterator[Fact]:
    """Two objects, both named by their shapes or both by their colours, and what clearly holds or clearly does not."""
    for attribute, ending in ((SHAPE, ""), (COLOUR, " shape")):
        for a, b in itertools.permutations(once(objects, attribute), 2):
            for relation, holds in relations(a, b):
                words = (a[attribute] + ending, relation, b[attribute] + ending)
                yield Fact(words, "yes" if holds else "no", (a, b))


def sizes(a: SceneObject, b: SceneObject) -> Iterator[tuple[str, bool]]:
    if a.size != b.size:  # two small objects are not quite equal, but nobody should have to decide
        yield "larger than", a.size == "large"
        yield "smaller than", a.size == "small"


def sides(a: SceneObject, b: SceneObject) -> Iterator[tuple[str, bool]]:
    """Relations by the rows and columns of the 3 × 3 grid; two objects in one row are neither above nor below each other."""
    (row, column), (other_row, other_column) = (divmod(PLACES.index(thing.place), 3) for thing in (a, b))
    if column != other_column:
        yield "left of", column < other_column
        yield "right of", column > other_column
    if row != other_row:
        yield "above", row < other_row
        yield "below", row > other_row


def about_unseen(fact: Fact) -> bool:
    """Whether the answer is about an object whose colour and shape training never combines, or denies that there is one.

    Not where the question names its colour and asks for its shape, or the reverse: there the text alone gives the answer.
    """
    if set(fact.words) & PARTNERS.keys() and fact.answer in PARTNERS:
        return False
    name = fact.words[0].partition(" ")[2] if fact.words else ""  # "red circle" of "a red circle"
    if fact.answer in ("yes", "no") and name in SEEN_PAIRS | UNSEEN_PAIRS:
        return name in UNSEEN_PAIRS
    return not fact.about or any(pair(thing) in UNSEEN_PAIRS for thing in fact.about)
