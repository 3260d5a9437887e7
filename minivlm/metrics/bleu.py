"""BLEU-1 … BLEU-4: how many n-grams of a caption stand in its references (Papineni et al. 2002, "BLEU").

    BLEU-N = exp(min(0, 1 − r/c)) · (Π_n matched_n / total_n)^(1/N)      c tokens, r of the reference that is nearest in length

An n-gram matches at most as often as it stands in one reference. Matches, totals and lengths are summed over a set before they
are divided, as the official evaluation of COCO does it: BLEU of a set is no mean of BLEU of its captions.
"""

from __future__ import annotations

import numpy as np

from minivlm.metrics.ngrams import N, NGrams, look_up

NO_TOTAL, NO_MATCH = (
    1e-9,
    1e-15,
)  # of the official script: a caption too short for an n-gram has almost no BLEU, and not NaN


def bleu_statistics(ngrams: NGrams, image: np.ndarray | None = None) -> np.ndarray:
    """(M, 2N + 2): matched n-grams, n-grams, tokens and tokens of the nearest reference. image: see `NGrams`."""
    image = ngrams.image if image is None else image
    M = len(ngrams.lengths)
    matched = np.zeros((M, N))
    for n, ((owner, gram, counts), references) in enumerate(ngrams.tables):
        kinds = max(1, ngrams.kinds[n])
        keys = image[references.owner] * kinds + references.gram
        order = np.argsort(keys, kind="stable")
        keys, first = np.unique(keys[order], return_index=True)
        most = np.maximum.reduceat(references.count[order], first) if len(first) else references.count
        matched[:, n] = np.bincount(owner, np.minimum(counts, look_up(keys, most, owner * kinds + gram)), minlength=M)
    total = np.maximum(ngrams.lengths[:, None] - np.arange(N), 0)
    nearest = nearest_length(ngrams.lengths, ngrams.reference_lengths, image)
    return np.column_stack([matched, total, ngrams.lengths, nearest]).astype(np.float64)


def nearest_length(lengths: np.ndarray, references: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Of each image the length of the reference that is nearest to its caption's; of two, the shorter."""
    order = np.lexsort((references, abs(references - lengths[image]), image))
    _, first = np.unique(image[order], return_index=True)
    return references[order][first]


def bleu_of(statistics: np.ndarray, n: int) -> np.ndarray:
    """The columns that BLEU-n is made of, (M, 2n + 2)."""
    return statistics[:, [*range(n), *range(N, N + n), 2 * N, 2 * N + 1]]


def bleu_value(sums: np.ndarray) -> np.ndarray:
    """(…, 2n + 2) sums of `bleu_of` → BLEU-n (…)."""
    n = sums.shape[-1] // 2 - 1
    matched, total, length, nearest = sums[..., :n], sums[..., n : 2 * n], sums[..., -2], sums[..., -1]
    precision = np.prod((matched + NO_MATCH) / (total + NO_TOTAL), axis=-1) ** (1 / n)
    ratio = (length + NO_MATCH) / (nearest + NO_TOTAL)
    with np.errstate(under="ignore", divide="ignore"):
        return precision * np.exp(np.minimum(0, 1 - 1 / ratio))
