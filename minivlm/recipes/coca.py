"""CoCa: one model that compares images with captions, and writes them. Trained from scratch, on captions alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from minivlm.datasets.batches import Captions
from minivlm.datasets.folder import open_pairs
from minivlm.layers.language_model import LanguageModelConfig
from minivlm.layers.vit import VisionConfig
from minivlm.metrics import Score
from minivlm.models.coca import CoCa, CoCaConfig
from minivlm.processor import Processor
from minivlm.recipes.captioner import CaptionData
from minivlm.recipes.folders import check_fills_a_batch, check_held_out, open_world
from minivlm.recipes.job import Job, each_against
from minivlm.recipes.parts import build, opened, speaking
from minivlm.recipes.recipe import Recipe
from minivlm.recipes.scores import Generated, Retrieval
from minivlm.training import OptimiserConfig


@dataclass(frozen=True, kw_only=True)
class CoCaRecipe(Recipe):
    what = "a CoCa"
    learns_from = ("captions",)
    model: CoCaConfig  # vocab_size and end_tokens follow from the tokeniser
    data: CaptionData = field(default_factory=CaptionData)

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        found, directory = opened(self, CoCa, checkpoint), self.data.source
        size = found[1].image_size if found else self.model.vision.image_size
        open_world(self, size, quiet=quiet)
        pairs = open_pairs(directory, "train", image_size=size)
        check_fills_a_batch(len(pairs), self.batch_size, "training images", directory)
        if found is None:
            sizes = dict(vocab_size=self.data.vocab_size, image_size=size, context=self.model.text.context)
            processor = Processor.train(pairs.texts(), **sizes)
            config = replace(self.model, text=speaking(self.model.text, processor))
            found = build(CoCa, config, seed=self.seed), processor
        model, processor = found
        check_held_out(directory, processor.image_size)
        samples = Captions(pairs, processor, directory, whole=True)
        scores = CaptionsAndRetrieval(model, processor, directory)
        return Job(self, model, processor, samples, scores, each_against(model.chance_losses(self.batch_size)))


class CaptionsAndRetrieval:
    """Captions, which choose the best checkpoint, and the scores of a CLIP."""

    def __init__(self, model: CoCa, processor: Processor, directory: str):
        self.retrieval = Retrieval(model, processor, directory)
        self.captions = Generated(model, processor, directory, ask=False, options=" --num_beams 3")
        self.name, self.validate, self.figure = self.captions.name, self.captions.validate, self.captions.figure

    def evaluate(self) -> dict[str, Score]:
        return self.retrieval.evaluate() | self.captions.evaluate()

    def next_commands(self, out: Path) -> list[str]:
        return self.captions.next_commands(out) + self.retrieval.next_commands(out)


COCA_RECIPES = {
    "coca": CoCaRecipe(
        summary="CoCa: contrast and captions in one decoder, from scratch",
        measured="21 min on one busy core: 97 % of held-out scenes named exactly, Recall@1 100 %, zero-shot 94 % (1 seed)",
        model=CoCaConfig(
            vision=VisionConfig(image_size=48, patch_size=8, width=128, depth=4, heads=4, stem="convolutions"),
            text=LanguageModelConfig(width=128, depth=4, heads=4, vocab_size=512, context=96),
            multimodal_depth=2,
        ),
        optimiser=OptimiserConfig(learning_rate=2e-3, warmup=100),
        steps=1200,
        batch_size=128,
        save_every=400,
    ),
}
