"""What all models that fuse have in common: words and regions go in together, and heads read what comes out.

tokens (B, T)      ─→ word embedding ──┐           ┌─→ words   (B, T, D) ─→ hidden words
                                       ├─→ fuse ─→ ┤   first ─→ pooled   ─→ answer, match
features (B, R, C) ─→ region embedding ┘           └─→ regions (B, R, E) ─→ hidden regions
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.errors import UserError
from minivlm.layers.bert import BERT, BERTConfig, TextHead
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.regions import WHOLE, grid_cells, pool_regions
from minivlm.layers.tower import ImageFeatures, Images, TowerConfig, make_tower, tower_features
from minivlm.layers.transformer import TransformerConfig
from minivlm.model import Model
from minivlm.models.fusion_losses import (
    AnswerLoss,
    answer_loss,
    chance_answer_loss,
    masked_region_loss,
    masked_word_loss,
)


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    text: BERTConfig
    region_width: int  # of a region's features
    vision: TowerConfig | None = None  # None: the features come from elsewhere, such as a detector
    vision_layer: int = -1  # of the tower, whose features are read
    answers: tuple[str, ...] = ()  # all that a question can be answered with
    answer_loss: AnswerLoss = "softmax"  # one of them is right, or each by itself is or is not
    heads: tuple[Literal["words", "regions", "matching"], ...] = ()  # what else is told
    word_bias: bool = False  # the words' logits have a bias each, as in BERT's released code and published VisualBERTs

    def __post_init__(self):
        check_features(self.vision, self.vision_layer, self.region_width)


def check_features(vision: TowerConfig | None, layer: int, wanted: int) -> None:
    """ValueError if the tower gives features of another width than are read."""
    if vision is not None and (width := vision.features_at(layer)[1]) != wanted:
        raise ValueError(f"the vision tower gives features of width {width}, but region_width is {wanted}")


class FusedStates(NamedTuple):
    words: Tensor  # (B, T, D)
    regions: Tensor  # (B, R, E)
    mask: Tensor  # (B, T) True = a real token
    region_mask: Tensor  # (B, R)


@dataclass(frozen=True)
class FusionOutput:
    logits: dict[str, Tensor]  # by head: answers (B, A), words (B, T, V), regions (B, R, C), matching (B, 2): no, yes
    words: Tensor  # (B, T, D)
    regions: Tensor  # (B, R, E)
    pooled: Tensor  # (B, P): what speaks for text and picture together


class FusionModel(Model):
    """images (B, 3, H, W), tokens (B, T), mask (B, T) → `FusionOutput`.

    `ImageFeatures` (B, R, C), or a tensor of this shape, may be given in place of images: of `image_features` or a detector.
    boxes (B, R, 4) say where they are from; without, they are a square grid, as a tower's, or their place is not known. With
    images, boxes are the regions whose features are pooled. region_mask (B, R): True = a real region.
    Raises UserError for boxes outside the picture.
    """

    config: FusionConfig
    regions: nn.Module  # how regions are embedded
    pooled_width: int

    def __init__(self, config: FusionConfig, *, seed: int = 0):
        super().__init__(config)
        c, generator = config, torch.Generator().manual_seed(seed)
        self.vision = None if c.vision is None else make_tower(c.vision, generator)
        self.bert = BERT(c.text, seed=seed)
        self.build()
        E = self.region_config.width
        self.answer_head = nn.Linear(self.pooled_width, len(c.answers)) if c.answers else None
        self.match_head = nn.Linear(self.pooled_width, 2) if "matching" in c.heads else None
        self.word_head = TextHead(c.text) if "words" in c.heads else None
        biased = "words" in c.heads and c.word_bias
        self.word_bias = nn.Parameter(torch.zeros(c.text.vocab_size)) if biased else None
        self.region_head = None
        if "regions" in c.heads:  # "a linear layer on top", after BERT's transformation
            self.region_head = nn.Sequential(TextHead(self.region_config), nn.Linear(E, c.region_width))
        initialise(self, generator)

    def build(self) -> None:
        """Make what is this model's own: `regions`, poolers, and what fuses."""
        raise NotImplementedError

    def fuse(self, words: Tensor, mask: Tensor, regions: Tensor, region_mask: Tensor) -> tuple[Tensor, Tensor]:
        """words (B, T, D), regions (B, R, E) → the same, having seen each other."""
        raise NotImplementedError

    def pool(self, states: FusedStates) -> Tensor:
        """What text and picture say together: (B, P)."""
        raise NotImplementedError

    @property
    def region_config(self) -> TransformerConfig:
        """Of the stream that the regions are in."""
        return self.config.text

    def forward(
        self,
        images: Images,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
    ) -> FusionOutput:
        states = self.read(images, tokens, mask, boxes=boxes, region_mask=region_mask)
        heads = {
            "answers": (self.answer_head, self.answer_logits),
            "words": (self.word_head, self.word_logits),
            "regions": (self.region_head, self.region_guess),
            "matching": (self.match_head, self.match_logits),
        }
        logits = {name: read(states) for name, (head, read) in heads.items() if head is not None}
        return FusionOutput(logits, states.words, states.regions, self.pool(states))

    def answer(self, images: Images, tokens: Tensor, mask: Tensor | None = None, **regions) -> Tensor:
        """Logits of all answers, (B, A). regions: boxes, region_mask, as `forward` takes them."""
        if self.answer_head is None:
            raise ValueError(f"this {type(self).__name__} has no answers to choose from: its config names none")
        return self.answer_logits(self.read(images, tokens, mask, **regions))

    def match(
        self, images: Images | None, tokens: Tensor, mask: Tensor | None = None, *, features=None, **regions
    ) -> Tensor:
        """Does text i describe image i?  → logits (B, 2) of no and yes. regions: as in `answer`."""
        if self.match_head is None:
            raise ValueError(f"this {type(self).__name__} does not match: its config names no such head")
        images = images if features is None else ImageFeatures(features)
        return self.match_logits(self.read(images, tokens, mask, **regions))

    # ---- from pixels to states ---------------------------------------------------------------------------------------

    def image_features(self, images: Images) -> Tensor:
        """images (B, 3, H, W) → (B, N, C), a grid of features. What is (B, R, C) already comes back as it is."""
        if isinstance(images, ImageFeatures):
            return images.tensor
        if images.dim() == 3:
            return images
        if self.vision is None:
            raise UserError(
                f"this {type(self).__name__} has no vision tower: it reads features (B, R, {self.config.region_width}) "
                "of regions that a detector has found, not pixels."
            )
        return tower_features(self.vision, images, [self.config.vision_layer])

    def see(self, images: Images, boxes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (B, R, C) and boxes (B, R, 4) of the regions."""
        grid = self.image_features(images)
        if boxes is None:
            square = math.isqrt(grid.shape[1]) ** 2 == grid.shape[1]
            cells = grid_cells(grid.shape[1], device=grid.device) if square else grid.new_tensor([WHOLE])
            return grid, cells.expand(len(grid), grid.shape[1], 4)
        check_boxes(boxes)
        given = isinstance(images, ImageFeatures) or images.dim() == 3
        return (grid if given else pool_regions(grid, boxes)), boxes

    def read(
        self,
        images: Images,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
    ) -> FusedStates:
        """What words and regions make of each other."""
        return self.encode(*self.see(images, boxes), tokens, mask, region_mask)

    def encode(
        self,
        features: Tensor,
        boxes: Tensor,
        tokens: Tensor,
        mask: Tensor | None = None,
        region_mask: Tensor | None = None,
    ) -> FusedStates:
        """The same of features (B, R, C) from boxes (B, R, 4)."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if region_mask is None:
            region_mask = mask.new_ones(features.shape[:2])
        words, regions = self.bert.embed(tokens), self.embed_regions(features, boxes)
        return FusedStates(*self.fuse(words, mask, regions, region_mask), mask, region_mask)

    def embed_regions(self, features: Tensor, boxes: Tensor) -> Tensor:
        """(B, R, C), (B, R, 4) → (B, R, E), normalised."""
        return self.bert.dropout(self.regions(features.to(self.dtype), boxes))

    # ---- what is told ------------------------------------------------------------------------------------------------

    def answer_logits(self, states: FusedStates) -> Tensor:
        """(B, A)"""
        return self.answer_head(self.pool(states))

    def match_logits(self, states: FusedStates) -> Tensor:
        """(B, 2): no and yes."""
        return self.match_head(self.pool(states))

    def word_logits(self, states: FusedStates) -> Tensor:
        """(B, T, V)"""
        logits = self.word_head(states.words) @ self.bert.token_embedding.weight.T
        return logits if self.word_bias is None else logits + self.word_bias

    def region_guess(self, states: FusedStates) -> Tensor:
        """(B, R, C): the features."""
        return self.region_head(states.regions)

    def losses(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        images: Images | None = None,
        features: Tensor | None = None,
        boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        *,
        answers: Tensor | None = None,
        labels: Tensor | None = None,
        hidden: Tensor | None = None,
        matches: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What training adds up, of whatever is given.

        answers (B, A): how right each is. labels (B, T): the words that were hidden, −100 elsewhere. hidden (B, R):
        True = a region that is to be told without being seen, if the text tells of it. matches (B,): does the text belong
        to the picture?
        """
        features, boxes = self.see(images if features is None else ImageFeatures(features), boxes)
        shown = features if hidden is None else features.masked_fill(hidden[..., None], 0.0)
        states = self.encode(shown, boxes, tokens, mask, region_mask)
        losses = {}
        if answers is not None:
            losses["answers"] = answer_loss(self.answer_logits(states), answers, self.config.answer_loss)
        if labels is not None:
            losses["words"] = masked_word_loss(self.word_logits(states), labels)
        if hidden is not None and self.region_head is not None:
            losses["regions"] = masked_region_loss(self.region_guess(states), features, told_regions(hidden, matches))
        if matches is not None:
            losses["matching"] = F.cross_entropy(self.match_logits(states).float(), matches.long())
            losses |= self.further_losses(states, matches)
        return losses

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = {"samples": super().counts(batch)["samples"]}
        if "labels" in batch:
            counts["words"] = (batch["labels"] != -100).sum()
        if "hidden" in batch:
            counts["regions"] = told_regions(batch["hidden"], batch.get("matches")).sum()
        return counts

    def further_losses(self, states: FusedStates, matches: Tensor) -> dict[str, Tensor]:
        """Those that are this model's own."""
        return {}

    def chance_losses(self) -> dict[str, float]:
        """The losses of a model that knows nothing, where they are known."""
        c = self.config
        known = {"words": math.log(c.text.vocab_size), "matching": math.log(2)}
        answers = {"answers": chance_answer_loss(len(c.answers), c.answer_loss)} if c.answers else {}
        return answers | {name: loss for name, loss in known.items() if name in c.heads}


def told_regions(hidden: Tensor, matches: Tensor | None) -> Tensor:
    """Of the hidden regions (B, R) those that a text tells of: all, or those of true pairs, matches (B,)."""
    return hidden if matches is None else hidden & matches[:, None]


def check_boxes(boxes: Tensor) -> None:
    """UserError for boxes (B, R, 4) that are not in the picture, or empty (looked at on the CPU alone)."""
    if boxes.device.type != "cpu":
        return
    left, top, right, bottom = boxes.unbind(-1)
    wrong = (boxes.amin(-1) < 0) | (boxes.amax(-1) > 1) | (left >= right) | (top >= bottom)
    if wrong.any():
        row, region = wrong.nonzero()[0].tolist()
        shown = ", ".join(f"{x:g}" for x in boxes[row, region].tolist())
        raise UserError(
            f"region {region} of picture {row} is ({shown}), which is no box inside the picture: left, top, right and "
            "bottom are fractions of its sides, from 0 to 1, left before right and top before bottom."
        )


@torch.no_grad()
def initialise(model: FusionModel, generator: torch.Generator) -> None:
    """Everything but the tower and BERT, which have started themselves; see `initialise_linears`.

    Types start at 0.02, as in BERT; so do positions, but at 0.5 where each region has its own: features are that large.
    """
    for name, part in model.named_children():
        if name not in ("vision", "bert"):
            initialise_linears(part, generator)
    for name, parameter in model.regions.named_parameters():
        if "embedding" in name:
            places = "position" in name and model.regions.in_order
            normal(parameter, 0.5 if places else 0.02, generator)
