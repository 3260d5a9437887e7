"""METEOR of captions: what of a caption and a reference can be aligned (Denkowski & Lavie 2014, "Meteor Universal", §3).

    METEOR = (1 − γ·(chunks / matches)^β) · P·R / (α·P + (1 − α)·R)

The program that aligns words, stems, synonyms and paraphrases is Java, and comes with the package pycocoevalcap. It gives
counts, of the best reference of each caption; those of a set are added up before the score is taken, as in COCO's evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minivlm.metrics.official_java import run_java

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75  # tuned for English by ranks that people gave
STAGES = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
COUNTS = 23  # in a line of the program


def meteor_statistics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Tokenised captions and references → (n, 6): weighted matches and words of the caption, the same of the reference, chunks
    and matched words. Unavailable: Java or the package is missing."""
    lines = [f"SCORE ||| {' ||| '.join(known)} ||| {text}" for text, known in zip(texts, references, strict=True)]
    arguments = ["-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    answers = run_java("METEOR", "meteor", "meteor-1.5.jar", arguments, "\n".join(lines) + "\n").splitlines()
    counts = np.array([line.split() for line in answers if line], dtype=np.float64).reshape(-1, COUNTS)
    if len(counts) != len(lines):
        raise ValueError(f"METEOR's program answered {len(counts)} of {len(lines)} captions")
    lengths, function_words = counts[:, 0:2], counts[:, 2:4]  # of caption and reference
    content, function = counts[:, 4:20].reshape(-1, 4, 2, 2).transpose(2, 0, 3, 1)  # (n, caption or reference, stage)
    matched = (DELTA * content + (1 - DELTA) * function) @ STAGES
    words = DELTA * (lengths - function_words) + (1 - DELTA) * function_words
    chunks, matches = counts[:, 20], counts[:, 21:]
    chunks = np.where(
        (chunks == 1) & (matches == lengths).all(axis=1), 0, chunks
    )  # all words in one: nothing is broken
    return np.column_stack([matched[:, 0], words[:, 0], matched[:, 1], words[:, 1], chunks, matches.mean(axis=1)])


def meteor_value(sums: np.ndarray) -> np.ndarray:
    """(…, 6) sums of `meteor_statistics` → METEOR (…)."""
    matched, words, reference_matched, reference_words, chunks, matches = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = matched / words, reference_matched / reference_words
        mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
        return np.nan_to_num(mean * (1 - GAMMA * (chunks / matches) ** BETA))
