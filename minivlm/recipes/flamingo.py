"""Flamingo: new layers teach a frozen language model to read images, and to learn from examples in its prompt.

    clip-resnet ─ vision tower, frozen ─┐
    lm ─ language model, frozen ────────┴→ flamingo (lessons in new words, and conversations)

Alayrac et al. 2022, "Flamingo: a Visual Language Model for Few-Shot Learning". The language model knows from its texts how
to pick up a word; the resampler and the gated layers only have to tell it what the images show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log
from pathlib import Path
from shlex import quote
from typing import Any

from minivlm import evaluate
from minivlm.datasets.class_episodes import class_lessons, is_class_folder, read_classes
from minivlm.datasets.conversations import Conversations
from minivlm.datasets.interleaved import Interleaved, is_interleaved
from minivlm.datasets.judge import conversation_problem
from minivlm.datasets.sequence_batches import ConversationTurns, Documents, Mixed, NewWords
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.conversations import ShapesConversations
from minivlm.datasets.shapes.shots import MOST_WAYS, Lessons, shot_episodes
from minivlm.errors import UserError
from minivlm.layers.gated_cross_attention import GatedConfig
from minivlm.layers.perceiver import PerceiverConfig
from minivlm.metrics import Score
from minivlm.models.flamingo import Flamingo, FlamingoConfig
from minivlm.processor import Processor
from minivlm.recipes.folders import SHAPES, check_fills_a_batch, check_suits, open_training_conversations
from minivlm.recipes.job import Job, Progress, against
from minivlm.recipes.parts import (
    LATENTS,
    build,
    join_processors,
    load_language_model,
    load_vision_tower,
    opened,
    reading,
    resampling,
    take,
)
from minivlm.recipes.recipe import FolderData, Recipe
from minivlm.recipes.scores import VALIDATED, Generated, NewClasses
from minivlm.recipes.text_scores import DocumentPerplexity
from minivlm.recipes.vision_cache import VisionCache
from minivlm.training import OptimiserConfig

WAYS = 5  # of lessons about classes: words to choose from, with an example of each
EPOCH = 10_000  # such lessons; there is no end of them


@dataclass(frozen=True, kw_only=True)
class GatedLayers:
    """What a Flamingo has between its vision tower and its language model; the rest follows from the two."""

    vision_layers: tuple[int, ...] = (-2,)
    resampler: PerceiverConfig = LATENTS  # its context_width and positions follow from the tower
    gated: GatedConfig = field(default_factory=GatedConfig)
    every: int = 1  # a gated layer before every n-th block of the language model


@dataclass(frozen=True, kw_only=True)
class LessonData(FolderData):
    lessons: float = 0.2  # share of the samples that teach new words, where the data is the shapes world


@dataclass(frozen=True, kw_only=True)
class FlamingoRecipe(Recipe):
    what = "a Flamingo"
    learns_from = ("documents", "classes", "conversations")
    judged_by = ("documents", "classes", "questions", "captions")
    vision_from: str = "out/clip-resnet"  # a CLIP or a tower alone (DINOv2), ours, published or a hub id
    language_from: str = "out/lm"  # likewise, a language model
    model: GatedLayers = GatedLayers()
    data: LessonData = LessonData()
    freeze_vision: bool = True  # False: the tower learns as well, for images unlike those that it was trained on
    store_frozen: bool = True  # False: the model that is left names its frozen parts, and holds only what is new
    chat: str | None = None  # how turns are written, by name; None: as the language model has it
    system: str | None = None  # what the system says first; None: as the chat template has it; "": nothing

    def builds_on(self) -> dict[str, str]:
        return {"vision_from": "clip-resnet", "language_from": "lm"}

    def external_weights(self) -> dict[str, str]:
        if self.store_frozen:
            return {}
        frozen = ("vision", "language_model") if self.freeze_vision else ("language_model",)
        return {part: self.origins()[part] for part in frozen}

    def origins(self) -> dict[str, str]:
        if self.starts_from:
            return dict.fromkeys(("vision", "resampler", "gated", "language_model"), self.starts_from)
        return {"vision": self.vision_from, "language_model": self.language_from}

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        model, processor = opened(self, Flamingo, checkpoint) or self.compose()
        model.freeze("language_model", *(["vision"] if self.freeze_vision else []))
        directory = self.data.source
        if is_interleaved(directory) or is_class_folder(directory):
            check_suits(self, directory)
            fed = documents(self, model, processor) if is_interleaved(directory) else classes(self, model, processor)
        else:
            problem = conversation_problem(processor)
            conversations = open_training_conversations(self, processor.image_size, quiet=quiet, problem=problem)
            fed = of_conversations(self, model, processor, conversations)
        loss = against("uniform", log(processor.vocab_size))
        progress = Progress(lambda line: f"{loss(line)}, gates {gates_text(model)}", loss.chances)
        return Job(self, model, processor, progress=progress, origins=self.origins(), **fed)

    def compose(self) -> tuple[Flamingo, Processor]:
        """Vision tower and language model put together, with a new resampler and new gated layers between them."""
        tower, images = load_vision_tower(self.vision_from)
        language, text = load_language_model(self.language_from, chat=self.chat, system=self.system)
        c, vision = self.model, tower.config
        config = FlamingoConfig(
            **reading(vision, c.vision_layers),
            language=language.config,
            resampler=resampling(c.resampler, vision, c.vision_layers),
            image_token=text.image_token_id,
            gated=c.gated,
            every=c.every,
        )
        model = build(Flamingo, config, seed=self.seed)
        take(model.vision, tower)
        take(model.language_model, language)
        return model, join_processors(images, text, image_tokens=config.image_tokens, context=language.config.context)


def gates_text(model: Flamingo) -> str:
    """How far the gates are open, of attention and MLP together, layer by layer."""
    return " ".join(f"{gate:.2f}" for gate in model.gates().mean(dim=1).tolist())


# ---- what it is fed, and judged by: the fields of a Job --------------------------------------------------------------


def documents(recipe: FlamingoRecipe, model: Flamingo, processor: Processor) -> dict[str, Any]:
    """What follows the first image of a document is learnt; judged is how well that of held-out ones is expected."""
    directory = recipe.data.source
    train = Interleaved(directory, "train", image_size=processor.image_size)
    train.leave_out(processor)
    scores = DocumentPerplexity(model, processor, directory, recipe.batch_size)
    check_fills_a_batch(len(train), recipe.batch_size, "training documents", directory)
    read = lambda indices: [image for images in train.images(indices) for image in images]
    cache = VisionCache(model, processor, len(train), read, single=False)
    return dict(samples=Documents(train, processor, directory), scores=scores, prepare=cache.prepare)


def classes(recipe: FlamingoRecipe, model: Flamingo, processor: Processor) -> dict[str, Any]:
    """The names of classes are learnt, new in every lesson; judged are classes held out, one example each."""
    directory = recipe.data.source
    known = read_classes(Path(directory), "train")
    if len(known) < WAYS:
        raise UserError(
            f"{directory} has {len(known)} training classes, but a lesson has up to {WAYS}: add some, or give "
            "a folder with interleaved.jsonl or conversations."
        )
    lessons, paths = class_lessons(known)
    read = lambda indices: [paths[i] for i in indices]
    cache = VisionCache(model, processor, len(paths), read, keep_pixels=True)
    note = f"lessons about {len(paths)} pictures of {len(known)} classes in {directory}"
    return dict(
        samples=NewWords(lessons, processor, cache, ways=WAYS, n=EPOCH, note=note),
        scores=NewClasses(model, processor, directory, ways=WAYS),
        prepare=cache.prepare,
        of_classes=True,
    )


def of_conversations(
    recipe: FlamingoRecipe, model: Flamingo, processor: Processor, conversations: Conversations
) -> dict[str, Any]:
    """Conversations are learnt and, in the shapes world, lessons; judged are answers, and new words from examples."""
    directory, share = recipe.data.source, recipe.data.lessons
    world = is_world(directory)
    where = "" if Path(directory) == SHAPES else f" --data {quote(str(directory))}"
    shots = lambda out, _: [f"python -m minivlm.evaluate {out}{where} --shots 0 1 2 4 8"] if world else []
    generated = Generated(model, processor, directory, shots, ask=True)
    cache = VisionCache.of_conversations(model, processor, conversations)
    samples = ConversationTurns(conversations, processor, cache, directory)
    taught = isinstance(conversations, ShapesConversations) and bool(share)
    if taught:
        lessons = Lessons.of_scenes(conversations.world.scenes)
        if len(lessons.images) < MOST_WAYS:
            raise UserError(
                f"{directory} shows only {len(lessons.images)} looks alone, but a lesson has up to {MOST_WAYS}: make a "
                "world with more pictures, or leave lessons out with --data.lessons 0."
            )
        samples = Mixed(samples, NewWords(lessons, processor, cache, ways=MOST_WAYS, n=EPOCH), share)
    scores = AnswersAndNewWords(generated, taught=taught) if world else generated
    return dict(samples=samples, scores=scores, prepare=cache.prepare)


class AnswersAndNewWords:
    """Answers, and the words of held-out lessons over the number of examples; where lessons were taught, a checkpoint is
    judged by both alike."""

    def __init__(self, generated: Generated, *, taught: bool):
        self.generated, self.taught, self.next_commands = generated, taught, generated.next_commands
        self.name = "accuracy of answers and of new words" if taught else generated.name
        self.shots: dict[str, Score] = {}  # scores by the number of examples, once it has been judged

    def validate(self, most: int) -> float:
        of, answers = self.generated, self.generated.validate(most)
        if not self.taught:
            return answers
        episodes = shot_episodes(VALIDATED, shots=2, seed=1, image_size=of.processor.image_size)
        return (answers + evaluate.few_shot_accuracy(of.model, of.processor, episodes).value) / 2

    def evaluate(self) -> dict[str, Score]:
        of, scores = self.generated, self.generated.evaluate()
        self.shots = evaluate.few_shot(of.model, of.processor, of.directory)
        return scores | self.shots

    def figure(self, path: Path) -> None:
        """Answers and captions; and the curves over the number of examples, in few-shot.png beside it."""
        self.generated.figure(path)
        if self.shots:
            evaluate.few_shot_picture(self.shots, path.with_name("few-shot.png"))


FLAMINGO_RECIPES = {
    "flamingo": FlamingoRecipe(
        summary="Flamingo: a frozen language model attends to images through gated layers, and learns words from its prompt",
        measured="31 to 36 min on one busy core: words from an example 100 %, 79 to 90 % of questions (4 runs, with GELU)",
        optimiser=OptimiserConfig(learning_rate=1.5e-3, warmup=100),
        steps=2400,
        batch_size=64,
        save_every=400,
    ),
}
