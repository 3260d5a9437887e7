"""Flamingo: a frozen language model attends to images through new layers between its own.

    images (B, I, 3, H, W) ─→ vision tower ─→ resampler ─→ (B, I·L, C) ──┬───────────────┬─ …
                                                                         ▼               ▼
    tokens (B, T) ─→ embedding ─→ block … block ─→ gated cross-attention ─→ block … ─→ gated … ─→ block ─→ head ─→ text

In the text an image is a single placeholder: each token attends to the last image before it. IDEFICS and OpenFlamingo are
configurations of this model.
Alayrac et al. 2022, "Flamingo: a Visual Language Model for Few-Shot Learning", figure 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minivlm.layers.attention import KeysValues
from minivlm.layers.gated_cross_attention import AttendTo, GatedConfig, GatedCrossAttention, image_mask
from minivlm.layers.initialise import initialise_linears
from minivlm.layers.language_model import (
    LanguageModel,
    LanguageModelConfig,
    LMDecoding,
    LMOutput,
    check_decoder,
)
from minivlm.layers.padding import padding_last
from minivlm.layers.perceiver import PerceiverConfig, PerceiverResampler
from minivlm.layers.tower import Images, check_reader, features_of, leading_axes, make_tower
from minivlm.model import Batch, Model
from minivlm.models.placeholders import cut_by_placeholders
from minivlm.models.vision_features import VisionFeaturesConfig, make_standardise, vision_features


@dataclass(frozen=True, kw_only=True)
class FlamingoConfig(VisionFeaturesConfig):
    language: LanguageModelConfig
    resampler: PerceiverConfig | None  # None: the text attends to the tower's features themselves
    image_token: int  # the id of the placeholder that stands for an image
    gated: GatedConfig = field(default_factory=GatedConfig)
    every: int = 1  # a gated layer before every n-th block of the language model,
    offset: int = 0  # the first before this one: 0 in IDEFICS, n − 1 in OpenFlamingo
    attend_to: AttendTo = field(default="last", metadata={"was": "see"})  # of the images before a token

    def __post_init__(self):
        check_decoder(self.language, "Flamingo")
        if self.resampler is not None:
            wanted = self.resampler.context_width or self.resampler.width
            check_reader(self.feature_width, wanted, "resampler", "resampler.context_width")
        if self.every < 1 or not 0 <= self.offset < self.language.depth:
            raise ValueError(
                f"every is {self.every} and offset {self.offset}, which puts no gated layer before any of the language "
                f"model's {self.language.depth} blocks: every must be at least 1, offset the number of a block"
            )
        super().__post_init__()

    @property
    def block_indices(self) -> range:
        """The blocks of the language model that have a gated layer before them."""
        return range(self.offset, self.language.depth, self.every)

    @property
    def latents(self) -> int:
        """Tokens of one image that the gated layers attend to."""
        if self.resampler is not None:
            return self.resampler.latents
        return features_of(self.vision, self.vision_layers)[0] + int(self.class_token)

    @property
    def image_tokens(self) -> int:
        """Placeholders that one image takes."""
        return 1


class Flamingo(Model):
    """images (B, I, 3, H, W), tokens (B, T), mask (B, T) with True = a real token → `LMOutput`. No image: None.

    The i-th placeholder of a row stands for its i-th image; images beyond a row's placeholders may be anything. Or images
    (M, 3, H, W): one for each placeholder, in reading order; a GPU is waited for to count these.
    labels (B, T): the tokens, −100 = not counted; where: see `next_token_loss`. `ImageFeatures` (B, I, N, C) or (M, N, C) may
    be given in place of images. Raises ValueError for a placeholder without an image.
    """

    config_class = FlamingoConfig
    predicts_text = True
    abilities = frozenset({"caption", "answer", "chat", "complete", "few-shot"})
    trained_parts: ClassVar[tuple[str, ...]] = ("resampler", "gated")  # the others come from elsewhere, and stay frozen

    def __init__(self, config: FlamingoConfig, *, seed: int = 0):
        super().__init__(config)
        c = config
        self.vision = make_tower(c.vision, torch.Generator().manual_seed(seed))
        self.standardise = make_standardise(c)
        self.resampler = None if c.resampler is None else PerceiverResampler(c.resampler, seed=seed)
        reads = c.feature_width if c.resampler is None else c.resampler.width
        sizes = dict(context_width=reads, mlp_width=c.language.hidden_width, config=c.gated)
        self.gated = nn.ModuleList(
            GatedCrossAttention(c.language.width, c.language.heads, **sizes) for _ in c.block_indices
        )
        initialise_linears(self.gated, torch.Generator().manual_seed(seed))
        self.language_model = LanguageModel(c.language, seed=seed)

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
        between = self.gated_layers(images, tokens, mask)
        return self.language_model(tokens, mask, labels, where=where, between=between)

    def losses(
        self, tokens: Tensor, labels: Tensor, images: Images | None = None, where: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The training losses. Padding on the right needs no mask: causal attention does not reach it."""
        return {"next token": self(images, tokens, labels=labels, where=where).loss}

    def image_features(self, images: Images) -> Tensor:
        """images (…, 3, H, W) → (M, N, C): what the vision tower computes. `ImageFeatures` → their tensor."""
        return vision_features(images, self.vision, self.standardise, self.config)

    def gated_layers(self, images: Images | None, tokens: Tensor, mask: Tensor | None = None) -> GatedLayers:
        """The gated layers for these images and tokens. A placeholder in padding is none."""
        c = self.config
        if mask is not None:
            tokens = tokens.masked_fill(~mask, -1)
        if images is None:
            self.check_placeholders(tokens, 0)
            return GatedLayers(self.gated, c.block_indices, [None] * len(self.gated), None)
        axes = leading_axes(images)  # (B, I) or (M,)
        image_tokens = self.resample(self.image_features(images).flatten(0, -3))  # (M, L, C)
        image_tokens = image_tokens.unflatten(0, axes) if len(axes) == 2 else self.by_row(image_tokens, tokens)
        if len(image_tokens) != len(tokens):
            raise ValueError(f"there are {len(tokens)} texts, but images for {len(image_tokens)}")
        count = image_tokens.shape[1]
        self.check_placeholders(tokens, count)
        visible = image_mask(tokens, c.image_token, count, latents=c.latents, attend_to=c.attend_to)
        image_tokens = image_tokens.flatten(1, 2)  # (B, I·L, C)
        keys_values = [layer.keys_values(image_tokens) for layer in self.gated]
        return GatedLayers(self.gated, c.block_indices, keys_values, visible)

    def by_row(self, image_tokens: Tensor, tokens: Tensor) -> Tensor:
        """Images in reading order (M, L, C) → those of each row (B, I, L, C), zeros where a row has fewer than others."""
        counts = (tokens == self.config.image_token).sum(dim=1).tolist()
        if sum(counts) != len(image_tokens):
            raise ValueError(
                f"the texts have {sum(counts)} image placeholders, but there are {len(image_tokens)} images"
            )
        return nn.utils.rnn.pad_sequence(image_tokens.split(counts), batch_first=True)

    def resample(self, features: Tensor) -> Tensor:
        """(M, N, C) → (M, L, C'): what the gated layers attend to of each image."""
        return features if self.resampler is None else self.resampler(features)

    def check_placeholders(self, tokens: Tensor, images: int) -> None:
        """ValueError for a row with more placeholders than images (checked on the CPU alone; a GPU would be waited for)."""
        if tokens.device.type != "cpu":
            return
        count = int((tokens == self.config.image_token).sum(dim=1).max()) if tokens.numel() else 0
        if count > images:
            raise ValueError(f"a text has {count} image placeholders, but there are only {images} images a row")

    def gates(self) -> Tensor:
        """The opening of each gated layer: mean |tanh(gate)| of its attention and of its MLP, (layers, 2). 0: not at all."""
        return torch.stack([block.openness() for block in self.gated])

    def cut(self, batch: Batch, size: int) -> Iterator[Batch]:
        return cut_by_placeholders(super().cut(batch, size), batch, size, self.config.image_token)

    # ---- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, images: Images | None, tokens: Tensor, mask: Tensor | None = None, *, room: int) -> LMDecoding:
        """Process images and a prompt; see `LanguageModel.prefill`. What follows attends to what its last token attends to."""
        if mask is not None and not mask.all():
            tokens, mask = padding_last(tokens, mask)
        between = self.gated_layers(images, tokens, mask)
        return self.language_model.prefill(tokens, mask, room=room, between=between)

    @property
    def endings(self) -> dict[str, Any]:
        return self.language_model.endings


class GatedLayers:
    """Gated layers and the images that they attend to: `between` of `Transformer`.

    keys_values: for each layer those of all images, or None. visible (B, T, S): True = may be attended to.
    """

    def __init__(
        self,
        layers: Sequence[GatedCrossAttention],
        block_indices: Sequence[int],
        keys_values: Sequence[KeysValues | None],
        visible: Tensor | None,
    ):
        self.layers, self.block_indices = layers, block_indices
        self.keys_values, self.visible = keys_values, visible

    def __call__(self, index: int, x: Tensor) -> Tensor:
        if index not in self.block_indices:
            return x
        i = self.block_indices.index(index)
        return self.layers[i](x, self.keys_values[i], self.visible)

    def after(self, lengths: Tensor) -> GatedLayers:
        """The layers for tokens that follow a prompt of so many tokens a row, lengths (B,): as its last one attends."""
        visible = self.visible
        if visible is not None:
            visible = visible.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, visible.shape[2]))
        return GatedLayers(self.layers, self.block_indices, self.keys_values, visible)

    def reorder(self, rows: Tensor) -> GatedLayers:
        keys_values = [None if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.keys_values]
        visible = None if self.visible is None else self.visible[rows]
        return GatedLayers(self.layers, self.block_indices, keys_values, visible)
