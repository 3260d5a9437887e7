"""LLaVA: image features, projected to the width of text embeddings, stand in the text in place of `<image>`.

    image (B, I, 3, H, W) ─→ vision tower ─→ projector ─┐ fill in
    tokens (B, T)         ─→ embedding ─────────────────┴───────→ language model ─→ text

Liu et al. 2023a, "Visual Instruction Tuning", figure 1 (linear projector); 2023b, LLaVA-1.5 (two layers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minivlm.layers.initialise import initialise_linears
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig, LMDecoding, LMOutput, check_decoder
from minivlm.layers.lora import LoRAConfig, add_lora, merge_lora
from minivlm.layers.mlp import Activation
from minivlm.layers.perceiver import PerceiverConfig
from minivlm.layers.projector import LinearProjector, MLPProjector, ResamplerProjector
from minivlm.layers.tower import (
    ImageFeatures,
    Images,
    TowerConfig,
    check_reader,
    features_of,
    leading_axes,
    make_tower,
    tower_features,
)
from minivlm.model import Batch, Model
from minivlm.models.own_modules import OwnTower, describe, either
from minivlm.models.placeholders import cut_by_placeholders, expand, fill


@dataclass(frozen=True, kw_only=True)
class LLaVAConfig:
    vision: TowerConfig | OwnTower | None  # None: it is given ready, as vision=my_tower
    language: LanguageModelConfig
    image_token: int  # the placeholder's id; an image takes as many of them as it has features, or latents
    projector: Literal["linear", "mlp", "resampler"] = "mlp"
    resampler: PerceiverConfig | None = None  # of projector="resampler"
    projector_activation: Activation = "gelu"
    projector_bias: bool = True  # of the MLP
    vision_layers: tuple[int, ...] = (-2,)  # whose features are used (several: side by side); −2: the last but one
    class_token: bool = False  # True: the class token is used as well
    tiles: int = 1  # n: an image is encoded whole, and again in n × n tiles (LLaVA-NeXT's AnyRes)
    lora: LoRAConfig | None = None  # on the language model, while it is trained so

    def __post_init__(self):
        check_decoder(self.language, "LLaVA")
        if (self.projector == "resampler") != (self.resampler is not None):
            raise ValueError(f"projector is {self.projector!r}, but resampler is {self.resampler}: the two go together")
        if self.vision is None:  # what is given in its place is checked when it is there
            return
        width = self.feature_width
        if (r := self.resampler) is not None:
            check_reader(width, r.context_width or r.width, "resampler", "resampler.context_width")

    @property
    def features_per_view(self) -> int:
        """Placeholders that one view of an image takes."""
        if self.resampler is not None:
            return self.resampler.latents
        return features_of(self.vision, self.vision_layers)[0] + int(self.class_token)

    @property
    def feature_width(self) -> int:
        return features_of(self.vision, self.vision_layers)[1]

    @property
    def views(self) -> int:
        """The views of one image: itself, and its tiles."""
        return 1 + self.tiles**2 if self.tiles > 1 else 1

    @property
    def image_tokens(self) -> int:
        """Placeholders that one image takes."""
        return self.views * self.features_per_view


class LLaVA(Model):
    """images (B, 3, H, W), or (B, I, 3, H, W) for several a row, tokens (B, T) → `LMOutput`. No image at all: None.

    With tiles, each image is its views, one after the other, as the processor makes them: (B, I · views, 3, H, W).
    labels (B, T): the tokens, −100 = not counted; where: see `next_token_loss`. `ImageFeatures` may be given in place of
    images.
    vision, language: ready modules, see own_modules.py.
    """

    config_class = LLaVAConfig
    predicts_text = True
    abilities = frozenset({"caption", "answer", "chat", "complete", "attend", "few-shot"})
    image_attention = "answer"

    def __init__(
        self,
        config: LLaVAConfig,
        *,
        vision: nn.Module | None = None,
        language: LanguageModel | None = None,
        seed: int = 0,
    ):
        super().__init__(describe(config, vision=vision, language=language))
        c = self.config
        generator = torch.Generator().manual_seed(seed)
        self.vision = either(vision, make_tower, c.vision, generator)
        self.projector = make_projector(c, generator, seed=seed)
        self.language_model = either(language, LanguageModel, c.language, seed=seed)
        if c.lora is not None:
            add_lora(self.language_model, c.lora, generator=generator)

    @property
    def image_placeholders(self) -> int:
        return self.config.image_tokens

    @property
    def language_config(self) -> LanguageModelConfig:
        return self.config.language

    def forward(
        self,
        images: Images | None,
        tokens: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        where: Tensor | None = None,
    ) -> LMOutput:
        x = self.embed(images, tokens)
        return self.language_model(embeddings=x, mask=mask, labels=labels, where=where)

    def losses(
        self, tokens: Tensor, labels: Tensor, images: Images | None = None, where: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The training losses. Padding on the right needs no mask: causal attention does not reach it."""
        return {"next token": self(images, tokens, labels=labels, where=where).loss}

    def embed(self, images: Images | None, tokens: Tensor) -> Tensor:
        """tokens (B, T) → (B, T, D), with the projected image features in place of the placeholders."""
        x = self.language_model.embed(tokens)
        if images is None:
            return fill(x, tokens == self.config.image_token, x.new_empty(0, x.shape[-1]))
        image_tokens = self.projector(self.image_features(images))  # (B·I, N, D)
        return fill(x, tokens == self.config.image_token, image_tokens.flatten(0, -2))

    def image_features(self, images: Images) -> Tensor:
        """images (B, [I,] 3, H, W) → (B · I, N, C): what the vision tower computes, before the projector."""
        if isinstance(images, ImageFeatures):
            return images.tensor
        return tower_features(self.vision, images, self.config.vision_layers, class_token=self.config.class_token)

    def cut(self, batch: Batch, size: int) -> Iterator[Batch]:
        return cut_by_placeholders(super().cut(batch, size), batch, size, self.config.image_token)

    # ---- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, images: Images | None, tokens: Tensor, mask: Tensor | None = None, *, room: int) -> LMDecoding:
        """Process images and a prompt that has one placeholder an image, or all; see `LanguageModel.prefill`."""
        c = self.config
        if images is not None:
            count, pad = leading_axes(images).numel() // c.views, c.language.pad_token
            tokens, mask = expand(tokens, mask, count, placeholder=c.image_token, copies=c.image_tokens, pad=pad)
        return self.language_model.prefill(mask=mask, embeddings=self.embed(images, tokens), room=room)

    @property
    def endings(self) -> dict[str, Any]:
        return self.language_model.endings

    def merge_lora(self) -> None:
        """Add the adapters to the language model's weights."""
        merge_lora(self.language_model)
        self.config = replace(self.config, lora=None)


def make_projector(config: LLaVAConfig, generator: torch.Generator, *, seed: int) -> nn.Module:
    """Features (M, N, C) → tokens (M, N, D), or as many as there are latents. A resampler initialises itself, by the seed."""
    sizes = (config.feature_width, config.language.width)
    if config.projector == "resampler":
        projector = ResamplerProjector(config.resampler, sizes[1], seed=seed)
        initialise_linears(projector.linear, generator)
        return projector
    mlp = config.projector == "mlp"
    options = dict(activation=config.projector_activation, bias=config.projector_bias)
    projector = MLPProjector(*sizes, **options) if mlp else LinearProjector(*sizes)
    initialise_linears(projector, generator)
    return projector
