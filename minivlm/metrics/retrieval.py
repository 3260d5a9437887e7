"""Does an image find its texts, a text its images, an image its class?  Recall@K and mean average precision.

    queries (Q, D) · candidates (G, D)ᵀ → scores (Q, G); candidates whose id is the query's are right, all others wrong.

A wrong candidate that ties with a right one stands before it, so that a model with one vector for everything scores
nothing and not everything. Scores are computed in blocks: memory is bounded whatever Q and G are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.metrics.samples import Samples
from minivlm.metrics.score import Score


class Relevance(NamedTuple):
    """Which candidates are right for which query, a few rows at a time."""

    shape: tuple[int, int]  # (Q, G)
    rows: Callable[[slice], Tensor]  # rows → (q, G) bool


BLOCK = 2**19  # scores held at a time: 5,000 × 25,000 at width 256 take 0.3 GB and, on one core, 9 s
DENSE = 2**21  # images · classes, up to which the mean per class has a column for each class


def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor | None = None,
    *,
    image_ids: Tensor | None = None,
    relevant: Sequence[Sequence[int]] | None = None,
    names: Sequence[str] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    block: int = BLOCK,
) -> dict[str, Score]:
    """Both directions of retrieval: {"image→text R@1": Score, …, "image→text mAP", "text→image R@1", …}.

    image_features (N, D), text_features (M, D), unit length; image_ids (N,) int names what each image shows and
    image_of_text (M,) int what each text describes: equal ids are right for each other. Without image_ids, image i is i;
    without image_of_text, text i is i. Where a caption stands under several images that have other captions as well,
    no ids can say so: relevant then lists, for each image, the texts that are right. names (N,): of the images, which are
    the samples: the texts of an image are one sample, that of several images belongs to the first.
    R@K is the share of queries with a right answer among the first K; mAP the mean over queries of the average precision.
    """
    if relevant is not None:
        forward, backward = by_lists(relevant, len(text_features))
        owners = first_query(relevant, len(text_features))
    else:
        images = torch.arange(len(image_features)) if image_ids is None else torch.as_tensor(image_ids)
        texts = torch.arange(len(text_features)) if image_of_text is None else torch.as_tensor(image_of_text)
        forward, backward = by_ids(images, texts), by_ids(texts, images)
        first = {image: i for i, image in reversed([*enumerate(images.tolist())])}
        owners = [first.get(image) for image in texts.tolist()]
    scores, names = {}, range(len(image_features)) if names is None else names
    for direction, query, candidate, right, of in (
        ("image→text", image_features, text_features, forward, range(len(image_features))),
        ("text→image", text_features, image_features, backward, owners),
    ):
        ranks, precisions, count = rank(query, candidate, right, what=direction, block=block)
        samples = [names[i] for i in of]
        for k in ks:
            scores[f"{direction} R@{k}"] = recall_at_k(ranks, count, len(candidate), k, samples)
        chance = chance_precision(count, len(candidate))
        scores[f"{direction} mAP"] = Score.of(Samples.mean(precisions.numpy(), samples), chance)
    return scores


def by_ids(query_ids: Tensor, candidate_ids: Tensor) -> Relevance:
    """Equal ids are right for each other."""
    return Relevance((len(query_ids), len(candidate_ids)), lambda rows: query_ids[rows, None] == candidate_ids)


def by_lists(right: Sequence[Sequence[int]], G: int) -> tuple[Relevance, Relevance]:
    """right: for each of Q queries the candidates, of G, that are right for it. And the same the other way round."""
    back: list[list[int]] = [[] for _ in range(G)]
    for query, candidates in enumerate(right):
        for candidate in candidates:
            back[candidate].append(query)

    def rows_of(lists: Sequence[Sequence[int]], width: int) -> Callable[[slice], Tensor]:
        def rows(some: slice) -> Tensor:
            dense = torch.zeros(len(part := lists[some]), width, dtype=torch.bool)
            for row, places in zip(dense, part, strict=True):
                row[list(places)] = True
            return dense

        return rows

    return Relevance((len(right), G), rows_of(right, G)), Relevance((G, len(right)), rows_of(back, len(right)))


def first_query(right: Sequence[Sequence[int]], G: int) -> list[int | None]:
    """right: for each query its right candidates, of G → for each candidate the first query that it is right for, if any."""
    first = {candidate: i for i, known in reversed([*enumerate(right)]) for candidate in known}
    return [first.get(candidate) for candidate in range(G)]


def zero_shot_accuracy(
    image_features: Tensor,
    class_features: Tensor,
    labels: Tensor,
    *,
    names: Sequence[str] | None = None,
    block: int = BLOCK,
) -> dict[str, Score]:
    """{"top-1": Score, "top-5": Score, "mean per class": Score}: each image retrieves its class.

    image_features (N, D), class_features (C, D), unit length; labels (N,) int, an index into the classes; names (N,): of the
    images. "mean per class" is top-1 accuracy averaged over the classes that occur: a frequent one counts no more than a rare
    one. Of five classes or fewer there is no top-5, which could not be wrong.
    """
    labels = torch.as_tensor(labels).cpu().long()
    C = len(class_features)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < C:
        raise ValueError(f"labels lie in {int(labels.min())}…{int(labels.max())}, but there are {C} classes")
    right = by_ids(labels, torch.arange(C))
    ranks, _, count = rank(image_features, class_features, right, what="image→class", block=block)
    scores = {f"top-{k}": recall_at_k(ranks, count, C, k, names) for k in (1, 5) if k == 1 or k < C}
    per_class = mean_per_class((ranks == 1).numpy(), labels.numpy(), names)
    return scores | {"mean per class": Score.of(per_class, 1 / C)}


def mean_per_class(right: np.ndarray, labels: np.ndarray, names: Sequence[Hashable] | None = None) -> Samples:
    """The mean over the classes that occur of their mean values; right, labels (N,). Of many images and classes the samples are
    weighted by the size of their class instead of having a column for each: the same value, and an interval that is wider."""
    right, (_, labels, count) = np.asarray(right, float), np.unique(labels, return_inverse=True, return_counts=True)
    if len(labels) * len(count) <= DENSE:
        return replace(Samples.macro(right, labels, len(count)), ids=None if names is None else tuple(map(str, names)))
    weight = 1 / (len(count) * count[labels])
    return Samples.summed("ratio", np.stack([weight * right, weight], axis=1), names)


@torch.no_grad()
def rank(
    queries: Tensor, candidates: Tensor, right: Relevance, *, what: str, block: int = BLOCK
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query the rank of its first right candidate, counted from 1, its average precision (double), and how many
    candidates are right for it; (Q,) each.

    Average precision: at each right candidate, the share of right ones among those down to it; averaged over all right ones.
    """
    check(queries, candidates, right, what)
    # In double precision a tie is a tie; in single, the same two vectors multiply to different last bits at different
    # places of a block. MPS has no doubles.
    device = "cpu" if queries.device.type == "mps" else queries.device
    queries, candidates = queries.to(device), candidates.to(device).double()
    blocks = []
    for start in range(0, len(queries), step := max(1, block // len(candidates))):
        rows = slice(start, start + step)
        scores = (queries[rows].double() @ candidates.T).float()  # (q, G)
        relevant = right.rows(rows).to(device)  # (q, G)
        if not relevant.any(dim=1).all():
            alone = start + int((~relevant.any(dim=1)).int().argmax())
            raise UserError(f"{what}: query {alone} has no right answer among the candidates.")
        blocks.append([part.cpu() for part in rank_block(scores, relevant)])
    ranks, precisions, counts = map(torch.cat, zip(*blocks, strict=True))
    return ranks, precisions, counts


def rank_block(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scores (q, G), right (q, G) bool → rank of the first right candidate, average precision, right candidates; (q,) each."""
    R = right.sum(dim=1, keepdim=True)  # (q, 1): right candidates of each query
    most = int(R.max())
    # Only the right ones are sorted, worst first; the wrong ones are merely counted above each right one.
    worst_first = scores.masked_fill(~right, torch.inf).topk(most, largest=False).values  # (q, most), padded with inf
    beats = torch.searchsorted(worst_first, scores, right=True)  # (q, G): how many right ones each beats or equals
    histogram = beats.new_zeros(len(beats), most + 1).scatter_add_(1, beats, (~right).long())
    wrong_above = histogram.flip(1).cumsum(1).flip(1)[:, 1:]  # (q, most): wrong ones not below the i-th worst right one
    right_above = R - torch.arange(most, device=R.device)  # (q, most): right ones down to it, itself included
    precision = (right_above.double() / (right_above + wrong_above)).masked_fill(right_above <= 0, 0)
    first = wrong_above.gather(1, R - 1).squeeze(1) + 1
    return first, precision.sum(dim=1) / R.squeeze(1), R.squeeze(1)


def recall_at_k(ranks: Tensor, right: Tensor, G: int, k: int, samples: Sequence[Hashable] | None = None) -> Score:
    """Share of ranks ≤ k; by chance 1 − C(G−R, k) / C(G, k): not all of k draws from G miss the R right ones. samples: of which
    each query is one, or a part."""
    missed = torch.ones(len(right), dtype=torch.double)
    for i in range(min(k, G)):
        missed *= (G - right.double() - i).clamp(min=0) / (G - i)
    return Score.of(Samples.mean((ranks <= k).numpy(), samples), 1 - missed.mean().item())


def chance_precision(right: Tensor, G: int) -> float:
    """Expected average precision of a random order of G candidates, R of them right.

    Place k is right with probability R/G, and then 1 + (k−1)(R−1)/(G−1) of the first k are; with H = Σ 1/k:
    1/R Σ_k R/G · (1 + (k−1)(R−1)/(G−1)) / k  =  (H + (R−1)/(G−1) · (G−H)) / G.   Bestgen 2015.
    """
    if G == 1:
        return 1.0
    H = math.fsum(1 / k for k in range(1, G + 1))
    return ((H + (right.double() - 1) / (G - 1) * (G - H)) / G).mean().item()


def check(queries: Tensor, candidates: Tensor, right: Relevance, what: str) -> None:
    for features, n, side in ((queries, right.shape[0], "queries"), (candidates, right.shape[1], "candidates")):
        if len(features) != n:
            raise ValueError(f"{what}: {len(features)} {side}, but relevance is given for {n}")
        if not len(features):
            raise UserError(f"{what}: there are no {side} to measure with.")
        if not torch.isfinite(features).all():
            raise UserError(f"{what}: the features of the {side} hold NaN or infinity: the model has diverged.")
