"""The prefix pattern as recipes: what they have in common, and the captioner, which is trained as a whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shlex import quote

import numpy as np
from torch import Tensor

from minivlm import evaluate
from minivlm.checkpoint import load
from minivlm.conversation import Sample, collate
from minivlm.datasets.conversations import Conversations, open_conversations
from minivlm.datasets.judge import Problem
from minivlm.datasets.shapes import is_world
from minivlm.layers.language_model import LanguageModelConfig
from minivlm.layers.vit import VisionConfig
from minivlm.metrics import Score, vqa_accuracy
from minivlm.models.captioner import ImageCaptioningConfig, ImageCaptioningModel
from minivlm.processor import Processor
from minivlm.recipes.base import Recipe
from minivlm.recipes.shared import build, check_fills_a_batch, check_suits, make_world_if_missing, speaking, suited
from minivlm.recipes.work import Work
from minivlm.training import OptimiserConfig, is_first_process

VALIDATED = 200  # captions, or answers in whole sentences


@dataclass(frozen=True, kw_only=True)
class ConversationsConfig:
    directory: str = "data/shapes"
    vocab_size: int = 512  # of a tokeniser that is trained on it; not used where a language model brings its own


def open_train(
    recipe: Recipe, image_size: int, *, quiet: bool, problem: Problem | None = None, captions: bool = False
) -> Conversations:
    """The training split of recipe.data; the shapes world is made if it is missing. UserError where it does not suit the
    recipe or fill a batch.

    problem, captions: what is left out, see `Conversations.leave_out`
    """
    directory = recipe.data.directory
    make_world_if_missing(directory, image_size, quiet=quiet)
    check_suits(recipe, directory)
    talk = open_conversations(directory, "train", image_size=image_size)
    if recipe.learns_from == ("captions",):
        talk.keep_captioned()
    if problem is not None:
        talk.leave_out(problem, captions=captions)
    check_fills_a_batch(len(talk), recipe.batch_size, "training samples", directory)
    return talk


class Speaking(Work):
    """A model that speaks about pictures, at work. answers: it is trained, and so judged, on questions as well."""

    answers = False

    def __init__(self, recipe: Recipe, model, processor: Processor, train: Conversations):
        super().__init__(recipe, model, processor, len(train))
        self.train = train
        self.chance_text = f"uniform {np.log(processor.vocab_size):.2f}"
        self.val = open_conversations(recipe.data.directory, "val", image_size=processor.image_size)
        shapes = is_world(recipe.data.directory)
        self.captions_name = "captions, object recall" if shapes else "captions, words in common"
        self.val_questions = self.val.questions()
        self.score_name = self.captions_name

    def check_held_out(self) -> None:
        """UserError for what would end the first evaluation: it is told before the first step."""
        for talk in (self.val, self.test) if is_first_process() and not is_world(self.recipe.data.directory) else ():
            talk.check_pictures()
            if self.answers:
                evaluate.check_questions(self.model, self.processor, talk)

    def notes(self) -> list[str]:
        return [f"{len(self.train)} training samples in {self.recipe.data.directory}", *self.train.notes]

    def key(self, index: int) -> str:
        return self.train.key(index)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """One of those of a training picture."""
        known = self.train.captions(index)
        return known[int(rng.random() * len(known))]

    def evaluate(self) -> dict[str, Score]:
        where = self.recipe.data.directory
        return evaluate.speech(self.model, self.processor, where, ask_questions=self.answers)

    def picture(self, path: Path) -> None:
        where = self.recipe.data.directory
        evaluate.speech_picture(self.model, self.processor, where, path, ask_questions=self.answers)

    def captions_score(self) -> float:
        """Of 200 validation pictures."""
        scores = evaluate.captions(self.model, self.processor, self.val, self.recipe.data.directory, most=VALIDATED)
        return scores[self.captions_name].value

    def judge_by_answers(self) -> None:
        self.answers = True
        self.score_name = evaluate.FREE_ANSWERS if self.val.free_answers else "accuracy of answers"

    def answers_score(self) -> float:
        """Of the validation questions; of those in conversations, 200."""
        free = self.val.free_answers
        questions = self.val_questions[: VALIDATED if free else None]
        said = evaluate.ask(self.model, self.processor, self.val, questions)
        return (evaluate.words_right(questions, said) if free else vqa_accuracy(questions, said)["accuracy"]).value

    def held_out_picture(self) -> str:
        return self.path(self.test, next(i for i in range(len(self.test)) if self.test.images([i])[0]))

    def held_out_question(self) -> str:
        """A picture and a question, as words of a command; nothing where there are no questions."""
        if is_world(self.recipe.data.directory):
            return f'{self.held_out_picture()} "how many red shapes are there?"'
        asked = next((q for q in self.test.questions() if len(self.test.images([q.index])[0]) == 1), None)
        return f"{self.path(self.test, asked.index)} {quote(asked.text)}" if asked else ""

    @cached_property
    def test(self) -> Conversations:
        return open_conversations(self.recipe.data.directory, "test", image_size=self.processor.image_size)

    def path(self, talk: Conversations, index: int) -> str:
        return quote(str(Path(self.recipe.data.directory) / talk.key(index)))


# ---- the captioner ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CaptionerRecipe(Recipe):
    what = "a captioner"
    learns_from = ("captions",)
    model: ImageCaptioningConfig  # vocab_size and end_tokens follow from the tokeniser
    data: ConversationsConfig = ConversationsConfig()

    def for_data(self, directory: str, out: str) -> CaptionerRecipe:
        """The same on another folder's captions."""
        vocab_size = self.data.vocab_size if is_world(directory) else 4096
        data = replace(self.data, directory=directory, vocab_size=vocab_size)
        return suited(self, directory, summary=f"a captioner of {directory}", data=data)

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Captioner:
        size, context = self.model.vision.image_size, self.model.language.context
        train = open_train(self, size, quiet=quiet)
        if checkpoint is not None:
            _, processor = load(checkpoint)
        else:
            words = (text for i in range(len(train)) for text in train.captions(i))
            room = context - self.model.vision.patches
            processor = Processor.train(words, vocab_size=self.data.vocab_size, image_size=size, context=room)
        config = replace(self.model, language=speaking(self.model.language, processor))
        model = build(ImageCaptioningModel, config, seed=self.seed)
        work = Captioner(self, model, processor, train)
        work.check_held_out()
        return work


class Captioner(Speaking):
    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """images (B/W, 3, S, S), tokens and labels (B/W, T) of process `rank` of W."""
        share = self.share(step, rank, world)
        captions = [self.caption(index, rng) for index, rng in share]
        rows = [self.processor.cut(row) for row in self.processor.encode(captions)]
        pictures = self.train.images([index for index, _ in share])
        images = self.processor.images([picture for [picture] in pictures])
        return {"images": images, **collate([Sample(row, row, []) for row in rows], self.processor.pad_token)}

    def length(self, index: int, rng: np.random.Generator) -> int:
        return len(self.caption(index, rng).split())

    def validate(self) -> float:
        return self.captions_score()

    def next_commands(self, out: Path) -> list[str]:
        return [f"python sample.py caption {out} {self.held_out_picture()} --num_beams 3"]


CAPTIONER_RECIPES = {
    "captioner": CaptionerRecipe(
        summary="pictures in, captions out: a ViT and a decoder trained together",
        measured="14 min on one core: 99 % of held-out scenes named exactly, 91 % of those with never-seen pairs (1 seed)",
        model=ImageCaptioningConfig(
            vision=VisionConfig(image_size=48, patch_size=8, width=128, depth=4, heads=4, stem="convolutions"),
            language=LanguageModelConfig(width=128, depth=4, heads=4, vocab_size=512, context=128, rope_theta=10_000.0),
        ),
        optimiser=OptimiserConfig(learning_rate=2e-3, warmup=100),
        steps=1200,
        batch_size=128,
        save_every=400,
    ),
}
