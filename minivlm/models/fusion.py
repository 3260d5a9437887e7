"""VisualBERT, UNITER, ViLBERT: words and regions of a picture in one encoder, or in two that attend to each other.

|            | fuse                    | regions                        | learns to tell                            |
|------------|-------------------------|--------------------------------|-------------------------------------------|
| VisualBERT | one stream              | feature + type (+ position)    | words, match                              |
| UNITER     | one stream              | feature, location, normalised  | words or regions, match, word ↔ region    |
| ViLBERT    | two, with co-attention  | feature + location             | words and regions, match                  |

All else is the same (see `FusionModel`).
Li et al. 2019, "VisualBERT: A Simple and Performant Baseline for Vision and Language"; Chen et al. 2020, "UNITER:
UNiversal Image-TExt Representation Learning"; Lu et al. 2019, "ViLBERT: Pretraining Task-Agnostic Visiolinguistic
Representations for Vision-and-Language Tasks".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.layers.co_attention import CoAttention
from minivlm.layers.regions import UNITERRegions, ViLBERTRegions, VisualBERTRegions
from minivlm.layers.transformer import Transformer, TransformerConfig, take
from minivlm.models.fusing import FusedStates, FusionConfig, FusionModel
from minivlm.models.fusion_losses import AnswerLoss, alignment_loss, transport_distance

# ---- one stream ------------------------------------------------------------------------------------------------------


class OneStream(FusionModel):
    """Regions and words are one sequence for one encoder. Its order means nothing: embeddings tell the positions."""

    def build(self) -> None:
        self.regions = self.make_regions()
        self.pooler = nn.Linear(self.config.text.width, self.config.text.width)
        self.pooled_width = self.config.text.width

    def make_regions(self) -> nn.Module:
        raise NotImplementedError

    def fuse(self, words: Tensor, mask: Tensor, regions: Tensor, region_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([regions, words], dim=1)
        x = self.bert.transformer(x, mask=torch.cat([region_mask, mask], dim=1))
        R = regions.shape[1]
        return x[:, R:], x[:, :R]

    def pool(self, states: FusedStates) -> Tensor:
        """BERT's: the first token, once more transformed (Devlin et al. 2019, released code)."""
        return self.pooler(states.words[:, 0]).tanh()


@dataclass(frozen=True, kw_only=True)
class VisualBERTConfig(FusionConfig):
    region_positions: bool = False  # region i has a position i of its own; False: as published, all have one
    answer_at: Literal["first", "last word"] = "last word"  # pooled, or as published, the token before the end token


class VisualBERT(OneStream):
    """Regions are words of another type: BERT does the rest."""

    config_class = VisualBERTConfig

    def make_regions(self) -> nn.Module:
        c, t = self.config, self.config.text
        sizes = dict(positions=t.context, types=t.token_types, in_order=c.region_positions)
        return VisualBERTRegions(c.region_width, t.width, **sizes)

    def embed_regions(self, features: Tensor, boxes: Tensor) -> Tensor:
        return self.bert.dropout(self.bert.norm(self.regions(features.to(self.dtype), boxes)))

    def answer_logits(self, states: FusedStates) -> Tensor:
        if self.config.answer_at == "first":
            return super().answer_logits(states)
        last = (states.mask.sum(dim=1) - 2).clamp(min=0)
        return self.answer_head(take(states.words, last)[:, 0])


@dataclass(frozen=True, kw_only=True)
class UNITERConfig(FusionConfig):
    alignment: float = 0.1  # weight of the word-region alignment beside the match; 0: none
    answer_loss: AnswerLoss = field(default="sigmoid", metadata={"before": "softmax"})


class UNITER(OneStream):
    """Regions know where they are, and words are moved to the regions that they speak of."""

    config_class = UNITERConfig

    def make_regions(self) -> nn.Module:
        c = self.config
        return UNITERRegions(c.region_width, c.text.width, norm_eps=c.text.norm_eps)

    def further_losses(self, states: FusedStates, matches: Tensor) -> dict[str, Tensor]:
        if not self.config.alignment:
            return {}
        return {"alignment": self.config.alignment * alignment_loss(transport_distance(*states), matches)}


# ---- two streams -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ViLBERTConfig(FusionConfig):
    regions: TransformerConfig  # the regions' own stream
    connections: int  # the two meet before each of their last so many blocks
    joint_heads: int  # of the attention from one to the other …
    joint_width: int  # … and the width of all its heads, and of the vector that the two are pooled into
    answer_loss: AnswerLoss = field(default="sigmoid", metadata={"before": "softmax"})

    def __post_init__(self):
        super().__post_init__()
        if self.connections > min(self.text.depth, self.regions.depth):
            raise ValueError(
                f"{self.connections} connections need as many blocks in both streams, which have {self.text.depth} and "
                f"{self.regions.depth}"
            )


class ViLBERT(FusionModel):
    """A stream for words and one for regions, each as wide and deep as it needs; co-attention connects their ends."""

    config_class = ViLBERTConfig

    def build(self) -> None:
        c = self.config
        self.regions = ViLBERTRegions(c.region_width, c.regions.width, norm_eps=c.regions.norm_eps)
        self.region_transformer = Transformer(c.regions)
        heads = dict(heads=c.joint_heads, head_width=c.joint_width // c.joint_heads)
        self.connections = nn.ModuleList(CoAttention(c.text, c.regions, **heads) for _ in range(c.connections))
        self.pooler = nn.Linear(c.text.width, c.joint_width)
        self.region_pooler = nn.Linear(c.regions.width, c.joint_width)
        self.pooled_width = c.joint_width

    @property
    def region_config(self) -> TransformerConfig:
        return self.config.regions

    def fuse(self, words: Tensor, mask: Tensor, regions: Tensor, region_mask: Tensor) -> tuple[Tensor, Tensor]:
        text, seen, n = self.bert.transformer.blocks, self.region_transformer.blocks, len(self.connections)
        for block in text[: len(text) - n]:
            words = block(words, mask=mask)
        for block in seen[: len(seen) - n]:
            regions = block(regions, mask=region_mask)
        for meet, block, other in zip(self.connections, text[len(text) - n :], seen[len(seen) - n :], strict=True):
            words, regions = meet(words, regions, mask, region_mask)
            words, regions = block(words, mask=mask), other(regions, mask=region_mask)
        return words, regions

    def pool(self, states: FusedStates) -> Tensor:
        """The first word times the picture (§3.2, alignment): the mean of its regions, since none here is the whole."""
        real = (states.region_mask / states.region_mask.sum(dim=1, keepdim=True)).to(states.regions.dtype)
        picture = (real[..., None] * states.regions).sum(dim=1)
        return F.relu(self.pooler(states.words[:, 0])) * F.relu(self.region_pooler(picture))
