"""Draws images whose captions name what is not there, and what each remedy makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from minivlm.pictures import Row, sheet, wrap

COLUMNS, TILE = 5, 176  # images, and their pixels


def draw(captions: Any) -> Image.Image:
    """captions: of hallucination.py. Some of the images whose greedy caption is wrong, evenly spread; else any."""
    by: Mapping[str, Sequence[str]] = captions.by
    shown = captions.shown
    wrong = lambda i, text: bool(set(shown.objects.named(text)) - shown.there[i])
    known = [i for i, text in enumerate(by["greedy"]) if wrong(i, text)] or range(len(captions.images))
    chosen = [known[k * len(known) // COLUMNS] for k in range(COLUMNS)] if len(known) > COLUMNS else known
    rows = [
        Row(
            name,
            [captions.images[i] for i in chosen],
            [not wrong(i, texts[i]) for i in chosen],
            ["\n".join(wrap(texts[i] or "(nothing)", 13, TILE)) for i in chosen],
        )
        for name, texts in by.items()
        if name != "sampled"
    ]
    return sheet(
        rows, title="Captions with objects that are not there, and after each remedy", tile=TILE, columns=COLUMNS
    )
