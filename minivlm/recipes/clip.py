"""The compare pattern: images and captions in, a CLIP out, evaluated on held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log
from pathlib import Path

from minivlm.datasets.batches import Captions
from minivlm.datasets.folder import TEMPLATES, open_pairs
from minivlm.datasets.label_captions import LabelCaptions
from minivlm.datasets.noisy import NoisyPairs
from minivlm.datasets.shapes import is_world
from minivlm.errors import UserError
from minivlm.layers.bert import BERTConfig
from minivlm.layers.efficientnet import EfficientNetConfig
from minivlm.layers.resnet import ResNetConfig
from minivlm.layers.text import TextConfig
from minivlm.layers.vit import VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor
from minivlm.recipes.clip_towers import Towers, check_given
from minivlm.recipes.folders import check_fills_a_batch, check_held_out, open_world
from minivlm.recipes.job import Job, against
from minivlm.recipes.parts import opened
from minivlm.recipes.recipe import FolderData, Recipe
from minivlm.recipes.scores import Retrieval
from minivlm.recipes.vision_cache import VisionCache
from minivlm.training import OptimiserConfig


@dataclass(frozen=True, kw_only=True)
class PairData(FolderData):
    augment: bool = False  # crops, flips and colour jitter, where the caption stays true
    vocab_size: int = 512  # of the byte-level BPE that is trained on the captions
    wrong_captions: float = 0.0  # share of the training captions that are put to another picture, as on the web
    label_captions: float = (
        0.0  # share of the time that "a photo of a LABEL" is the caption of a labelled training image
    )


@dataclass(frozen=True, kw_only=True)
class CLIPRecipe(Recipe):
    what = "a CLIP"
    learns_from = ("pairs",)
    taken_by = "--vision_from"
    model: CLIPConfig  # its vocab_size and end_token follow from the tokeniser
    vision_from: str = ""  # a vision tower in place of a new one: DINOv2, ViT, that of another model. It is frozen
    text_from: str = ""  # likewise a text tower with its tokeniser: a BERT, or that of a CLIP. It learns
    data: PairData = PairData()

    def on(self, directory: str) -> Recipe:
        """Photographs need more than shapes do: their own size, augmentation and vocabulary; what knows photographs, less."""
        if is_world(directory):
            return self
        if self.starts_from:
            tuned, batch_size = FINE_TUNING, min(self.batch_size, FINE_TUNING.batch_size)
            told = f"{self.starts_from}, fine-tuned on {directory}"
            return replace(tuned, summary=told, starts_from=self.starts_from, batch_size=batch_size)
        parts = dict(vision_from=self.vision_from, text_from=self.text_from)
        if self.vision_from:
            return replace(ON_TOWER, summary=f"a CLIP on {directory} with the tower of {self.vision_from}", **parts)
        own = {ResNetConfig: "a small CLIP with a ResNet", EfficientNetConfig: "ALIGN: an EfficientNet and a BERT"}
        if (what := own.get(type(self.model.vision))) is None:
            return replace(PHOTOGRAPHS, summary=f"a small CLIP on {directory}", **parts)
        return replace(PHOTOGRAPHS, summary=f"{what}, on {directory}", model=self.model, **parts)

    def as_chosen(self) -> Recipe:
        """The sigmoid starts at the batch's prior, one true text among B for an image, and learns more slowly, but for its two
        scalars; docs/results.md tells why. A model that is there has a scale and a bias of its own."""
        if self.model.loss == "softmax" or self.starts_from:
            return self
        prior = -log(max(1, self.batch_size - 1))  # σ(prior) = 1/B
        return replace(
            self,
            model=replace(self.model, initial_bias=prior, initial_temperature=0.2),
            optimiser=replace(self.optimiser, learning_rate=self.optimiser.learning_rate / 3),
            rates={"loss": 0.1} | self.rates,
            steps=self.steps * 5 // 2,
            save_every=self.save_every * 5 // 2,
        )

    def of_size(self, n: int) -> Recipe:
        """Fine-tuning takes a few epochs: more of them cost what the model knew, and gain nothing on a small folder."""
        if not self.starts_from:
            return self
        steps = max(TUNED_STEPS, TUNED_EPOCHS * ceil(n / self.batch_size))
        return replace(self, steps=steps, save_every=ceil(steps / 4))

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        check_given(self)
        found, directory = opened(self, CLIP, checkpoint), self.data.source
        towers = None if found else Towers.of(self)
        size = found[1].image_size if found else towers.image_size or self.model.vision.image_size
        open_world(self, size, quiet=quiet)
        pairs = open_pairs(directory, "train", image_size=size)
        check_fills_a_batch(len(pairs), self.batch_size, "training images", directory)
        classes = pairs.classes or []
        if self.data.wrong_captions:
            pairs = NoisyPairs(pairs, self.data.wrong_captions, seed=self.seed)
        if self.data.label_captions:
            pairs = LabelCaptions(pairs, self.data.label_captions, directory)
        model, processor = found or towers.compose(self, pairs)
        if self.vision_from:
            model.freeze("vision")
        check_classes(classes, processor, directory)
        check_held_out(directory, processor.image_size)
        chance = sum(model.chance_losses(self.batch_size).values())
        cache = VisionCache(model, processor, len(pairs), pairs.images)
        samples = Captions(pairs, processor, directory, augment=self.data.augment, cache=cache)
        progress = against("chance", chance)
        scores = Retrieval(model, processor, directory)
        start = bool(self.starts_from)
        parts = (model, processor, samples, scores, progress, self.origins(model), cache.prepare)
        return Job(self, *parts, judges_start=start)

    def origins(self, model: CLIP) -> dict[str, str]:
        if self.starts_from:
            return dict.fromkeys((name for name, _ in model.named_children()), self.starts_from)
        return {"vision": self.vision_from or "new", "text": self.text_from or "new"}


def check_classes(classes: Sequence[str], processor: Processor, directory: str) -> None:
    """UserError, before the first step, for a class whose name does not fit into the sentences that judge by it."""
    for name in classes:
        longest = max(map(len, processor.encode([template.format(name) for template in TEMPLATES])))
        if longest > processor.context:
            raise UserError(
                f"the class {shortened(name)!r} of {directory} makes a sentence of {longest} tokens, but the model reads "
                f"{processor.context}: shorten the name, or give a larger --model.text.context."
            )


def shortened(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:40]}…"


SMALL_TEXT = TextConfig(width=128, depth=2, heads=4, vocab_size=512, context=64, end_token=0)

CLIP_SHAPES = CLIPRecipe(
    summary="a small CLIP (ViT) on the shapes world",
    measured="3 min on 2 cores: zero-shot 98 % on seen, 91 % on never-seen pairs, Recall@1 95 % (mean of 3 seeds)",
    model=CLIPConfig(
        vision=VisionConfig(image_size=48, patch_size=8, width=128, depth=4, heads=4, stem="convolutions"),
        text=SMALL_TEXT,
        embed_width=128,
    ),
    optimiser=OptimiserConfig(learning_rate=3e-3, warmup=100),
    steps=600,  # three and a half minutes on two cores
    batch_size=256,
    save_every=300,
)

PHOTOGRAPHS = CLIPRecipe(
    summary="a small CLIP on your own photographs",
    model=CLIPConfig(
        vision=VisionConfig(image_size=64, patch_size=8, width=128, depth=4, heads=4, stem="convolutions"),
        # The captions of a few thousand photographs are soon known by heart; dropout puts that off.
        text=TextConfig(width=128, depth=2, heads=4, vocab_size=512, context=64, end_token=0, dropout=0.1),
        embed_width=128,
    ),
    optimiser=OptimiserConfig(learning_rate=2e-3, weight_decay=0.2, warmup=100),
    steps=1200,
    batch_size=256,
    data=PairData(augment=True),
)

TUNED_EPOCHS, TUNED_STEPS = 5, 50

FINE_TUNING = replace(
    PHOTOGRAPHS,
    summary="a published CLIP, fine-tuned on your own photographs",
    # FLYP (Goyal et al. 2023, "Finetune like you pretrain", §4) has the same loss, rate and decay.
    optimiser=OptimiserConfig(learning_rate=1e-5, weight_decay=0.1, warmup=20),
    batch_size=128,
)

# A new text tower soon knows a few thousand captions by heart. Flowers and aerial photographs with DINOv2-S: 800 steps in
# place of 400 gave the same text→image Recall@10 (58 %), of flowers alone a lower one (28 against 31 %).
ON_TOWER = replace(
    PHOTOGRAPHS,
    summary="a CLIP on your own photographs, with a vision tower that is there",
    steps=400,
)

CLIP_RECIPES = {
    "clip": CLIP_SHAPES,
    "clip-resnet": replace(
        CLIP_SHAPES,
        summary="the same with a small ResNet as the vision tower",
        measured="6 min on one busy core: zero-shot 100 %, never-seen pairs 93 % (84 to 100), Recall@1 99.5 % (3 seeds)",
        model=CLIPConfig(
            vision=ResNetConfig(blocks=(1, 1, 1, 1), width=16, output_width=128, heads=8, image_size=64),
            text=SMALL_TEXT,
            embed_width=128,
            image_projection=False,
        ),
    ),
    "align": replace(
        CLIP_SHAPES,
        summary="ALIGN: an EfficientNet and a BERT, on captions of which four in ten are wrong",
        measured="17 min on one busy core: Recall@1 90 %, zero-shot 45 % on seen, 40 % on never-seen pairs (1 seed)",
        model=CLIPConfig(
            vision=EfficientNetConfig(
                image_size=64,
                stem_channels=16,
                channels=(16, 24, 48, 128),
                blocks=(1, 1, 2, 1),
                kernels=(3, 3, 5, 3),
                strides=(1, 2, 2, 2),
                expansions=(1, 4, 4, 4),
            ),
            text=BERTConfig(width=128, depth=2, heads=4, vocab_size=512, context=64, norm_eps=1e-5),
            embed_width=128,
            image_projection=False,
            text_projection_bias=True,
            label_smoothing=0.1,
            # The paper's starts at 1, and has far more steps to come down: in 300 of these it reaches 0.60 (Recall@1 18 %).
            initial_temperature=0.07,
        ),
        data=PairData(wrong_captions=0.4),
        optimiser=OptimiserConfig(learning_rate=2e-3, warmup=100),
    ),
}
