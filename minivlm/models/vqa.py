"""The plain model of visual question answering: two encoders, a fusion of what they compute, and a list of answers.

    images (B, 3, H, W) ─→ vision tower ─→ projection + position ─→ (B, N, D) ─┐ context
    tokens (B, T)       ─→ question encoder ────────────────────→ (B, T, D) ───┴─→ fusion ─→ first token ─→ (B, A)

Antol et al. 2015, "VQA: Visual Question Answering", §4: the most frequent answers are classes. There two vectors are
multiplied; here the tokens of the question attend to the features of the image several times over, in blocks of self- and
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
from minivlm.models.own_modules import OwnText, OwnTower, describe, either, text_states


@dataclass(frozen=True, kw_only=True)
class VQAConfig:
    vision: TowerConfig | OwnTower | None  # None: it is given ready, as vision=my_tower
    vision_layer: int = -1  # of the tower, whose features are used
    text: BERTConfig | OwnText | None  # the question encoder
    fusion: TransformerConfig  # its blocks attend to the image
    answers: tuple[str, ...]

    answer_loss: ClassVar[AnswerLoss] = "softmax"  # one of them is right

    def __post_init__(self):
        if not self.answers:
            raise ValueError("there are no answers to choose from")
        if self.text is None:  # it is given ready, as text=my_encoder, and checked then
            return
        if self.fusion.width != self.text.width or self.fusion.cross_attention_every != 1:
            raise ValueError(
                f"fusion takes text of width {self.text.width}, and the image in every block: set "
                "fusion.width to it, and fusion.cross_attention_every to 1"
            )


def plain_config(width: int, answers: int) -> VQAConfig:
    """The config of a model whose two encoders are given ready."""
    heads = width // 64 if width % 64 == 0 else 1
    fusion = TransformerConfig(width=width, depth=3, heads=heads, cross_attention_every=1)
    return VQAConfig(vision=None, text=None, fusion=fusion, answers=tuple(map(str, range(answers))))


class VQAModel(Model):
    """images (B, 3, H, W), tokens (B, T), mask (B, T) → the logits of all answers, (B, A).

    `ImageFeatures` may be given in place of images. vision, text: modules of your own, see own_modules.py.
    VQAModel(tower, encoder, fusion_dim, num_answers) is short for a config of three fusing blocks and answers "0", "1", ….
    """

    config_class = VQAConfig
    abilities = frozenset({"choose", "attend"})
    image_attention = "fusion.*.cross_attention"

    def __init__(
        self,
        config: VQAConfig | nn.Module,
        text: nn.Module | None = None,
        fusion_dim: int = 512,
        num_answers: int = 3000,
        *,
        vision: nn.Module | None = None,
        seed: int = 0,
    ):
        if isinstance(config, nn.Module):
            config, vision = plain_config(fusion_dim, num_answers), config
        super().__init__(describe(config, vision=vision, text=text))
        c, generator = self.config, torch.Generator().manual_seed(seed)
        self.vision = either(vision, make_tower, c.vision, generator)
        count, width = c.vision.features_at(c.vision_layer)
        self.projector = LinearProjector(width, c.text.width)
        self.position_embedding = nn.Parameter(torch.empty(count, c.text.width))
        self.picture_norm = make_norm(c.fusion)
        self.bert = either(text, BERT, c.text, seed=seed)
        self.fusion = Transformer(c.fusion)
        self.norm = make_norm(c.fusion)
        self.answer_head = nn.Linear(c.text.width, len(c.answers))
        initialise(self, generator)

    def forward(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        features = self.projector(self.image_features(images)) + self.position_embedding  # (B, N, D)
        question = text_states(self.bert, tokens, mask)  # (B, T, D)
        x = self.norm(self.fusion(question, self.picture_norm(features), mask=mask))
        return self.answer_head(x[:, 0])

    def image_features(self, images: Images) -> Tensor:
        """images (B, 3, H, W) → (B, N, C), the features of the vision tower."""
        if isinstance(images, ImageFeatures):
            return images.tensor
        return tower_features(self.vision, images, [self.config.vision_layer])

    def answer(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of all answers, (B, A)."""
        return self(images, tokens, mask)

    def losses(
        self, images: Images, tokens: Tensor, mask: Tensor | None = None, *, answers: Tensor
    ) -> dict[str, Tensor]:
        """The training losses by name. answers (B, A): how right each is."""
        return {"answers": answer_loss(self(images, tokens, mask), answers)}

    def chance_losses(self) -> dict[str, float]:
        return {"answers": chance_answer_loss(len(self.config.answers))}


@torch.no_grad()
def initialise(model: VQAModel, generator: torch.Generator) -> None:
    """Initialise all but the encoders, as `initialise_linears` does; positions 0.5, as the features."""
    for part in (model.projector, model.fusion, model.answer_head):
        initialise_linears(part, generator)
    normal(model.position_embedding, 0.5, generator)
