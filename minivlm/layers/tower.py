"""A vision tower as a language model uses it: all its features, not one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlm.layers.efficientnet import EfficientNet, EfficientNetConfig
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.resnet import Bottleneck, ResNet, ResNetConfig
from minivlm.layers.vit import ConvolutionStem, VisionConfig, VisionTransformer

TowerConfig = VisionConfig | ResNetConfig | EfficientNetConfig


@dataclass(frozen=True)
class ImageFeatures:
    """Features that a vision tower has computed: `model.image_features(images)`, given to the model in place of images.

    A frozen tower computes the same in every epoch, so that training computes it once. tensor: (M, N, C), or with leading
    axes as the images have them.
    """

    tensor: Tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, rows) -> ImageFeatures:
        return ImageFeatures(self.tensor[rows])

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def dim(self) -> int:
        return self.tensor.dim()

    def to(self, *args, **options) -> ImageFeatures:
        """As `Tensor.to`."""
        return ImageFeatures(self.tensor.to(*args, **options))


Images = Tensor | ImageFeatures


def leading_axes(images: Images) -> torch.Size:
    """(B,), or (B, I) for several images a row: the axes in front of (3, H, W), or of the (N, C) of features."""
    return images.tensor.shape[:-2] if isinstance(images, ImageFeatures) else images.shape[:-3]


def new_tower(config: TowerConfig) -> nn.Module:
    """The tower of a config, as PyTorch starts its weights."""
    kinds = {VisionConfig: VisionTransformer, ResNetConfig: ResNet, EfficientNetConfig: EfficientNet}
    return kinds[type(config)](config)


def make_tower(config: TowerConfig, generator: torch.Generator) -> nn.Module:
    """The tower of a config, with CLIP's initialisation."""
    tower = new_tower(config)
    initialise_linears(tower, generator)
    initialise_tower(tower, generator)
    return tower


@torch.no_grad()
def initialise_tower(tower: nn.Module, generator: torch.Generator) -> None:
    """Initialise what is a tower's own; its linear layers: `initialise_linears`.

    | tensor                     | normal, mean 0, standard deviation     |
    |----------------------------|----------------------------------------|
    | class token, pool query,   | 1/√width                               |
    | registers                  |                                        |
    | positions                  | 1/√width, or 0.5 after a stem          |
    | stem of convolutions       | √(2 / fan in)  (He et al. 2015)        |

    The last batch norm of every ResNet bottleneck starts at zero, so that the block starts as its shortcut (Goyal et
    al. 2017, §5.1). A stem's output is twice as large as a patch embedding's (0.93 against 0.42 on the shapes world), and
    positions start larger beside it.
    """
    for module in tower.modules():
        if isinstance(module, ConvolutionStem):
            for conv in module.convolutions():
                normal(conv.weight, (2 / conv.weight[0].numel()) ** 0.5, generator)
        elif isinstance(module, Bottleneck):
            module.expand.norm.weight.zero_()
    stem = getattr(tower.config, "stem", "patch") == "convolutions"
    for name, parameter in tower.named_parameters():
        if name.endswith(("class_embedding", "query", "position_embedding", "register_tokens")):
            positions = name.endswith("position_embedding")
            normal(parameter, 0.5 if stem and positions else parameter.shape[-1] ** -0.5, generator)


def features_of(config: TowerConfig, layers: Sequence[int]) -> tuple[int, int]:
    """(N, C) of what `image_features` gives of these layers, class token aside. ValueError: layers whose grids differ."""
    counts, widths = zip(*map(config.features_at, layers), strict=True)
    if len(set(counts)) > 1:
        raise ValueError(f"the features of layers {tuple(layers)} do not lie side by side: their grids differ")
    return counts[0], sum(widths)


def check_reader(width: int, wanted: int, reader: str, field: str) -> None:
    """ValueError if what reads the features of a tower expects another width than they have."""
    if width != wanted:
        raise ValueError(
            f"the vision tower gives features of width {width}, but the {reader} reads features of width "
            f"{wanted}: choose the tower that it was trained with, or set {field}"
        )


def learned_positions(config: TowerConfig, layers: Sequence[int]) -> int:
    """The number of position embeddings that a connector adds to the features of an image: a ViT's know where they are."""
    return 0 if isinstance(config, VisionConfig) else features_of(config, layers)[0]


def tower_features(tower: nn.Module, images: Tensor, layers: Sequence[int], *, class_token: bool = False) -> Tensor:
    """images (…, 3, H, W) → (M, N, C): the features of each image after these layers, several side by side.

    class_token: keep it, in front of the patches. Registers are never kept (Darcet et al. 2024, §2.2). A frozen tower keeps
    no activations, since nothing asks for gradients.
    """
    pixels = images.flatten(0, -4)
    states = [tower.features(pixels, layer=layer) for layer in layers]
    x = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
    leading = getattr(tower, "leading", 0)
    if class_token and leading > 1:
        return torch.cat([x[:, :1], x[:, leading:]], dim=1)
    return x if class_token else x[:, leading:]
