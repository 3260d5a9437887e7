"""Retrieval as it is published for COCO and Flickr30k: five captions an image, each a candidate and a query of its own.

    image→text   right if any of its captions is among the first K of all captions     N queries
    text→image   right if its image is among the first K of all images                5N queries

The protocol of Karpathy & Fei-Fei 2015, §4.1, with the rsum and the 1K folds of Faghri et al. 2018 (VSE++, §4.1). Two images
with the same caption stay two: the caption of the other image is wrong, where `retrieval` counts it as right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.metrics.retrieval import by_ids, rank, recall_at_k
from minivlm.metrics.samples import DRAWS, LEVEL, Samples, drawn
from minivlm.metrics.score import Score

KS = (1, 5, 10)


def caption_retrieval(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Sequence[int],
    *,
    names: Sequence[str] | None = None,
    fold: int | None = None,
) -> dict[str, Score]:
    """{"image→text R@1": Score, …, "image→text median rank", "text→image R@1", …, "rsum"}; rsum adds up the six R@K in percent.

    image_features (N, D), text_features (M, D), unit length; image_of_text (M,): the row of each text's image; names (N,): of
    the images, which are the samples. fold: so many images are candidates at a time, and scores are those of all folds.
    UserError where N is no multiple of fold, and for an image without a text.
    """
    N, of = len(image_features), torch.as_tensor(image_of_text)
    names, fold = range(N) if names is None else names, fold or N
    if N % fold:
        raise UserError(f"{N} images cannot be judged in folds of {fold}: the number has to be a multiple of it.")
    directions: dict[str, list] = {"image→text": [], "text→image": []}
    for start in range(0, N, fold):
        images = torch.arange(start, start + fold)
        texts = ((of >= start) & (of < start + fold)).nonzero().flatten()
        sides = (
            (images, image_features[start : start + fold]),
            (of[texts], text_features[texts.to(text_features.device)]),
        )
        for direction, (query, candidate) in zip(directions, (sides, sides[::-1]), strict=True):
            right = by_ids(query[0], candidate[0])
            ranks, _, count = rank(query[1], candidate[1], right, what=direction)
            directions[direction].append((ranks, count, len(candidate[0]), [names[i] for i in query[0].tolist()]))
    scores = {}
    for direction, folds in directions.items():
        scores |= {f"{direction} R@{k}": recall(folds, k) for k in KS}
        scores[f"{direction} median rank"] = median_rank(folds)
    return scores | {"rsum": rsum([scores[f"{direction} R@{k}"] for direction in directions for k in KS])}


def recall(folds: list, k: int) -> Score:
    """R@K over all folds; each fold is (ranks, right candidates, candidates, samples)."""
    ranks, samples = torch.cat([fold[0] for fold in folds]), [name for fold in folds for name in fold[3]]
    chance = sum(recall_at_k(one, count, G, k).chance * len(one) for one, count, G, _ in folds) / len(ranks)
    return Score.of(Samples.mean((ranks <= k).numpy(), samples), chance)


def rsum(recalls: Sequence[Score]) -> Score:
    """100 · the sum of three R@K of either direction, from 0 to 600."""
    ids, parts = recalls[0].samples.ids, []
    for score in recalls:  # of each image: right queries, queries
        place = {name: i for i, name in enumerate(score.samples.ids)}
        parts.append(score.samples.statistics[[place[name] for name in ids]])
    right = [sum(part[:, 0] for part in some) for some in (parts[:3], parts[3:])]
    columns = [right[0], parts[0][:, 1], right[1], parts[3][:, 1]]
    samples = Samples("rsum", np.stack(columns, axis=1), ids)
    return Score.of(samples, 100 * sum(score.chance for score in recalls), share=False)


def median_rank(folds: list) -> Score:
    """The median of the ranks of the first right candidate, rounded down as published code does; 1 is best. chance: that of a
    random order. A median is no function of sums over samples, so its bootstrap is drawn here."""
    ranks = torch.cat([fold[0] for fold in folds]).numpy()
    sample = {name: i for i, name in enumerate(dict.fromkeys(name for fold in folds for name in fold[3]))}
    of = np.array([sample[name] for fold in folds for name in fold[3]])
    order = np.argsort(ranks, kind="stable")
    medians = []
    for counts in np.array_split(drawn(len(sample)), -(-DRAWS * len(ranks) // 2**22)):
        below = counts[:, of[order]].cumsum(axis=1, dtype=np.int64)  # (draws, queries)
        medians.append(ranks[order][(2 * below >= below[:, -1:]).argmax(axis=1)])
    low, high = np.quantile(np.concatenate(medians), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    _, count, G, _ = folds[0]
    found = (len(ranks), float(low), float(high))
    return Score(float(np.median(ranks) // 1), random_median(G, int(count.median())), share=False, recorded=found)


def random_median(G: int, R: int) -> float:
    """The median rank of the first of R right candidates in a random order of G."""
    missed = 1.0
    for m in range(1, G + 1):  # the first m are all wrong
        missed *= max(0, G - R - m + 1) / (G - m + 1)
        if missed <= 0.5:
            return float(m)
    return float(G)
