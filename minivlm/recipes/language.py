"""Language models on the texts of a dataset, which others are built on: a decoder, and a T5, which has an encoder as well."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from minivlm.conversation import DESCRIBE
from minivlm.datasets.conversations import open_texts
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.episodes import documents
from minivlm.datasets.span_corruption import SENTINELS
from minivlm.datasets.text_batches import SpanCorruption, Texts
from minivlm.errors import UserError
from minivlm.layers.induction import give_induction_heads
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.layers.t5 import T5, T5Config
from minivlm.layers.vocabulary import with_vocabulary
from minivlm.processor import Processor
from minivlm.recipes.folders import check_fills_a_batch, next_training, open_world
from minivlm.recipes.job import Job, against
from minivlm.recipes.parts import build, opened, speaking
from minivlm.recipes.recipe import FolderData, Recipe
from minivlm.recipes.text_scores import Perplexity
from minivlm.training import OptimiserConfig

FOR_TOKENISER = 4000  # texts of the shapes world
IMAGE_SIZE = 48  # of the world, if it is made for its texts


@dataclass(frozen=True, kw_only=True)
class TextData(FolderData):
    vocab_size: int = 512  # of the byte-level BPE that is trained on the texts


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe(Recipe):
    what = "a small language model"
    learns_from = ("texts",)
    taken_by = "--language_from"
    model: LanguageModelConfig  # its vocab_size and end_tokens follow from the tokeniser
    data: TextData = TextData()
    induction_heads: bool = False  # given at the start, see layers/induction.py

    def on(self, directory: str) -> Recipe:
        return replace(self, summary=f"{self.what} on the texts of {directory}")

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        directory = self.data.source
        found = opened(self, LanguageModel, checkpoint)
        texts, processor = open_texts_of(self, found, quiet=quiet)
        model = found[0] if found else self.new(LanguageModel, processor)
        samples = Texts(texts, processor, directory)
        return job(self, model, processor, samples, endless=texts is None, next_recipe="llava")

    def new(self, kind: type[LanguageModel | T5], processor: Processor) -> LanguageModel | T5:
        model = build(kind, speaking(self.model, processor), seed=self.seed)
        if self.induction_heads:
            prepare_to_copy(model, seed=self.seed)
        return model


@dataclass(frozen=True, kw_only=True)
class SpanData(FolderData):
    vocab_size: int = 512  # of the byte-level BPE that is trained on the texts
    holes: float = 0.75  # share of the texts with spans to be generated; the others are cut in two, as when it is used


@dataclass(frozen=True, kw_only=True)
class T5Recipe(LanguageRecipe):
    what = "a small T5"
    model: T5Config  # its vocab_size and end_tokens follow from the tokeniser
    data: SpanData = SpanData()

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        found = opened(self, T5, checkpoint)
        texts, processor = open_texts_of(self, found, quiet=quiet)
        processor.tokenizer.add_special_tokens(list(SENTINELS))
        model = with_vocabulary(found[0], processor.vocab_size) if found else self.new(T5, processor)
        samples = SpanCorruption(Texts(texts, processor, self.data.source), share=self.data.holes)
        return job(self, model, processor, samples, endless=texts is None, next_recipe="blip2", option=" --lm t5")


def open_texts_of(
    recipe: LanguageRecipe, found: tuple[LanguageModel | T5, Processor] | None, *, quiet: bool
) -> tuple[list[str] | None, Processor]:
    """The training texts, None for those of the shapes world; and the tokeniser that comes with a model, or a new one."""
    directory = recipe.data.source
    open_world(recipe, IMAGE_SIZE, quiet=quiet)
    texts = None if is_world(directory) else open_texts(directory, "train")
    if texts is not None:
        check_fills_a_batch(len(texts), recipe.batch_size, "texts", directory)
    if found is not None:
        return texts, found[1]
    words = chain([DESCRIBE], documents(0, "train", FOR_TOKENISER)) if texts is None else texts
    sizes = dict(vocab_size=recipe.data.vocab_size, image_size=IMAGE_SIZE, context=recipe.model.context)
    return texts, Processor.train(words, **sizes)


def prepare_to_copy(model: LanguageModel | T5, *, seed: int) -> None:
    """Induction heads at the start; a UserError for a model that has no room for them."""
    try:
        give_induction_heads(model, torch.Generator().manual_seed(seed))
    except ValueError as error:
        raise UserError(f"{error}; or leave them out with --induction_heads false.") from None


def job(recipe, model, processor: Processor, samples, *, endless: bool, next_recipe: str, option: str = "") -> Job:
    directory = recipe.data.source
    more = lambda out: [f"{command}{option}" for command in next_training(next_recipe, directory)]
    scores = Perplexity(model, processor, directory, more)
    return Job(recipe, model, processor, samples, scores, against("unigrams", scores.chance), endless=endless)


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
    "t5": T5Recipe(
        summary="a small T5 on the texts of the shapes world: an encoder takes their beginnings, a decoder continues them",
        measured="23 min on one busy core: 88 % of told scenes' questions (chance 29), new words 97 % (1 seed, earlier texts)",
        model=T5Config(
            width=128,
            depth=4,
            decoder_depth=2,  # what it generates is short
            heads=8,
            vocab_size=512,
            context=192,
            activation="gelu_tanh",  # as Flan-T5's
            gated_mlp=True,
            mlp_width=320,  # with a gate, as many weights as 480 without
            scale_head=True,  # as the first T5: large embeddings, which are heard above what the blocks add
        ),
        induction_heads=True,
        optimiser=OptimiserConfig(learning_rate=3e-3, warmup=100),
        steps=1600,
        batch_size=64,
        bucket_steps=4,
        save_every=400,
    ),
}
