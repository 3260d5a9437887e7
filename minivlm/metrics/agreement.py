"""How far raters agree beyond what they would by chance: 1 always, 0 as often as by chance.

    κ = (p_o − p_e) / (1 − p_e)      p_o: the observed agreement, p_e: that of raters who draw from the same answers at random

For two raters Cohen 1960, "A coefficient of agreement for nominal scales" (each draws from answers of their own), and 1968 for
ordered answers; for more, Fleiss 1971, "Measuring nominal scale agreement among many raters" (all draw from the same ones).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def cohen_kappa(one: Sequence[Hashable], other: Sequence[Hashable], *, ordered: bool = False) -> float | None:
    """Of two raters' answers to the same samples. ordered: answers are numbers, and a disagreement counts by the square of its
    distance. None where it is not defined: without samples, or where both always gave the same one answer."""
    if len(one) != len(other):
        raise ValueError(f"{len(one)} answers and {len(other)}: there must be two for each sample")
    known = sorted(dict.fromkeys([*one, *other]))
    place = {answer: i for i, answer in enumerate(known)}
    counts = np.zeros((len(known), len(known)))
    np.add.at(counts, ([place[a] for a in one], [place[b] for b in other]), 1)
    by_chance = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / max(1, len(one))
    if ordered:
        numbers = np.array(known, dtype=float)
        cost = (numbers[:, None] - numbers) ** 2
    else:
        cost = 1 - np.eye(len(known))
    expected = float((cost * by_chance).sum())
    return 1 - float((cost * counts).sum()) / expected if expected > 0 else None


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """counts (N, C): how many raters gave each of C answers to each of N samples. Samples may have different numbers of
    ratings; those with fewer than two are not counted. p_o is the mean over samples of the share of pairs of raters who
    agree, p_e comes from all ratings together. None where it is not defined: no such sample, or one answer alone."""
    counts = np.asarray(counts, dtype=np.float64)
    counts = counts[counts.sum(axis=1) >= 2]
    if not len(counts):
        return None
    raters = counts.sum(axis=1)
    observed = float(((counts * (counts - 1)).sum(axis=1) / (raters * (raters - 1))).mean())
    by_chance = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    return (observed - by_chance) / (1 - by_chance) if by_chance < 1 else None
