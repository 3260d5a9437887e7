"""The scores of captions beside human references, as the official evaluation of COCO computes them (Chen et al. 2015).

texts, references ─→ tokens ─→ n-grams ─→ BLEU-1 … 4 · CIDEr-D
                         └───→ longest common subsequence ─→ ROUGE-L
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minivlm.errors import UserError
from minivlm.metrics.bleu import bleu_of, bleu_statistics
from minivlm.metrics.cider import cider
from minivlm.metrics.ngrams import N, NGrams
from minivlm.metrics.rouge import rouge_l
from minivlm.metrics.samples import Samples
from minivlm.metrics.score import Score


def scores_of_tokens(
    texts: Sequence[str], references: Sequence[Sequence[str]], ids: Sequence[str] | None = None
) -> dict[str, Score]:
    """BLEU-1 … BLEU-4, ROUGE-L and CIDEr of tokenised captions, beside one or more tokenised references each.

    Chance is what the same captions get beside the references of the next image.
    """
    if not texts:
        raise UserError("there are no captions to measure with.")
    names = None if ids is None else tuple(map(str, ids))
    ngrams = NGrams(texts, references)
    others = (ngrams.image - 1) % len(texts)  # the references of image 1 stand beside caption 0
    bleu, bleu_by_chance = (bleu_statistics(ngrams, image) for image in (ngrams.image, others))
    scores = {}
    for n in range(1, N + 1):
        chance = Samples("bleu", bleu_of(bleu_by_chance, n)).value
        scores[f"BLEU-{n}"] = Score.of(Samples("bleu", bleu_of(bleu, n), names), chance)
    overlap = [rouge_l(text, known) for text, known in zip(texts, references, strict=True)]
    by_chance = [rouge_l(text, known) for text, known in zip(texts, [*references[1:], references[0]], strict=True)]
    scores["ROUGE-L"] = Score.of(mean(overlap, names), float(np.mean(by_chance)))
    consensus, by_chance = cider(ngrams), cider(ngrams, others)
    scores["CIDEr"] = Score.of(mean(consensus, names), float(by_chance.mean()), share=False)
    return scores


def mean(values: Sequence[float], ids: tuple[str, ...] | None) -> Samples:
    """Of values that are no shares of right ones: a "ratio", for whose interval an exact bound of shares has no meaning."""
    return Samples("ratio", np.column_stack([values, np.ones(len(values))]), ids)
