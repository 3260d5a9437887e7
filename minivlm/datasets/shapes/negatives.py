"""Captions of the shapes world that are false by one word, which judge a model that matches images with texts.

    true    "a small red circle at the top left and a large blue star in the centre"
    colour  "a small red circle at the top left and a large pink star in the centre"
    place   "a small red circle at the top left and a large blue star on the right"

A caption of another image is mostly wrong in every word, so one word suffices to reject it. These need all words
(Thrush et al. 2022, "Winoground", and Yuksekgonul et al. 2023, "When and Why Vision-Language Models Behave like
Bags-of-Words", ask for the same). The words alone must not give them away: no two objects share a place, objects come in
reading order as in every canonical caption, and pairs of colour and shape that training never shows are named only
where the image shows such a pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

import numpy as np

from minivlm.datasets.shapes.facts import UNSEEN_PAIRS, pair
from minivlm.datasets.shapes.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, SceneObject
from minivlm.datasets.shapes.text import canonical, parse

VALUES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "place": PLACES}


def one_attribute_negatives(
    scene: Scene, described: Sequence[SceneObject], rng: np.random.Generator
) -> list[tuple[str, str]]:
    """(caption, attribute) for each attribute that a true caption names: one object has another, and none like it is there.

    described: the objects of the true caption, from `parse`, or those of the scene themselves. An attribute that it does
    not name, or that cannot be changed, is left out. Of `rng` only the raw stream is used, as in `describe`.
    """
    drawn = ((one_negative(scene, described, attribute, rng), attribute) for attribute in VALUES)
    return [(text, attribute) for text, attribute in drawn if text is not None]


def any_negative(scene: Scene, described: Sequence[SceneObject], rng: np.random.Generator) -> str | None:
    """One of these, each attribute as likely as the others; None where there is none. The others are not drawn."""
    attributes = list(VALUES)
    while attributes:
        attribute = attributes.pop(rng.bit_generator.random_raw() % len(attributes))
        if (text := one_negative(scene, described, attribute, rng)) is not None:
            return text
    return None


def one_negative(
    scene: Scene, described: Sequence[SceneObject], attribute: str, rng: np.random.Generator
) -> str | None:
    """A caption that is false by this attribute of one object, if it can be changed."""
    if not (choices := list(false_captions(scene, described, attribute))):
        return None
    return canonical(Scene(in_reading_order(choices[rng.bit_generator.random_raw() % len(choices)])))


def false_captions(scene: Scene, described: Sequence[SceneObject], attribute: str) -> Iterator[list[SceneObject]]:
    """Every change of this attribute of one object that makes the description false, and could be true of some image."""
    shows_unseen = any(pair(thing) in UNSEEN_PAIRS for thing in scene.objects)
    for i, thing in enumerate(described):
        others = [*described[:i], *described[i + 1 :]]
        for value in VALUES[attribute] if getattr(thing, attribute) is not None else ():
            other = thing._replace(**{attribute: value})
            taken = other.place is not None and other.place in [o.place for o in others]
            unheard_of = pair(other) in UNSEEN_PAIRS and not shows_unseen
            if not taken and not unheard_of and not any(agrees(other, there) for there in scene.objects):
                yield [*described[:i], other, *described[i + 1 :]]


def changed(caption: str, rng: np.random.Generator) -> str | None:
    """The caption with one attribute of one object changed, without the image: false if the caption was true.
    None where there is nothing to change, as in captions of photographs."""
    described = tuple(parse(caption))
    return any_negative(Scene(described), described, rng)


def is_true(caption: str, scene: Scene) -> bool:
    """Whether a caption names every object of the image and no other, each with nothing that is wrong of it."""
    described = parse(caption)
    if len(described) != len(scene.objects):
        return False
    orders = permutations(scene.objects)
    return any(all(agrees(s, thing) for s, thing in zip(described, order, strict=True)) for order in orders)


def agrees(described: SceneObject, thing: SceneObject) -> bool:
    """Whether the description is true of this object, in all that it names."""
    return all(getattr(described, attribute) in (None, getattr(thing, attribute)) for attribute in VALUES)


def in_reading_order(objects: Sequence[SceneObject]) -> tuple[SceneObject, ...]:
    """Row by row, from left to right, if all places are named; else as they are."""
    if any(thing.place is None for thing in objects):
        return tuple(objects)
    return tuple(sorted(objects, key=lambda thing: PLACES.index(thing.place)))
