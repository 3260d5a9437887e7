"""The Perceiver Resampler: a few learned latents attend to any number of features, and come out as a fixed number of tokens.

    features (M, F, N, C) ─ + time ─→ norm ─┬─→ keys, values ─┐
                                            │                 ├─ attention ─ + ─ MLP ─ + ─→ next block … norm ─→ (M, L, D)
    latents (L, D) ───────────────→ norm ───┴─→ queries ──────┘
                                    latents are keys and values as well

Jaegle et al. 2021 (Perceiver); Alayrac et al. 2022, "Flamingo: a Visual Language Model for Few-Shot Learning", §3.1.1 and
figure 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minivlm.layers.attention import CrossAttention, QKNorm
from minivlm.layers.autocast import cast_once
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.mlp import MLP, Activation
from minivlm.layers.position import add_positions


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig:
    """The defaults are Flamingo's, but for the sizes."""

    width: int  # of the latents
    depth: int = 6
    heads: int = 8
    head_width: int | None = None  # None: width / heads
    latents: int = 64  # tokens that come out
    context_width: int | None = None  # of the features, if it is another; they are projected to ours first
    mlp_width: int | None = None  # None: four times the width
    activation: Activation = field(default="squared_relu", metadata={"before": "gelu"})
    qk_norm: QKNorm | None = None
    norm_eps: float = 1e-5
    # Image features with a learned position each: those of a ResNet have none. 0: as they come
    positions: int = field(default=0, metadata={"was": "places"})
    max_images: int = 0  # images or frames that are resampled together, told apart by learned time embeddings; 0: none


class PerceiverBlock(nn.Module):
    """latents (M, L, D), features (M, S, D) → (M, L, D). No biases but in the norms."""

    def __init__(self, config: PerceiverConfig):
        super().__init__()
        c = config
        self.features_norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.latents_norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.attention = CrossAttention(
            c.width,
            c.heads,
            head_width=c.head_width,
            bias=False,
            out_bias=False,
            qk_norm=c.qk_norm,
            norm_eps=c.norm_eps,
        )
        self.mlp_norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.mlp = MLP(c.width, c.mlp_width or 4 * c.width, c.activation, bias=False)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        queries = cast_once(self.latents_norm(latents))
        context = torch.cat([cast_once(self.features_norm(features)), queries], dim=1)
        latents = latents + self.attention(queries, context)
        return latents + self.mlp(self.mlp_norm(latents))


class PerceiverResampler(nn.Module):
    """features (M, F, N, C) of F images or frames each, or (M, N, C) of one → (M, L, D), whatever F and N are.

    Raises ValueError for more frames than there are time embeddings.
    """

    def __init__(self, config: PerceiverConfig, *, seed: int = 0):
        super().__init__()
        c = self.config = config
        self.latents = nn.Parameter(torch.empty(c.latents, c.width))
        self.times = nn.Parameter(torch.empty(c.max_images, c.width)) if c.max_images else None
        width = c.context_width or c.width  # of the features
        self.image_position_embedding = nn.Parameter(torch.empty(c.positions, width)) if c.positions else None
        self.projection = nn.Linear(width, c.width, bias=False) if width != c.width else None
        self.blocks = nn.ModuleList(PerceiverBlock(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        initialise(self, torch.Generator().manual_seed(seed))

    def forward(self, features: Tensor) -> Tensor:
        x = features if features.dim() == 4 else features[:, None]  # (M, F, N, C)
        if self.image_position_embedding is not None:
            x = add_positions(x, self.image_position_embedding)
        if self.projection is not None:
            x = self.projection(x)
        if self.times is not None:
            if x.shape[1] > len(self.times):
                raise ValueError(
                    f"{x.shape[1]} images are to be resampled together, but max_images is {len(self.times)}"
                )
            x = x + self.times[: x.shape[1], None].to(x.dtype)
        x = x.flatten(1, 2)  # (M, F·N, D)
        latents = self.latents.to(x.dtype).expand(len(x), -1, -1)
        for block in self.blocks:
            latents = block(latents, x)
        return self.norm(latents)


@torch.no_grad()
def initialise(model: PerceiverResampler, generator: torch.Generator) -> None:
    """Normal; latents and times 1 and 0.02 (the first norm sees the latents' direction alone); the rest as
    `initialise_linears` says, what is added to the residual stream smaller by 1/√(2·depth), as in `Transformer`."""
    initialise_linears(model, generator)
    normal(model.latents, 1.0, generator)
    if model.times is not None:
        normal(model.times, 0.02, generator)
    if model.image_position_embedding is not None:
        normal(model.image_position_embedding, 0.5, generator)
    shrink = (2 * len(model.blocks)) ** -0.5
    for block in model.blocks:
        for linear in (block.attention.out_proj, block.mlp.down_proj):
            normal(linear.weight, linear.in_features**-0.5 * shrink, generator)
