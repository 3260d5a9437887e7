"""Captions of the shapes world: scene → words, in many wordings or in the canonical one, and words → scene.

"a small red circle at the top left and a large blue star in the centre"     canonical: everything, in reading order
"a photo of a blue star and a red circle"                                     describe: one of many wordings
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np

from minivlm.datasets.shapes.scenes import COLOURS, MOST, PLACES, SHAPES, SIZES, Scene, SceneObject

# The first wording is the canonical one.
WHERE = {
    "top left": ("at the top left", "in the top left corner"),
    "top": ("at the top", "near the top"),
    "top right": ("at the top right", "in the top right corner"),
    "left": ("on the left", "on the left side"),
    "centre": ("in the centre", "in the middle"),
    "right": ("on the right", "on the right side"),
    "bottom left": ("at the bottom left", "in the bottom left corner"),
    "bottom": ("at the bottom", "near the bottom"),
    "bottom right": ("at the bottom right", "in the bottom right corner"),
}
PLACE_FIRST = None  # "in the centre there is a blue star"
OPENINGS = ("", "", "", "there is ", "a picture of ", "a photo of ", PLACE_FIRST)
NAMED = (
    4 * [(True, True)] + 2 * [(False, True)] + [(True, False)] + 3 * [(False, False)]
)  # size, place: of every object or of none
ORDERS = [list(itertools.permutations(range(n))) for n in range(MOST + 1)]


def canonical(scene: Scene) -> str:
    """Every object with all that is known of it, in reading order: scenes that differ in a fact differ in this."""
    return listing([f"{noun(thing)}{where(thing.place)}" for thing in scene.objects])


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """One true wording. Colour and shape of every object are always named; size in half of the captions, place in six of ten.

    Of `rng` only the raw stream of its bit generator is used, which NumPy keeps the same from version to version.
    """
    named, order, opening, wordings = rng.bit_generator.random_raw(4).tolist()
    name_size, name_place = NAMED[named % len(NAMED)]
    orders = ORDERS[len(scene.objects)]
    things = [scene.objects[i] for i in orders[order % len(orders)]]
    nouns = [noun(thing, name_size) for thing in things]
    places = [where(thing.place, wordings >> i & 1) if name_place else "" for i, thing in enumerate(things)]
    opening = OPENINGS[opening % len(OPENINGS)]
    if opening is PLACE_FIRST and places[0]:
        nouns[0] = "there is " + nouns[0]
        return listing([f"{place[1:]} {name}" for place, name in zip(places, nouns, strict=True)])
    return (opening or "") + listing([name + place for name, place in zip(nouns, places, strict=True)])


def noun(thing: SceneObject, name_size: bool = True) -> str:
    """ "a small red circle", "an orange star" """
    name = f"{thing.colour} {thing.shape}"
    if name_size and thing.size is not None:
        name = f"{thing.size} {name}"
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def where(place: str | None, wording: int = 0) -> str:
    """ " at the top left", or nothing where no place is known"""
    return "" if place is None else f" {WHERE[place][wording]}"


def listing(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c" """
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


THING = rf"(?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})\b"
_PLACES = "|".join([*sorted(PLACES, key=len, reverse=True), "center", "middle"])  # "top left" before "top"
PLACE = rf"(?:at|in|on|near|to) the (?P<place>{_PLACES})\b(?: side| corner)?"
PLACE_AFTER = re.compile(rf"{THING}(?: {PLACE})?")
PLACE_BEFORE = re.compile(rf"(?:{PLACE}(?: there is)? an? )?{THING}")


def parse(caption: str) -> list[SceneObject]:
    """The objects of a caption, in the order in which they are named, without boxes.

    Understands every wording of `describe` and `canonical`. Of other text it takes what it recognises and skips the
    rest: a model's babble counts for as many objects as it names. Compare captions as Counters of their objects.
    """
    text = " ".join(re.findall(r"[a-z]+", caption.lower()))
    pattern = PLACE_BEFORE if re.match(PLACE, text) else PLACE_AFTER
    objects = []
    for match in pattern.finditer(text):
        place = "centre" if match["place"] in ("center", "middle") else match["place"]
        objects.append(SceneObject(match["shape"], match["colour"], match["size"], place))
    return objects
