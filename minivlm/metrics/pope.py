"""POPE: does a model say that objects are there which are not?  Li et al. 2023, "Evaluating Object Hallucination in Large
Vision-Language Models", §5.

"Is there a kite in the image?" is asked as often of objects that are there as of ones that are not: of random ones, of popular
ones, and of those that often stand beside what is there (adversarial).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minivlm.errors import UserError
from minivlm.metrics.samples import Samples
from minivlm.metrics.score import Score

NO = {"No", "no", "not"}


def means_yes(answer: str) -> bool:
    """As the official evaluation has it: "no" or "not" in the first sentence means no, all else means yes."""
    return NO.isdisjoint(answer.split(".")[0].replace(",", "").split(" "))


def pope_scores(answers: Sequence[tuple[str, bool]], images: Sequence[str] | None = None) -> dict[str, Score]:
    """answers: what the model said, and whether the object is there. images: those of one image are drawn together.

    {"accuracy", "precision", "recall", "F1", "yes": Score}, of which "yes" is the share of questions that are answered so.
    Chance: of one who always says yes, as models with a strong prior do. UserError where only one label occurs.
    """
    if not answers:
        raise UserError("there are no yes/no questions to measure with.")
    yes, label = (np.array(column, dtype=bool) for column in zip(*((means_yes(a), b) for a, b in answers), strict=True))
    if label.all() or not label.any():
        only = "yes" if label.all() else "no"
        raise UserError(
            f"all {len(label)} questions have the answer {only}: POPE needs objects that are there and some not."
        )
    share, one = float(label.mean()), np.ones(len(label))

    def score(kind: str, chance: float, *columns: np.ndarray) -> Score:
        return Score.of(Samples.summed(kind, np.stack(columns, axis=1).astype(float), images), chance)

    true, false, missed = yes & label, yes & ~label, ~yes & label
    return {
        "accuracy": score("mean", share, yes == label, one),
        "precision": score("ratio", share, true, yes),
        "recall": score("ratio", 1.0, true, label),
        "F1": score("f1", 2 * share / (1 + share), true, false, missed),
        "yes": score("mean", 1.0, yes, one),
    }
