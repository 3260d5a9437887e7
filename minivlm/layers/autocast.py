"""What torch.autocast does to matrix products, for those who have several of the same x."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_on(x: Tensor) -> bool:
    """Does autocast choose what products with x are computed in?"""
    device = x.device.type
    # A device without autocast, such as meta, cannot be asked whether it is on.
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def matrix_dtype(x: Tensor) -> torch.dtype:
    """What a product with x is computed in: its dtype, or autocast's."""
    return torch.get_autocast_dtype(x.device.type) if is_on(x) else x.dtype


def cast_once(x: Tensor) -> Tensor:
    """x in the dtype of matrix products. Left to itself, autocast makes a copy for each product with it, such as that of q,
    of k and of v; each takes time, and is kept for the gradients."""
    return x.to(matrix_dtype(x))


def meet(x: Tensor, layer: nn.Module) -> Tensor:
    """x as `layer` reads it, linear, with LoRA or a norm, if its weights are held in another precision than its neighbours'.
    Where autocast is on, it brings both together itself."""
    return x if is_on(x) else x.to(getattr(layer, "base", layer).weight.dtype)
