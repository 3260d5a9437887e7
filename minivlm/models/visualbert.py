"""VisualBERT: the regions of an image are tokens of another type, in one BERT with the text.

    regions (B, R, C) ─ projection + type 1 (+ position) ─┐
                                                          ├─ norm ─→ one sequence (B, R + T, D) ─→ BERT ─→ heads
    tokens  (B, T)    ─ word + type 0 + position ─────────┘

Li et al. 2019, "VisualBERT: A Simple and Performant Baseline for Vision and Language", figure 2. It learns to predict
masked words, and whether the text belongs to the image (§3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minivlm.layers.bert import BERT
from minivlm.layers.regions import VisualBERTRegions
from minivlm.layers.tower import ImageFeatures, Images
from minivlm.layers.transformer import take
from minivlm.model import Model
from minivlm.models import joint_encoder as joint
from minivlm.models.joint_encoder import JointEncoderConfig, JointOutput, Regions
from minivlm.models.own_modules import describe
from minivlm.models.vision_features import Standardise


@dataclass(frozen=True, kw_only=True)
class VisualBERTConfig(JointEncoderConfig):
    region_positions: bool = False  # region i has a position i of its own; False: as published, all have one
    answer_at: Literal["first", "last word"] = "last word"  # pooled, or as published, the token before the end token


class VisualBERT(Model):
    """images (B, 3, H, W), tokens (B, T), mask (B, T) → `JointOutput`.

    Regions are the cells of the tower's grid or, with boxes (B, R, 4), those boxes, over which the grid is pooled; or those of
    a detector: `ImageFeatures` (B, R, C) in place of images, beside their boxes. region_mask (B, R): True = a real region.
    hidden (B, R): True = its features are withheld, to be predicted. heads: those to compute; None: all.
    vision: a module of your own, see own_modules.py. Raises UserError for boxes outside the image.
    """

    config_class = VisualBERTConfig
    # functions of the model that all joint encoders share
    abilities = property(joint.abilities)
    takes_images = property(joint.takes_images)
    image_attention = "bert.transformer.*.attention"
    image_features, answer, match = joint.image_features, joint.answer, joint.match
    losses, counts, chance_losses = joint.losses, joint.counts, joint.chance_losses
    further_losses = joint.no_further_losses

    def __init__(self, config: VisualBERTConfig, *, vision: nn.Module | None = None, seed: int = 0):
        super().__init__(describe(config, vision=vision))
        c, D, generator = self.config, config.text.width, torch.Generator().manual_seed(seed)
        self.vision = joint.vision_tower(c, generator, vision)
        self.standardise = Standardise(c.region_width) if c.standardise else None
        self.bert = BERT(c.text, seed=seed)
        sizes = dict(positions=c.text.context, types=c.text.token_types, in_order=c.region_positions)
        self.regions = VisualBERTRegions(c.region_width, D, **sizes)
        self.pooler = nn.Linear(D, D)
        joint.add_heads(self, pooled_width=D, regions=c.text)
        joint.initialise(self, generator)

    def forward(
        self,
        images: Images | None,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        hidden: Tensor | None = None,
        heads: tuple[str, ...] | None = None,
        features: Tensor | None = None,
    ) -> JointOutput:
        images = images if features is None else ImageFeatures(features)  # the older form of a detector's features
        heads, found = joint.heads_of(self, heads), joint.find_regions(self, images, boxes, region_mask)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        text, regions = self.bert.embed(tokens), self.embed_regions(found, hidden)  # (B, T, D), (B, R, D)
        R = regions.shape[1]
        x = torch.cat([regions, text], dim=1)  # the order means nothing: positions are embedded
        x = self.bert.transformer(x, mask=torch.cat([found.mask, mask], dim=1))
        regions, text = x[:, :R], x[:, R:]
        pooled = self.pooler(text[:, 0]).tanh()  # BERT's: the first token, once more transformed
        asked = pooled
        if self.config.answer_at == "last word" and "answers" in heads:
            last = (mask.sum(dim=1) - 2).clamp(min=0)
            asked = take(text, last)[:, 0]
        logits = joint.logits_of(self, heads, text=text, regions=regions, pooled=pooled, asked=asked)
        return JointOutput(logits, text, regions, pooled, mask, found)

    def embed_regions(self, found: Regions, hidden: Tensor | None = None) -> Tensor:
        """(B, R, D), normalised by the norm of the words."""
        features = joint.withhold(found.features, hidden).to(self.dtype)
        return self.bert.dropout(self.bert.norm(self.regions(features, found.boxes)))
