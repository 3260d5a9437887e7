"""The captioner: image features stand in front of the caption, and a causal decoder continues from there.

    images (B, 3, H, W) ─→ vision tower ─→ projection ─→ (B, N, D) ─┐ in front of
    tokens (B, T)       ─→ embedding ─────────────────→ (B, T, D) ─┴────────────→ language model ─→ (B, T, V)

Vinyals et al. 2015, "Show and Tell": an image encoder and a text decoder, trained on pairs; here with all features of the
image rather than one vector (Xu et al. 2015, "Show, Attend and Tell"), to which the decoder's self-attention attends.
Training is teacher forcing: each token is predicted from the right ones before it. Generation feeds back its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.errors import UserError
from minivlm.layers.initialise import initialise_linears
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig, LMDecoding, LMOutput, check_decoder
from minivlm.layers.projector import LinearProjector
from minivlm.layers.tower import ImageFeatures, Images, TowerConfig, leading_axes, make_tower, tower_features
from minivlm.model import Model
from minivlm.models.own_modules import OwnTower, describe, either


@dataclass(frozen=True, kw_only=True)
class ImageCaptioningConfig:
    vision: TowerConfig | OwnTower | None  # None: it is given ready, as vision=my_tower
    language: LanguageModelConfig | None  # its context holds the image as well; None: it is given ready
    vision_layer: int = -1  # whose features are used; −1: the last, for a tower that learns with the rest
    start_token: int | None = None  # of every caption; None: unknown, so that `generate` has to be given tokens

    def __post_init__(self):
        if self.language is None:
            return
        check_decoder(self.language, "the captioner")
        if self.vision is not None and self.language.context <= self.image_tokens:
            raise ValueError(
                f"an image takes {self.image_tokens} positions, but the context of the language model is "
                f"{self.language.context}: no room is left for text"
            )

    @property
    def image_tokens(self) -> int:
        """Positions that an image takes in front of the text."""
        return self.vision.features_at(self.vision_layer)[0]


class ImageCaptioningModel(Model):
    """images (B, 3, H, W), tokens (B, T) that start with the start token → `LMOutput` of the T tokens.

    mask (B, T): True = a real token. labels (B, T): the tokens, −100 = not counted; where: see `next_token_loss`.
    Without tokens it generates: images → the ids of their captions (B, ≤ 64).
    vision, language: ready modules, see own_modules.py. ImageCaptioningModel(tower, language_model, vocab_size) is short for
    a config of these two.
    """

    config_class = ImageCaptioningConfig
    predicts_text = True
    abilities = frozenset({"caption", "attend"})
    image_attention = "answer"

    def __init__(
        self,
        config: ImageCaptioningConfig | nn.Module,
        language: LanguageModel | None = None,
        vocab_size: int | None = None,
        *,
        vision: nn.Module | None = None,
        seed: int = 0,
    ):
        if isinstance(config, nn.Module):
            config, vision = ImageCaptioningConfig(vision=None, language=None), config
        super().__init__(describe(config, vision=vision, language=language))
        if vocab_size not in (None, self.config.language.vocab_size):
            raise UserError(
                f"vocab_size is {vocab_size}, but the language model knows {self.config.language.vocab_size} tokens."
            )
        c = self.config
        generator = torch.Generator().manual_seed(seed)
        self.vision = either(vision, make_tower, c.vision, generator)
        self.projector = LinearProjector(c.vision.features_at(c.vision_layer)[1], c.language.width)
        initialise_linears(self.projector, generator)
        self.language_model = either(language, LanguageModel, c.language, seed=seed)

    @property
    def language_config(self) -> LanguageModelConfig:
        return self.config.language

    def forward(
        self,
        images: Images,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        where: Tensor | None = None,
    ) -> LMOutput | Tensor:
        if tokens is None:
            return self.generate(images)
        hidden = self.language_model.states(*self.embed(images, tokens, mask))
        return self.language_model.output(hidden[:, -tokens.shape[1] :], labels, where)  # of the text alone

    def losses(self, images: Images, tokens: Tensor, labels: Tensor, where: Tensor | None = None) -> dict[str, Tensor]:
        """The training losses. Padding on the right needs no mask: causal attention does not reach it."""
        return {"next token": self(images, tokens, labels=labels, where=where).loss}

    def image_features(self, images: Images) -> Tensor:
        """images (B, 3, H, W) → (B, N, C): what the vision tower computes, before the projector."""
        if isinstance(images, ImageFeatures):
            return images.tensor
        return tower_features(self.vision, images, [self.config.vision_layer])

    def embed(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Embeddings (B, N + T, D) and their mask: the image, then the text."""
        if leading_axes(images) != tokens.shape[:1]:
            raise ValueError(f"images are {tuple(images.shape)}, but tokens {tuple(tokens.shape)} need one image a row")
        image_tokens = self.projector(self.image_features(images))  # (B, N, D)
        x = torch.cat([image_tokens, self.language_model.embed(tokens)], dim=1)
        return x, None if mask is None else torch.cat([mask.new_ones(image_tokens.shape[:2]), mask], dim=1)

    # ---- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, images: Images, tokens: Tensor, mask: Tensor | None = None, *, room: int) -> LMDecoding:
        """Process images and the prompts (B, T) of their captions; see `LanguageModel.prefill`."""
        x, mask = self.embed(images, tokens, mask)
        return self.language_model.prefill(mask=mask, embeddings=x, room=room)

    def start_tokens(self, images: Images) -> Tensor:
        """(B, 1): the start token."""
        if self.config.start_token is None:
            raise UserError(
                "the captioner does not know the token that its captions start with: set start_token in its config, to "
                "processor.start_token, or give tokens (B, 1)."
            )
        return torch.full((len(images), 1), self.config.start_token, device=images.device)

    @property
    def endings(self) -> dict[str, Any]:
        return self.language_model.endings
