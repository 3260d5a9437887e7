"""Search images with a text, or with another image.

    folder ──encode_image──> features-….npy  (n, D) float32, unit length, memory-mapped ┐
                             index.json      whose row is whose                        ┴── · query (D,) → the k best

The search is exact: every row is compared, a chunk at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.errors import UserError
from minivlm.tasks.abilities import require_vectors
from minivlm.tasks.features import encode_images, encode_texts
from minivlm.tasks.image_index import fingerprint
from minivlm.tasks.index_files import ImageIndex, open_image_index


def search_images(
    query: Any, index: ImageIndex | str | Path | Tensor, model, processor, *, top_k: int = 5, chunk: int = 65_536
) -> list[tuple[Path, float]] | list[tuple[int, float]]:
    """The `top_k` images of the index that are closest to `query`, as (path, cosine), best first.

    query: a string is a text; a Path, PIL image or (H, W, 3) uint8 array is an image. index: from `build_image_index`, or
    the folder that it is in; or vectors (N, D) of images, for which (row, cosine) comes back. chunk: rows in memory at a
    time. All images where there are fewer than top_k; of equal ones the earlier in the index first. UserError: an index
    that another model made, an empty query, top_k below 1.
    """
    if top_k < 1:
        raise UserError(f"top_k is {top_k}, but at least one image has to be found.")
    if isinstance(query, str) and not query.strip():
        raise UserError("the query is empty; say what to look for.")
    require_vectors(model, processor, texts=isinstance(query, str))
    in_memory = isinstance(index, Tensor)
    if not isinstance(index, (ImageIndex, Tensor)):
        index = open_image_index(index)
    if not in_memory and index.model != fingerprint(model, processor):
        raise UserError(
            f"the index in {index.path} was made with another model; make it again with build_image_index, "
            "or give the model it was made with."
        )
    [vector] = (encode_texts if isinstance(query, str) else encode_images)([query], model, processor)
    if in_memory and (index.dim() < 2 or index.shape[-1] != vector.shape[-1]):
        raise UserError(
            f"the index has shape {tuple(index.shape)}, but the vectors of this model have width {vector.shape[-1]}: "
            "make the index with build_image_index and the same model."
        )
    features = F.normalize(index.detach().float(), dim=-1).flatten(1).cpu().numpy() if in_memory else index.features
    scores, rows = best_rows(vector, features, top_k, chunk=chunk)
    found = zip(rows.tolist(), scores.tolist(), strict=True)
    if in_memory:
        return list(found)
    names = list(index.rows)
    return [(index.directory / names[row], score) for row, score in found]


def best_rows(query: Tensor, features: np.ndarray, k: int, *, chunk: int) -> tuple[Tensor, Tensor]:
    """query (D,), features (n, D) → the k highest products and their rows, (k,) each, best first, ties by row.

    Where an image has Q vectors, features (n, Q · D), a text is as close as the closest of them, and another image, query
    (Q, D), as close as they are on average.
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
