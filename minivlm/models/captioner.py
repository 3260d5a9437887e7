"""The captioner: the features of a picture stand in front of its caption, and a causal decoder goes on from there.

    images (B, 3, H, W) ─→ vision tower ─→ projection ─→ (B, N, D) ─┐ in front of
    tokens (B, T)       ─→ embedding ─────────────────→ (B, T, D) ─┴────────────→ language model ─→ (B, T, V)

Vinyals et al. 2015, "Show and Tell": an encoder of pictures, a decoder of words, trained on pairs; with all features of
the picture rather than one vector (Xu et al. 2015, "Show, Attend and Tell"), here read by the decoder's self-attention.
Training is teacher forcing: every word is guessed from the right ones before it. Speaking feeds back what was said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlm.layers.initialise import initialise_linears
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig, LMDecoding, LMOutput, check_decoder
from minivlm.layers.projector import LinearProjector
from minivlm.layers.tower import ImageFeatures, Images, TowerConfig, leading_axes, make_tower, tower_features
from minivlm.losses import next_token_loss
from minivlm.model import Model


@dataclass(frozen=True, kw_only=True)
class ImageCaptioningConfig:
    vision: TowerConfig
    language: LanguageModelConfig  # its context holds the picture as well
    vision_layer: int = -1  # whose features are read; −1: the last, for a tower that learns with the rest

    def __post_init__(self):
        check_decoder(self.language, "the captioner")
        if self.language.context <= self.image_tokens:
            raise ValueError(
                f"a picture takes {self.image_tokens} positions, but the context of the language model is "
                f"{self.language.context}: no room is left for words"
            )

    @property
    def image_tokens(self) -> int:
        """Positions that one picture takes."""
        return self.vision.features_at(self.vision_layer)[0]


class ImageCaptioningModel(Model):
    """images (B, 3, H, W), tokens (B, T) that begin with the start token → `LMOutput` of the T words.

    mask (B, T): True = a real token. labels (B, T): the tokens, −100 = not counted.
    """

    config_class = ImageCaptioningConfig
    abilities = frozenset({"caption", "attend"})
    image_attention = "answer"

    def __init__(self, config: ImageCaptioningConfig, *, seed: int = 0):
        super().__init__(config)
        c = config
        generator = torch.Generator().manual_seed(seed)
        self.vision = make_tower(c.vision, generator)
        self.projector = LinearProjector(c.vision.features_at(c.vision_layer)[1], c.language.width)
        initialise_linears(self.projector, generator)
        self.language_model = LanguageModel(c.language, seed=seed)

    @property
    def language_config(self) -> LanguageModelConfig:
        return self.config.language

    def forward(
        self, images: Images, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> LMOutput:
        head = self.language_model.head
        hidden = self.states(images, tokens, mask)
        loss = None if labels is None else next_token_loss(hidden, labels, head.weight)
        return LMOutput(hidden, head, loss)

    def losses(self, images: Images, tokens: Tensor, labels: Tensor, where: Tensor | None = None) -> dict[str, Tensor]:
        """What training adds up; where: see `next_token_loss`."""
        hidden = self.states(images, tokens)
        return {"next token": next_token_loss(hidden, labels, self.language_model.head.weight, where=where)}

    def states(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the head reads at the words: (B, T, E)."""
        return self.language_model.states(*self.embed(images, tokens, mask), last=tokens.shape[1])

    def image_features(self, images: Images) -> Tensor:
        """images (B, 3, H, W) → (B, N, C): what the vision tower computes, before the projector."""
        if isinstance(images, ImageFeatures):
            return images.tensor
        return tower_features(self.vision, images, [self.config.vision_layer])

    def embed(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, N + T, D) and its mask: the image, then the text."""
        if leading_axes(images) != tokens.shape[:1]:
            raise ValueError(
                f"images are {tuple(images.shape)}, but tokens {tuple(tokens.shape)} need one picture a row"
            )
        image_tokens = self.projector(self.image_features(images))  # (B, N, D)
        x = torch.cat([image_tokens, self.language_model.embed(tokens)], dim=1)
        return x, None if mask is None else torch.cat([mask.new_ones(image_tokens.shape[:2]), mask], dim=1)

    @torch.no_grad()
    def prefill(self, images: Images, tokens: Tensor, mask: Tensor | None = None, *, room: int) -> LMDecoding:
        """Read pictures and beginnings (B, T) of their captions, and be ready for `room` more tokens a row."""
        x, mask = self.embed(images, tokens, mask)
        return self.language_model.prefill(mask=mask, embeddings=x, room=room)

    @property
    def endings(self) -> dict[str, Any]:
        return self.language_model.endings
