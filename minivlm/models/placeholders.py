"""Image placeholders: tokens of one id that stand in a text where image features belong.

<image> in a prompt ─ expand ─→ a placeholder for each feature ─ fill ─→ embeddings with the features in their place
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minivlm.layers.tower import leading_axes
from minivlm.model import Batch


def fill(x: Tensor, placeholders: Tensor, features: Tensor) -> Tensor:
    """x (B, T, D) with the True positions of placeholders (B, T) replaced, in reading order, by features (M, D).

    Raises ValueError unless there are M of them (checked on the CPU alone; a GPU would be waited for).
    """
    if x.device.type == "cpu" and (count := int(placeholders.sum())) != len(features):
        raise ValueError(f"the text has placeholders for {count} image features, but the images have {len(features)}")
    return x.masked_scatter(placeholders[..., None], features.to(x.dtype))


def expand(
    tokens: Tensor, mask: Tensor | None, images: int, *, placeholder: int, copies: int, pad: int
) -> tuple[Tensor, Tensor | None]:
    """tokens, mask (B, T) with one placeholder an image → the same, right-padded, with one for each of its features.

    Texts whose placeholders are not as many as the images, since they are expanded already, come back as they are.
    """
    if copies == 1 or (tokens == placeholder).sum() != images:
        return tokens, mask
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    times = torch.where(tokens == placeholder, copies, 1) * mask
    rows = [row.repeat_interleave(n) for row, n in zip(tokens, times, strict=True)]
    lengths = times.sum(dim=1, keepdim=True)
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device) < lengths


def cut_by_placeholders(parts: Iterator[Batch], batch: Batch, size: int, placeholder: int | None) -> Iterator[Batch]:
    """Parts of `size` rows of a batch (see `Model.cut`) whose images may be listed one after the other, without an axis for
    the rows: each part gets those whose placeholders it has. placeholder None: every row has as many images."""
    tokens, images = batch["tokens"], batch.get("images")
    listed = images is not None and len(leading_axes(images)) == 1
    counts = torch.ones_like(tokens[:, 0]) if placeholder is None else (tokens == placeholder).sum(dim=1)
    ends = [0, *counts.cumsum(dim=0).tolist()]
    for first, part in zip(range(0, len(tokens), size), parts, strict=True):
        if listed:
            rows = ends[first], ends[min(first + size, len(tokens))]
            start, end = (len(images) * row // max(1, ends[-1]) for row in rows)
            part["images"] = images[start:end]
        yield {name: tensor for name, tensor in part.items() if len(tensor)}
