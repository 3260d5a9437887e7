"""A vision tower of which all features are read; and what both stages of BLIP-2 have, a Q-Former that reads them.

images (…, 3, H, W) ─→ vision tower ─→ features (M, N, C) ─→ Q-Former ─→ (M, Q, D)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlm.layers.qformer import QFormer, QFormerConfig, QFormerOutput
from minivlm.layers.tower import TowerConfig, check_reader, features_of, look, make_tower
from minivlm.layers.vit import VisionConfig
from minivlm.models.speaking import SpeakingModel


@dataclass(frozen=True, kw_only=True)
class SeeingConfig:
    """A vision tower, and what is read of it."""

    vision: TowerConfig
    vision_layers: tuple[int, ...] = (-1,)  # whose features are read (several: side by side)
    class_token: bool = True  # the class token is read as well, if the tower has one
    vision_norm: bool = True  # the tower's last norm is applied to all features

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
    """The tower, and what it sees."""

    def __init__(self, config: SeeingConfig, *, seed: int = 0):
        super().__init__(config)
        self.vision = make_tower(config.vision, torch.Generator().manual_seed(seed))

    def look(self, images: Tensor, vision: nn.Module | None = None) -> Tensor:
        """images (…, 3, H, W) → (M, N, C): what the vision tower, or another like it, sees, as others read it."""
        c, tower = self.config, self.vision if vision is None else vision
        features = look(tower, images, c.vision_layers, class_token=c.class_token)
        return tower.norm(features) if c.vision_norm else features


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

    def query(self, images: Tensor | None, features: Tensor | None) -> QFormerOutput:
        """What the queries make of pictures, or of their features: (M, Q, D)."""
        return self.qformer.look(self.look(images) if features is None else features)
