"""The plain model of visual question answering: two encoders, what they say brought together, and a list of answers.

    images (B, 3, H, W) ─→ vision tower ─→ projection + place ─→ (B, N, D) ─┐ is read by
    tokens (B, T)       ─→ question encoder ─────────────────→ (B, T, D) ───┴─→ fusion ─→ first word ─→ (B, A)

Antol et al. 2015, "VQA: Visual Question Answering", §4: the most frequent answers are classes. There two vectors are
multiplied; here the question's words look for what they ask about, several times over, in blocks of self- and
cross-attention (Yang et al. 2016, "Stacked Attention Networks for Image Question Answering", §3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from minivlm.layers.bert import BERT, BERTConfig
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.projector import LinearProjector
from minivlm.layers.tower import ImageFeatures, Images, TowerConfig, make_tower, tower_features
from minivlm.layers.transformer import Transformer, TransformerConfig, make_norm
from minivlm.losses import AnswerLoss, answer_loss, chance_answer_loss
from minivlm.model import Model
from minivlm.models.joint_encoder import JointOutput


@dataclass(frozen=True, kw_only=True)
class VQAConfig:
    vision: TowerConfig
    vision_layer: int = -1  # of the tower, whose features are read
    text: BERTConfig  # the question encoder
    fusion: TransformerConfig  # its blocks read the picture
    answers: tuple[str, ...]

    answer_loss: ClassVar[AnswerLoss] = "softmax"  # one of them is right

    def __post_init__(self):
        if not self.answers:
            raise ValueError("there are no answers to choose from")
        if self.fusion.width != self.text.width or self.fusion.cross_attention_every != 1:
            raise ValueError(
                f"fusion reads words of width {self.text.width}, and the picture in every block: set "
                "fusion.width to it, and fusion.cross_attention_every to 1"
            )


class VQAModel(Model):
    """images (B, 3, H, W), tokens (B, T), mask (B, T) → `JointOutput` with logits["answers"] (B, A).

    `ImageFeatures` may be given in place of images.
    """

    config_class = VQAConfig

    def __init__(self, config: VQAConfig, *, seed: int = 0):
        super().__init__(config)
        c, generator = config, torch.Generator().manual_seed(seed)
        places, width = c.vision.features_at(c.vision_layer)
        self.vision = make_tower(c.vision, generator)
        self.projector = LinearProjector(width, c.text.width)
        self.position_embedding = nn.Parameter(torch.empty(places, c.text.width))
        self.picture_norm = make_norm(c.fusion)
        self.bert = BERT(c.text, seed=seed)
        self.fusion = Transformer(c.fusion)
        self.norm = make_norm(c.fusion)
        self.answer_head = nn.Linear(c.text.width, len(c.answers))
        initialise(self, generator)

    def forward(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> JointOutput:
        seen = self.picture_norm(self.projector(self.image_features(images)) + self.position_embedding)  # (B, N, D)
        asked = self.bert(tokens, mask).hidden  # (B, T, D)
        words = self.norm(self.fusion(asked, seen, mask=mask))
        pooled = words[:, 0]
        return JointOutput({"answers": self.answer_head(pooled)}, words, seen, pooled, mask, None)

    def image_features(self, images: Images) -> Tensor:
        """images (B, 3, H, W) → (B, N, C), the features of the vision tower."""
        if isinstance(images, ImageFeatures):
            return images.tensor
        return tower_features(self.vision, images, [self.config.vision_layer])

    def answer(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of all answers, (B, A)."""
        return self(images, tokens, mask).logits["answers"]

    def losses(
        self,
        images: Images,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        answers: Tensor,
    ) -> dict[str, Tensor]:
        """What training adds up. answers (B, A): how right each is."""
        return {"answers": answer_loss(self.answer(images, tokens, mask), answers)}

    def chance_losses(self) -> dict[str, float]:
        return {"answers": chance_answer_loss(len(self.config.answers))}


@torch.no_grad()
def initialise(model: VQAModel, generator: torch.Generator) -> None:
    """All but the encoders, which have started themselves: see `initialise_linears`; places 0.5, as what is there."""
    for part in (model.projector, model.fusion, model.answer_head):
        initialise_linears(part, generator)
    normal(model.position_embedding, 0.5, generator)
