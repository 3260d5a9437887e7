"""LLaVA in its two stages (Liu et al. 2023a, §4.2): first the projector learns to be read, then the whole to converse.

    clip-resnet ─ vision tower, frozen ──┐
    lm ─ language model, frozen ─────────┴→ llava-stage1 (captions) ─→ llava (conversations)

Stage 2 trains the language model itself, or adapters on it (--lora.rank 16).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minivlm.adapters import save_adapter
from minivlm.checkpoint import load
from minivlm.conversation import Sample, Turn, collate, encode_conversation, template_of, with_chat
from minivlm.datasets.conversations import Conversations
from minivlm.datasets.judge import conversation_problem
from minivlm.errors import UserError
from minivlm.layers.lora import LoRAConfig, add_lora
from minivlm.layers.perceiver import PerceiverConfig
from minivlm.layers.tower import ImageFeatures
from minivlm.losses import labelled
from minivlm.models.llava import LLaVA, LLaVAConfig
from minivlm.processor import Processor
from minivlm.recipes.base import Recipe
from minivlm.recipes.captioner import ConversationsConfig, Speaking, open_train
from minivlm.recipes.frozen import compute_features_once, measure_once
from minivlm.recipes.parts import LATENTS, join_processors, load_language_model, load_vision_model, resampling, take
from minivlm.recipes.shared import next_training, suited
from minivlm.training import OptimiserConfig

LOOKED_AT = 500  # samples, before the first step, to tell how many are cut


@dataclass(frozen=True, kw_only=True)
class LLaVARecipe(Recipe):
    what = "LLaVA"
    learns_from = ("conversations",)
    judged_by = ("questions", "captions")
    stage: Literal["align", "instruct"]
    vision_from: str = "out/clip-resnet"  # a CLIP of ours, a published one, or a hub id: its vision tower
    language_from: str = "out/lm"  # likewise, a language model
    chat: str | None = None  # how turns are written, by name; None: as the language model has it, or the LLaVA
    system: str | None = None  # what the system says first; None: as the chat template has it; "": nothing
    starts_from: str | None = None  # stage "instruct": a LLaVA that went through stage "align"
    projector: Literal["linear", "mlp", "resampler"] = "mlp"
    resampler: PerceiverConfig = (
        LATENTS  # of projector="resampler"; its context_width and positions follow from the tower
    )
    vision_layers: tuple[int, ...] = (-2,)
    tiles: int = 1
    lora: LoRAConfig | None = None  # stage "instruct": None trains the language model itself
    data: ConversationsConfig = field(default_factory=ConversationsConfig)

    def needs(self) -> dict[str, str]:
        if self.stage == "instruct":
            return {"llava-stage1": self.starts_from}
        return {"clip-resnet": self.vision_from, "lm": self.language_from}

    def for_data(self, directory: str, out: str) -> LLaVARecipe:
        """The same on another folder; what it builds on is trained on that folder as well, beside `out`."""
        beside = f"{Path(out).parent / Path(directory).resolve().name}"
        changed = {"data": replace(self.data, directory=directory), "summary": f"{self.summary}, on {directory}"}
        if self.stage == "instruct":
            return suited(self, directory, **changed, starts_from=f"{beside}-llava-stage1")
        return suited(self, directory, **changed, vision_from=f"{beside}-clip", language_from=f"{beside}-lm")

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> LLaVAWork:
        if checkpoint is not None:
            model, processor = load(checkpoint)
        else:
            model, processor = self.align() if self.stage == "align" else self.instruct()
        model.freeze("vision")
        if self.stage == "align":
            model.freeze("language_model")
        judged = dict(problem=conversation_problem(processor), captions=self.stage == "align")
        train = open_train(self, processor.image_size, quiet=quiet, **judged)
        return LLaVAWork(self, model, processor, train)

    def align(self) -> tuple[LLaVA, Processor]:
        """Vision tower and language model put together, with a new projector between them."""
        clip, eyes = load_vision_model(self.vision_from)
        speaker, words = load_language_model(self.language_from, chat=self.chat, system=self.system)
        vision = clip.config.vision
        reads = resampling(self.resampler, vision, self.vision_layers) if self.projector == "resampler" else None
        config = LLaVAConfig(
            vision=vision,
            language=speaker.config,
            image_token=words.image_token_id,
            projector=self.projector,
            resampler=reads,
            vision_layers=self.vision_layers,
            tiles=self.tiles,
        )
        model = LLaVA(config, seed=self.seed)
        take(model.vision, clip.vision)
        take(model.language_model, speaker)
        sees = dict(image_tokens=config.image_tokens, tiles=self.tiles)
        return model, join_processors(eyes, words, context=speaker.config.context, **sees)

    def instruct(self) -> tuple[LLaVA, Processor]:
        model, processor = load(self.starts_from)
        if not isinstance(model, LLaVA):
            raise UserError(f"--starts_from {self.starts_from} holds a {type(model).__name__}, but a LLaVA is wanted.")
        if self.lora is not None:
            add_lora(model.language_model, self.lora, generator=torch.Generator().manual_seed(self.seed))
            model.config = replace(model.config, lora=self.lora)
        processor = with_chat(processor, self.chat, self.system)
        template_of(processor)
        return model, processor


class PrefixWork(Speaking):
    """A model at work whose pictures stand in the text, seen by a frozen tower.

    origins: see `Work`. answers: it is judged by its answers, if the data have questions; else by its captions. Where the
    data have no captions, by its answers all the same.
    """

    def __init__(
        self, recipe, model, processor: Processor, train: Conversations, *, origins: dict[str, str], answers: bool
    ):
        super().__init__(recipe, model, processor, train)
        self.origins = origins
        if self.val_questions and (answers or not any(map(self.val.captions, range(len(self.val))))):
            self.judge_by_answers()
        self.features: Tensor | None = None
        self.check_held_out()

    def notes(self) -> list[str]:
        """And how many conversations the context has no room for."""
        n = min(len(self.train), LOOKED_AT)
        cut = sum(self.sample(i, np.random.default_rng(i)).cut > 0 for i in range(n))
        context = self.processor.context
        told = [f"{cut} of the first {n} samples are longer than the context of {context} tokens: their text is cut"]
        return super().notes() + (told if cut else [])

    def prepare(self, device: torch.device, precision: torch.dtype) -> None:
        """A frozen tower sees every training picture once; its features are kept for all epochs."""
        first = chain.from_iterable(self.train.images([i])[0] for i in range(len(self.train)))
        measure_once(self.model, self.processor, first, device, precision)
        learns = any(p.requires_grad for p in self.model.vision.parameters())
        if self.train.one_picture_each and not learns:
            single = lambda indices: [picture for [picture] in self.train.images(indices)]
            self.features = compute_features_once(
                self.model, self.processor, len(self.train), single, device, precision
            )

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        turns, context = self.conversation(index, rng), self.processor.context
        try:
            return encode_conversation(turns, self.processor, context=context)
        except UserError:  # of several questions about a picture, of which each fits alone (datasets/judge.py)
            return encode_conversation(turns[:2], self.processor, context=context)

    def conversation(self, index: int, rng: np.random.Generator) -> list[Turn]:
        return self.train.conversation(index, rng)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """tokens and labels (B/W, T), where the labels are, and images or their features, of process `rank` of W."""
        samples, pictures = zip(*(self.draw(index, rng) for index, rng in self.share(step, rank, world)), strict=True)
        batch = collate(samples, self.processor.pad_token)
        batch["where"] = labelled(batch["labels"])
        return {**batch, **self.pictures(list(chain.from_iterable(pictures)))}

    def length(self, index: int, rng: np.random.Generator) -> int:
        return sum(len(turn.text.split()) for turn in self.conversation(index, rng))

    def draw(self, index: int, rng: np.random.Generator) -> tuple[Sample, list[int]]:
        """What is read of a training sample, and the samples that its pictures are of."""
        return self.sample(index, rng), [index]

    def pictures(self, indices: list[int]) -> dict[str, Tensor]:
        """The pictures of these samples, or what the tower saw of them."""
        if self.features is not None:
            return {"images": ImageFeatures(self.features[torch.tensor(indices)])}
        pictures = [picture for pictures in self.train.images(indices) for picture in pictures]
        return {"images": self.processor.images(pictures)} if pictures else {}

    def validate(self) -> float:
        return self.answers_score() if self.answers else self.captions_score()

    def next_commands(self, out: Path) -> list[str]:
        asked = self.held_out_question()
        return [
            f"python sample.py caption {out} {self.held_out_picture()}",
            *([f"python sample.py answer {out} {asked}"] if asked else []),
        ]


class LLaVAWork(PrefixWork):
    def __init__(self, recipe: LLaVARecipe, model: LLaVA, processor: Processor, train: Conversations):
        align = recipe.stage == "align"
        origins = {
            "vision": recipe.vision_from if align else recipe.starts_from,
            "projector": "new" if align else recipe.starts_from,
            "language_model": recipe.language_from if align else recipe.starts_from,
            "language_model LoRA": "new, zero",
        }
        super().__init__(recipe, model, processor, train, origins=origins, answers=not align)

    def conversation(self, index: int, rng: np.random.Generator) -> list[Turn]:
        if self.recipe.stage == "align":
            return self.train.caption_conversation(index, rng)
        return self.train.conversation(index, rng)

    def next_commands(self, out: Path) -> list[str]:
        commands = super().next_commands(out)
        if self.recipe.stage == "align":
            return [commands[0], *next_training("llava", self.recipe.data.directory, starts_from=out)]
        return [*commands, f"python sample.py chat {out} {self.held_out_picture()}"]

    def finish(self, out: Path) -> None:
        """Adapters are left twice: alone, for the base that they belong to, and as part of the weights."""
        if (lora := self.model.config.lora) is not None:
            save_adapter(out / "adapter", self.model, base=str(self.recipe.starts_from), config=lora)
            self.model.merge_lora()


LLAVA_RECIPES = {
    "llava-stage1": LLaVARecipe(
        summary="LLaVA, stage 1: the projector alone learns, on captions",
        measured="1.5 to 2 min on one core, after clip-resnet and lm",
        stage="align",
        optimiser=OptimiserConfig(learning_rate=2e-3, warmup=50, weight_decay=0.0),
        steps=300,
        batch_size=64,
        save_every=300,
    ),
    "llava": LLaVARecipe(
        summary="LLaVA: a frozen vision tower, a projector and a language model that converse about pictures",
        measured="12 to 19 min on one busy core: 94 % of balanced questions, 78 % about never-seen pairs (3 seeds)",
        stage="instruct",
        starts_from="out/llava-stage1",
        optimiser=OptimiserConfig(learning_rate=2e-3, warmup=100),
        steps=2000,
        batch_size=64,
        save_every=500,
    ),
}
