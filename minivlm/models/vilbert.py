"""ViLBERT: a stream for the text and one for the regions, each as wide and deep as it needs, connected by co-attention.

    tokens  (B, T)    ─→ embedding ─→ blocks ─→ ┌ co-attention ┐ ─→ block ─→ … ─→ (B, T, D) ─┐
                                                │      ⇅       │                             ├─ product ─→ heads
    regions (B, R, C) ─→ embedding ─→ blocks ─→ └ co-attention ┘ ─→ block ─→ … ─→ (B, R, E) ─┘

Lu et al. 2019, "ViLBERT: Pretraining Task-Agnostic Visiolinguistic Representations for Vision-and-Language Tasks", figure 1.
It learns to predict masked words and masked regions, and whether the text belongs to the image (§3.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.layers.bert import BERT
from minivlm.layers.co_attention import CoAttention
from minivlm.layers.regions import ViLBERTRegions
from minivlm.layers.tower import Images
from minivlm.layers.transformer import Transformer, TransformerConfig
from minivlm.losses import AnswerLoss
from minivlm.model import Model
from minivlm.models import joint_encoder as joint
from minivlm.models.joint_encoder import JointEncoderConfig, JointOutput
from minivlm.models.own_modules import describe
from minivlm.models.vision_features import Standardise


@dataclass(frozen=True, kw_only=True)
class ViLBERTConfig(JointEncoderConfig):
    regions: TransformerConfig  # the regions' own stream
    connections: int  # the two meet before each of their last so many blocks
    joint_heads: int  # of the attention from one to the other …
    joint_width: int  # … and the width of all its heads, and of the vector that the two are pooled into
    answer_loss: AnswerLoss = field(default="sigmoid", metadata={"before": "softmax"})

    def __post_init__(self):
        super().__post_init__()
        if self.connections > min(self.text.depth, self.regions.depth):
            raise ValueError(
                f"{self.connections} connections need as many blocks in both streams, which have {self.text.depth} and "
                f"{self.regions.depth}"
            )


class ViLBERT(Model):
    """images (B, 3, H, W), tokens (B, T), mask (B, T) → `JointOutput`.

    Regions are the cells of the tower's grid or, with boxes (B, R, 4), those boxes, over which the grid is pooled; or those of
    a detector: `ImageFeatures` (B, R, C) in place of images, beside their boxes. region_mask (B, R): True = a real region.
    hidden (B, R): True = its features are withheld, to be predicted. heads: those to compute; None: all.
    vision: a module of your own, see own_modules.py. Raises UserError for boxes outside the image.
    """

    config_class = ViLBERTConfig
    # functions of the model that all joint encoders share
    abilities = property(joint.abilities)
    takes_images = property(joint.takes_images)
    image_attention = "connections.*.words.attention"
    image_features, answer, match = joint.image_features, joint.answer, joint.match
    losses, counts, chance_losses = joint.losses, joint.counts, joint.chance_losses
    embed_regions, further_losses = joint.embed_regions, joint.no_further_losses

    def __init__(self, config: ViLBERTConfig, *, vision: nn.Module | None = None, seed: int = 0):
        super().__init__(describe(config, vision=vision))
        c, generator = self.config, torch.Generator().manual_seed(seed)
        self.vision = joint.vision_tower(c, generator, vision)
        self.standardise = Standardise(c.region_width) if c.standardise else None
        self.bert = BERT(c.text, seed=seed)
        self.regions = ViLBERTRegions(c.region_width, c.regions.width, norm_eps=c.regions.norm_eps)
        self.region_transformer = Transformer(c.regions)
        heads = dict(heads=c.joint_heads, head_width=c.joint_width // c.joint_heads)
        self.connections = nn.ModuleList(CoAttention(c.text, c.regions, **heads) for _ in range(c.connections))
        self.pooler = nn.Linear(c.text.width, c.joint_width)
        self.region_pooler = nn.Linear(c.regions.width, c.joint_width)
        joint.add_heads(self, pooled_width=c.joint_width, regions=c.regions)
        joint.initialise(self, generator)

    def forward(
        self,
        images: Images,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        hidden: Tensor | None = None,
        heads: tuple[str, ...] | None = None,
    ) -> JointOutput:
        heads, found = joint.heads_of(self, heads), joint.find_regions(self, images, boxes, region_mask)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        text, regions = self.bert.embed(tokens), self.embed_regions(found, hidden)  # (B, T, D), (B, R, E)
        text, regions = self.fuse(text, mask, regions, found.mask)
        pooled = self.pool(text, regions, found.mask)
        logits = joint.logits_of(self, heads, text=text, regions=regions, pooled=pooled)
        return JointOutput(logits, text, regions, pooled, mask, found)

    def fuse(self, text: Tensor, mask: Tensor, regions: Tensor, region_mask: Tensor) -> tuple[Tensor, Tensor]:
        """text (B, T, D), regions (B, R, E) → the same after all blocks of both streams."""
        blocks, others, n = self.bert.transformer.blocks, self.region_transformer.blocks, len(self.connections)
        for block in blocks[: len(blocks) - n]:
            text = block(text, mask=mask)
        for other in others[: len(others) - n]:
            regions = other(regions, mask=region_mask)
        for meet, block, other in zip(
            self.connections, blocks[len(blocks) - n :], others[len(others) - n :], strict=True
        ):
            text, regions = meet(text, regions, mask, region_mask)
            text, regions = block(text, mask=mask), other(regions, mask=region_mask)
        return text, regions

    def pool(self, text: Tensor, regions: Tensor, region_mask: Tensor) -> Tensor:
        """(B, P): the first word times the image (§3.2, alignment): the mean of its regions, since none here is the whole."""
        real = (region_mask / region_mask.sum(dim=1, keepdim=True)).to(regions.dtype)
        image = (real[..., None] * regions).sum(dim=1)
        return F.relu(self.pooler(text[:, 0])) * F.relu(self.region_pooler(image))
