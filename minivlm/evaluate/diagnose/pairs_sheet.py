"""Draws balanced pairs: one question, two images, and what a model answers to each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from minivlm.datasets.conversations import Conversations, Question
from minivlm.metrics.vqa import normalise
from minivlm.pictures import Row, sheet

ROWS, TILE = 6, 144  # pairs, and pixels of an image


def draw(
    conversations: Conversations,
    questions: Sequence[Question],
    pairs: Sequence[tuple[int, int]],
    answers: Sequence[str],
    right: np.ndarray,
) -> Image.Image | None:
    """Those with one answer to both images first, of texts as different as there are. None without pairs."""
    if not pairs:
        return None
    alike = lambda pair: normalise(answers[pair[0]]) == normalise(answers[pair[1]])
    ordered = sorted(pairs, key=lambda pair: not alike(pair))
    first = {
        normalise(questions[pair[0]].text): pair for pair in reversed(ordered)
    }  # of each text the first of the order
    chosen = sorted(first.values(), key=ordered.index)[:ROWS]
    chosen += [pair for pair in ordered if pair not in chosen][: ROWS - len(chosen)]
    rows = []
    for pair in chosen:
        images = [conversations.images([questions[i].index])[0][0] for i in pair]
        notes = [f"{answers[i]}" if right[i] >= 0.5 else f"{answers[i]}, not {questions[i].answers[0]}" for i in pair]
        rows.append(Row(questions[pair[0]].text, images, [bool(right[i] >= 0.5) for i in pair], notes))
    return sheet(rows, title="One question about two images", tile=TILE, columns=2)
