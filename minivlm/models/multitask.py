"""One encoder for words and regions, three tasks: a caption is generated, an answer chosen, an image found.

They differ in what attends to what:

    task                    regions attend to   words attend to           output of        is
    answer  (or vqa)        all                 all                       the first word   (B, A)      logits of the answers
    caption                 regions             regions, earlier words    every word       (B, T, V)   logits of the next word
    search  (or retrieval)  regions             words                     each alone       (B, B)      similarity, scaled

Zhou et al. 2020, "Unified Vision-Language Pre-Training for Image Captioning and VQA" (VLP), §3: one transformer, two
masks. The third is that of Li et al. 2023 (BLIP-2), figure 2; all three are drawn at `attention_mask`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.errors import UserError, nearest
from minivlm.generation.decoding import Decoding, check_context
from minivlm.layers.bert import BERTConfig, TextHead
from minivlm.layers.initialise import initialise_linears
from minivlm.layers.padding import padding_first
from minivlm.layers.qformer import attention_mask
from minivlm.layers.tower import ImageFeatures, Images
from minivlm.layers.vit import VisionConfig
from minivlm.losses import (
    CLIPLoss,
    answer_loss,
    backward,
    chance_answer_loss,
    in_parts,
    mean,
    next_token_loss,
    processes,
)
from minivlm.model import Model
from minivlm.models.joint_encoder import find_regions
from minivlm.models.own_modules import describe
from minivlm.models.uniter import UNITER, UNITERConfig
from minivlm.models.visualbert import VisualBERT, VisualBERTConfig

Task = Literal["caption", "answer", "search"]
TASKS = ("caption", "answer", "search")
OTHER_NAMES = {"vqa": "answer", "retrieval": "search"}


@dataclass(frozen=True, kw_only=True)
class MultitaskConfig:
    encoder: VisualBERTConfig | UNITERConfig  # with a vision tower and answers, without other heads
    tasks: tuple[Task, ...] = TASKS  # that it learns
    embed_width: int = 128  # of the vectors that are compared
    caption_weight: float = 1.0  # of its loss beside the others': most of a sentence's words are easy, an answer is not
    end_token: int
    pad_token: int = 0

    def __post_init__(self):
        if self.encoder.vision is None or self.encoder.heads:
            raise ValueError("the encoder of all tasks needs a vision tower, and no heads of its own")
        if not self.tasks or ("answer" in self.tasks and not self.encoder.answers):
            raise ValueError("there are no tasks, or no answers to choose from")

    @property
    def answers(self) -> tuple[str, ...]:
        return self.encoder.answers if "answer" in self.tasks else ()

    @property
    def image_tokens(self) -> int:
        """Positions that one image takes."""
        return self.encoder.vision.features_at(self.encoder.vision_layer)[0]

    @property
    def context(self) -> int:
        """Positions that there are, for an image and a text."""
        return self.image_tokens + self.encoder.text.context

    @property
    def vocab_size(self) -> int:
        return self.encoder.text.vocab_size


def small_config() -> MultitaskConfig:
    """Images of 64 pixels a side, 4,096 tokens with the special ones of `Processor.train`, and the answers yes and no."""
    sizes = dict(width=128, depth=4, heads=4)
    encoder = VisualBERTConfig(
        text=BERTConfig(vocab_size=4096, context=64, **sizes),
        vision=VisionConfig(image_size=64, patch_size=8, **sizes),
        region_width=128,
        region_positions=True,
        answers=("yes", "no"),
        answer_at="first",
    )
    return MultitaskConfig(encoder=encoder, end_token=3)


class MultitaskVLM(Model):
    """images (B, 3, H, W), tokens (B, T), mask (B, T), task → logits, as in the table above.

    `ImageFeatures` may be given in place of images. vision: a module of your own, see own_modules.py. Without a config it is
    a small one, see `small_config`.
    """

    config_class = MultitaskConfig
    image_attention = "encoder.bert.transformer.*.attention"

    @property
    def abilities(self) -> frozenset[str]:
        of = {"caption": ("caption",), "answer": ("choose", "attend"), "search": ("encode",)}
        return frozenset(word for task in self.config.tasks for word in of[task])

    def __init__(self, config: MultitaskConfig | None = None, *, vision: nn.Module | None = None, seed: int = 0):
        super().__init__(describe(config or small_config(), vision=vision))
        c = self.config
        encoder = UNITER if isinstance(c.encoder, UNITERConfig) else VisualBERT
        self.encoder = encoder(c.encoder, vision=vision, seed=seed)
        width = c.encoder.text.width
        self.word_head = TextHead(c.encoder.text)
        self.text_projection = nn.Linear(width, c.embed_width)
        self.image_projection = nn.Linear(width, c.embed_width)
        self.loss = CLIPLoss()
        generator = torch.Generator().manual_seed(seed)
        for part in (self.word_head, self.text_projection, self.image_projection):
            initialise_linears(part, generator)

    @property
    def vision(self) -> nn.Module:
        return self.encoder.vision

    def image_features(self, images: Images) -> Tensor:
        return self.encoder.image_features(images)

    def forward(
        self,
        images: Images,
        tokens: Tensor,
        mask: Tensor | None = None,
        task: Task | Literal["vqa", "retrieval"] | None = None,
    ) -> Tensor:
        """Raises UserError for a task that does not exist, or was not learnt."""
        match self.task_called(task):
            case "answer":
                return self.answer(images, tokens, mask)
            case "caption":
                return self.word_logits(self.caption_states(images, tokens, mask)[1])
            case _:
                return self.loss.logits(self.encode_image(images), self.encode_text(tokens, mask))

    def task_called(self, name: str) -> Task:
        if (task := OTHER_NAMES.get(name, name)) not in (tasks := self.config.tasks):
            there_are = [*tasks, *(other for other, same in OTHER_NAMES.items() if same in tasks)]
            found = nearest(str(name), there_are)
            more = "" if "There are" in found else f" There are: {', '.join(there_are)}."
            raise UserError(f"{name!r} is no task of this MultitaskVLM.{found}{more}")
        return task

    # ---- three ways through the encoder ------------------------------------------------------------------------------

    def answer(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of all answers, (B, A)."""
        return self.encoder.answer(images, tokens, mask)

    def caption_states(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The states (B, R, D) of regions, which attend to regions alone, and (B, T, D) of words, which attend to regions and
        to earlier words."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        regions = self.regions(images)
        pairs = attention_mask("causal", regions.shape[1], mask)
        x = torch.cat([regions, self.encoder.bert.embed(tokens)], dim=1)
        x = self.encoder.bert.transformer(x, mask=pairs)
        return x[:, : regions.shape[1]], x[:, regions.shape[1] :]

    def encode_image(self, images: Images) -> Tensor:
        """(B, 3, H, W) → (B, E), unit length: the mean of regions that attend to regions alone."""
        return self.image_vector(self.encoder.bert.transformer(self.regions(images)))

    def image_vector(self, regions: Tensor) -> Tensor:
        """(B, R, D) → (B, E)"""
        return F.normalize(self.image_projection(regions.mean(dim=1)), dim=-1)

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) → (B, E), unit length: the first of words that attend to words alone."""
        return F.normalize(self.text_projection(self.encoder.bert(tokens, mask).hidden[:, 0]), dim=-1)

    def probabilities(self, image_vectors: Tensor, text_vectors: Tensor) -> Tensor:
        """(N, E), (M, E) → (N, M): how probable each text is for each image, among the M."""
        return self.loss.logits(image_vectors, text_vectors).softmax(dim=1)

    def regions(self, images: Images) -> Tensor:
        """(B, R, D), as they enter the first block."""
        return self.encoder.embed_regions(find_regions(self.encoder, images))

    def word_logits(self, hidden: Tensor) -> Tensor:
        """(B, T, D) → (B, T, V)"""
        return self.word_head(hidden) @ self.encoder.bert.token_embedding.weight.T

    # ---- training ----------------------------------------------------------------------------------------------------

    def losses(
        self,
        images: Images,
        *,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        question: Tensor | None = None,
        question_mask: Tensor | None = None,
        answers: Tensor | None = None,
        micro_batch: int | None = None,
    ) -> dict[str, Tensor]:
        """The training losses by name. tokens, mask (B, T): a caption; question (B, L) and answers (B, A): how right each is.

        Balanced: each loss is divided by that of a model that knows nothing, so that all start at about 1; the caption's then
        counts `caption_weight` times. micro_batch: samples whose activations are held at a time, see `in_parts`.
        """
        split = partial(in_parts, size=micro_batch)
        images = ImageFeatures(split(self.image_features, images))
        losses, tasks, vectors = {}, self.config.tasks, None
        if "caption" in tasks:
            total, vectors = split(self.caption_total, images, tokens, mask)
            losses["caption"] = mean(total, mask[:, 1:].sum())
        if "answer" in tasks:
            losses["answer"] = split(self.answer_total, images, question, question_mask, answers) / len(answers)
        if "search" in tasks:
            if vectors is None:
                vectors = split(self.encode_image, images)
            losses["search"] = self.loss(vectors, split(self.encode_text, tokens, mask))
        chance = self.chance_losses(processes() * len(images))
        return {name: self.task_weight(name) / chance[name] * loss for name, loss in losses.items()}

    def backward_in_parts(self, batch: dict[str, Tensor], size: int) -> dict[str, Tensor]:
        self.check_parts(len(batch["tokens"]), size)
        return backward(self.losses(**batch, micro_batch=size))  # search compares the whole batch

    def caption_total(self, images: Images, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the captions' losses, and the images' vectors (B, E): regions do not attend to words, so that no second
        pass is needed for these."""
        regions, text = self.caption_states(images, tokens, mask)
        labels, weight = tokens.masked_fill(~mask, -100), self.encoder.bert.token_embedding.weight
        return next_token_loss(self.word_head(text), labels, weight, total=True), self.image_vector(regions)

    def answer_total(self, images: Images, question: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
        """The sum of the answers' losses."""
        logits = self.answer(images, question, mask)
        return answer_loss(logits, answers, self.config.encoder.answer_loss) * len(answers)

    def task_weight(self, task: Task) -> float:
        return self.config.caption_weight if task == "caption" else 1.0

    def chance_losses(self, batch_size: int) -> dict[str, float]:
        """The losses of a model that knows nothing, before they are balanced (a batch of one finds its only caption anyway)."""
        c = self.config
        return {
            "caption": math.log(c.vocab_size),
            "answer": chance_answer_loss(max(2, len(c.answers)), c.encoder.answer_loss),
            "search": math.log(max(2, batch_size)),
        }

    @property
    def endings(self) -> dict[str, Any]:
        return {"end_tokens": (self.config.end_token,), "pad_token": self.config.pad_token}

    # ---- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, images: Images, tokens: Tensor, mask: Tensor | None = None, *, room: int) -> CaptionDecoding:
        """Compute images and prompts (B, T), the prefixes of captions, with room for `room` more tokens a row."""
        tokens, mask = padding_first(tokens, mask)
        check_context(tokens.shape[1], room, self.config.encoder.text.context)
        return CaptionDecoding(self, self.regions(images), tokens, mask, room=room)


class CaptionDecoding(Decoding):
    """The keys and values of regions, which never attend to words, and of a caption so far."""

    def __init__(self, model: MultitaskVLM, regions: Tensor, tokens: Tensor, mask: Tensor, *, room: int):
        self.model, self.mask, self.room = model, mask, room
        self.R = regions.shape[1]
        self.kept = [Kept() for _ in model.encoder.bert.transformer.blocks]
        self.append(regions, mask.new_ones(len(mask), self.R, self.R))
        self.logits = self.predict_all(tokens)

    @torch.no_grad()
    def append(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, D) → the same after all blocks, which keep it; mask (B, T, S): which of all that is kept it attends to."""
        for block, kept in zip(self.model.encoder.bert.transformer.blocks, self.kept, strict=True):
            kept.mask = mask[:, None]
            x = block(x, cache=kept)
        return x

    @torch.no_grad()
    def predict_all(self, tokens: Tensor) -> Tensor:
        """tokens (B, T), the last that `mask` counts → logits (B, V) of what follows."""
        T = tokens.shape[1]
        positions = (self.mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -T:]
        x = self.model.encoder.bert.embed(tokens, positions=positions)
        x = self.append(x, attention_mask("causal", self.R, self.mask)[:, -T:])
        return self.model.word_logits(x[:, -1]).float()

    def predict(self, tokens: Tensor) -> Tensor:
        self.mask = F.pad(self.mask, (0, 1), value=True)
        return self.predict_all(tokens[:, None])

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.mask = self.mask[rows]
        for kept in self.kept:
            kept.keys, kept.values = kept.keys[rows], kept.values[rows]


class Kept:
    """Keys and values of one block so far, as `Attention` asks a cache for them."""

    keys: Tensor | None = None
    values: Tensor | None = None
    mask: Tensor  # (B, 1, T, S)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.keys = k if self.keys is None else torch.cat([self.keys, k], dim=2)
        self.values = v if self.values is None else torch.cat([self.values, v], dim=2)
        return self.keys, self.values, self.mask
