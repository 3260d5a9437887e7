"""Vectors of images for zero-shot classification, retrieval and probes: each image is encoded once, whatever is made of it.

image ─→ vision tower ─pooled─→ "vision tower" (C) ─projection, unit length─→ "shared space" (D), of a model that compares
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from minivlm.datasets.pairs import Pairs
from minivlm.errors import UserError
from minivlm.evaluate.compare import AT_A_TIME
from minivlm.layers.tower import ImageFeatures
from minivlm.processes import each
from minivlm.tasks.features import finite, inference

TOWER, SHARED = "vision tower", "shared space"


class ImageVectors:
    """Of one model, by the names of images. Tiles of an image are averaged; so are the queries of a Q-Former."""

    def __init__(self, model, processor):
        check_tower(model)
        self.model, self.processor = model, processor
        self.known: dict[str, tuple[Tensor, ...]] = {}
        self.spaces = (TOWER, SHARED) if "encode" in model.abilities else (TOWER,)

    def of(self, pairs: Pairs, indices: Sequence[int] | None = None) -> dict[str, Tensor]:
        """{space: (N, C) float32}, of all images or of these; see the module."""
        indices = range(len(pairs)) if indices is None else indices
        keys = {i: pairs.key(i) for i in map(int, indices)}
        new = [*{key: i for i, key in keys.items() if key not in self.known}.values()]
        parts = [new[i : i + AT_A_TIME] for i in range(0, len(new), AT_A_TIME)]
        with inference(self.model):
            found = each(lambda part: self.encode(pairs.images(part)), parts)
        rows = chain.from_iterable(zip(*part, strict=True) for part in found)
        self.known |= {keys[i]: row for i, row in zip(new, rows, strict=True)}
        columns = zip(*(self.known[key] for key in keys.values()), strict=True)
        return {name: torch.stack(rows).to(self.model.device) for name, rows in zip(self.spaces, columns, strict=True)}

    def encode(self, images: Sequence) -> tuple[Tensor, ...]:
        model, B = self.model, len(images)
        pixels = self.processor.images(list(images)).to(model.device, model.dtype)
        if "compare" in model.abilities:  # a tower alone
            return (finite(model(pixels).float(), model).cpu(),)
        features = model.image_features(pixels)  # (B · tiles, N, C)
        vectors = [model.pooled_features(features).unflatten(0, (B, -1)).mean(dim=1)]
        if SHARED in self.spaces:
            shared = model.encode_image(ImageFeatures(features))
            vectors.append(shared.mean(dim=1) if shared.ndim == 3 else shared)
        return tuple(finite(vector.float(), model).cpu() for vector in vectors)


def check_tower(model) -> None:
    """UserError for a model that computes no features of images."""
    if not model.takes_images:
        raise UserError(f"this {type(model).__name__} takes no images, so there are no vectors of images to judge.")
