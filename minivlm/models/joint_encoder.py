"""Parts around the encoders of VisualBERT, UNITER and ViLBERT: the embeddings of regions, and the heads.

    images (B, 3, H, W) ─→ vision tower ─→ grid ─┐
    features and boxes of a detector ────────────┴→ regions (B, R, C) ─┐             ┌→ text    (B, T, D) ─→ masked tokens
                                                                       ├→ encoder ─→ ┼→ regions (B, R, E) ─→ masked regions
    tokens (B, T) ─────────────────────────────────────────────────────┘             └→ pooled  (B, P)    ─→ answers, match

Functions of a model. Each of the three has `vision`, `bert`, `regions` and the heads that its config names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.errors import UserError
from minivlm.layers.bert import BERTConfig, TextHead
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.regions import WHOLE, grid_cells, pool_regions
from minivlm.layers.tower import ImageFeatures, Images, TowerConfig, make_tower, tower_features
from minivlm.layers.transformer import TransformerConfig
from minivlm.losses import AnswerLoss, answer_loss, chance_answer_loss, masked_region_loss, masked_token_loss
from minivlm.model import Batch, Model
from minivlm.models.own_modules import OwnTower, either

# ---- config and output -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JointEncoderConfig:
    text: BERTConfig
    region_width: int  # of a region's features
    vision: TowerConfig | OwnTower | None = None  # None: the features come from elsewhere, such as a detector
    vision_layer: int = -1  # of the tower, whose features are the regions'
    standardise: bool = False  # each channel of them is shifted and scaled to mean 0 and deviation 1 (`Standardise`)
    answers: tuple[str, ...] = ()  # all that a question can be answered with
    answer_loss: AnswerLoss = "softmax"  # one of them is right, or each by itself is or is not
    heads: tuple[Literal["words", "regions", "matching"], ...] = ()  # what else is predicted
    word_bias: bool = False  # the words' logits have a bias each, as in BERT's released code and published VisualBERTs

    def __post_init__(self):
        if self.vision is not None and (width := self.vision.features_at(self.vision_layer)[1]) != self.region_width:
            raise ValueError(
                f"the vision tower gives features of width {width}, but region_width is {self.region_width}"
            )


@dataclass(frozen=True)
class JointOutput:
    logits: dict[str, Tensor]  # by head: answers (B, A), words (B, T, V), regions (B, R, C), matching (B, 2): no, yes
    text: Tensor  # (B, T, D)
    regions: Tensor  # (B, R, E)
    pooled: Tensor  # (B, P): text and image together
    mask: Tensor  # (B, T) True = a real token
    found: Regions


class Regions(NamedTuple):
    features: Tensor  # (B, R, C)
    boxes: Tensor  # (B, R, 4): left, top, right, bottom, as fractions of the image's sides
    mask: Tensor  # (B, R) True = a real region


# ---- regions ---------------------------------------------------------------------------------------------------------


def image_features(model: Model, images: Images) -> Tensor:
    """images (B, 3, H, W) → (B, N, C), a grid of features. What is (B, R, C) already comes back as it is."""
    if isinstance(images, ImageFeatures):
        return images.tensor
    if images.dim() == 3:
        return images
    if model.vision is None:
        raise UserError(
            f"this {type(model).__name__} has no vision tower: it reads features (B, R, {model.config.region_width}) "
            "of regions that a detector has found, not pixels."
        )
    features = tower_features(model.vision, images, [model.config.vision_layer])
    return features if model.standardise is None else model.standardise(features)


def find_regions(
    model: Model, images: Images, boxes: Tensor | None = None, region_mask: Tensor | None = None
) -> Regions:
    """The regions of images, which are the cells of the tower's grid, or the boxes over which it is pooled; or the regions of a
    detector, whose features stand in place of images. Features without boxes that are no square grid have no location."""
    features = model.image_features(images)
    if boxes is None:
        square = math.isqrt(features.shape[1]) ** 2 == features.shape[1]
        cells = grid_cells(features.shape[1], device=features.device) if square else features.new_tensor([WHOLE])
        boxes = cells.expand(len(features), features.shape[1], 4)
    else:
        check_boxes(boxes)
        if not isinstance(images, ImageFeatures) and images.dim() != 3:
            features = pool_regions(features, boxes)
    if region_mask is None:
        region_mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    return Regions(features, boxes, region_mask)


def check_boxes(boxes: Tensor) -> None:
    """UserError for boxes (B, R, 4) that are not in the image, or empty (checked on the CPU alone)."""
    if boxes.device.type != "cpu":
        return
    left, top, right, bottom = boxes.unbind(-1)
    wrong = (boxes.amin(-1) < 0) | (boxes.amax(-1) > 1) | (left >= right) | (top >= bottom)
    if wrong.any():
        row, region = wrong.nonzero()[0].tolist()
        shown = ", ".join(f"{x:g}" for x in boxes[row, region].tolist())
        raise UserError(
            f"region {region} of image {row} is ({shown}), which is no box inside the image: left, top, right and "
            "bottom are fractions of its sides, from 0 to 1, left before right and top before bottom."
        )


def embed_regions(model: Model, found: Regions, hidden: Tensor | None = None) -> Tensor:
    """The regions (B, R, E) as they enter the encoder, normalised. hidden (B, R): True = without its features."""
    features = withhold(found.features, hidden).to(model.dtype)
    return model.bert.dropout(model.regions(features, found.boxes))


def withhold(features: Tensor, hidden: Tensor | None) -> Tensor:
    """features (B, R, C) with zeros in place of the hidden regions (B, R)."""
    return features if hidden is None else features.masked_fill(hidden[..., None], 0.0)


# ---- heads -----------------------------------------------------------------------------------------------------------


def add_heads(model: Model, *, pooled_width: int, regions: TransformerConfig) -> None:
    """Gives a model the heads that its config names; the others are None. regions: of the stream that the regions are in."""
    c = model.config
    words = "words" in c.heads
    model.answer_head = nn.Linear(pooled_width, len(c.answers)) if c.answers else None
    model.match_head = nn.Linear(pooled_width, 2) if "matching" in c.heads else None
    model.word_head = TextHead(c.text) if words else None
    model.word_bias = nn.Parameter(torch.zeros(c.text.vocab_size)) if words and c.word_bias else None
    model.region_head = None
    if "regions" in c.heads:  # "a linear layer on top", after BERT's transformation
        model.region_head = nn.Sequential(TextHead(regions), nn.Linear(regions.width, c.region_width))


def heads_of(model: Model, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The heads to compute: all that the model has, or those that are wanted. ValueError for one that it has not."""
    has = {
        "answers": model.answer_head,
        "words": model.word_head,
        "regions": model.region_head,
        "matching": model.match_head,
    }
    if wanted is None:
        return tuple(name for name, head in has.items() if head is not None)
    for name in wanted:
        if has[name] is None:
            lacks = {"answers": "has no answers to choose from: its config names none"}
            other = f"does not {'match' if name == 'matching' else f'predict {name}'}: its config names no such head"
            raise ValueError(f"this {type(model).__name__} {lacks.get(name, other)}")
    return wanted


def logits_of(
    model: Model, heads: tuple[str, ...], *, text: Tensor, regions: Tensor, pooled: Tensor, asked: Tensor | None = None
) -> dict[str, Tensor]:
    """The logits of these heads, by name. asked (B, P): where answers are read; None: at `pooled`."""
    logits = {}
    for name in heads:
        match name:
            case "answers":
                logits[name] = model.answer_head(pooled if asked is None else asked)
            case "words":
                words = model.word_head(text) @ model.bert.token_embedding.weight.T
                logits[name] = words if model.word_bias is None else words + model.word_bias
            case "regions":
                logits[name] = model.region_head(regions)
            case "matching":
                logits[name] = model.match_head(pooled)
    return logits


def abilities(model: Model) -> frozenset[str]:
    """See `Model.abilities`: those of the heads that the model has, and of its tower."""
    can = {"choose"} if model.config.answers else set()
    can |= {"attend"} if model.config.answers and model.vision is not None else set()
    return frozenset(can | ({"match"} if "matching" in model.config.heads else set()))


def takes_images(model: Model) -> bool:
    """See `Model.takes_images`."""
    return model.vision is not None


def answer(model: Model, images: Images, tokens: Tensor, mask: Tensor | None = None, **regions) -> Tensor:
    """Logits of all answers, (B, A). regions: boxes, region_mask, as `forward` takes them."""
    return model(images, tokens, mask, heads=("answers",), **regions).logits["answers"]


def match(model: Model, images: Images, tokens: Tensor, mask: Tensor | None = None, **regions) -> Tensor:
    """Does text i describe image i?  → logits (B, 2) of no and yes. regions: as in `answer`."""
    return model(images, tokens, mask, heads=("matching",), **regions).logits["matching"]


# ---- training --------------------------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """Targets of the outputs; None: not in this step."""

    answers: Tensor | None = None  # (B, A): how right each is
    labels: Tensor | None = None  # (B, T): the tokens that were masked, −100 elsewhere
    hidden: Tensor | None = (
        None  # (B, R): True = a region to be predicted without its features, if the text describes it
    )
    matches: Tensor | None = None  # (B,): does the text belong to the image?

    @property
    def heads(self) -> tuple[str, ...]:
        names = ("answers", "words", "regions", "matching")
        return tuple(name for name, target in zip(names, self, strict=True) if target is not None)


def losses(
    model: Model,
    images: Images,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    boxes: Tensor | None = None,
    region_mask: Tensor | None = None,
    **targets: Tensor,
) -> dict[str, Tensor]:
    """The training losses of the `Targets` that are given, by head, and those that a model alone has (`further_losses`)."""
    given = Targets(**targets)
    regions = dict(boxes=boxes, region_mask=region_mask, hidden=given.hidden)
    out = model(images, tokens, mask, heads=given.heads, **regions)
    return losses_of(out, given, model.config.answer_loss) | model.further_losses(out, given)


def no_further_losses(model: Model, out: JointOutput, targets: Targets) -> dict[str, Tensor]:
    return {}


def losses_of(out: JointOutput, targets: Targets, kind: AnswerLoss) -> dict[str, Tensor]:
    """The losses of what was computed, by head."""
    losses, logits, (answers, labels, hidden, matches) = {}, out.logits, targets
    if answers is not None:
        losses["answers"] = answer_loss(logits["answers"], answers, kind)
    if labels is not None:
        losses["words"] = masked_token_loss(logits["words"], labels)
    if hidden is not None:
        losses["regions"] = masked_region_loss(logits["regions"], out.found.features, described(hidden, matches))
    if matches is not None:
        losses["matching"] = F.cross_entropy(logits["matching"].float(), matches.long())
    return losses


def described(hidden: Tensor, matches: Tensor | None) -> Tensor:
    """The hidden regions (B, R) of images that the text describes: all, or those of true pairs, matches (B,)."""
    return hidden if matches is None else hidden & matches[:, None]


def counts(model: Model, batch: Batch) -> dict[str, Tensor]:
    """See `Model.counts`."""
    counts = {"samples": Model.counts(model, batch)["samples"]}
    if "labels" in batch:
        counts["words"] = (batch["labels"] != -100).sum()
    if "hidden" in batch:
        counts["regions"] = described(batch["hidden"], batch.get("matches")).sum()
    return counts


def chance_losses(model: Model) -> dict[str, float]:
    """The losses of a model that knows nothing, where they are known."""
    c = model.config
    known = {"words": math.log(c.text.vocab_size), "matching": math.log(2)}
    answers = {"answers": chance_answer_loss(len(c.answers), c.answer_loss)} if c.answers else {}
    return answers | {name: loss for name, loss in known.items() if name in c.heads}


# ---- the start -------------------------------------------------------------------------------------------------------


def vision_tower(
    config: JointEncoderConfig, generator: torch.Generator, own: nn.Module | None = None
) -> nn.Module | None:
    """The tower, if the config has one, or that of one's own."""
    return None if config.vision is None else either(own, make_tower, config.vision, generator)


@torch.no_grad()
def initialise(model: Model, generator: torch.Generator) -> None:
    """Initialise everything but the tower and BERT, which have initialised themselves; see `initialise_linears`.

    Types start at 0.02, as in BERT; so do positions, but at 0.5 where each region has its own: features are that large.
    """
    for name, part in model.named_children():
        if name not in ("vision", "bert"):
            initialise_linears(part, generator)
    for name, parameter in model.regions.named_parameters():
        if "embedding" in name:
            large = "position" in name and model.regions.in_order
            normal(parameter, 0.5 if large else 0.02, generator)
