"""Search a folder of pictures with words, or with a picture.

    folder ──encode_image──> features-….npy  (n, D) float32, unit length, memory-mapped ┐
                             index.json      whose row is whose                        ┴── · query (D,) → the k best

The search is exact: every row is compared, a chunk at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.tasks.features import encode_images, encode_texts
from minivlm.tasks.image_index import ImageIndex, fingerprint, open_image_index


def search_images(
    query: Any, index: ImageIndex | str | Path, model, processor, *, top_k: int = 5, chunk: int = 65_536
) -> list[tuple[Path, float]]:
    """The `top_k` images of the index that are closest to `query`, as (path, cosine), best first.

    query: a string is words; a Path, PIL image or (H, W, 3) uint8 array is a picture. index: from `build_image_index`,
    or where it lies. chunk: rows in memory at a time. All images where there are fewer than top_k; of equal ones the
    earlier in the index first. UserError: an index that another model made, an empty query, top_k below 1.
    """
    if top_k < 1:
        raise UserError(f"top_k is {top_k}, but at least one picture has to be shown.")
    if isinstance(query, str) and not query.strip():
        raise UserError("the query is empty; say what to look for.")
    if not isinstance(index, ImageIndex):
        index = open_image_index(index)
    if index.model != fingerprint(model, processor):
        raise UserError(
            f"the index in {index.path} was made with another model; make it again with build_image_index, "
            "or give the model it was made with."
        )
    encode = encode_texts if isinstance(query, str) else encode_images
    scores, rows = best_rows(encode([query], model, processor)[0], index.features, top_k, chunk=chunk)
    names = list(index.rows)
    return [(index.directory / names[row], score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]


def best_rows(query: Tensor, features: np.ndarray, k: int, *, chunk: int) -> tuple[Tensor, Tensor]:
    """query (D,), features (n, D) → the k highest products and their rows, (k,) each, best first, ties by row.

    Where a picture has Q vectors, features (n, Q · D), a text is as close as the closest of them, and another picture,
    query (Q, D), as close as they are on average.
    """
    scores, rows = query.new_empty(0), torch.empty(0, dtype=torch.long, device=query.device)
    for start in range(0, len(features), chunk):
        block = torch.from_numpy(np.array(features[start : start + chunk])).to(query.device)
        # A matrix product would round equal rows differently at different places, and so break ties at random.
        products = block.view(len(block), -1, query.shape[-1]).mul_(query).sum(dim=-1)  # (n, Q)
        products = products.amax(dim=1) if query.dim() == 1 else products.mean(dim=1)
        scores = torch.cat([scores, products])
        rows = torch.cat([rows, torch.arange(start, start + len(block), device=query.device)])
        order = scores.sort(descending=True, stable=True).indices[:k]
        scores, rows = scores[order], rows[order]
    return scores, rows
