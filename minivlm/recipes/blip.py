"""BLIP as a recipe (Li et al. 2022, §3.2): contrast, matching and generation together, and questions with their answers.

clip ─ vision tower ─→ blip          captions and questions
                    └→ blip-noisy    captions alone, of which a share is wrong ─→ blip-capfilt (capfilt.py)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from torch import Tensor

from minivlm import evaluate
from minivlm.checkpoint import load
from minivlm.datasets.conversations import open_conversations
from minivlm.datasets.folder import open_pairs
from minivlm.datasets.noisy import NoisyPairs
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.negatives import changed
from minivlm.errors import UserError
from minivlm.layers.bert import BERTConfig
from minivlm.layers.tower import features_of, learned_positions
from minivlm.layers.vit import VisionConfig
from minivlm.metrics import Score
from minivlm.models.blip import BLIP, BLIPConfig
from minivlm.models.momentum import MomentumConfig
from minivlm.processor import Processor
from minivlm.recipes.base import Recipe
from minivlm.recipes.blip2 import Stage1
from minivlm.recipes.parts import load_vision_model, take
from minivlm.recipes.shared import build, check_fills_a_batch, check_suits, make_world_if_missing, suited
from minivlm.training import OptimiserConfig

DECODE, ENCODE = "<decode>", "<encode>"  # what texts begin with that are said, or read together with a picture
CAPTIONS = 200  # validation pictures that a checkpoint describes


@dataclass(frozen=True, kw_only=True)
class BLIPRecipe(Recipe):
    what = "a BLIP"
    learns_from = ("pairs",)
    vision_from: str | None = "out/clip"  # a CLIP of ours, a published one, or a hub id; None: `vision`, from scratch
    vision: VisionConfig = field(
        default_factory=lambda: VisionConfig(
            image_size=48, patch_size=8, width=128, depth=4, heads=4, stem="convolutions"
        )
    )
    vision_layers: tuple[int, ...] = (-1,)
    freeze_vision: bool = False  # then it sees every picture once
    text: BERTConfig = field(  # its vocab_size and context_width follow from the tokeniser and the tower
        default_factory=lambda: BERTConfig(
            width=128,
            depth=4,
            heads=4,
            vocab_size=512,
            context=96,
            token_types=0,
            norm_eps=1e-5,
            cross_attention_every=1,
        )
    )
    vocab_size: int = 512  # of the byte-level BPE that is trained on captions and questions
    embed_width: int = 128
    momentum: MomentumConfig | None = None
    label_smoothing: float = 0.1  # of every token that is said
    questions: bool = True  # are asked and answered as well, where the data have some about every picture
    false_captions: float = 0.75  # share of the samples that come with a nearly right caption, where there is one
    wrong: float = 0.0  # share of the captions that are another picture's, as on the web
    directory: str = "data/shapes"

    def needs(self) -> dict[str, str]:
        return {} if self.vision_from is None else {"clip": self.vision_from}

    def for_data(self, directory: str, out: str) -> BLIPRecipe:
        """The same on another folder's captions; the tower is trained on that folder as well, beside `out`."""
        eyes = None if self.vision_from is None else f"{Path(out).parent / Path(directory).resolve().name}-clip"
        vocab_size = self.vocab_size if is_world(directory) else 4096
        summary = f"{self.summary}, on {directory}"
        changed = dict(summary=summary, directory=directory, vision_from=eyes, vocab_size=vocab_size)
        return suited(self, directory, **changed)

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> BLIPWork:
        self.check_queue()
        model, processor, train = self.open(checkpoint, quiet=quiet)
        check_fills_a_batch(len(train), self.batch_size, "training images", self.directory)
        return BLIPWork(self, model, processor, train)

    def open(self, checkpoint: Path | None, *, quiet: bool) -> tuple[BLIP, Processor, Pairs]:
        """Model, processor, and the captions that are learnt from."""
        eyes, seen = (None, None) if self.vision_from is None or checkpoint else load_vision_model(self.vision_from)
        size = seen.image_size if seen else self.vision.image_size
        make_world_if_missing(self.directory, size, quiet=quiet)
        check_suits(self, self.directory)
        model, processor = load(checkpoint) if checkpoint is not None else self.compose(eyes, seen)
        if self.freeze_vision:
            model.freeze("vision")
        train = open_pairs(self.directory, "train", image_size=processor.image_size)
        return model, processor, NoisyPairs(train, self.wrong, seed=self.seed) if self.wrong else train

    def check_queue(self) -> None:
        """UserError for a momentum queue that batches do not fill."""
        try:
            if self.momentum is not None:
                self.momentum.check_batch(self.batch_size)
        except ValueError as error:
            raise UserError(f"{error}: choose another --momentum.queue or --batch_size.") from None

    def compose(self, eyes: torch.nn.Module | None, seen: Processor | None) -> tuple[BLIP, Processor]:
        """The tower of a CLIP, or a new one; a new text model, and a tokeniser for captions, questions and answers."""
        size, context = self.vision.image_size, self.text.context
        talk = open_conversations(self.directory, "train", image_size=None)
        words = Processor.train(talk.texts(), vocab_size=self.vocab_size, image_size=size, context=context)
        words.tokenizer.add_special_tokens([DECODE, ENCODE])
        sees = seen.config if seen else words.config
        read = dict(context=context, pad_token=0, pad_to_context=False, chat="encoder")
        processor = Processor(words.tokenizer, replace(sees, **read))

        vision = eyes.config.vision if eyes else self.vision
        width = features_of(vision, self.vision_layers)[1]
        whole = isinstance(vision, VisionConfig) and self.vision_layers == (-1,)
        config = BLIPConfig(
            vision=vision,
            vision_layers=self.vision_layers,
            class_token=whole,
            vision_norm=whole,
            positions=learned_positions(vision, self.vision_layers),
            text=replace(self.text, vocab_size=processor.vocab_size, context_width=width),
            embed_width=self.embed_width,
            decode_token=processor.tokenizer.token_to_id(DECODE),
            encode_token=processor.tokenizer.token_to_id(ENCODE),
            end_token=processor.end_token,
            pad_token=processor.pad_token,
            momentum=self.momentum and self.momentum.over(len(talk)),
            label_smoothing=self.label_smoothing,
        )
        model = build(BLIP, config, seed=self.seed)
        if eyes:
            take(model.vision, eyes.vision)
        return model, processor


class BLIPWork(Stage1):
    """Captions and what is false of them come as in stage 1 of BLIP-2; beside them a question about every picture."""

    score_name = "matching and captions"

    def __init__(self, recipe: BLIPRecipe, model: BLIP, processor: Processor, train: Pairs):
        eyes = "new" if recipe.vision_from is None else recipe.vision_from
        origins = {"vision": eyes, "decoder": "new; shares all but self-attention with the encoder"}
        super().__init__(recipe, model, processor, train, origins)
        asks = recipe.questions and not recipe.wrong and model.config.answers and is_world(recipe.directory)
        self.talk = open_conversations(recipe.directory, "train", image_size=None) if asks else None
        self.val = open_conversations(recipe.directory, "val", image_size=processor.image_size)
        self.describes = any(map(self.val.captions, range(len(self.val))))
        if not self.describes:
            self.score_name = "text→image Recall@1 re-ranked"
        if self.talk is None:
            self.chance.pop("answering")
            model.config = replace(model.config, asked=False)

    def prepare(self, device: torch.device, precision: torch.dtype) -> None:
        if self.recipe.freeze_vision:
            super().prepare(device, precision)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """As stage 1's, with question, answer and their masks (B/W, ·)."""
        batch = super().batch(step, rank, world)
        if self.talk is not None:
            asked, said = zip(*(self.exchange(index, rng) for index, rng in self.share(step, rank, world)), strict=True)
            batch["question"], batch["question_mask"] = self.processor.text(asked, cut=True)
            batch["answer"], batch["answer_mask"] = self.processor.text(said, cut=True)
        return batch

    def exchange(self, index: int, rng: np.random.Generator) -> tuple[str, str]:
        """One question about a picture, and its answer."""
        asked = self.talk.asked(index, rng)
        question = asked[int(rng.integers(len(asked)))]
        return question.text, question.answers[0]

    def captions(self, index: int, rng: np.random.Generator) -> tuple[str, str | None]:
        """As stage 1's, but where nobody knows what the picture shows, a false caption is a guess."""
        if not self.recipe.wrong:
            return super().captions(index, rng)
        caption = self.train.all_captions(index)[0]
        return caption, changed(caption, rng) if rng.random() < self.recipe.false_captions else None

    def validate(self) -> float:
        """Both count alike: are true and nearly true captions told apart, and are scenes described? Where there are no
        captions, the first alone."""
        where = self.recipe.directory
        matching = evaluate.matching_accuracy(self.model, self.processor, where)
        if not self.describes:
            return matching
        captions = evaluate.captions(self.model, self.processor, self.val, where, most=CAPTIONS)
        return (matching + next(iter(captions.values())).value) / 2

    def evaluate(self) -> dict[str, Score]:
        where = self.recipe.directory
        scores = evaluate.matching(self.model, self.processor, where)
        return scores | evaluate.speech(self.model, self.processor, where, ask_questions=self.talk is not None)

    def next_commands(self, out: Path) -> list[str]:
        where = Path(self.recipe.directory)
        test = open_pairs(where, "test", image_size=self.processor.image_size)
        folder, picture = (quote(str(path)) for path in ((where / test.key(0)).parent, where / test.key(0)))
        text = quote(test.all_captions(0)[0])
        asked = [f'python sample.py answer {out} {picture} "how many red shapes are there?"'] if self.talk else []
        return [
            f"python sample.py caption {out} {picture}",
            f"python sample.py match {out} {picture} {text}",
            f"python sample.py search {out} {folder} {text} --rerank 16 --save sheet.png",
            *asked,
        ]

    def finish(self, out: Path) -> None:
        """The slow copy and its queue were for training."""
        self.model.forget()


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
        summary="the same on captions of which 40 % are another picture's: what CapFilt begins with",
        measured="13 min on one busy core: matching 88 %, 53 % of scenes described (3 seeds, before labels were smoothed)",
        steps=1050,  # with what CapFilt does before, twelve minutes on two idle cores hold so many
        save_every=350,
        questions=False,
        wrong=0.4,
    ),
}
