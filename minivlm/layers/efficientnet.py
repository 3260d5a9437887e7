"""EfficientNet: one small network, made wider and deeper by two numbers; its blocks weigh their channels by the image itself.

    (B, 3, H, W) ─ stem ─→ /2 ─ stages of MBConv ─→ (B, C, H/32, W/32) ─ mean ─→ (B, C)

    MBConv:  x ─ expand 1×1 ─→ depthwise k×k ─→ squeeze-and-excitation ─→ project 1×1 ─ + x

Tan & Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", table 1 and §3.3. The inverted
bottleneck: Sandler et al. 2018; the weighing of channels: Hu et al. 2018. ALIGN's image encoder is one, without the last
1×1 convolution of the original.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from minivlm.layers.mlp import ACTIVATIONS
from minivlm.layers.resnet import ConvNorm


@dataclass(frozen=True, kw_only=True)
class EfficientNetConfig:
    """The defaults are B0's. A stage is an entry of each tuple; channels and blocks are given before they are scaled."""

    width_scale: float = 1.0  # all channels times this, rounded to multiples of `divisor`
    depth_scale: float = 1.0  # blocks of every stage times this, rounded up
    image_size: int = 224
    stem_channels: int = 32
    channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    blocks: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    kernels: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    expansions: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    squeeze: float = 0.25  # hidden width of the squeeze-and-excitation, relative to the channels that enter the block
    divisor: int = 8
    activation: str = "silu"
    norm_eps: float = 1e-3
    even_padding: tuple[int, ...] = ()  # numbers of blocks, counted through, whose stride pads both sides alike

    def __post_init__(self):
        stages = {len(t) for t in (self.channels, self.blocks, self.kernels, self.strides, self.expansions)}
        if len(stages) != 1 or stages == {0}:
            raise ValueError("channels, blocks, kernels, strides and expansions need one entry for each stage")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; there are {', '.join(ACTIVATIONS)}")
        if not all(stride in (1, 2) for stride in self.strides) or not all(k % 2 for k in self.kernels):
            raise ValueError(f"strides {self.strides} must be 1 or 2, and kernels {self.kernels} odd")
        if self.features_at(-1)[0] == 0:
            raise ValueError(f"image_size {self.image_size} is too small: nothing is left of it after all strides")

    def scaled(self, channels: int) -> int:
        """To the nearest multiple of the divisor, but never by more than a tenth down (Tan & Le's released code)."""
        wanted = channels * self.width_scale
        rounded = max(self.divisor, int(wanted + self.divisor / 2) // self.divisor * self.divisor)
        return rounded if rounded >= 0.9 * wanted else rounded + self.divisor

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return tuple(math.ceil(self.depth_scale * n) for n in self.blocks)

    @property
    def output_width(self) -> int:
        return self.scaled(self.channels[-1])

    def pads_evenly(self, stage: int) -> bool:
        return sum(self.depths[:stage]) in self.even_padding

    def features_at(self, layer: int) -> tuple[int, int]:
        """(cells, channels) of `features(images, layer=layer)`."""
        count = layer if layer >= 0 else len(self.channels) + 1 + layer
        side = self.image_size // 2
        for stage in range(count):
            if self.strides[stage] == 2:
                side = (side + self.pads_evenly(stage)) // 2
        return side * side, self.scaled(self.channels[count - 1] if count else self.stem_channels)


EFFICIENTNET_SIZES = {  # Tan & Le 2019, table 2; the scales and image sizes: their released code
    "B0": EfficientNetConfig(),
    "B1": EfficientNetConfig(depth_scale=1.1, image_size=240),
    "B2": EfficientNetConfig(width_scale=1.1, depth_scale=1.2, image_size=260),
    "B3": EfficientNetConfig(width_scale=1.2, depth_scale=1.4, image_size=300),
    "B4": EfficientNetConfig(width_scale=1.4, depth_scale=1.8, image_size=380),
    "B5": EfficientNetConfig(width_scale=1.6, depth_scale=2.2, image_size=456),
    "B6": EfficientNetConfig(width_scale=1.8, depth_scale=2.6, image_size=528),
    "B7": EfficientNetConfig(width_scale=2.0, depth_scale=3.1, image_size=600),
}


class SqueezeExcitation(nn.Module):
    """x (B, C, h, w) → the same, each channel times a number in (0, 1) that follows from the means of all channels."""

    def __init__(self, channels: int, hidden: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * self.expand(self.activation(self.reduce(means))).sigmoid()


class MBConv(nn.Module):
    """(B, C, h, w) → (B, C', h/stride, w/stride): widen, convolve each channel by itself, weigh the channels, narrow.

    first: of its stage, where size and channels change, so that there is nothing to add to.
    """

    def __init__(self, config: EfficientNetConfig, stage: int, *, first: bool):
        super().__init__()
        c = config
        out = c.scaled(c.channels[stage])
        channels = out if not first else c.scaled(c.channels[stage - 1] if stage else c.stem_channels)
        hidden, eps = channels * c.expansions[stage], c.norm_eps
        stride = c.strides[stage] if first else 1
        skewed = stride == 2 and not c.pads_evenly(stage)
        self.first, self.activation = first, ACTIVATIONS[c.activation]
        self.expand = ConvNorm(channels, hidden, 1, eps=eps) if c.expansions[stage] != 1 else None
        self.depthwise = ConvNorm(
            hidden, hidden, c.kernels[stage], stride=stride, groups=hidden, eps=eps, skewed=skewed
        )
        self.weigh = SqueezeExcitation(hidden, max(1, int(channels * c.squeeze)), c.activation)
        self.project = ConvNorm(hidden, out, 1, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.activation(self.expand(x))
        y = self.weigh(self.activation(self.depthwise(y)))
        y = self.project(y)
        return y if self.first else x + y


class EfficientNet(nn.Module):
    """images (B, 3, H, W) of any size → one vector an image (B, C); `features` gives the grid as tokens."""

    def __init__(self, config: EfficientNetConfig):
        super().__init__()
        c = self.config = config
        self.stem = ConvNorm(3, c.scaled(c.stem_channels), 3, stride=2, eps=c.norm_eps, skewed=True)
        self.activation = ACTIVATIONS[c.activation]
        self.stages = nn.ModuleList(
            nn.Sequential(*(MBConv(c, stage, first=i == 0) for i in range(depth)))
            for stage, depth in enumerate(c.depths)
        )
        self.feature_width = self.output_width = c.output_width

    def forward(self, images: Tensor) -> Tensor:
        return self.grid(images).mean(dim=(2, 3))

    def features(self, images: Tensor, *, layer: int = -1) -> Tensor:
        """(B, 3, H, W) → (B, N, C): the grid after the last stage (layer −1), the one before (−2), …, row by row."""
        return self.grid(images, layer).flatten(2).transpose(1, 2)

    def grid(self, images: Tensor, layer: int = -1) -> Tensor:
        """(B, 3, H, W) → (B, C, h, w) after the stem and as many stages as `layer` says."""
        depth = len(self.stages)
        count = layer if layer >= 0 else depth + 1 + layer
        if not 0 <= count <= depth:
            raise ValueError(f"layer {layer} does not exist: {depth} stages have states 0 to {depth} (or −1 …)")
        x = self.activation(self.stem(images.to(self.stem.conv.weight.dtype)))  # weights may be in half precision
        for stage in self.stages[:count]:
            x = stage(x)
        return x
