"""CIDEr-D: the likeness of a caption and its references in n-grams that tell images apart (Vedantam et al. 2015, §4 and §7.1).

    CIDEr-D = 10/N Σ_n mean over references of  exp(−(l − l')²/2σ²) · min(g, g')·g' / ‖g‖‖g'‖

g counts each n-gram, weighted by log(images / images in whose references it stands); the caption's count is clipped to the
reference's; lengths that differ cost. The weights belong to a set of references: of one image alone CIDEr-D is 0.
"""

from __future__ import annotations

import numpy as np

from minivlm.metrics.ngrams import N, NGrams, look_up

SIGMA = 6.0  # tokens
SCALE = 10.0


def cider(ngrams: NGrams, image: np.ndarray | None = None) -> np.ndarray:
    """(M,) CIDEr-D of each caption, from 0 to 10. image: see `NGrams`."""
    M, R = len(ngrams.lengths), len(ngrams.image)
    compared = ngrams.image if image is None else image
    likeness = np.zeros(R)
    for n, ((owner, gram, counts), references) in enumerate(ngrams.tables):
        kinds = max(1, ngrams.kinds[n])
        in_images = np.unique(ngrams.image[references.owner] * kinds + references.gram) % kinds
        rarity = np.log(M) - np.log(np.maximum(1, np.bincount(in_images, minlength=kinds)))
        weights, reference_weights = counts * rarity[gram], references.count * rarity[references.gram]
        norms = np.sqrt(np.bincount(owner, weights**2, minlength=M))
        reference_norms = np.sqrt(np.bincount(references.owner, reference_weights**2, minlength=R))
        of_caption = look_up(owner * kinds + gram, weights, compared[references.owner] * kinds + references.gram)
        common = np.minimum(of_caption, reference_weights) * reference_weights
        products = norms[compared] * reference_norms
        likeness += np.bincount(references.owner, common, minlength=R) / np.where(products > 0, products, 1)
    bigrams = lambda lengths: np.maximum(lengths - 1, 0)  # as the official script measures a text
    apart = bigrams(ngrams.lengths)[compared] - bigrams(ngrams.reference_lengths)
    likeness *= np.exp(-(apart**2) / (2 * SIGMA**2))
    return SCALE / N * np.bincount(compared, likeness, minlength=M) / np.bincount(compared, minlength=M)
