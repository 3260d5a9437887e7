"""LLaVA in its two stages (Liu et al. 2023a, §4.2): first the projector learns to be read, then the whole to converse.

    clip-resnet ─ vision tower, frozen ──┐
    lm ─ language model, frozen ─────────┴→ llava-stage1 (captions) ─→ llava (conversations)

Stage 2 trains the language model itself, or adapters on it (--lora.rank 16).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Literal

import torch

from minivlm.adapters import save_adapter
from minivlm.checkpoint import load
from minivlm.conversation import template_of, with_chat
from minivlm.datasets.judge import conversation_problem
from minivlm.datasets.sequence_batches import ConversationTurns
from minivlm.errors import UserError
from minivlm.layers.lora import LoRAConfig, add_lora
from minivlm.layers.perceiver import PerceiverConfig
from minivlm.models.llava import LLaVA, LLaVAConfig
from minivlm.processor import Processor
from minivlm.recipes.folders import next_training, open_training_conversations
from minivlm.recipes.job import Job, against
from minivlm.recipes.parts import LATENTS, join_processors, load_language_model, load_vision_tower, resampling, take
from minivlm.recipes.recipe import FOLDER, FolderData, Recipe
from minivlm.recipes.scores import Generated
from minivlm.recipes.vision_cache import VisionCache
from minivlm.training import OptimiserConfig


@dataclass(frozen=True, kw_only=True)
class Projection:
    """How a LLaVA's language model is given what the vision tower computes; the rest follows from the two."""

    projector: Literal["linear", "mlp", "resampler"] = "mlp"
    resampler: PerceiverConfig = (
        LATENTS  # of projector="resampler"; its context_width and positions follow from the tower
    )
    vision_layers: tuple[int, ...] = (-2,)
    tiles: int = 1


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

    def builds_on(self) -> dict[str, str]:
        return {"vision_from": "clip-resnet", "language_from": "lm"}

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        model, processor = load(checkpoint) if checkpoint is not None else self.compose()
        model.freeze("vision", "language_model")
        origins = {"vision": self.vision_from, "projector": "new", "language_model": self.language_from}
        return job(self, model, processor, origins, captions=True, quiet=quiet)

    def compose(self) -> tuple[LLaVA, Processor]:
        """Vision tower and language model put together, with a new projector between them."""
        tower, images = load_vision_tower(self.vision_from)
        language, text = load_language_model(self.language_from, chat=self.chat, system=self.system)
        c, vision = self.model, tower.config
        config = LLaVAConfig(
            vision=vision,
            language=language.config,
            image_token=text.image_token_id,
            projector=c.projector,
            resampler=resampling(c.resampler, vision, c.vision_layers) if c.projector == "resampler" else None,
            vision_layers=c.vision_layers,
            tiles=c.tiles,
        )
        model = LLaVA(config, seed=self.seed)
        take(model.vision, tower)
        take(model.language_model, language)
        shown = dict(image_tokens=config.image_tokens, tiles=c.tiles)
        return model, join_processors(images, text, context=language.config.context, **shown)


@dataclass(frozen=True, kw_only=True)
class LLaVARecipe(Recipe):
    what = "LLaVA"
    learns_from = ("conversations",)
    judged_by = ("questions", "captions")
    starts_from: str = "out/llava-stage1"  # a LLaVA that went through stage 1
    data: FolderData = FOLDER
    chat: str | None = None  # how turns are written, by name; None: as the LLaVA has it
    system: str | None = None  # what the system says first; None: as the chat template has it; "": nothing

    def builds_on(self) -> dict[str, str]:
        return {"starts_from": "llava-stage1"}

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        model, processor = load(checkpoint) if checkpoint is not None else self.open()
        model.freeze("vision")
        parts = ("vision", "projector", "language_model")
        origins = dict.fromkeys(parts, self.starts_from) | {"language_model LoRA": "new, zero"}
        return job(self, model, processor, origins, captions=False, quiet=quiet)

    def open(self) -> tuple[LLaVA, Processor]:
        model, processor = load(self.starts_from)
        if not isinstance(model, LLaVA):
            raise UserError(f"--starts_from {self.starts_from} holds a {type(model).__name__}, but a LLaVA is wanted.")
        if (lora := self.lora) is not None:
            lora = LoRAConfig(lora.rank, lora.alpha, lora.dropout, lora.targets)
            add_lora(model.language_model, lora, generator=torch.Generator().manual_seed(self.seed))
            model.config = replace(model.config, lora=lora)
        processor = with_chat(processor, self.chat, self.system)
        template_of(processor)
        return model, processor


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
            return next_training("llava", directory, starts_from=out)
        return [f"python sample.py chat {out} {picture}"]

    def leave_adapter(out: Path) -> None:
        """Adapters are left twice: alone, for the base that they belong to, and as part of the weights."""
        if (lora := model.config.lora) is not None:
            save_adapter(out / "adapter", model, base=str(recipe.starts_from), config=lora)
            model.merge_lora()

    cache = VisionCache.of_conversations(model, processor, conversations)
    samples = ConversationTurns(conversations, processor, cache, directory, captions=captions)
    scores = Generated(model, processor, directory, more, ask=not captions)
    progress = against(f"uniform {log(processor.vocab_size):.2f}")
    return Job(recipe, model, processor, samples, scores, progress, origins, cache.prepare, leave_adapter)


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
}
