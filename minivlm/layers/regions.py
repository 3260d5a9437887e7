"""Regions of an image as tokens beside text: what is there (features), and where (boxes).

    features (B, R, C) ─ projection ─┐
                                     ├─→ (B, R, D)
    boxes (B, R, 4)    ─ location ───┘     left, top, right, bottom, as fractions of the image's sides

Three papers embed them in three ways. There a detector finds the regions; here they are the cells of a grid, or boxes
that are given, over which the features of a vision tower are averaged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WHOLE = (0.0, 0.0, 1.0, 1.0)  # the box of the whole image


def grid_cells(n: int, *, device: torch.device | None = None) -> Tensor:
    """(n, 4): the boxes of the n cells of a square grid, row by row. ValueError where n is no square."""
    side = round(n**0.5)
    if side * side != n:
        raise ValueError(f"{n} features are not a square grid: give the boxes that they belong to")
    row, column = torch.arange(n, device=device) // side, torch.arange(n, device=device) % side
    return torch.stack([column, row, column + 1, row + 1], dim=1) / side


def pool_regions(features: Tensor, boxes: Tensor) -> Tensor:
    """features (B, N, C) of a square grid, boxes (B, R, 4) → (B, R, C): the mean over each box, by area.

    RoI pooling (Girshick 2015, §2.1) without its rounding to whole cells; a cell's own box gives the cell's features.
    """
    columns = torch.arange(round(features.shape[1] ** 0.5), device=boxes.device)
    low, high = columns / len(columns), (columns + 1) / len(columns)  # (S,) the edges of cells

    def overlap(start: Tensor, end: Tensor) -> Tensor:
        """(B, R), (B, R) → (B, R, S): how much of each column, or row, lies between."""
        return (torch.minimum(end[..., None], high) - torch.maximum(start[..., None], low)).clamp(min=0)

    left, top, right, bottom = boxes.unbind(-1)
    area = overlap(top, bottom)[..., :, None] * overlap(left, right)[..., None, :]  # (B, R, S, S)
    area = area.flatten(2)
    return (area / area.sum(dim=-1, keepdim=True)).to(features.dtype) @ features


def location(boxes: Tensor, *, sides: bool) -> Tensor:
    """(B, R, 4) → (B, R, 5): the box and its area; with its sides (B, R, 7): the box, width, height, area."""
    size = boxes[..., 2:] - boxes[..., :2]
    area = size.prod(dim=-1, keepdim=True)
    return torch.cat([boxes, size, area] if sides else [boxes, area], dim=-1)


class VisualBERTRegions(nn.Module):
    """projection + type + position, normalised with the text by its norm.  Li et al. 2019 (VisualBERT), §3.2.

    The published model has no positions: all its regions stand at position 0. in_order: region i stands at position i.
    """

    def __init__(self, feature_width: int, width: int, *, positions: int, types: int, in_order: bool):
        super().__init__()
        self.in_order = in_order
        self.projection = nn.Linear(feature_width, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.type_embedding = nn.Embedding(types, width)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        positions = self.position_embedding.weight[: features.shape[1] if self.in_order else 1]
        return self.projection(features) + positions + self.type_embedding.weight[1]


class UNITERRegions(nn.Module):
    """norm(norm(projection) + norm(location) + type).  Chen et al. 2020 (UNITER), §3.1 and figure 1."""

    def __init__(self, feature_width: int, width: int, *, norm_eps: float):
        super().__init__()
        self.projection, self.projection_norm = nn.Linear(feature_width, width), nn.LayerNorm(width, eps=norm_eps)
        self.location, self.location_norm = nn.Linear(7, width), nn.LayerNorm(width, eps=norm_eps)
        self.type_embedding = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        what = self.projection_norm(self.projection(features))
        where = self.location_norm(self.location(location(boxes, sides=True).to(features.dtype)))
        return self.norm(what + where + self.type_embedding)


class ViLBERTRegions(nn.Module):
    """norm(projection + location).  Lu et al. 2019 (ViLBERT), §3.1, "Image Representations"."""

    def __init__(self, feature_width: int, width: int, *, norm_eps: float):
        super().__init__()
        self.projection, self.location = nn.Linear(feature_width, width), nn.Linear(5, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        where = self.location(location(boxes, sides=False).to(features.dtype))
        return self.norm(self.projection(features) + where)
