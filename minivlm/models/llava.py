"""LLaVA: image features, projected to the width of text embeddings, stand in the text in place of `<image>`.

    image (B, I, 3, H, W) ─→ vision tower ─→ projector ─┐ fill in
    tokens (B, T)         ─→ embedding ─────────────────┴───────→ language model ─→ text

Liu et al. 2023a, "Visual Instruction Tuning", figure 1 (linear projector); 2023b, LLaVA-1.5 (two layers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minivlm.layers.initialise import initialise_linears
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig, LMDecoding, LMOutput, check_decoder
from minivlm.layers.lora import LoRAConfig, add_lora
from minivlm.layers.mlp import Activation
from minivlm.layers.perceiver import PerceiverConfig
from minivlm.layers.projector import (
    LinearProjector,
    MLPProjector,
    QFormerProjector,
    ResamplerProjector,
    pixel_shuffle,
)
from minivlm.layers.qformer import QFormerConfig
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
from minivlm.layers.vit import VisionConfig
from minivlm.model import Batch, Model
from minivlm.models.own_modules import OwnTower, describe, either
from minivlm.models.placeholders import cut_by_placeholders, expand, fill

SOME_WORDS = 4096  # of a vocabulary, the most frequent first


@dataclass(frozen=True, kw_only=True)
class LLaVAConfig:
    vision: TowerConfig | OwnTower | None  # None: it is given ready, as vision=my_tower
    language: LanguageModelConfig
    image_token: int  # the placeholder's id; an image takes as many of them as it has features, or latents
    projector: Literal["linear", "mlp", "pixel_shuffle", "resampler", "qformer"] = "mlp"
    pixel_shuffle: int = 1  # features of so many a side are one token: of "pixel_shuffle", or before "linear" and "mlp"
    resampler: PerceiverConfig | None = None  # of projector="resampler"
    qformer: QFormerConfig | None = None  # of projector="qformer"
    projector_activation: Activation = "gelu"
    projector_bias: bool = True  # of the MLP
    vision_layers: tuple[int, ...] = (-2,)  # whose features are used (several: side by side); −2: the last but one
    class_token: bool = False  # True: the class token is used as well
    vision_norm: bool = False  # True: the last norm of a ViT is applied to its features
    tiles: int = 1  # n: an image is encoded whole, and again in n × n tiles (LLaVA-NeXT's AnyRes)
    lora: LoRAConfig | None = None  # on the language model, while it is trained so

    def __post_init__(self):
        check_decoder(self.language, "LLaVA")
        for kind, queried in (("resampler", self.resampler), ("qformer", self.qformer)):
            if (self.projector == kind) != (queried is not None):
                raise ValueError(f"projector is {self.projector!r}, but {kind} is {queried}: the two go together")
        if self.vision is None:  # what is given in its place is checked when it is there
            return
        if self.vision_norm and (not isinstance(self.vision, VisionConfig) or len(self.vision_layers) > 1):
            raise ValueError("vision_norm needs a ViT and a single layer of it: set it to False")
        width = self.feature_width
        if (c := self.queried) is not None:
            check_reader(width, c.context_width or c.width, self.projector, f"{self.projector}.context_width")
        check_pixel_shuffle(self)

    @property
    def queried(self) -> PerceiverConfig | QFormerConfig | None:
        """Of the projector, where it gives as many tokens as it has queries."""
        return self.resampler or self.qformer

    @property
    def features_per_view(self) -> int:
        """Placeholders that one view of an image takes."""
        if self.queried is not None:
            return self.resampler.latents if self.resampler is not None else self.qformer.queries
        return features_of(self.vision, self.vision_layers)[0] // self.pixel_shuffle**2 + int(self.class_token)

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
        """images (B, [I,] 3, H, W) → (B · I, N, C): what the vision tower computes, and what of it is one token side by
        side; all that is before the first weight of the projector."""
        if isinstance(images, ImageFeatures):
            return images.tensor
        c = self.config
        x = tower_features(self.vision, images, c.vision_layers, class_token=c.class_token)
        x = self.vision.norm(x) if c.vision_norm else x
        return pixel_shuffle(x, c.pixel_shuffle) if c.pixel_shuffle > 1 else x

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


def check_pixel_shuffle(config: LLaVAConfig) -> None:
    """ValueError where the features cannot be folded into squares."""
    c, side = config, config.pixel_shuffle
    least = 2 if c.projector == "pixel_shuffle" else 1
    if side < least:
        raise ValueError(f"pixel_shuffle is {side}, but must be at least {least} for projector={c.projector!r}")
    if side == 1:
        return
    if c.queried is not None or c.class_token:
        what = "class_token" if c.class_token else f"projector={c.projector!r}"
        raise ValueError(f"pixel_shuffle folds a grid of features, which does not go together with {what}")
    n = features_of(c.vision, c.vision_layers)[0]
    grid = isqrt(n)
    if grid * grid != n:
        raise ValueError(f"pixel_shuffle needs a square grid of features, but the vision tower gives {n}")
    if grid % side:
        fitting = [str(d) for d in range(2, grid + 1) if grid % d == 0]
        raise ValueError(
            f"pixel_shuffle {side} does not divide the vision tower's grid of {grid} × {grid} features: choose "
            f"{', '.join(fitting) or 'another projector'}"
        )


def make_projector(config: LLaVAConfig, generator: torch.Generator, *, seed: int) -> nn.Module:
    """Features (M, N, C) → tokens (M, N, D), or as many as there are queries. What has some initialises itself, by the seed."""
    c, sizes = config, (config.feature_width * config.pixel_shuffle**2, config.language.width)
    if c.queried is not None:
        kind = ResamplerProjector if c.resampler is not None else QFormerProjector
        projector = kind(c.queried, sizes[1], seed=seed)
        initialise_linears(projector.linear, generator)
        return projector
    if c.projector == "mlp":
        projector = MLPProjector(*sizes, activation=c.projector_activation, bias=c.projector_bias)
    else:
        projector = LinearProjector(*sizes, bias=c.projector == "linear")
    initialise_linears(projector, generator)
    return projector


@torch.no_grad()
def scale_projector(model: LLaVA, images: Images) -> float:
    """Scale a new projector so that its tokens of these images are as long as the language model's words are on average.

    A language model adds to what it is given. Tokens of many times the length of its words drown what its blocks add, and
    the gradient that reaches a projector through the first norm is as many times smaller. Returns the factor.
    """
    tokens = model.projector(model.image_features(images)).flatten(0, -2).float()
    words = model.language_model.embed(
        torch.arange(min(SOME_WORDS, model.config.language.vocab_size), device=model.device)
    )
    factor = (words.float().norm(dim=-1).mean() / tokens.norm(dim=-1).mean()).item()
    for parameter in model.projector.output.parameters():
        parameter.mul_(factor)
    return factor
