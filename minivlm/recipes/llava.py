"""LLaVA in its two stages (Liu et al. 2023a, §4.2): first the projector learns to be read, then the whole to converse.

    clip-resnet ─ vision tower, frozen ──┐
    lm ─ language model, frozen ─────────┴→ llava-stage1 (captions) ─→ llava (conversations)

Stage 2 trains the language model itself, or adapters on it (--lora.rank 16). `vlm-stage1` and `vlm` are the same from
published backbones, with few image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from math import log
from pathlib import Path
from typing import Any, Literal

import torch

from minivlm.conversation import template_of
from minivlm.datasets.judge import conversation_problem
from minivlm.datasets.sequence_batches import ConversationTurns
from minivlm.errors import UserError
from minivlm.layers.language_model import LanguageModelConfig
from minivlm.layers.perceiver import PerceiverConfig
from minivlm.layers.qformer import QFormerConfig
from minivlm.layers.tower import TowerConfig
from minivlm.models.llava import LLaVA, LLaVAConfig, scale_projector
from minivlm.origins import is_published
from minivlm.processor import Processor
from minivlm.recipes.folders import next_training, open_training_conversations
from minivlm.recipes.job import Job, against
from minivlm.recipes.parts import (
    LATENTS,
    join_processors,
    load_language_model,
    load_vision_tower,
    opened,
    resampling,
    take,
)
from minivlm.recipes.recipe import FOLDER, FolderData, Recipe
from minivlm.recipes.scores import Generated
from minivlm.recipes.vision_cache import VisionCache
from minivlm.tasks.features import inference
from minivlm.training import OptimiserConfig, autocast

SCALED_BY = 32  # images by which a new connector is scaled
QUERIES = QFormerConfig(width=128, depth=2, heads=4, queries=16)  # of a small Q-Former


@dataclass(frozen=True, kw_only=True)
class Projection:
    """How a LLaVA's language model is given what the vision tower computes; the rest follows from the two."""

    projector: Literal["linear", "mlp", "pixel_shuffle", "resampler", "qformer"] = "mlp"
    pixel_shuffle: int | None = None  # features of so many a side are one token; None: 2 of "pixel_shuffle", else 1
    # Of projector="resampler" or "qformer"; their context_width and positions follow from the tower
    resampler: PerceiverConfig = LATENTS
    qformer: QFormerConfig = QUERIES
    vision_layers: tuple[int, ...] = (-2,)
    vision_norm: bool = False  # the last norm of a ViT is applied to its features
    tiles: int = 1

    def config(self, vision: TowerConfig, language: LanguageModelConfig, image_token: int) -> LLaVAConfig:
        """Of a LLaVA of these two. UserError where they, or what was chosen, do not fit each other."""
        side = self.pixel_shuffle or (2 if self.projector == "pixel_shuffle" else 1)
        queried = {
            kind: resampling(getattr(self, kind), vision, self.vision_layers) for kind in ("resampler", "qformer")
        }
        chosen = {name: getattr(self, name) for name in ("projector", "vision_layers", "vision_norm", "tiles")}
        chosen |= {kind: config for kind, config in queried.items() if kind == self.projector}
        try:
            return LLaVAConfig(vision=vision, language=language, image_token=image_token, pixel_shuffle=side, **chosen)
        except ValueError as error:
            raise UserError(f"the model cannot be built: {error}.") from None


# A ViT's 16 × 16 patches become 16 tokens, of which each costs a small language model as much as a word
FOLDED = Projection(projector="pixel_shuffle", pixel_shuffle=4, vision_layers=(-1,), vision_norm=True)


@dataclass(frozen=True, kw_only=True)
class LLaVAStage1Recipe(Recipe):
    what = "LLaVA"
    learns_from = ("conversations",)
    judged_by = ("questions", "captions")
    vision_from: str = "out/clip-resnet"  # a CLIP or a tower alone (DINOv2), ours, published or a hub id
    language_from: str = "out/lm"  # likewise, a language model
    model: Projection = Projection()
    data: FolderData = FOLDER
    chat: str | None = None  # how turns are written, by name; None: as the language model has it
    system: str | None = None  # what the system says first; None: as the chat template has it; "": nothing
    published: bool = field(default=False, metadata={"option": False})  # what it starts from: nothing is trained first
    stage2: str = field(default="llava", metadata={"option": False})  # the recipe that continues

    def builds_on(self) -> dict[str, str]:
        return {} if self.published else {"vision_from": "clip-resnet", "language_from": "lm"}

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        model, processor = opened(self, LLaVA, checkpoint) or self.compose()
        model.freeze("vision", "language_model")
        origins = {"vision": self.vision_from, "projector": "new", "language_model": self.language_from}
        origins = {} if self.continues else origins
        made = job(self, model, processor, origins, captions=True, quiet=quiet)
        return made if checkpoint is not None or self.continues else scaled(made)

    def compose(self) -> tuple[LLaVA, Processor]:
        """Vision tower and language model put together, with a new projector between them."""
        tower, images = load_vision_tower(self.vision_from)
        language, text = load_language_model(self.language_from, chat=self.chat, system=self.system)
        config = self.model.config(tower.config, language.config, text.image_token_id)
        model = LLaVA(config, seed=self.seed)
        take(model.vision, tower)
        take(model.language_model, language)
        shown = dict(image_tokens=config.image_tokens, tiles=config.tiles)
        return model, join_processors(images, text, context=language.config.context, **shown)


@dataclass(frozen=True, kw_only=True)
class LLaVARecipe(Recipe):
    what = "LLaVA"
    learns_from = ("conversations",)
    judged_by = ("questions", "captions")
    starts_from: str = "out/llava-stage1"  # a LLaVA that went through stage 1
    vision_from: str = ""  # of stage 1, where that is trained first; "": as stage 1 has it
    language_from: str = ""  # likewise
    data: FolderData = FOLDER
    chat: str | None = None  # how turns are written, by name; None: as the LLaVA has it
    system: str | None = None  # what the system says first; None: as the chat template has it; "": nothing

    stage1: str = field(default="llava-stage1", metadata={"option": False})  # the recipe that it continues

    def builds_on(self) -> dict[str, str]:
        return {"starts_from": self.stage1}

    def hands_on(self) -> dict[str, str]:
        return {name: source for name in ("vision_from", "language_from") if (source := getattr(self, name))}

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        model, processor = opened(self, LLaVA, checkpoint)
        template_of(processor)
        model.freeze("vision")
        origins = dict.fromkeys(("vision", "projector", "language_model"), self.starts_from)
        return job(self, model, processor, origins, captions=False, quiet=quiet)


def job(
    recipe: Recipe, model: LLaVA, processor: Processor, origins: dict[str, str], *, captions: bool, quiet: bool
) -> Job:
    """Of stage 1, which learns captions, or of stage 2."""
    directory, problem = recipe.data.source, conversation_problem(processor)
    conversations = open_training_conversations(
        recipe, processor.image_size, quiet=quiet, problem=problem, captioned=captions
    )

    def more(out: Path, picture: str) -> list[str]:
        if captions:
            return next_training(recipe.stage2, directory, starts_from=out)
        return [f"python sample.py chat {out} {picture}"]

    cache = VisionCache.of_conversations(model, processor, conversations)
    samples = ConversationTurns(conversations, processor, cache, directory, captions=captions)
    scores = Generated(model, processor, directory, more, ask=not captions)
    progress = against("uniform", log(processor.vocab_size))
    return Job(recipe, model, processor, samples, scores, progress, origins, cache.prepare)


def scaled(made: Job) -> Job:
    """The job of a new model, whose connector starts at the length of the language model's words once images are at hand.

    An MLP or a matrix in front of a language model of ours stays as it is: their lengths are of one order.
    """
    model, prepare = made.model, made.prepare
    ours = not is_published(model.language_model)
    if ours and model.config.projector in ("linear", "mlp"):
        return made

    def prepare_and_scale(device: torch.device, precision: torch.dtype, *room: Any) -> None:
        prepare(device, precision, *room)
        conversations = made.samples.conversations
        some = list(islice((i for i in range(len(conversations)) if conversations.image_count(i) == 1), SCALED_BY))
        if some:
            with inference(model), autocast(device, precision):
                scale_projector(model, made.samples.images(some)["images"].to(device))

    return replace(made, prepare=prepare_and_scale)


LLAVA_RECIPES = {
    "llava-stage1": LLaVAStage1Recipe(
        summary="LLaVA, stage 1: the projector alone learns, on captions",
        measured="1.5 to 2 min on one core, after clip-resnet and lm",
        optimiser=OptimiserConfig(learning_rate=2e-3, warmup=50, weight_decay=0.0),
        steps=300,
        batch_size=64,
        save_every=300,
    ),
    "llava": LLaVARecipe(
        summary="LLaVA: a frozen vision tower, a projector and a language model that converse about images",
        measured="12 to 19 min on one busy core: 94 % of balanced questions, 78 % about never-seen pairs (3 seeds)",
        optimiser=OptimiserConfig(learning_rate=2e-3, warmup=100),
        steps=2000,
        batch_size=64,
        save_every=500,
    ),
    "vlm-stage1": LLaVAStage1Recipe(
        summary="a small VLM, stage 1: between a published vision tower and chat model a new connector learns, on captions",
        measured="measured on photographs: docs/results.md",
        vision_from="facebook/dinov2-small",
        language_from="HuggingFaceTB/SmolLM2-135M-Instruct",
        published=True,
        stage2="vlm",
        model=FOLDED,
        optimiser=OptimiserConfig(learning_rate=1e-3, warmup=20, weight_decay=0.0),
        steps=300,
        batch_size=16,
        bucket_steps=8,  # captions are half as long as questions
        save_every=300,
    ),
    "vlm": LLaVARecipe(
        summary="a small VLM: DINOv2, pixel shuffle and SmolLM2, or others, converse about your images",
        measured="measured on photographs: docs/results.md",
        starts_from="out/vlm-stage1",
        stage1="vlm-stage1",
        optimiser=OptimiserConfig(
            learning_rate=5e-4, warmup=20, weight_decay=0.0
        ),  # of what is new; rates.py has the rest
        steps=600,
        batch_size=16,
        bucket_steps=8,
        save_every=300,
    ),
}
