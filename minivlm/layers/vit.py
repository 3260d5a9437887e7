"""The vision transformer: an image is cut into patches, which are tokens of a transformer.

    (B, 3, H, W) ─ patches ─→ (B, N, D) ─ + class token, positions ─→ blocks ─→ norm ─→ pool ─→ (B, D)

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; attention pooling as in Zhai et al. 2023 (SigLIP), §A; LayerScale,
SwiGLU and registers as in DINOv2 (Oquab et al. 2024, §4; Darcet et al. 2024, §2.2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.errors import UserError
from minivlm.layers.attention import CrossAttention
from minivlm.layers.mlp import MLP
from minivlm.layers.position import resize_position_table
from minivlm.layers.transformer import Transformer, TransformerConfig, make_norm
from minivlm.model import Model


@dataclass(frozen=True, kw_only=True)
class VisionConfig(TransformerConfig):
    """A ViT. The defaults are CLIP's."""

    image_size: int = 224  # pixels a side of the images the position table was made for
    patch_size: int = 32
    pool: Literal["class", "mean", "attention"] = "class"
    embedding_norm: bool = True  # CLIP normalises once more before the first block
    patch_bias: bool = False
    stem: Literal["patch", "convolutions"] = "patch"
    drop_border: bool = False  # pixels beyond the last whole patch are dropped (SigLIP so400m: 384 = 27·14 + 6)
    layer_scale: float | None = None  # what the learned scales of both halves of a block start at; None: there are none
    registers: int = 0  # learned tokens between class token and patches, without positions and never read
    antialias_positions: bool = False  # when the position table is interpolated

    def __post_init__(self):
        if self.registers and self.pool != "class":
            raise ValueError(f"registers stand behind the class token, but pool is {self.pool!r}")
        if self.image_size % self.patch_size and not self.drop_border:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def output_width(self) -> int:
        return self.width

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def features_at(self, layer: int) -> tuple[int, int]:
        """(patches, width) of `features(images, layer=layer)`, the class token not counted."""
        return self.patches, self.width


VIT_SIZES = {
    "B/32": VisionConfig(width=768, depth=12, heads=12, patch_size=32),
    "B/16": VisionConfig(width=768, depth=12, heads=12, patch_size=16),
    "L/14": VisionConfig(width=1024, depth=24, heads=16, patch_size=14),
    "H/14": VisionConfig(width=1280, depth=32, heads=16, patch_size=14),
    "g/14": VisionConfig(  # EVA-CLIP's, as BLIP-2 reads it: its last norm on all tokens.  Fang et al. 2023, table 1
        width=1408,
        depth=39,
        heads=16,
        mlp_width=6144,
        patch_size=14,
        norm_eps=1e-6,
        embedding_norm=False,
        patch_bias=True,
    ),
}


class VisionTransformer(Model):
    """images (B, 3, H, W) → one vector an image (B, D); `features` gives all tokens.

    H and W may differ from image_size in any multiple of the patch size: the position table is interpolated.
    A part of many models; as a model of its own it is what DINOv2 and the plain ViT are.
    """

    config_class = VisionConfig
    abilities = frozenset({"compare"})

    def __init__(self, config: VisionConfig):
        super().__init__(config)
        c, placed = config, int(config.pool == "class")  # tokens in front of the patches that have a position
        self.leading = placed + c.registers  # tokens in front of the patches
        self.output_width = self.feature_width = c.width
        if c.stem == "patch":
            self.patch_embedding = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size, bias=c.patch_bias)
        else:
            self.patch_embedding = ConvolutionStem(c.width, c.patch_size)
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(c.width), std=0.02)) if placed else None
        self.position_embedding = nn.Parameter(nn.init.normal_(torch.empty(placed + c.patches, c.width), std=0.02))
        self.register_tokens = None
        if c.registers:
            self.register_tokens = nn.Parameter(nn.init.normal_(torch.empty(c.registers, c.width), std=0.02))
        self.embedding_norm = make_norm(c) if c.embedding_norm else nn.Identity()
        self.transformer = Transformer(c, layer_scale=c.layer_scale)
        self.norm = make_norm(c)
        self.attention_pool = AttentionPool(c) if c.pool == "attention" else None

    def forward(self, images: Tensor) -> Tensor:
        if self.config.pool == "class":
            x = self.embed(images)
            first = torch.zeros(len(x), dtype=torch.long, device=x.device)
            return self.norm(self.transformer.state_at(x, first))
        x = self.norm(self.features(images))
        return x.mean(dim=1) if self.attention_pool is None else self.attention_pool(x)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, D), unit length: what images are compared by."""
        return F.normalize(self(images), dim=-1)

    def features(self, images: Tensor, *, layer: int = -1) -> Tensor:
        """(B, 3, H, W) → (B, 1 + R + N, D), class token and registers first where there are any; the last norm is not applied.

        layer: −1 after the last block, −2 after the one before (which is then the last one to run), 0 before the first.
        """
        return self.transformer(self.embed(images), layer=layer)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 1 + R + N, D): patches, class token, positions, registers."""
        H, W = images.shape[-2:]
        P = self.config.patch_size
        if (H % P or W % P) and not self.config.drop_border:
            raise UserError(
                f"images are {H}×{W}, but both sides must be multiples of the patch size {P}: without a centre crop "
                "(do_center_crop in preprocessor_config.json) they keep their shape, so crop or pad them before."
            )
        images = images[..., : H // P * P, : W // P * P]
        images = images.to(self.position_embedding.dtype)  # weights may be stored in half precision
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, D, H/P, W/P) → (B, N, D)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = x + self.positions((H // P, W // P)).to(x.dtype)
        if self.register_tokens is not None:
            registers = self.register_tokens.to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        return self.embedding_norm(x)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table (1 + h·w, D) of a grid of patches."""
        placed = int(self.class_embedding is not None)
        return resize_position_table(
            self.position_embedding, grid, leading=placed, antialias=self.config.antialias_positions
        )


@torch.no_grad()
def fitted(tower: nn.Module, image_size: int) -> nn.Module:
    """The tower for images of so many pixels a side: the position table of a ViT that was made for others is interpolated, once
    and for all."""
    if not isinstance(tower, VisionTransformer) or tower.config.image_size == image_size:
        return tower
    P, table = tower.config.patch_size, tower.position_embedding
    tower.position_embedding = nn.Parameter(tower.positions((image_size // P,) * 2), table.requires_grad)
    drop = tower.config.drop_border or image_size % P != 0
    tower.config = replace(tower.config, image_size=image_size, drop_border=drop)
    return tower


class ConvolutionStem(nn.Sequential):
    """images (B, 3, H, W) → (B, D, H/P, W/P) by log₂ P convolutions of 3×3 and stride 2, each with twice the channels.

    Patches overlap, so that small shapes are whole before the grid cuts them; a ViT converges sooner with it than with one
    wide stride. Xiao et al. 2021, "Early Convolutions Help Transformers See Better", §4.
    """

    def __init__(self, width: int, patch_size: int):
        steps = patch_size.bit_length() - 1
        if patch_size != 1 << steps or width % (1 << steps):
            raise ValueError(
                f"a stem halves the image: patch_size {patch_size} must be a power of two that divides {width}"
            )
        channels = [3, *(width >> (steps - 1 - i) for i in range(steps))]
        layers: list[nn.Module] = []
        for i in range(steps):
            layers += [nn.Conv2d(channels[i], channels[i + 1], 3, stride=2, padding=1), nn.GELU()]
        super().__init__(*layers[:-1])

    def convolutions(self) -> list[nn.Conv2d]:
        return [layer for layer in self if isinstance(layer, nn.Conv2d)]


class AttentionPool(nn.Module):
    """A learnt query reads all tokens: (B, N, D) → (B, D). As in SigLIP: attention, then an MLP with a residual."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.query = nn.Parameter(nn.init.normal_(torch.empty(1, 1, config.width), std=0.02))
        self.attention = CrossAttention(config.width, config.heads)
        self.norm = make_norm(config)
        self.mlp = MLP(config.width, config.hidden_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.query.to(x.dtype).expand(len(x), -1, -1), x)  # (B, 1, D)
        return (y + self.mlp(self.norm(y)))[:, 0]
