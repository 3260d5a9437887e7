"""What stands between two widths: image features in, tokens of the language model's width out. (…, C) → (…, D)"""

from __future__ import annotations

from torch import Tensor, nn

from minivlm.layers.mlp import ACTIVATIONS
from minivlm.layers.perceiver import PerceiverConfig, PerceiverResampler


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


class ResamplerProjector(nn.Module):
    """(M, N, C) → (M, L, D), however many features there are: Flamingo's resampler, and one matrix behind it."""

    def __init__(self, resampler: PerceiverConfig, output_width: int, *, seed: int = 0):
        super().__init__()
        self.linear = LinearProjector(resampler.width, output_width)
        self.resampler = PerceiverResampler(resampler, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.resampler(x))
