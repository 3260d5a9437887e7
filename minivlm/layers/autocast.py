"""What torch.autocast does to matrix products, for those who have several of the same x."""

from __future__ import annotations

import torch
from torch import Tensor


def matrix_dtype(x: Tensor) -> torch.dtype:
    """What a product with x is computed in: its dtype, or autocast's."""
    device = x.device.type
    # A device without autocast, such as meta, cannot be asked whether it is on.
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on and x.dtype != torch.float64 else x.dtype


def cast_once(x: Tensor) -> Tensor:
    """x as it is read by matrix products. Left to itself, autocast makes a copy for each product with it, such as that of q,
    of k and of v; each takes time, and is kept for the gradients."""
    return x.to(matrix_dtype(x))
