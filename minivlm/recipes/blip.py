"""BLIP (Li et al. 2022, §3.2): contrast, matching and generation together, and questions with their answers.

clip ─ vision tower ─→ blip          captions and questions
                    └→ blip-noisy    captions alone, of which a share is wrong ─→ blip-capfilt (capfilt.py)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minivlm import evaluate
from minivlm.datasets.batches import CaptionsWithNegatives, WithQuestions
from minivlm.datasets.conversations import open_conversations
from minivlm.datasets.folder import open_pairs
from minivlm.datasets.noisy import NoisyPairs
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes import is_world
from minivlm.errors import UserError
from minivlm.layers.bert import BERTConfig
from minivlm.layers.tower import features_of, learned_positions
from minivlm.layers.vit import VisionConfig
from minivlm.metrics import Score
from minivlm.models.blip import BLIP, BLIPConfig
from minivlm.models.momentum import MomentumConfig
from minivlm.processor import Processor
from minivlm.recipes.folders import check_fills_a_batch, check_held_out, open_world
from minivlm.recipes.job import Job, each_against
from minivlm.recipes.parts import build, load_vision_tower, opened, take
from minivlm.recipes.recipe import FolderData, Recipe
from minivlm.recipes.scores import Generated, Matching
from minivlm.recipes.vision_cache import VisionCache
from minivlm.training import OptimiserConfig

DECODE, ENCODE = "<decode>", "<encode>"  # what texts begin with that are generated, or read together with an image
DESCRIBED = 200  # validation images that a checkpoint describes


VISION = VisionConfig(image_size=48, patch_size=8, width=128, depth=4, heads=4, stem="convolutions")
TEXT = BERTConfig(
    width=128, depth=4, heads=4, vocab_size=512, context=96, token_types=0, norm_eps=1e-5, cross_attention_every=1
)


@dataclass(frozen=True, kw_only=True)
class BLIPModel:
    vision: VisionConfig = VISION  # of --vision_from none
    vision_layers: tuple[int, ...] = (-1,)
    text: BERTConfig = TEXT  # its vocab_size and context_width follow from the tokeniser and the tower
    embed_width: int = 128
    momentum: MomentumConfig | None = None
    label_smoothing: float = 0.1  # of every token that is generated


@dataclass(frozen=True, kw_only=True)
class BLIPData(FolderData):
    vocab_size: int = 512  # of the byte-level BPE that is trained on captions and questions
    wrong_captions: float = 0.0  # share of the captions that are another picture's, as on the web
    false_captions: float = 0.75  # share of the samples that come with a nearly right caption, where there is one
    questions: bool = True  # are asked and answered as well, where the data have some about every image


@dataclass(frozen=True, kw_only=True)
class BLIPRecipe(Recipe):
    what = "a BLIP"
    learns_from = ("pairs",)
    vision_from: str | None = (
        "out/clip"  # a CLIP or a tower alone (DINOv2), ours, published or a hub id; None: model.vision, new
    )
    freeze_vision: bool = False  # then it sees every picture once
    model: BLIPModel = BLIPModel()
    data: BLIPData = BLIPData()

    def builds_on(self) -> dict[str, str]:
        return {} if self.vision_from is None else {"vision_from": "clip"}

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        check_queue(self)
        model, processor, pairs = open_parts(self, checkpoint, quiet=quiet)
        check_fills_a_batch(len(pairs), self.batch_size, "training images", self.data.source)
        return job(self, model, processor, pairs, ask=self.data.questions)


def check_queue(recipe: BLIPRecipe) -> None:
    """UserError for a momentum queue that batches do not fill."""
    try:
        if recipe.model.momentum is not None:
            recipe.model.momentum.check_batch(recipe.batch_size)
    except ValueError as error:
        raise UserError(f"{error}: choose another --model.momentum.queue or --batch_size.") from None


def open_parts(recipe: BLIPRecipe, checkpoint: Path | None, *, quiet: bool) -> tuple[BLIP, Processor, Pairs]:
    """Model, processor, and the captions that are trained on."""
    data, found = recipe.data, opened_blip(recipe, checkpoint)
    tower, images = (None, None) if found or recipe.vision_from is None else load_vision_tower(recipe.vision_from)
    prepares = found[1] if found else images
    open_world(recipe, prepares.image_size if prepares else recipe.model.vision.image_size, quiet=quiet)
    model, processor = found or compose(recipe, tower, images)
    if recipe.freeze_vision:
        model.freeze("vision")
    pairs = open_pairs(data.source, "train", image_size=processor.image_size)
    return model, processor, NoisyPairs(pairs, data.wrong_captions, seed=recipe.seed) if data.wrong_captions else pairs


def opened_blip(recipe: BLIPRecipe, checkpoint: Path | None) -> tuple[BLIP, Processor] | None:
    """What it starts from, as `opened` has it. Of a CapFilt that is a teacher, and what learns is new."""
    if checkpoint is None and not recipe.continues:
        return None
    model, processor = opened(recipe, BLIP, checkpoint)
    if model.config.roles == "answer":
        raise UserError(
            f"--starts_from {recipe.starts_from} holds a BLIP that answers questions alone, but {recipe.what} learns from "
            "captions: one that captions or matches is wanted."
        )
    return model, processor


def compose(recipe: BLIPRecipe, tower: torch.nn.Module | None, images: Processor | None) -> tuple[BLIP, Processor]:
    """A tower that was trained, or a new one; a new text model, and a tokeniser for captions, questions and answers."""
    c, data = recipe.model, recipe.data
    conversations = open_conversations(data.source, "train", image_size=None)
    sizes = dict(vocab_size=data.vocab_size, image_size=c.vision.image_size, context=c.text.context)
    text = Processor.train(conversations.texts(), **sizes)
    text.tokenizer.add_special_tokens([DECODE, ENCODE])
    texts = dict(context=c.text.context, pad_token=0, pad_to_context=False, chat="encoder")
    processor = Processor(text.tokenizer, replace(images.config if images else text.config, **texts))

    vision = c.vision if tower is None else tower.config
    whole = isinstance(vision, VisionConfig) and c.vision_layers == (-1,)
    width = features_of(vision, c.vision_layers)[1]
    config = BLIPConfig(
        vision=vision,
        vision_layers=c.vision_layers,
        class_token=whole,
        vision_norm=whole,
        positions=learned_positions(vision, c.vision_layers),
        text=replace(c.text, vocab_size=processor.vocab_size, context_width=width),
        embed_width=c.embed_width,
        decode_token=processor.tokenizer.token_to_id(DECODE),
        encode_token=processor.tokenizer.token_to_id(ENCODE),
        end_token=processor.end_token,
        pad_token=processor.pad_token,
        momentum=c.momentum and c.momentum.over(len(conversations)),
        label_smoothing=c.label_smoothing,
    )
    model = build(BLIP, config, seed=recipe.seed)
    if tower is not None:
        take(model.vision, tower)
    return model, processor


def job(recipe: BLIPRecipe, model: BLIP, processor: Processor, pairs: Pairs, *, ask: bool) -> Job:
    """Captions and what is false of them, as in stage 1 of BLIP-2; beside them a question about every image."""
    directory, wrong = recipe.data.source, bool(recipe.data.wrong_captions)
    check_held_out(directory, processor.image_size)
    c, chance = model.config, model.chance_losses(recipe.batch_size)
    for name in (*(() if c.compares else ("contrast", "matching")), *(() if c.captions else ("generation",))):
        chance.pop(name)
    ask = ask and not wrong and c.answers and is_world(directory)
    if not ask:
        chance.pop("answering")
        model.config = replace(c, trained_on_questions=c.trained_on_questions and recipe.continues)

    cache = VisionCache(model, processor, len(pairs), pairs.images)
    false = recipe.data.false_captions if c.compares else 0.0
    samples = CaptionsWithNegatives(pairs, processor, cache, directory, false_captions=false, guess=wrong)
    if ask:
        samples = WithQuestions(samples, open_conversations(directory, "train", image_size=None))
    scores = (
        MatchingAndCaptions(model, processor, directory, ask=ask)
        if c.compares
        else Generated(model, processor, directory, ask=False)
    )
    vision = "new" if recipe.vision_from is None else recipe.vision_from
    origins = {"vision": vision, "decoder": "new; shares all but self-attention with the encoder"}
    origins = {} if recipe.continues else origins
    remove = lambda out: model.remove_momentum()  # the slow copy and its queue, which were for training
    return Job(recipe, model, processor, samples, scores, each_against(chance), origins, cache.prepare, remove)


class MatchingAndCaptions:
    """Both count alike: are nearly true captions detected, and are scenes described? Where there are no captions,
    the first alone."""

    def __init__(self, model: BLIP, processor: Processor, directory: str, *, ask: bool):
        self.model, self.processor, self.directory, self.ask = model, processor, directory, ask
        self.matching = Matching(model, processor, directory, self.more_commands)
        self.figure = self.matching.figure
        self.val = open_conversations(directory, "val", image_size=processor.image_size)
        self.describes = "caption" in model.abilities and any(map(self.val.captions, range(len(self.val))))
        self.name = "matching and captions" if self.describes else "text→image Recall@1 re-ranked"

    def validate(self, most: int) -> float:
        matching = self.matching.validate(most)
        if not self.describes:
            return matching
        captions = evaluate.captions(self.model, self.processor, self.val, self.directory, most=DESCRIBED)
        return (matching + next(iter(captions.values())).value) / 2

    def evaluate(self) -> dict[str, Score]:
        if "caption" not in self.model.abilities:
            return self.matching.evaluate()
        generated = evaluate.answers_and_captions(self.model, self.processor, self.directory, ask_questions=self.ask)
        return self.matching.evaluate() | generated

    def next_commands(self, out: Path) -> list[str]:
        match, search, *more = self.matching.next_commands(out)
        return [*more[:1], match, search, *more[1:]]

    def more_commands(self, out: Path, picture: str) -> list[str]:
        if "caption" not in self.model.abilities:
            return []
        answer = [f'python sample.py answer {out} {picture} "how many red shapes are there?"'] if self.ask else []
        return [f"python sample.py caption {out} {picture}", *answer]


BLIP_SHAPES = BLIPRecipe(
    summary="BLIP: one text transformer compares, matches, describes and answers",
    measured="20 min on one busy core: matching 96 %, 86 % of scenes described (3 seeds, before labels were smoothed)",
    optimiser=OptimiserConfig(learning_rate=1e-3, warmup=100),
    steps=1300,
    # Without bucket_steps: in batches of like length long captions count no more than short ones, and who stands where is
    # learnt late (after 1,100 steps 67 % of the scenes are described, instead of 85 %).
    batch_size=64,
    save_every=325,
)
BLIP_RECIPES = {
    "blip": BLIP_SHAPES,
    "blip-noisy": replace(
        BLIP_SHAPES,
        summary="the same on captions of which 40 % belong to another image: what CapFilt starts from",
        measured="13 min on one busy core: matching 88 %, 53 % of scenes described (3 seeds, before labels were smoothed)",
        steps=1050,  # with what CapFilt does before, twelve minutes on two idle cores hold so many
        save_every=350,
        data=BLIPData(questions=False, wrong_captions=0.4),
    ),
}
