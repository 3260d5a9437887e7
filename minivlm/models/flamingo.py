"""Flamingo: a frozen language model reads images through new layers between its own.

    images (B, I, 3, H, W) ─→ vision tower ─→ resampler ─→ (B, I·L, C) ──┬───────────────┬─ …
                                                                         ▼               ▼
    tokens (B, T) ─→ embedding ─→ block … block ─→ gated cross-attention ─→ block … ─→ gated … ─→ block ─→ head ─→ text

In the text an image is a single mark, which says where it stands: each token sees the last image before it. IDEFICS and
OpenFlamingo are configurations of this model.
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
    to_the_left,
)
from minivlm.layers.perceiver import PerceiverConfig, PerceiverResampler
from minivlm.layers.tower import ImageFeatures, Images, check_reader, features_of, leading_axes, make_tower
from minivlm.losses import next_token_loss
from minivlm.model import Batch, Model
from minivlm.models.placeholders import cut_by_placeholders
from minivlm.models.vision_features import VisionFeaturesConfig, make_standardise, vision_features


@dataclass(frozen=True, kw_only=True)
class FlamingoConfig(VisionFeaturesConfig):
    language: LanguageModelConfig
    resampler: PerceiverConfig | None  # None: the text reads the tower's features themselves
    image_token: int  # the id of the mark that stands for a picture
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
    def places(self) -> range:
        """The blocks of the language model that have a gated layer before them."""
        return range(self.offset, self.language.depth, self.every)

    @property
    def latents(self) -> int:
        """Tokens that one picture becomes, for the gated layers to read."""
        if self.resampler is not None:
            return self.resampler.latents
        return features_of(self.vision, self.vision_layers)[0] + int(self.class_token)

    @property
    def image_tokens(self) -> int:
        """Places that one picture takes in the text."""
        return 1


class Flamingo(Model):
    """images (B, I, 3, H, W), tokens (B, T), mask (B, T) with True = a real token → `LMOutput`. No picture: None.

    The i-th mark of a row stands for its i-th image; rows with fewer marks than I may have anything in the places left.
    Or images (M, 3, H, W): one for each mark, in reading order; a GPU is waited for to count these.
    labels (B, T): the tokens, −100 = not counted. `ImageFeatures` (B, I, N, C) or (M, N, C) may be given in place of images.
    Raises ValueError for a mark without an image.
    """

    config_class = FlamingoConfig
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
        self.gated = nn.ModuleList(GatedCrossAttention(c.language.width, c.language.heads, **sizes) for _ in c.places)
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
    ) -> LMOutput:
        lm = self.language_model
        hidden = lm.states(lm.embed(tokens), mask, between=self.read(images, tokens, mask))
        return LMOutput(hidden, lm.head, None if labels is None else next_token_loss(hidden, labels, lm.head.weight))

    def losses(
        self,
        tokens: Tensor,
        labels: Tensor,
        images: Images | None = None,
        features: Tensor | None = None,
        where: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What training adds up. Padding on the right, where causal attention does not look; where: see `next_token_loss`."""
        images = images if features is None else ImageFeatures(features)
        x, between = self.language_model.embed(tokens), self.read(images, tokens)
        return {"next token": self.language_model.loss(x, labels, where=where, between=between)}

    def image_features(self, images: Images) -> Tensor:
        """images (…, 3, H, W) → (M, N, C): what the vision tower computes. `ImageFeatures` → their tensor."""
        return vision_features(images, self.vision, self.standardise, self.config)

    def read(self, images: Images | None, tokens: Tensor, mask: Tensor | None = None) -> GatedReading:
        """What stands between the blocks while they read these tokens. A mark in padding is none."""
        c = self.config
        if mask is not None:
            tokens = tokens.masked_fill(~mask, -1)
        if images is None:
            self.check_marks(tokens, 0)
            return GatedReading(self.gated, c.places, [None] * len(self.gated), None)
        axes = leading_axes(images)  # (B, I) or (M,)
        seen = self.resample(self.image_features(images).flatten(0, -3))  # (M, L, C)
        seen = seen.unflatten(0, axes) if len(axes) == 2 else self.deal(seen, tokens)
        if len(seen) != len(tokens):
            raise ValueError(f"there are {len(tokens)} texts, but images for {len(seen)}")
        self.check_marks(tokens, seen.shape[1])
        visible = image_mask(tokens, c.image_token, seen.shape[1], latents=c.latents, attend_to=c.attend_to)
        seen = seen.flatten(1, 2)  # (B, I·L, C)
        return GatedReading(self.gated, c.places, [block.keys_values(seen) for block in self.gated], visible)

    def deal(self, seen: Tensor, tokens: Tensor) -> Tensor:
        """Images in reading order (M, L, C) → each row its own, (B, I, L, C), zeros where a row has fewer than others."""
        marks = (tokens == self.config.image_token).sum(dim=1).tolist()
        if sum(marks) != len(seen):
            raise ValueError(f"the texts have {sum(marks)} image marks, but there are {len(seen)} images")
        return nn.utils.rnn.pad_sequence(seen.split(marks), batch_first=True)

    def resample(self, features: Tensor) -> Tensor:
        """(M, N, C) → (M, L, C'): what the gated layers read of each picture."""
        return features if self.resampler is None else self.resampler(features)

    def check_marks(self, tokens: Tensor, images: int) -> None:
        """ValueError for a row with more marks than images (looked at on the CPU alone; a GPU would be waited for)."""
        if tokens.device.type != "cpu":
            return
        marks = int((tokens == self.config.image_token).sum(dim=1).max()) if tokens.numel() else 0
        if marks > images:
            raise ValueError(f"a text has {marks} image marks, but there are only {images} images a row")

    def gates(self) -> Tensor:
        """How open each gated layer is: mean |tanh(gate)| of its attention and of its MLP, (layers, 2). 0: not at all."""
        return torch.stack([block.openness() for block in self.gated])

    def cut(self, batch: Batch, size: int) -> Iterator[Batch]:
        return cut_by_placeholders(super().cut(batch, size), batch, size, self.config.image_token)

    # ---- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, images: Images | None, tokens: Tensor, mask: Tensor | None = None, *, room: int) -> LMDecoding:
        """Read pictures and a prompt; see `LanguageModel.prefill`. What follows sees what the prompt's last token saw."""
        if mask is not None and not mask.all():
            marked, mask = to_the_left(tokens[..., None], mask)
            tokens = marked[..., 0]
        between = self.read(images, tokens, mask)
        x = self.language_model.embed(tokens)
        return self.language_model.prefill(mask=mask, embeddings=x, room=room, between=between)

    @property
    def endings(self) -> dict[str, Any]:
        return self.language_model.endings


class GatedReading:
    """Gated layers, what they read, and who may read it: `between` of `Transformer`, a `Reading` of the language model.

    read: for each layer the keys and values of all images, or None. visible (B, T, S): True = may be seen.
    """

    def __init__(
        self,
        layers: Sequence[GatedCrossAttention],
        places: Sequence[int],
        read: Sequence[KeysValues | None],
        visible: Tensor | None,
    ):
        self.layers, self.places, self.read, self.visible = layers, places, read, visible

    def __call__(self, index: int, x: Tensor) -> Tensor:
        if index not in self.places:
            return x
        i = self.places.index(index)
        return self.layers[i](x, self.read[i], self.visible)

    def after(self, lengths: Tensor) -> GatedReading:
        """For tokens that follow a prompt of so many tokens a row, lengths (B,): they see what its last one saw."""
        visible = self.visible
        if visible is not None:
            visible = visible.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, visible.shape[2]))
        return GatedReading(self.layers, self.places, self.read, visible)

    def reorder(self, rows: Tensor) -> GatedReading:
        read = [None if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.read]
        return GatedReading(self.layers, self.places, read, None if self.visible is None else self.visible[rows])
