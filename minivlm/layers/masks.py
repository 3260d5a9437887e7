"""Boolean masks of attention: True = may be attended to."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_mask(mask: Tensor | None) -> Tensor | None:
    """(B, S) keys of each row, or (B, T, S) keys of each query → (B, 1, ·, S). TypeError for a mask that is not boolean."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be boolean (True = may be attended to), not {mask.dtype}: write mask == 1 if 1 means that."
        )
    if mask.dim() == 4:
        return mask
    return mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]


def combine(mask: Tensor | None, causal: bool, T: int, S: int, device) -> Tensor | None:
    """The mask and the causal triangle as one tensor, broadcastable to (B, H, T, S); None: all is allowed."""
    if not causal or T == 1:  # the last query sees every key
        return mask
    triangle = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return triangle if mask is None else mask & triangle
