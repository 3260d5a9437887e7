"""The scores of captions beside human references, as the official evaluation of COCO computes them (Chen et al. 2015).

captions, references ─→ tokens ─→ n-grams ─→ BLEU-1 … 4, CIDEr-D
                           ├────→ longest common subsequences ─→ ROUGE-L
                           └────→ alignments (Java) ─→ METEOR;   tuples of a parser (Java, or exact) ─→ SPICE
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minivlm.errors import UserError
from minivlm.metrics.bleu import bleu_of, bleu_statistics
from minivlm.metrics.cider import cider
from minivlm.metrics.meteor import meteor_statistics
from minivlm.metrics.ngrams import N, NGrams
from minivlm.metrics.official_java import Unavailable
from minivlm.metrics.ptb_tokenizer import tokenise_captions
from minivlm.metrics.rouge import rouge_l
from minivlm.metrics.samples import Samples
from minivlm.metrics.score import Score
from minivlm.metrics.spice import spice_by_java, spice_of_shapes

NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE")
Texts, References = Sequence[str], Sequence[Sequence[str]]


def caption_scores(
    texts: Texts,
    references: References,
    *,
    ids: Sequence[str] | None = None,
    names: Sequence[str] = NAMES,
    world: bool = False,
    notes: list[str] | None = None,
) -> dict[str, Score]:
    """The scores of these names of captions as they were written, one an image, beside one or more references each.

    world: the captions are of the shapes world, whose SPICE needs no parser. METEOR, and SPICE elsewhere, need Java and the
    package pycocoevalcap: what cannot be had is absent, and `notes` gets a sentence on it. Chance is what the same captions get
    beside the references of the next image; for METEOR and the parser's SPICE it is not measured. UserError: no captions.
    """
    tokens = iter(tokenise_captions([text for known in references for text in known]))
    known_tokens = [[next(tokens) for _ in known] for known in references]
    text_tokens = tokenise_captions(texts)
    scores = scores_of_tokens(text_tokens, known_tokens, ids)
    named = None if ids is None else tuple(map(str, ids))
    if world:
        found = spice_of_shapes(texts, references)
        chance = spice_of_shapes(texts, shifted(references)).mean()
        scores["SPICE"] = Score.of(mean(found, named), float(chance))
    makers: dict[str, Callable[[Texts, References], Samples]] = {
        "METEOR": lambda texts, known: Samples("meteor", meteor_statistics(texts, known), named),
        "SPICE": lambda texts, known: mean(spice_by_java(texts, known), named),
    }
    for name in (name for name in makers if name in names and name not in scores):
        try:
            scores[name] = Score.of(makers[name](text_tokens, known_tokens), None)
        except Unavailable as why:
            if notes is not None:
                notes.append(str(why))
    return {name: scores[name] for name in NAMES if name in names and name in scores}


def scores_of_tokens(texts: Texts, references: References, ids: Sequence[str] | None = None) -> dict[str, Score]:
    """BLEU-1 … BLEU-4, ROUGE-L and CIDEr of tokenised captions, beside one or more tokenised references each."""
    if not texts:
        raise UserError("there are no captions to measure with.")
    named = None if ids is None else tuple(map(str, ids))
    ngrams = NGrams(texts, references)
    others = (ngrams.image - 1) % len(texts)  # the references of image 1 stand beside caption 0
    bleu, bleu_by_chance = (bleu_statistics(ngrams, image) for image in (ngrams.image, others))
    scores = {}
    for n in range(1, N + 1):
        chance = Samples("bleu", bleu_of(bleu_by_chance, n)).value
        scores[f"BLEU-{n}"] = Score.of(Samples("bleu", bleu_of(bleu, n), named), chance)
    overlap, by_chance = (
        np.array([rouge_l(text, known) for text, known in zip(texts, of_images, strict=True)])
        for of_images in (references, shifted(references))
    )
    scores["ROUGE-L"] = Score.of(mean(overlap, named), float(by_chance.mean()))
    consensus, by_chance = cider(ngrams), cider(ngrams, others)
    scores["CIDEr"] = Score.of(mean(consensus, named), float(by_chance.mean()), share=False)
    return scores


def shifted(references: References) -> References:
    """Those of the next image."""
    return [*references[1:], *references[:1]]


def mean(values: np.ndarray, ids: tuple[str, ...] | None) -> Samples:
    """Of values that are no shares of right ones: a "ratio", for whose interval an exact bound of shares has no meaning."""
    return Samples("ratio", np.column_stack([values, np.ones(len(values))]), ids)
