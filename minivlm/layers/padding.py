"""Rows of tokens or embeddings with their padding moved to one side."""

from __future__ import annotations

import torch
from torch import Tensor


def padding_last(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, T) or (B, T, D), mask (B, T) with padding anywhere → the same with all padding on the right."""
    return rearranged(x, mask, (~mask).long().argsort(dim=1, stable=True))


def padding_first(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (B, T) or (B, T, D), mask (B, T) → the same with all padding on the left, so that all rows end together."""
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    return rearranged(x, mask, mask.long().argsort(dim=1, stable=True))


def rearranged(x: Tensor, mask: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Position t of a row becomes what stands at order[t]; order (B, T)."""
    index = order if x.dim() == 2 else order[..., None].expand_as(x)
    return x.gather(1, index), mask.gather(1, order)
