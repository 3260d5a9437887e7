"""What stands between two widths: image features in, tokens of the language model's width out. (…, C) → (…, D)"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from minivlm.layers.mlp import ACTIVATIONS
from minivlm.layers.perceiver import PerceiverConfig, PerceiverResampler
from minivlm.layers.qformer import QFormer, QFormerConfig

LATENT_SCALE = 0.1  # of PerceiverResampler's own


class LinearProjector(nn.Linear):
    """One matrix, as in the first LLaVA (Liu et al. 2023a, equation 1); behind a pixel shuffle without bias, as Idefics3's."""

    def __init__(self, width: int, output_width: int, *, bias: bool = True):
        super().__init__(width, output_width, bias=bias)

    @property
    def output(self) -> nn.Linear:
        """The layer whose scale is that of the tokens; every projector has one."""
        return self


class MLPProjector(nn.Module):
    """Two layers with an activation between them (Liu et al. 2023b, LLaVA-1.5, §3.2)."""

    def __init__(self, width: int, output_width: int, activation: str = "gelu", *, bias: bool = True):
        super().__init__()
        self.up_proj = nn.Linear(width, output_width, bias=bias)
        self.activation = ACTIVATIONS[activation]
        self.down_proj = nn.Linear(output_width, output_width, bias=bias)

    @property
    def output(self) -> nn.Linear:
        return self.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class ResamplerProjector(nn.Module):
    """(M, N, C) → (M, L, D), however many features there are: Flamingo's resampler, and one matrix behind it.

    Its latents start small. Attention adds to them an average over all patches, which is short: at Flamingo's own scale
    96 % of what comes out of the last norm is the same for all images (DINOv2 on flowers), and training soon makes it 99 %.
    """

    def __init__(self, resampler: PerceiverConfig, output_width: int, *, seed: int = 0):
        super().__init__()
        self.linear = LinearProjector(resampler.width, output_width)
        self.resampler = PerceiverResampler(resampler, seed=seed)
        with torch.no_grad():
            self.resampler.latents.mul_(LATENT_SCALE)

    @property
    def output(self) -> nn.Linear:
        return self.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.resampler(x))


class QFormerProjector(nn.Module):
    """(M, N, C) → (M, Q, D), however many features there are: a Q-Former without text, and one matrix behind it."""

    def __init__(self, qformer: QFormerConfig, output_width: int, *, seed: int = 0):
        super().__init__()
        self.linear = LinearProjector(qformer.width, output_width)
        self.qformer = QFormer(qformer, seed=seed)

    @property
    def output(self) -> nn.Linear:
        return self.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.qformer.query(x).queries)


def pixel_shuffle(x: Tensor, side: int) -> Tensor:
    """(M, N, C) → (M, N/s², s²·C): the features of each square of s × s neighbours become one, row by row, s = side.

    Fewer image tokens for the language model, and nothing is lost. The N features are a square grid, row by row.
    Shi et al. 2016, §3.2, backwards; Marafioti et al. 2025 (SmolVLM), §2.2; the order of channels is that of Idefics3.
    """
    M, N, C = x.shape
    cells = isqrt(N) // side  # squares in a row
    x = x.reshape(M, cells, side, cells, side, C).transpose(2, 3)  # (M, rows, columns, s, s, C)
    return x.reshape(M, cells * cells, side * side * C)
