"""CLIP's modified ResNet: a three-convolution stem, strides that blur before they skip, and attention as the last pool.

    (B, 3, H, W) ─ stem ─→ /4 ─ 4 stages ─→ (B, 32·w, H/32, W/32) ─ attention pool ─→ (B, E)

He et al. 2016; the three changes: Radford et al. 2021 (CLIP), §2.4; anti-aliased strides: Zhang 2019.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.errors import UserError
from minivlm.layers.attention import CrossAttention
from minivlm.layers.position import resize_position_table


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """blocks in each of the four stages, channels of the stem, width of the vector that comes out."""

    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = 64
    output_width: int = 1024
    heads: int = 32  # of the attention pool
    image_size: int = 224

    def __post_init__(self):
        if self.image_size % 32:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of 32, by which a ResNet shrinks an image"
            )

    def features_at(self, layer: int) -> tuple[int, int]:
        """(cells, channels) of `features(images, layer=layer)`."""
        stages = len(self.blocks)
        count = layer if layer >= 0 else stages + 1 + layer
        side = self.image_size // 4 >> max(0, count - 1)
        return side * side, self.width if count == 0 else self.width * 2 ** (count - 1) * Bottleneck.expansion


RESNET_SIZES = {
    "RN50": ResNetConfig(),
    "RN101": ResNetConfig(blocks=(3, 4, 23, 3), output_width=512),
    "RN50x4": ResNetConfig(blocks=(4, 6, 10, 6), width=80, output_width=640, heads=40, image_size=288),
    "RN50x16": ResNetConfig(blocks=(6, 8, 18, 8), width=96, output_width=768, heads=48, image_size=384),
    "RN50x64": ResNetConfig(blocks=(3, 15, 36, 10), width=128, output_width=1024, heads=64, image_size=448),
}


class ConvNorm(nn.Sequential):
    """Convolution without bias, then batch norm.

    skewed: a pixel less of padding above and on the left, as TensorFlow pads for a stride of 2 where the sides are even.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        eps: float = 1e-5,
        skewed: bool = False,
    ):
        half = kernel // 2
        pad = {"pad": nn.ZeroPad2d((half - 1, half, half - 1, half))} if skewed else {}
        padding = 0 if skewed else half
        conv = nn.Conv2d(channels, out_channels, kernel, stride=stride, padding=padding, groups=groups, bias=False)
        super().__init__(OrderedDict(**pad, conv=conv, norm=nn.BatchNorm2d(out_channels, eps=eps)))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions around a residual; a stride is an average pool in front of the last one."""

    expansion = 4

    def __init__(self, channels: int, width: int, *, stride: int = 1):
        super().__init__()
        out_channels = width * self.expansion
        self.reduce = ConvNorm(channels, width, 1)
        self.conv = ConvNorm(width, width, 3)
        self.expand = ConvNorm(width, out_channels, 1)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        changed = stride > 1 or channels != out_channels
        self.shortcut = ConvNorm(channels, out_channels, 1) if changed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.reduce(x))
        y = F.relu(self.conv(y))
        y = self.expand(self.pool(y))
        return F.relu(y + self.shortcut(self.pool(x)))


class GridAttentionPool(nn.Module):
    """The mean of a feature grid asks the grid: (B, C, h, w) → (B, E). Its projection is already the joint space's."""

    def __init__(self, channels: int, output_width: int, heads: int, side: int):
        super().__init__()
        self.position_embedding = nn.Parameter(nn.init.normal_(torch.empty(1 + side * side, channels), std=0.02))
        self.attention = CrossAttention(channels, heads)
        self.attention.out_proj = nn.Linear(channels, output_width)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (B, C, h, w) → (B, N, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        x = x + resize_position_table(self.position_embedding, grid, leading=1).to(x.dtype)
        return self.attention(x[:, :1], x)[:, 0]


class ResNet(nn.Module):
    """images (B, 3, H, W), sides multiples of 32 → one vector an image (B, E); `features` gives the grid as tokens."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        c = self.config = config
        w = c.width
        self.stem = nn.ModuleList(
            [ConvNorm(3, w // 2, 3, stride=2), ConvNorm(w // 2, w // 2, 3), ConvNorm(w // 2, w, 3)]
        )
        self.stages = nn.ModuleList()
        channels = w
        for i, count in enumerate(c.blocks):
            width = w * 2**i
            blocks = [Bottleneck(channels, width, stride=1 if i == 0 else 2)]
            channels = width * Bottleneck.expansion
            blocks += [Bottleneck(channels, width) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*blocks))
        self.feature_width, self.output_width = channels, c.output_width
        self.attention_pool = GridAttentionPool(channels, c.output_width, c.heads, c.image_size // 32)

    def forward(self, images: Tensor) -> Tensor:
        return self.attention_pool(self.grid(images))

    def features(self, images: Tensor, *, layer: int = -1) -> Tensor:
        """(B, 3, H, W) → (B, N, C): the grid after the last stage (layer −1), the one before (−2), …, row by row."""
        return self.grid(images, layer).flatten(2).transpose(1, 2)

    def grid(self, images: Tensor, layer: int = -1) -> Tensor:
        """(B, 3, H, W) → (B, C, h, w) after the stem and as many stages as `layer` says."""
        H, W = images.shape[-2:]
        if H % 32 or W % 32:
            raise UserError(
                f"images are {H}×{W}, but both sides must be multiples of 32: without a centre crop (do_center_crop in "
                "preprocessor_config.json) they keep their shape, so crop or pad them before."
            )
        x = images.to(self.stem[0].conv.weight.dtype)  # weights may be stored in half precision
        for conv in self.stem:
            x = F.relu(conv(x))
        x = F.avg_pool2d(x, 2)
        depth = len(self.stages)
        count = layer if layer >= 0 else depth + 1 + layer
        if not 0 <= count <= depth:
            raise ValueError(f"layer {layer} does not exist: {depth} stages have states 0 to {depth} (or −1 …)")
        for stage in self.stages[:count]:
            x = stage(x)
        return x
