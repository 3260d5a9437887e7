"""Short texts side by side in one row, so that little of a batch is padding; none of them sees another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minivlm.conversation import IGNORED, Sample


def pack(samples: Sequence[Sample], context: int, pad_token: int) -> dict[str, Tensor]:
    """Samples, in order, into as few rows of up to `context` tokens as fit: tokens, labels, segments, each (B, T).

    segments numbers the texts of a row 1, 2, …, padding 0: attention stays inside a number. The first token of a text is
    no label, since what stands before it is another text. Raises ValueError for a text longer than the context.
    """
    bins: list[list[Sample]] = []
    for sample in samples:
        n = len(sample.tokens)
        if n > context:
            raise ValueError(f"a text of {n} tokens does not fit a context of {context}; cut it first")
        fits = (texts for texts in bins if sum(len(text.tokens) for text in texts) + n <= context)
        home = next(fits, None)
        if home is None:
            bins.append(home := [])
        home.append(sample)
    T = max(sum(len(text.tokens) for text in texts) for texts in bins)
    tokens, labels = torch.full((len(bins), T), pad_token), torch.full((len(bins), T), IGNORED)
    segments = torch.zeros(len(bins), T, dtype=torch.long)
    for i, texts in enumerate(bins):
        start = 0
        for number, text in enumerate(texts, start=1):
            span = slice(start, start + len(text.tokens))
            tokens[i, span], labels[i, span] = torch.tensor(text.tokens), torch.tensor(text.labels)
            segments[i, span] = number
            labels[i, start] = IGNORED
            start = span.stop
    return {"tokens": tokens, "labels": labels, "segments": segments}
