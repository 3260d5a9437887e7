"""Short texts side by side in one row, so that little of a batch is padding; none of them sees another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(rows: Sequence[Sequence[int]], context: int, pad_token: int) -> dict[str, Tensor]:
    """Token rows, in order, into as few rows of up to `context` tokens as fit: tokens, labels, segments, each (B, T).

    segments numbers the texts of a row 1, 2, …, padding 0: attention stays inside a number. The first token of a text is
    no label, since what stands before it is another text. Raises ValueError for a text longer than the context.
    """
    bins: list[list[Sequence[int]]] = []
    for row in rows:
        if len(row) > context:
            raise ValueError(f"a text of {len(row)} tokens does not fit a context of {context}; cut it first")
        fits = (texts for texts in bins if sum(map(len, texts)) + len(row) <= context)
        home = next(fits, None)
        if home is None:
            bins.append(home := [])
        home.append(row)
    T = max(sum(map(len, texts)) for texts in bins)
    tokens = torch.full((len(bins), T), pad_token)
    labels, segments = torch.full((len(bins), T), -100), torch.zeros(len(bins), T, dtype=torch.long)
    for i, texts in enumerate(bins):
        start = 0
        for number, row in enumerate(texts, start=1):
            span = slice(start, start + len(row))
            tokens[i, span] = labels[i, span] = torch.tensor(row)
            segments[i, span] = number
            labels[i, start] = -100
            start += len(row)
    return {"tokens": tokens, "labels": labels, "segments": segments}
