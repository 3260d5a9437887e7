"""Does an image find its texts, a text its images, a picture its class?  Recall@K and mean average precision.

    queries (Q, D) · candidates (G, D)ᵀ → scores (Q, G); candidates whose id is the query's are right, all others wrong.

A wrong candidate that ties with a right one stands before it, so that a model with one vector for everything scores
nothing and not everything. Scores are computed in blocks: memory is bounded whatever Q and G are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.metrics.score import Score

BLOCK = 2**19  # scores held at a time: 5,000 × 25,000 at width 256 take 0.3 GB and, on one core, 9 s


def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor | None = None,
    *,
    image_ids: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    block: int = BLOCK,
) -> dict[str, Score]:
    """Both directions of retrieval: {"image→text R@1": Score, …, "image→text mAP", "text→image R@1", …}.

    image_features (N, D), text_features (M, D), unit length; image_ids (N,) int names what each image shows and
    image_of_text (M,) int what each text describes: equal ids are right for each other. Without image_ids, image i
    is i; without image_of_text, text i is i. One image may so have several captions, and one caption several images.
    R@K is the share of queries with a right answer among the first K, mAP the mean over queries of the average
    precision. UserError: nothing to measure, a query without a right answer, features that are not finite.
    """
    image_ids = torch.arange(len(image_features)) if image_ids is None else torch.as_tensor(image_ids).cpu()
    text_ids = torch.arange(len(text_features)) if image_of_text is None else torch.as_tensor(image_of_text).cpu()
    images, texts = (image_features, image_ids), (text_features, text_ids)
    scores = {}
    for direction, (query, query_ids), (candidate, candidate_ids) in (
        ("image→text", images, texts),
        ("text→image", texts, images),
    ):
        ranks, precisions = rank(query, candidate, query_ids, candidate_ids, what=direction, block=block)
        right = count_right(query_ids, candidate_ids)
        for k in ks:
            scores[f"{direction} R@{k}"] = recall_at_k(ranks, right, len(candidate), k)
        scores[f"{direction} mAP"] = Score(precisions.mean().item(), chance_precision(right, len(candidate)))
    return scores


def zero_shot_accuracy(
    image_features: Tensor, class_features: Tensor, labels: Tensor, *, block: int = BLOCK
) -> dict[str, Score]:
    """{"top-1": Score, "top-5": Score, "mean per class": Score}: each image retrieves its class.

    image_features (N, D), class_features (C, D), unit length; labels (N,) int, an index into the classes. "mean per
    class" is top-1 accuracy averaged over the classes that occur: a frequent one counts no more than a rare one.
    """
    labels = torch.as_tensor(labels).cpu().long()
    C = len(class_features)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < C:
        raise ValueError(f"labels lie in {int(labels.min())}…{int(labels.max())}, but there are {C} classes")
    ranks, _ = rank(image_features, class_features, labels, torch.arange(C), what="image→class", block=block)
    right = torch.ones(len(labels), dtype=torch.long)
    hits = torch.zeros(C, dtype=torch.double).index_add_(0, labels, (ranks == 1).double())
    seen = labels.bincount(minlength=C)
    return {
        "top-1": recall_at_k(ranks, right, C, 1),
        "top-5": recall_at_k(ranks, right, C, 5),
        "mean per class": Score((hits[seen > 0] / seen[seen > 0]).mean().item(), 1 / C),
    }


@torch.no_grad()
def rank(
    queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, *, what: str, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """The rank of each query's first right candidate (Q,) int64, counted from 1, and its average precision (Q,) double.

    Average precision: the share of right ones among the candidates down to a right one, averaged over all right ones.
    """
    check(queries, candidates, query_ids, candidate_ids, what)
    # In double precision a tie is a tie; in single, the same two vectors multiply to different last bits at different
    # places of a block. MPS has no doubles.
    device = "cpu" if queries.device.type == "mps" else queries.device
    queries, candidates = queries.to(device), candidates.to(device).double()
    query_ids, candidate_ids = query_ids.to(device), candidate_ids.to(device)
    ranks, precisions = [], []
    step = max(1, block // len(candidates))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        scores = (queries[rows].double() @ candidates.T).float()  # (q, G)
        right = query_ids[rows, None] == candidate_ids  # (q, G)
        first, precision = rank_block(scores, right)
        ranks.append(first.cpu())
        precisions.append(precision.cpu())
    return torch.cat(ranks), torch.cat(precisions)


def rank_block(scores: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """scores (q, G), right (q, G) bool → rank of the first right candidate (q,), average precision (q,)."""
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
    return first, precision.sum(dim=1) / R.squeeze(1)


def recall_at_k(ranks: Tensor, right: Tensor, G: int, k: int) -> Score:
    """Share of ranks ≤ k; by chance 1 − C(G−R, k) / C(G, k): not all of k draws from G miss the R right ones."""
    missed = torch.ones(len(right), dtype=torch.double)
    for i in range(min(k, G)):
        missed *= (G - right.double() - i).clamp(min=0) / (G - i)
    return Score((ranks <= k).double().mean().item(), 1 - missed.mean().item())


def chance_precision(right: Tensor, G: int) -> float:
    """Expected average precision of a random order of G candidates, R of them right.

    Place k is right with probability R/G, and then 1 + (k−1)(R−1)/(G−1) of the first k are; with H = Σ 1/k:
    1/R Σ_k R/G · (1 + (k−1)(R−1)/(G−1)) / k  =  (H + (R−1)/(G−1) · (G−H)) / G.   Bestgen 2015.
    """
    if G == 1:
        return 1.0
    H = math.fsum(1 / k for k in range(1, G + 1))
    return ((H + (right.double() - 1) / (G - 1) * (G - H)) / G).mean().item()


def count_right(query_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """(Q,) int64: how many candidates bear each query's id."""
    ordered = candidate_ids.sort().values
    return torch.searchsorted(ordered, query_ids, right=True) - torch.searchsorted(ordered, query_ids)


def check(queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, what: str) -> None:
    for features, ids, side in ((queries, query_ids, "queries"), (candidates, candidate_ids, "candidates")):
        if len(features) != len(ids):
            raise ValueError(f"{what}: {len(features)} {side}, but {len(ids)} ids of {side}")
        if not len(features):
            raise UserError(f"{what}: there are no {side} to measure with.")
        if not torch.isfinite(features).all():
            raise UserError(f"{what}: the features of the {side} hold NaN or infinity: the model has diverged.")
    if alone := (count_right(query_ids, candidate_ids) == 0).nonzero().flatten().tolist():
        raise UserError(
            f"{what}: query {alone[0]} has no right answer among the candidates ({len(alone)} such queries)."
        )
