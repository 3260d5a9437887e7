"""What stands between two widths: image features in, tokens of the language model's width out. (…, C) → (…, D)"""

from __future__ import annotations

from torch import Tensor, nn

from minivlm.layers.mlp import ACTIVATIONS


class LinearProjector(nn.Linear):
    """One matrix, as in the first LLaVA (Liu et al. 2023a, equation 1)."""

    def __init__(self, width: int, output_width: int):
        super().__init__(width, output_width)


class MLPProjector(nn.Module):
    """Two layers with an activation between them (Liu et al. 2023b, LLaVA-1.5, §3.2)."""

    def __init__(self, width: int, output_width: int, activation: str = "gelu", *, bias: bool = True):
        super().__init__()
        self.up_proj = nn.Linear(width, output_width, bias=bias)
        self.activation = ACTIVATIONS[activation]
        self.down_proj = nn.Linear(output_width, output_width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))
