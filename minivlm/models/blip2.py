"""BLIP-2: the outputs of a Q-Former, whose vision tower is frozen, stand in front of, or inside, the text of a frozen language
model.

    images ─→ vision tower ─→ Q-Former ─→ projection ─┐
                        text ─→ embedding ────────────┴─→ language model (a decoder, or a T5) ─→ text

Its first stage, in which the Q-Former learns from images and texts, is `BLIP2Stage1`; this is the second.
Li et al. 2023, "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models",
§3.2 and figure 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.layers.initialise import initialise_linears
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig, LMDecoding, LMOutput
from minivlm.layers.qformer import QFormer, QFormerConfig
from minivlm.layers.t5 import T5, T5Config, T5Decoding
from minivlm.layers.tower import Images, check_reader, leading_axes, make_tower
from minivlm.model import Batch, Model
from minivlm.models.blip2_stage1 import BLIP2Stage1, BLIP2Stage1Config
from minivlm.models.placeholders import cut_by_placeholders, expand, fill
from minivlm.models.vision_features import VisionFeaturesConfig, make_standardise, vision_features

__all__ = ["BLIP2", "BLIP2Config", "BLIP2Stage1", "BLIP2Stage1Config"]


@dataclass(frozen=True, kw_only=True)
class BLIP2Config(VisionFeaturesConfig):
    qformer: QFormerConfig
    language: LanguageModelConfig | T5Config
    image_token: int | None  # the placeholder's id, as many an image as there are queries; None: they stand in front

    def __post_init__(self):
        q = self.qformer
        check_reader(self.feature_width, q.context_width or q.width, "Q-Former", "qformer.context_width")
        super().__post_init__()

    @property
    def image_tokens(self) -> int:
        """Positions that one image takes."""
        return self.qformer.queries


class BLIP2(Model):
    """images (B, [I,] 3, H, W), tokens (B, T), mask (B, T) → `LMOutput`. No image at all: None.

    A decoder: labels (B, T) are the tokens. A T5: tokens and images go into its encoder, labels (B, T') are the text that it
    is to generate. −100 = not counted; where: see `next_token_loss`. `ImageFeatures` may be given in place of images.
    """

    config_class = BLIP2Config
    predicts_text = True
    image_attention = "queries"

    def __init__(self, config: BLIP2Config, *, seed: int = 0):
        super().__init__(config)
        c = config
        self.vision = make_tower(c.vision, torch.Generator().manual_seed(seed))
        self.standardise = make_standardise(c)
        self.qformer = QFormer(c.qformer, seed=seed)
        self.projection = nn.Linear(c.qformer.width, c.language.width)
        initialise_linears(self.projection, torch.Generator().manual_seed(seed))
        kind = T5 if isinstance(c.language, T5Config) else LanguageModel
        self.language_model = kind(c.language, seed=seed)

    @property
    def abilities(self) -> frozenset[str]:
        between = {"few-shot"} if self.config.image_token is not None else set()
        return frozenset({"caption", "answer", "chat", "complete", "attend"} | between)

    @property
    def image_placeholders(self) -> int | None:
        return None if self.config.image_token is None else self.config.image_tokens

    @property
    def language_config(self) -> LanguageModelConfig | T5Config:
        return self.config.language

    @property
    def continues_prompt(self) -> bool:
        return self.language_model.continues_prompt

    @property
    def decoder_start_token(self) -> int | None:
        return self.language_model.decoder_start_token

    @property
    def endings(self) -> dict[str, Any]:
        return self.language_model.endings

    def forward(
        self,
        images: Images | None,
        tokens: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        where: Tensor | None = None,
    ) -> LMOutput:
        x, mask = self.embed(images, tokens, mask)
        if isinstance(self.language_model, T5):
            return self.language_model(embeddings=x, mask=mask, labels=labels)
        hidden = self.language_model.states(x, mask)[:, -tokens.shape[1] :]  # of the text alone
        return self.language_model.output(hidden, labels, where)

    def losses(
        self,
        tokens: Tensor,
        labels: Tensor,
        images: Images | None = None,
        mask: Tensor | None = None,
        where: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The training losses. A decoder needs no mask, since padding on the right is beyond its causal attention."""
        mask = mask if isinstance(self.language_model, T5) else None
        return {"next token": self(images, tokens, mask, labels, where=where).loss}

    def cut(self, batch: Batch, size: int) -> Iterator[Batch]:
        return cut_by_placeholders(super().cut(batch, size), batch, size, self.config.image_token)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        ours = super().counts(batch)
        return self.language_model.counts(batch) if isinstance(self.language_model, T5) else ours

    def image_features(self, images: Images) -> Tensor:
        """images (…, 3, H, W) → (M, N, C): what the vision tower computes. `ImageFeatures` → their tensor."""
        return vision_features(images, self.vision, self.standardise, self.config)

    def embed(self, images: Images | None, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """tokens (B, T), mask → (B, T, D) and its mask, with the queries of images in place of their placeholders, or ahead."""
        x = self.language_model.embed(tokens)
        image_tokens = x.new_empty(0, x.shape[-1])
        if images is not None:
            queries = self.qformer.query(self.image_features(images)).queries  # (B·I, Q, C)
            image_tokens = self.projection(queries).flatten(0, 1)  # (B·I·Q, D)
        if self.config.image_token is not None:
            return fill(x, tokens == self.config.image_token, image_tokens), mask
        image_tokens = image_tokens.view(len(x), -1, x.shape[-1]).to(x.dtype)  # (B, I·Q, D)
        mask = None if mask is None else torch.cat([mask.new_ones(image_tokens.shape[:2]), mask], dim=1)
        return torch.cat([image_tokens, x], dim=1), mask

    @torch.no_grad()
    def prefill(
        self, images: Images | None, tokens: Tensor, mask: Tensor | None = None, *, room: int
    ) -> LMDecoding | T5Decoding:
        """Process images and a prompt that has one placeholder an image, or all, or none at all: then the images stand in
        front. See `LanguageModel.prefill`."""
        placeholder, Q = self.config.image_token, self.config.image_tokens
        if images is not None and placeholder is not None:
            count, pad = leading_axes(images).numel(), self.config.language.pad_token
            if not (tokens == placeholder).any():
                ahead = count // len(tokens) * Q
                tokens = F.pad(tokens, (ahead, 0), value=placeholder)
                mask = None if mask is None else F.pad(mask, (ahead, 0), value=True)
            tokens, mask = expand(tokens, mask, count, placeholder=placeholder, copies=Q, pad=pad)
        x, mask = self.embed(images, tokens, mask)
        return self.language_model.prefill(mask=mask, embeddings=x, room=room)
