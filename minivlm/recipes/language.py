"""A language model on the texts of a dataset: what the others are built on. t5.py has one with an encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from torch import Tensor

from minivlm import evaluate
from minivlm.checkpoint import load
from minivlm.conversation import DESCRIBE, Turn, collate
from minivlm.datasets.continuation import split
from minivlm.datasets.conversations import open_texts
from minivlm.datasets.packing import pack
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.episodes import document, documents, words
from minivlm.errors import UserError
from minivlm.evaluate.language import held_out_texts, perplexity, sample, unigram_entropy
from minivlm.layers.induction import give_induction_heads
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.layers.t5 import T5
from minivlm.metrics import Score
from minivlm.model import Model
from minivlm.pictures import Row, sheet
from minivlm.processor import Processor
from minivlm.recipes.base import Recipe
from minivlm.recipes.shared import (
    build,
    check_fills_a_batch,
    check_suits,
    make_world_if_missing,
    next_training,
    speaking,
    suited,
)
from minivlm.recipes.work import Work
from minivlm.tasks.generate import beginning
from minivlm.training import OptimiserConfig

SHAPES_DOCUMENTS = 10**6  # as many as anyone will read; document i is made when it is asked for
FOR_TOKENISER = 4000
VALIDATED = 200  # held-out texts that a checkpoint is judged by
PICTURED, SAID = 12, 24  # beginnings, and tokens that each goes on for
SHOWN = 240  # characters of a beginning in the picture


@dataclass(frozen=True, kw_only=True)
class TextsConfig:
    directory: str = "data/shapes"
    vocab_size: int = 512  # of the byte-level BPE that is trained on them


@dataclass(frozen=True, kw_only=True)
class PackableTextsConfig(TextsConfig):
    pack: bool = False  # several texts in a row, so that less of a batch is padding


@dataclass(frozen=True, kw_only=True)
class TextsRecipe(Recipe):
    """What all recipes on texts alone have in common. One defines `model`, a config, and `work`."""

    learns_from = ("texts",)
    taken_by = "--language_from"
    data: TextsConfig = TextsConfig()
    induction_heads: bool = False  # given at the start, see layers/induction.py

    def for_data(self, directory: str, out: str) -> TextsRecipe:
        """The same on another folder's captions, questions and conversations."""
        vocab_size = self.data.vocab_size if is_world(directory) else 4096
        data = replace(self.data, directory=directory, vocab_size=vocab_size)
        return suited(self, directory, summary=f"{self.what} on the texts of {directory}", data=data)

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Language:
        directory = self.data.directory
        make_world_if_missing(directory, image_size=48, quiet=quiet)
        check_suits(self, directory)
        texts = None if is_world(directory) else open_texts(directory, "train")
        if texts is not None:
            check_fills_a_batch(len(texts), self.batch_size, "texts", directory)
        if checkpoint is not None:
            _, processor = load(checkpoint)
        else:
            words = chain([DESCRIBE], documents(0, "train", FOR_TOKENISER)) if texts is None else texts
            sizes = dict(vocab_size=self.data.vocab_size, image_size=48, context=self.model.context)
            processor = Processor.train(words, **sizes)
        return self.work(processor, texts)

    def work(self, processor: Processor, texts: list[str] | None) -> Language:
        """A new model at work. texts: None for those of the shapes world, which are drawn as they are read."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe(TextsRecipe):
    what = "a small language model"
    model: LanguageModelConfig  # its vocab_size and end_tokens follow from the tokeniser
    data: PackableTextsConfig = PackableTextsConfig()

    def work(self, processor: Processor, texts: list[str] | None) -> Language:
        model = build(LanguageModel, speaking(self.model, processor), seed=self.seed)
        if self.induction_heads:
            prepare_to_copy(model, seed=self.seed)
        return Language(self, model, processor, texts)


def prepare_to_copy(model: LanguageModel | T5, *, seed: int) -> None:
    """Induction heads at the start; a UserError for a model that has no room for them."""
    try:
        give_induction_heads(model, torch.Generator().manual_seed(seed))
    except ValueError as error:
        raise UserError(f"{error}; or leave them out with --induction_heads false.") from None


class Language(Work):
    score_name = "1 / perplexity"
    leads_to, option = "llava", ""  # the recipe that the user trains next, and with which option

    def __init__(self, recipe: TextsRecipe, model: Model, processor: Processor, texts: list[str] | None):
        super().__init__(recipe, model, processor, SHAPES_DOCUMENTS if texts is None else len(texts))
        self.texts = texts
        self.held_out = held_out_texts(recipe.data.directory)
        self.chance_text = f"unigrams {unigram_entropy(self.held_out[:VALIDATED], processor):.2f}"

    def notes(self) -> list[str]:
        if self.texts is None:
            return [f"texts of the shapes world, drawn as they are read ({self.recipe.data.directory})"]
        cut = self.processor.too_long(self.texts)
        notes = (
            [f"{cut} texts are longer than the context of {self.processor.context} and are cut to it"] if cut else []
        )
        return [f"{len(self.texts)} texts in {self.recipe.data.directory}", *notes]

    def read(self, index: int) -> str | list[Turn]:
        return document(0, "train", index) if self.texts is None else self.texts[index]

    def indices(self, step: int):
        if self.texts is not None:
            return super().indices(step)
        B = self.recipe.batch_size  # from an endless supply, in order: a seed begins elsewhere
        return (torch.arange(B) + B * step + self.recipe.seed * 10**7).numpy()

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """tokens and labels (B/W, T) of process `rank` of W; packed: fewer rows, and their segments."""
        samples = [sample(self.read(index), self.processor) for index, _ in self.share(step, rank, world)]
        if self.recipe.data.pack:
            return pack(samples, self.processor.context, self.processor.pad_token)
        return collate(samples, self.processor.pad_token)

    def length(self, index: int, rng: np.random.Generator) -> int:
        return len(sample(self.read(index), self.processor).tokens)

    def key(self, index: int) -> str:
        return f"text {index}"

    def validate(self) -> float:
        return 1 / perplexity(self.model, self.processor, self.held_out[:VALIDATED]).value

    def evaluate(self) -> dict[str, Score]:
        return evaluate.language(self.model, self.processor, self.recipe.data.directory)

    def picture(self, path: Path) -> None:
        """How the model goes on with beginnings of held-out texts that its context has room for: of conversations, what it
        answers; and what the texts say."""
        rows = []
        for number, text in enumerate(self.held_out):
            begun, rest = split(text, np.random.default_rng(number))
            tokens = beginning(begun, self.model, self.processor)
            if len(tokens) + SAID > self.processor.context:
                continue
            if len(rows) == PICTURED:
                break
            tokens = torch.tensor([tokens], device=self.model.device)
            said = self.processor.decode(self.model.generate(tokens, max_new_tokens=SAID))[0].strip()
            shown = begun if len(begun) <= SHOWN else "… " + begun[-SHOWN:].partition(" ")[2]
            truth = "as the text" if said and rest.startswith(said) else f"the text: {rest}"
            rows.append(Row(shown, [], detail=f"goes on: {said} ({truth})"))
        sheet(rows, title="Held-out beginnings, and how the model goes on").save(path)

    def next_commands(self, out: Path) -> list[str]:
        texts = [words(text) for text in self.held_out]
        question, mark, _ = next((text for text in texts if "?" in text), texts[0]).partition("?")
        more = next_training(self.leads_to, self.recipe.data.directory)
        return [f"python sample.py complete {out} {quote(question + mark)}", *(f"{one}{self.option}" for one in more)]


LANGUAGE_RECIPES = {
    "lm": LanguageRecipe(
        summary="a small language model on the texts of the shapes world",
        measured="24 min on one busy core: new words 99 %, questions about told scenes 93 and 96 % (2 seeds)",
        # Rotary positions besides the learned ones: "what came one before" is the same turn everywhere, and copying
        # begins with it (loss after 300 steps: 1.45, without them 1.57). The learned ones tell LLaVA's
        # picture tokens, which always stand at the same places, where in the picture they are.
        model=LanguageModelConfig(width=128, depth=4, heads=4, vocab_size=512, context=192, rope_theta=10_000.0),
        induction_heads=True,
        optimiser=OptimiserConfig(learning_rate=3e-3, warmup=100),
        steps=3000,  # comparing comes late, and which is larger not at all
        batch_size=64,
        bucket_steps=4,  # 84 tokens a row instead of 117, and as good
        save_every=750,
    ),
}
