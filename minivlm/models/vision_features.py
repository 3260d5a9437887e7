"""A vision tower of which all features are read; and what both stages of BLIP-2 have, a Q-Former that reads them.

images (…, 3, H, W) ─→ vision tower ─→ features (M, N, C) ─→ Q-Former ─→ (M, Q, D)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlm.layers.qformer import QFormer, QFormerConfig, QFormerOutput
from minivlm.layers.tower import (
    ImageFeatures,
    Images,
    TowerConfig,
    check_reader,
    features_of,
    make_tower,
    tower_features,
)
from minivlm.layers.vit import VisionConfig
from minivlm.models.speaking import SpeakingModel


@dataclass(frozen=True, kw_only=True)
class SeeingConfig:
    """A vision tower, and what is read of it."""

    vision: TowerConfig
    vision_layers: tuple[int, ...] = (-1,)  # whose features are read (several: side by side)
    class_token: bool = True  # the class token is read as well, if the tower has one
    vision_norm: bool = True  # the tower's last norm is applied to all features
    standardise: bool = False  # each channel is shifted and scaled to mean 0 and deviation 1, as `measure` found them

    def __post_init__(self):
        if self.vision_norm and (not isinstance(self.vision, VisionConfig) or len(self.vision_layers) > 1):
            raise ValueError("vision_norm needs a ViT of which a single layer is read: set it to False")

    @property
    def feature_width(self) -> int:
        return features_of(self.vision, self.vision_layers)[1]

    def check_reader(self, wanted: int, reader: str, field: str) -> None:
        """ValueError if what reads the features expects another width."""
        check_reader(self.feature_width, wanted, reader, field)


class SeeingModel(SpeakingModel):
    """The tower, and what it sees.

    The channels of a frozen ResNet differ in scale (eight times in our small one), and what only the small ones tell is
    learnt late: without `standardise` BLIP-2's stage 1 told sizes apart in 62 % after 400 steps, with it in 71 % (one seed,
    validation; chance 50 %).
    """

    def __init__(self, config: SeeingConfig, *, seed: int = 0):
        super().__init__(config)
        self.vision = make_tower(config.vision, torch.Generator().manual_seed(seed))
        if config.standardise:
            self.register_buffer("feature_mean", torch.zeros(config.feature_width))  # (C,), as is the next
            self.register_buffer("feature_deviation", torch.ones(config.feature_width))

    def image_features(self, images: Images, vision: nn.Module | None = None) -> Tensor:
        """images (…, 3, H, W) → (M, N, C): what the vision tower, or another like it, sees, as others read it. Features that
        are given stay as they are."""
        if isinstance(images, ImageFeatures):
            return images.tensor
        c, tower = self.config, self.vision if vision is None else vision
        features = tower_features(tower, images, c.vision_layers, class_token=c.class_token)
        if c.vision_norm:
            features = tower.norm(features)
        return (features - self.feature_mean) / self.feature_deviation if c.standardise else features

    @property
    def unmeasured(self) -> bool:
        """Are features to be standardised that nobody has seen yet? Until then they stay as they are."""
        return self.config.standardise and not self.feature_mean.any()

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """images (M, 3, H, W): from now on features are standardised by the mean and the deviation of each channel over
        theirs; a channel that never moves keeps its scale."""
        self.feature_mean.zero_()
        self.feature_deviation.fill_(1.0)
        features = self.image_features(images).float().flatten(0, -2)
        deviation, mean = torch.std_mean(features, dim=0, correction=0)
        self.feature_mean.copy_(mean)
        self.feature_deviation.copy_(torch.where(deviation > 0, deviation, 1.0))

    def load_measures(self, other: SeeingModel) -> None:
        """Those of another model with the same tower."""
        if self.config.standardise:
            self.feature_mean.copy_(other.feature_mean)
            self.feature_deviation.copy_(other.feature_deviation)


@dataclass(frozen=True, kw_only=True)
class QueryingConfig(SeeingConfig):
    """… and the Q-Former that reads it."""

    qformer: QFormerConfig

    def __post_init__(self):
        self.check_reader(self.qformer.context_width or self.qformer.width, "Q-Former", "qformer.context_width")
        super().__post_init__()


class QueryingModel(SeeingModel):
    """The two parts, and what the queries see."""

    def __init__(self, config: QueryingConfig, *, seed: int = 0):
        super().__init__(config, seed=seed)
        self.qformer = QFormer(config.qformer, seed=seed)

    def query(self, images: Images | None, features: Tensor | None = None) -> QFormerOutput:
        """What the queries make of pictures, or of their features: (M, Q, D)."""
        return self.qformer.look(self.image_features(images) if features is None else features)
