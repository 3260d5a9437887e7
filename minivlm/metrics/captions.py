"""Does a caption of the shapes world say what the picture shows?  Read back to objects, it can be compared exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from minivlm.datasets.shapes.text import parse
from minivlm.errors import UserError
from minivlm.metrics.score import Score


def scene_match(captions: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    """captions against the canonical caption of each scene, in any wording and order of the objects.

    "exact scene match"   all objects and no others, each with its size, colour, shape and place
    "object precision"    of the objects that are told, the share that is there; every object counts once
    "object recall"       of the objects that are there, the share that is told

    Chance is what the same captions get for the next picture. Raises UserError where there are no captions; ValueError
    where there is not one for each scene.
    """
    if len(captions) != len(references):
        raise ValueError(f"{len(references)} scenes, but {len(captions)} captions")
    if not captions:
        raise UserError("there are no captions to measure with.")
    told, there = ([Counter(parse(text)) for text in texts] for texts in (captions, references))
    values, chances = compare(told, there), compare(told, there[1:] + there[:1])
    return {name: Score(value, chances[name]) for name, value in values.items()}


def compare(told: list[Counter], there: list[Counter]) -> dict[str, float]:
    right = sum((a & b).total() for a, b in zip(told, there, strict=True))
    return {
        "exact scene match": sum(a == b for a, b in zip(told, there, strict=True)) / len(there),
        "object precision": right / max(1, sum(a.total() for a in told)),
        "object recall": right / max(1, sum(b.total() for b in there)),
    }
