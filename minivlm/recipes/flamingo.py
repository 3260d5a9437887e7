"""Flamingo: new layers teach a frozen language model to read pictures, and to learn from examples in its prompt.

    clip-resnet ─ vision tower, frozen ─┐
    lm ─ language model, frozen ────────┴→ flamingo (lessons in new words, and conversations)

Alayrac et al. 2022, "Flamingo: a Visual Language Model for Few-Shot Learning". The language model knows from its texts how
to pick up a word; the resampler and the gated layers only have to tell it what the pictures show.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote

import numpy as np

from minivlm import evaluate
from minivlm.checkpoint import load
from minivlm.conversation import Sample
from minivlm.datasets.class_episodes import is_class_folder
from minivlm.datasets.conversations import Conversations
from minivlm.datasets.interleaved import is_interleaved
from minivlm.datasets.judge import conversation_problem
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.conversations import ShapesConversations
from minivlm.datasets.shapes.shots import MOST_WAYS, Lessons, shot_episodes
from minivlm.errors import UserError
from minivlm.layers.gated_cross_attention import GatedConfig
from minivlm.layers.perceiver import PerceiverConfig
from minivlm.metrics import Score
from minivlm.models.flamingo import Flamingo, FlamingoConfig
from minivlm.processor import Processor
from minivlm.recipes.base import Recipe
from minivlm.recipes.captioner import ConversationsConfig, open_train
from minivlm.recipes.interleaved import InterleavedWork, gates_text
from minivlm.recipes.lessons import LessonsWork, lesson_sample
from minivlm.recipes.llava import PrefixWork
from minivlm.recipes.parts import (
    LATENTS,
    join_processors,
    load_language_model,
    load_vision_model,
    reading,
    resampling,
    take,
)
from minivlm.recipes.shared import SHAPES, build, check_suits, suited
from minivlm.recipes.work import Work
from minivlm.training import OptimiserConfig

WORDS = 8  # about so many tokens has an example of a lesson
VALIDATED = 200  # episodes of two examples that a checkpoint is judged by, besides the questions


@dataclass(frozen=True, kw_only=True)
class FlamingoRecipe(Recipe):
    what = "a Flamingo"
    learns_from = ("documents", "classes", "conversations")
    judged_by = ("documents", "classes", "questions", "captions")
    vision_from: str = "out/clip-resnet"  # a CLIP of ours, a published one, or a hub id: its vision tower
    language_from: str = "out/lm"  # likewise, a language model
    starts_from: str | None = None  # a Flamingo that goes on learning, in place of both and of what is new
    vision_layers: tuple[int, ...] = (-2,)
    resampler: PerceiverConfig = LATENTS  # its context_width and positions follow from the tower
    gated: GatedConfig = field(default_factory=GatedConfig)
    every: int = 1  # a gated layer before every n-th block of the language model
    freeze_vision: bool = True  # False: the tower learns as well, to see what it has never seen
    store_frozen: bool = True  # False: the model that is left names its frozen parts, and holds only what is new
    chat: str | None = None  # how turns are written, by name; None: as the language model has it
    system: str | None = None  # what the system says first; None: as the chat template has it; "": nothing
    lessons: float = 0.2  # share of the samples that teach new words, where the data is the shapes world
    data: ConversationsConfig = field(default_factory=ConversationsConfig)

    def needs(self) -> dict[str, str]:
        if self.starts_from is not None:
            return {}
        return {"clip-resnet": self.vision_from, "lm": self.language_from}

    def for_data(self, directory: str, out: str) -> FlamingoRecipe:
        """The same on another folder; what it builds on is trained on that folder as well, beside `out`."""
        beside = f"{Path(out).parent / Path(directory).resolve().name}"
        return suited(
            self,
            directory,
            summary=f"{self.summary}, on {directory}",
            data=replace(self.data, directory=directory),
            vision_from=f"{beside}-clip",
            language_from=f"{beside}-lm",
        )

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Work:
        model, processor = load(checkpoint) if checkpoint is not None else self.new_model()
        model.freeze("language_model", *(["vision"] if self.freeze_vision else []))
        directory = self.data.directory
        if is_interleaved(directory) or is_class_folder(directory):
            check_suits(self, directory)
            work = (InterleavedWork if is_interleaved(directory) else LessonsWork)(self, model, processor)
            work.origins = self.origins()
            return work
        train = open_train(self, processor.image_size, quiet=quiet, problem=conversation_problem(processor))
        return FlamingoWork(self, model, processor, train)

    def origins(self) -> dict[str, str]:
        if self.starts_from is not None:
            return dict.fromkeys(("vision", "resampler", "gated", "language_model"), self.starts_from)
        return {"vision": self.vision_from, "language_model": self.language_from}

    def base(self) -> dict[str, str]:
        if self.store_frozen:
            return {}
        frozen = ("vision", "language_model") if self.freeze_vision else ("language_model",)
        return {part: self.origins()[part] for part in frozen}

    def new_model(self) -> tuple[Flamingo, Processor]:
        if self.starts_from is None:
            return self.compose()
        model, processor = load(self.starts_from)
        if not isinstance(model, Flamingo):
            raise UserError(
                f"--starts_from {self.starts_from} holds a {type(model).__name__}, but a Flamingo is wanted."
            )
        return model, processor

    def compose(self) -> tuple[Flamingo, Processor]:
        """Eyes and language model put together, with a new resampler and new gated layers between them."""
        clip, eyes = load_vision_model(self.vision_from)
        speaker, words = load_language_model(self.language_from, chat=self.chat, system=self.system)
        vision = clip.config.vision
        config = FlamingoConfig(
            **reading(vision, self.vision_layers),
            language=speaker.config,
            resampler=resampling(self.resampler, vision, self.vision_layers),
            image_token=words.image_token_id,
            gated=self.gated,
            every=self.every,
        )
        model = build(Flamingo, config, seed=self.seed)
        take(model.vision, clip.vision)
        take(model.language_model, speaker)
        return model, join_processors(eyes, words, image_tokens=config.image_tokens, context=speaker.config.context)


class FlamingoWork(PrefixWork):
    def __init__(self, recipe: FlamingoRecipe, model: Flamingo, processor: Processor, train: Conversations):
        super().__init__(recipe, model, processor, train, origins=recipe.origins(), answers=True)
        self.shots: dict[str, Score] = {}  # scores by the number of examples, once it has been judged
        world = isinstance(train, ShapesConversations)
        self.lessons = Lessons.of_scenes(train.world.scenes) if world and recipe.lessons else None
        if self.lessons is not None:
            if len(self.lessons.pictures) < MOST_WAYS:
                raise UserError(
                    f"{recipe.data.directory} shows only {len(self.lessons.pictures)} looks alone, but a lesson has up to "
                    f"{MOST_WAYS}: make a world with more pictures, or leave lessons out with --lessons 0."
                )
            self.score_name = "accuracy of answers and of new words"

    def draw(self, index: int, rng: np.random.Generator) -> tuple[Sample, list[int]]:
        """A conversation about a picture, or a lesson about several others."""
        if not self.is_lesson(rng):
            return super().draw(index, rng)
        named = self.lessons.lesson(rng)
        return lesson_sample(named, self.processor), [picture for picture, _ in named]

    def is_lesson(self, rng: np.random.Generator) -> bool:
        return self.lessons is not None and rng.random() < self.recipe.lessons

    def length(self, index: int, rng: np.random.Generator) -> int:
        if not self.is_lesson(rng):
            return super().length(index, rng)
        return WORDS * len(self.lessons.lesson(rng))

    def progress(self, line: dict[str, float]) -> str:
        return f"{super().progress(line)}, gates {gates_text(self.model)}"

    def validate(self) -> float:
        answers = super().validate()
        if self.lessons is None:
            return answers
        episodes = shot_episodes(VALIDATED, shots=2, seed=1, image_size=self.processor.image_size)
        return (answers + evaluate.few_shot_accuracy(self.model, self.processor, episodes).value) / 2

    def evaluate(self) -> dict[str, Score]:
        scores = super().evaluate()
        if is_world(self.recipe.data.directory):
            self.shots = evaluate.few_shot(self.model, self.processor, self.recipe.data.directory)
        return scores | self.shots

    def picture(self, path: Path) -> None:
        """Answers and captions; and the curves over the number of examples, in few-shot.png beside it."""
        super().picture(path)
        if self.shots:
            evaluate.few_shot_picture(self.shots, path.with_name("few-shot.png"))

    def next_commands(self, out: Path) -> list[str]:
        where = self.recipe.data.directory
        data = "" if Path(where) == SHAPES else f" --data {quote(str(where))}"
        shots = [f"python -m minivlm.evaluate {out}{data} --shots 0 1 2 4 8"] if is_world(where) else []
        return [*super().next_commands(out), *shots]


FLAMINGO_RECIPES = {
    "flamingo": FlamingoRecipe(
        summary="Flamingo: a frozen language model reads pictures through gated layers, and learns words from its prompt",
        measured="31 to 36 min on one busy core: words from an example 100 %, 79 to 90 % of questions (4 runs, with GELU)",
        optimiser=OptimiserConfig(learning_rate=1.5e-3, warmup=100),
        steps=2400,
        batch_size=64,
        save_every=400,
    ),
}
