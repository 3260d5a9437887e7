"""CHAIR: how many of the objects that captions name are not in their images.  Rohrbach et al. 2018, "Object Hallucination in
Image Captioning", §3.2.

    CHAIR_s  captions that name such an object, of all captions         CHAIR_i  such objects, of all that are named
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minivlm.errors import UserError
from minivlm.metrics.samples import Samples
from minivlm.metrics.score import Score

SENTENCE, INSTANCE, NAMED = "CHAIR_s", "CHAIR_i", "objects named"


def chair_scores(
    named: Sequence[Sequence[str]], there: Sequence[set[str]], ids: Sequence[str] | None = None
) -> dict[str, Score]:
    """named: the objects in each caption, one for each mention; there: those in its image.

    {"CHAIR_s", "CHAIR_i": lower is better, "objects named": of those that are there}. Chance: the same captions beside the next
    image. A share of nothing is left out, as CHAIR_i where no object is named. UserError where there are no captions.
    """
    if not named:
        raise UserError("there are no captions to measure with.")
    rows, others = (
        np.array([counts(some, of) for some, of in zip(named, images, strict=True)], dtype=float)
        for images in (there, [*there[1:], there[0]])
    )
    scores = {}
    for i, name in enumerate((SENTENCE, INSTANCE, NAMED)):
        own, chance = (Samples("mean", some[:, 2 * i : 2 * i + 2], ids and tuple(ids)) for some in (rows, others))
        if own.n:
            scores[name] = Score.of(own, chance.value)
    return scores


def counts(named: Sequence[str], there: set[str]) -> tuple[int, ...]:
    wrong = sum(name not in there for name in named)
    return wrong > 0, 1, wrong, len(named), len(there & set(named)), len(there)
