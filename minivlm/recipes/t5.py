"""A small T5 on the texts of a dataset: the encoder reads a text with holes, or how it begins; the decoder says the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from minivlm.datasets.continuation import collate_pairs, split, tokens_of
from minivlm.datasets.shapes.episodes import words
from minivlm.datasets.span_corruption import HOLES, drop, with_holes
from minivlm.layers.t5 import T5, T5Config
from minivlm.processor import Processor
from minivlm.recipes.language import Language, TextsRecipe, prepare_to_copy
from minivlm.recipes.shared import build, speaking
from minivlm.training import OptimiserConfig


@dataclass(frozen=True, kw_only=True)
class T5Recipe(TextsRecipe):
    what = "a small T5"
    model: T5Config  # its vocab_size and end_tokens follow from the tokeniser
    holes: float = 0.75  # share of the texts that are read with holes; the others are cut in two, as when it is used

    def work(self, processor: Processor, texts: list[str] | None) -> Continuation:
        processor.tokenizer.add_special_tokens(list(HOLES))
        model = build(T5, speaking(self.model, processor), seed=self.seed)
        if self.induction_heads:
            prepare_to_copy(model, seed=self.seed)
        return Continuation(self, model, processor, texts)


class Continuation(Language):
    recipe: T5Recipe
    leads_to, option = "blip2", " --lm t5"

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """tokens and mask (B/W, S), labels (B/W, T) of process `rank` of W; every step cuts anew."""
        pairs = [self.pair(index, rng) for index, rng in self.share(step, rank, world)]
        return collate_pairs(pairs, self.processor)

    def pair(self, index: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """What is read of a text, and what is to be said."""
        if rng.random() < self.recipe.holes:
            return with_holes(drop(self.read(index), rng), self.processor)
        return tokens_of(split(self.read(index), rng), self.processor)

    def length(self, index: int, rng: np.random.Generator) -> int:
        holed = rng.random() < self.recipe.holes
        return len((words(self.read(index)) if holed else split(self.read(index), rng)[0]).split())


T5_RECIPES = {
    "t5": T5Recipe(
        summary="a small T5 on the texts of the shapes world: an encoder reads how they begin, a decoder says the rest",
        measured="23 min on one busy core: 88 % of told scenes' questions (chance 29), new words 97 % (1 seed, earlier texts)",
        model=T5Config(
            width=128,
            depth=4,
            decoder_depth=2,  # what is said is short
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
