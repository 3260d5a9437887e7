"""Does a caption of the shapes world describe the image?  Parsed into objects, it can be compared exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from minivlm.datasets.shapes.text import parse
from minivlm.errors import UserError
from minivlm.metrics.samples import Samples
from minivlm.metrics.score import Score


def scene_match(captions: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    """captions against the canonical caption of each scene, in any wording and order of the objects.

    "exact scene match"   all objects and no others, each with its size, colour, shape and place
    "object precision"    of the objects that are named, the share that is there; every object counts once
    "object recall"       of the objects that are there, the share that is named

    Chance is what the same captions get for the next image. Raises UserError where there are no captions; ValueError
    where there is not one for each scene.
    """
    if len(captions) != len(references):
        raise ValueError(f"{len(references)} scenes, but {len(captions)} captions")
    if not captions:
        raise UserError("there are no captions to measure with.")
    named, there = ([Counter(parse(text)) for text in texts] for texts in (captions, references))
    found, chances = compare(named, there), compare(named, there[1:] + there[:1])
    return {name: Score.of(samples, chances[name].value) for name, samples in found.items()}


def compare(named: list[Counter], there: list[Counter]) -> dict[str, Samples]:
    right = [(a & b).total() for a, b in zip(named, there, strict=True)]
    columns = lambda counts: np.column_stack([right, [one.total() for one in counts]])
    return {
        "exact scene match": Samples.mean([a == b for a, b in zip(named, there, strict=True)]),
        "object precision": Samples("ratio", columns(named)),
        "object recall": Samples("ratio", columns(there)),
    }
