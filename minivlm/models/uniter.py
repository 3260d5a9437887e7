"""UNITER: words and regions, which know where they are, in one encoder, and words are moved to the regions they name.

    regions (B, R, C) ─ norm(projection) + norm(location) + type ─┐
                                                                  ├─ norm ─→ (B, R + T, D) ─→ transformer ─→ heads
    tokens  (B, T)    ─ word + position + type ───────────────────┘                           │
                                                                     words ⇄ regions: optimal transport

Chen et al. 2020, "UNITER: UNiversal Image-TExt Representation Learning", figure 1. It learns to predict masked words or
masked regions, whether the text belongs to the image, and the alignment of words and regions (§3.2), whose plan is found by
Xie et al. 2018, "A Fast Proximal Point Method for Computing Exact Wasserstein Distance", algorithm 1 (IPOT).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.layers.bert import BERT
from minivlm.layers.regions import UNITERRegions
from minivlm.layers.tower import Images
from minivlm.losses import AnswerLoss
from minivlm.model import Model
from minivlm.models import joint_encoder as joint
from minivlm.models.joint_encoder import JointEncoderConfig, JointOutput, Targets
from minivlm.models.own_modules import describe
from minivlm.models.vision_features import Standardise


@dataclass(frozen=True, kw_only=True)
class UNITERConfig(JointEncoderConfig):
    alignment: float = 0.1  # weight of the word-region alignment beside the match; 0: none
    answer_loss: AnswerLoss = field(default="sigmoid", metadata={"before": "softmax"})


class UNITER(Model):
    """images (B, 3, H, W), tokens (B, T), mask (B, T) → `JointOutput`.

    Regions are the cells of the tower's grid or, with boxes (B, R, 4), those boxes, over which the grid is pooled; or those of
    a detector: `ImageFeatures` (B, R, C) in place of images, beside their boxes. region_mask (B, R): True = a real region.
    hidden (B, R): True = its features are withheld, to be predicted. heads: those to compute; None: all.
    vision: a module of your own, see own_modules.py. Raises UserError for boxes outside the image.
    """

    config_class = UNITERConfig
    # functions of the model that all joint encoders share
    abilities = property(joint.abilities)
    takes_images = property(joint.takes_images)
    image_attention = "bert.transformer.*.attention"
    image_features, answer, match = joint.image_features, joint.answer, joint.match
    losses, counts, chance_losses = joint.losses, joint.counts, joint.chance_losses
    embed_regions = joint.embed_regions

    def __init__(self, config: UNITERConfig, *, vision: nn.Module | None = None, seed: int = 0):
        super().__init__(describe(config, vision=vision))
        c, D, generator = self.config, config.text.width, torch.Generator().manual_seed(seed)
        self.vision = joint.vision_tower(c, generator, vision)
        self.standardise = Standardise(c.region_width) if c.standardise else None
        self.bert = BERT(c.text, seed=seed)
        self.regions = UNITERRegions(c.region_width, D, norm_eps=c.text.norm_eps)
        self.pooler = nn.Linear(D, D)
        joint.add_heads(self, pooled_width=D, regions=c.text)
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
        text, regions = self.bert.embed(tokens), self.embed_regions(found, hidden)  # (B, T, D), (B, R, D)
        R = regions.shape[1]
        x = torch.cat([regions, text], dim=1)  # the order means nothing: locations and positions are embedded
        x = self.bert.transformer(x, mask=torch.cat([found.mask, mask], dim=1))
        regions, text = x[:, :R], x[:, R:]
        pooled = self.pooler(text[:, 0]).tanh()  # BERT's: the first token, once more transformed
        logits = joint.logits_of(self, heads, text=text, regions=regions, pooled=pooled)
        return JointOutput(logits, text, regions, pooled, mask, found)

    def further_losses(self, out: JointOutput, targets: Targets) -> dict[str, Tensor]:
        """Beside the match, the alignment of text and regions (§3.2, WRA)."""
        if targets.matches is None or not self.config.alignment:
            return {}
        distance = transport_distance(out.text, out.regions, out.mask, out.found.mask)
        return {"alignment": self.config.alignment * alignment_loss(distance, targets.matches)}


# ---- alignment of words and regions ------------------------------------------------------------------------------------


def alignment_loss(distance: Tensor, matches: Tensor) -> Tensor:
    """Words of a true pair are to be moved to their regions cheaply, those of a false one at a cost.

    distance (B,), matches (B,) bool. As in UNITER's released code: the sum over true pairs less that over false ones,
    by the number of both.
    """
    return (distance * torch.where(matches, 1.0, -1.0)).mean()


def transport_distance(words: Tensor, regions: Tensor, mask: Tensor, region_mask: Tensor) -> Tensor:
    """The optimal transport distance between words and regions: (B, T, D), (B, R, D), masks → (B,) between 0 and 2.

    Each word has the same weight, each region has; moving costs 1 − cosine. The plan is taken as given: gradients reach
    the costs alone, as the paper has it (Chen et al. 2020, §3.2, equation 4).
    """
    with torch.autocast(words.device.type, enabled=False):
        words, regions = F.normalize(words.float(), dim=-1), F.normalize(regions.float(), dim=-1)
        cost = 1 - words @ regions.transpose(1, 2)  # (B, T, R)
        plan = transport_plan(cost.detach(), evenly(mask), evenly(region_mask))
        return (plan * cost).sum(dim=(1, 2))


def evenly(mask: Tensor) -> Tensor:
    """(B, T) bool → (B, T): weights that sum to one in each row, none for padding."""
    return mask / mask.sum(dim=1, keepdim=True)


@torch.no_grad()
def transport_plan(cost: Tensor, source: Tensor, target: Tensor, *, beta: float = 0.5, iterations: int = 50) -> Tensor:
    """cost (B, T, R), source (B, T) and target (B, R), each summing to one → how much goes where, (B, T, R).

    IPOT: each iteration is a Sinkhorn step on the kernel times the plan so far, which walks to the exact optimum, where
    Sinkhorn's own fixed point is blurred by beta.
    """
    tiny = torch.finfo(cost.dtype).tiny
    kernel = (-cost / beta).exp()
    plan = source[:, :, None] * target[:, None, :]
    right = target.clone()  # (B, R), the factors of the columns
    for _ in range(iterations):
        q = kernel * plan
        left = source / torch.einsum("btr,br->bt", q, right).clamp(min=tiny)
        right = target / torch.einsum("btr,bt->br", q, left).clamp(min=tiny)
        plan = left[:, :, None] * q * right[:, None, :]
    return plan
