"""What both stages of BLIP-2 have: a vision tower, and the Q-Former that reads it.

images (…, 3, H, W) ─→ vision tower ─→ features (M, N, C) ─→ Q-Former ─→ (M, Q, D)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minivlm.layers.qformer import QFormer, QFormerConfig, QFormerOutput
from minivlm.layers.resnet import ResNetConfig
from minivlm.layers.tower import look, make_tower
from minivlm.layers.vit import VisionConfig
from minivlm.models.speaking import SpeakingModel


@dataclass(frozen=True, kw_only=True)
class QueryingConfig:
    """A vision tower and the Q-Former that reads it."""

    vision: VisionConfig | ResNetConfig
    qformer: QFormerConfig
    vision_layers: tuple[int, ...] = (-1,)  # whose features are read (several: side by side)
    class_token: bool = True  # the class token is read as well, if the tower has one
    vision_norm: bool = True  # the tower's last norm is applied to all features

    def __post_init__(self):
        width = sum(self.vision.features_at(layer)[1] for layer in self.vision_layers)
        wanted = self.qformer.context_width or self.qformer.width
        if width != wanted:
            raise ValueError(
                f"the vision tower gives features of width {width}, but the Q-Former reads features of width {wanted}: "
                "choose the tower that it was trained with, or set qformer.context_width"
            )
        if self.vision_norm and (isinstance(self.vision, ResNetConfig) or len(self.vision_layers) > 1):
            raise ValueError("vision_norm needs a ViT of which a single layer is read: set it to False")


class QueryingModel(SpeakingModel):
    """The two parts, and what the queries see."""

    def __init__(self, config: QueryingConfig, *, seed: int = 0):
        super().__init__(config)
        self.vision = make_tower(config.vision, torch.Generator().manual_seed(seed))
        self.qformer = QFormer(config.qformer, seed=seed)

    def look(self, images: Tensor) -> Tensor:
        """images (…, 3, H, W) → (M, N, C): what the vision tower sees of each picture, before the Q-Former."""
        c = self.config
        features = look(self.vision, images, c.vision_layers, class_token=c.class_token)
        return self.vision.norm(features) if c.vision_norm else features

    def query(self, images: Tensor | None, features: Tensor | None) -> QFormerOutput:
        """What the queries make of pictures, or of their features: (M, Q, D)."""
        return self.qformer.look(self.look(images) if features is None else features)
