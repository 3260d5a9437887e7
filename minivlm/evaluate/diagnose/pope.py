"""POPE on any folder whose objects are known: "is there a dog in the image?", as often of what is there as of what is not.

random        an object that is not there, any of them with the same probability
popular       one of those that are in most other images
adversarial   one of those that are most often together with what is there

Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models", §5.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minivlm.metrics import Score
from minivlm.metrics.pope import pope_scores

SPLITS = ("random", "popular", "adversarial")
EACH = 3  # questions about an image with yes for an answer, at most, and as many with no


class Asked(NamedTuple):
    image: int  # index into the images
    name: str
    there: bool
    split: str


def pope_questions(there: Sequence[set[str]], names: Sequence[str]) -> list[Asked]:
    """there: of each image the objects in it. Each question is in one split; those with yes are the same ones in all."""
    often = Counter(name for some in there for name in some)
    together = Counter((a, b) for some in there for a in some for b in some if a != b)
    looks = Counter((a, b) for a in names for b in names if a != b and set(a.split()) & set(b.split()))
    asked, order = [], {name: i for i, name in enumerate(np.random.default_rng(0).permutation(list(names)).tolist())}
    for i, some in enumerate(there):
        known = sorted(some, key=order.__getitem__)[:EACH]
        absent = [name for name in names if name not in some]
        n, rng = min(len(known), len(absent)), np.random.default_rng(i)
        near = {
            b: sum(together[a, b] + 0.5 * looks[a, b] for a in some) for b in absent
        }  # of one word in common, no more
        chosen = {
            "random": [absent[k] for k in rng.permutation(len(absent))[:n]],
            "popular": sorted(absent, key=lambda name: (-often[name], order[name]))[:n],
            "adversarial": sorted(absent, key=lambda name: (-near[name], order[name]))[:n],
        }
        for split, wrong in chosen.items():
            asked += [Asked(i, name, True, split) for name in known[:n]] + [
                Asked(i, name, False, split) for name in wrong
            ]
    return asked


def scores_by_split(asked: Sequence[Asked], yes: Sequence[bool], keys: Sequence[str]) -> dict[str, Score]:
    """Accuracy, F1 and the share of yes, for each split. keys: of the images."""
    scores = {}
    for split in dict.fromkeys(q.split for q in asked):
        rows = [(q, "yes" if said else "no") for q, said in zip(asked, yes, strict=True) if q.split == split]
        found = pope_scores([(said, q.there) for q, said in rows], [keys[q.image] for q, _ in rows])
        scores |= {f"POPE {split}: {name}": found[name] for name in ("accuracy", "F1", "yes")}
    return scores
