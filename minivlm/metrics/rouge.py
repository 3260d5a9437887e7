"""ROUGE-L: the longest common subsequence of a caption and its references (Lin 2004, "ROUGE", §3).

F = (1 + β²)·P·R / (R + β²·P)       P = LCS / tokens of the caption, R = LCS / tokens of the reference, each the best of all
"""

from __future__ import annotations

from collections.abc import Sequence

BETA = 1.2  # recall counts more, as in COCO's evaluation


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L of one tokenised caption, from 0 to 1."""
    words = text.split(" ")  # an empty caption is one empty token, as it is in the official script
    places: dict[str, int] = {}
    for i, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << i
    precision = recall = 0.0
    for reference in references:
        others = reference.split(" ")
        common = common_length(places, len(words), others)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(others))
    if not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_length(places: dict[str, int], length: int, words: Sequence[str]) -> int:
    """The length of the longest common subsequence, a row of the table of lengths at a time.

    places: word → the places in the text at which it stands, as bits. A row is kept as the bits of the places at which it
    does not grow; the next row is a sum whose carries run through them (Hyyrö 2004, "Bit-parallel LCS-length computation").
    """
    row = whole = (1 << length) - 1
    for word in words:
        if here := places.get(word):
            grows = row & here
            row = (row + grows | row - grows) & whole
    return length - row.bit_count()
