"""BLIP-2 in its two stages (Li et al. 2023, §3): a Q-Former learns to see, then a frozen language model learns nothing and
the Q-Former to be read by it.

    clip-resnet ─ vision tower, frozen ─┬→ blip2-stage1 (contrast, matching, generation) ─┐
    lm or t5 ─ language model, frozen ──┼─────────────────────────────────────────────────┴→ blip2 (conversations)
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from shlex import quote
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minivlm import evaluate
from minivlm.checkpoint import load
from minivlm.conversation import IGNORED, PLACEHOLDER, Sample, encode_conversation, template_of, with_chat
from minivlm.datasets.continuation import collate_pairs
from minivlm.datasets.folder import open_pairs
from minivlm.datasets.judge import conversation_problem, exchanges
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.span_corruption import HOLES, with_holes
from minivlm.errors import UserError
from minivlm.layers.bert import BERT
from minivlm.layers.language_model import LanguageModel
from minivlm.layers.qformer import QFormerConfig
from minivlm.layers.t5 import T5
from minivlm.layers.tower import features_of, learned_positions
from minivlm.metrics import Score
from minivlm.models.blip2 import BLIP2, BLIP2Config
from minivlm.models.blip2_stage1 import BLIP2Stage1, BLIP2Stage1Config
from minivlm.models.vision_features import VisionFeaturesConfig
from minivlm.processor import Processor
from minivlm.recipes.base import Recipe
from minivlm.recipes.captioner import ConversationsConfig, open_train
from minivlm.recipes.frozen import compute_features_once, measure_once
from minivlm.recipes.llava import PrefixWork
from minivlm.recipes.parts import join_processors, load_vision_model, reading, take, with_image_token
from minivlm.recipes.shared import (
    build,
    check_fills_a_batch,
    check_held_out,
    check_suits,
    make_world_if_missing,
    next_training,
    suited,
)
from minivlm.recipes.work import Work
from minivlm.special_tokens import Markup, as_text, without_marks
from minivlm.training import OptimiserConfig

DECODE = "<decode>"  # stands where a text begins that is to be said; elsewhere texts begin with <start>
QUERIES = QFormerConfig(width=128, depth=4, heads=4, queries=16, context=64, norm_eps=1e-5)


def querying(clip, qformer: QFormerConfig, layers: tuple[int, ...], **text) -> dict:
    """The fields of a `BLIP2Config`, or of stage 1's, for the tower of a CLIP, whose features before the last norm are read."""
    vision = clip.config.vision
    width, positions = features_of(vision, layers)[1], learned_positions(vision, layers)
    qformer = replace(qformer, context_width=width, positions=positions, **text)
    return dict(**reading(vision, layers), qformer=qformer)


# ---- stage 1 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BLIP2Stage1Recipe(Recipe):
    what = "stage 1 of a BLIP-2"
    learns_from = ("pairs",)
    taken_by = "--starts_from"
    vision_from: str = "out/clip-resnet"  # a CLIP of ours, a published one, or a hub id: its vision tower
    vision_layers: tuple[int, ...] = (-2,)
    qformer: QFormerConfig = QUERIES  # its vocab_size and context_width follow from the tokeniser and the tower
    bert_from: str | None = None  # published BERT weights to start the Q-Former from; its tokeniser comes along
    embed_width: int = 128
    label_smoothing: float = 0.1  # of the contrast and of every token that is said
    false_captions: float = 0.75  # share of the samples that come with a nearly right caption, where the data have some
    directory: str = "data/shapes"

    def needs(self) -> dict[str, str]:
        return {"clip-resnet": self.vision_from}

    def for_data(self, directory: str, out: str) -> BLIP2Stage1Recipe:
        """The same on another folder's captions; the tower is trained on that folder as well, beside `out`."""
        beside = Path(out).parent / Path(directory).resolve().name
        summary = f"{self.summary}, on {directory}"
        return suited(self, directory, summary=summary, directory=directory, vision_from=f"{beside}-clip")

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Stage1:
        model, processor = load(checkpoint) if checkpoint is not None else self.compose()
        model.freeze("vision")
        make_world_if_missing(self.directory, processor.image_size, quiet=quiet)
        check_suits(self, self.directory)
        train = open_pairs(self.directory, "train", image_size=processor.image_size)
        check_fills_a_batch(len(train), self.batch_size, "training images", self.directory)
        origins = {"vision": self.vision_from, "qformer": self.bert_from or "new"}
        return Stage1(self, model, processor, train, origins)

    def compose(self) -> tuple[BLIP2Stage1, Processor]:
        """The tower of a CLIP, a new Q-Former, and the CLIP's tokeniser with one more token."""
        clip, processor = load_vision_model(self.vision_from)
        bert = None
        if self.bert_from is not None:
            bert, words = load(self.bert_from)
            if not isinstance(bert, BERT):
                raise UserError(f"--bert_from {self.bert_from} holds a {type(bert).__name__}, but a BERT is wanted.")
            processor = Processor(words.tokenizer, replace(processor.config, pad_token=words.pad_token))
        processor.tokenizer.add_special_tokens([DECODE])
        context = min(self.qformer.context, processor.context)
        processor = Processor(processor.tokenizer, replace(processor.config, context=context, pad_to_context=False))
        text = dict(vocab_size=processor.vocab_size)
        config = BLIP2Stage1Config(
            **querying(clip, self.qformer, self.vision_layers, **text),
            embed_width=self.embed_width,
            label_smoothing=self.label_smoothing,
            start_token=processor.start_token,
            decode_token=processor.tokenizer.token_to_id(DECODE),
            end_token=processor.end_token,
            pad_token=processor.pad_token,
        )
        model = build(BLIP2Stage1, config, seed=self.seed)
        take(model.vision, clip.vision)
        if bert is not None:
            try:
                model.qformer.load_bert(bert)
            except ValueError as error:
                raise UserError(f"--bert_from {self.bert_from} does not fit: {error}.") from None
        return model, processor


class Stage1(Work):
    score_name = "matching accuracy"

    def __init__(self, recipe, model, processor: Processor, train: Pairs, origins: dict[str, str]):
        super().__init__(recipe, model, processor, len(train))
        self.train, self.origins = train, origins
        check_held_out(recipe.directory, processor.image_size)
        self.chance = model.chance_losses(recipe.batch_size)  # by name, as the progress bar tells them
        self.features: Tensor | None = None

    def notes(self) -> list[str]:
        cut = self.processor.too_long(list(self.train.texts()))
        told = f"{cut} captions are longer than the context of {self.processor.context} tokens and are cut to it"
        start = f"{len(self.train)} training images in {self.recipe.directory}"
        return [start, *self.train.notes, *([told] if cut else [])]

    def progress(self, line: dict[str, float]) -> str:
        """The three losses, each beside that of a model which knows nothing."""
        return ", ".join(f"{name} {line[name]:.2f} (chance {chance:.2f})" for name, chance in self.chance.items())

    def prepare(self, device: torch.device, precision: torch.dtype) -> None:
        first = (self.train.images([i])[0] for i in range(self.n))
        measure_once(self.model, self.processor, first, device, precision)
        self.features = compute_features_once(self.model, self.processor, self.n, self.train.images, device, precision)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """tokens and mask (B/W, T), false ones, and images or their features, of process `rank` of W."""
        indices, rngs = zip(*self.share(step, rank, world), strict=True)
        captions, false = zip(*(self.captions(i, rng) for i, rng in zip(indices, rngs, strict=True)), strict=True)
        tokens, mask = self.processor.text(captions, cut=True)
        batch = {"tokens": tokens, "mask": mask}
        if any(false):
            batch["false"], false_mask = self.processor.text([text or "" for text in false], cut=True)
            batch["false_mask"] = false_mask & torch.tensor([text is not None for text in false])[:, None]
        if self.features is not None:
            return {**batch, "features": self.features[torch.tensor(indices)]}
        return {**batch, "images": self.processor.images(list(self.train.images(indices)))}

    def length(self, index: int, rng: np.random.Generator) -> int:
        return max(len(text.split()) for text in self.captions(index, rng) if text is not None)

    def captions(self, index: int, rng: np.random.Generator) -> tuple[str, str | None]:
        """A caption, and a nearly right one or none. The two are of one style, so that the style tells nothing."""
        if rng.random() < self.recipe.false_captions and (false := self.train.false_caption(index, rng)) is not None:
            return self.train.all_captions(index)[0], false
        return self.train.captions([index], rng)[0], None

    def key(self, index: int) -> str:
        return self.train.key(index)

    def validate(self) -> float:
        return evaluate.matching_accuracy(self.model, self.processor, self.recipe.directory)

    def evaluate(self) -> dict[str, Score]:
        return evaluate.matching(self.model, self.processor, self.recipe.directory)

    def picture(self, path: Path) -> None:
        evaluate.matching_picture(self.model, self.processor, self.recipe.directory, path)

    def next_commands(self, out: Path) -> list[str]:
        test = open_pairs(self.recipe.directory, "test", image_size=self.processor.image_size)
        picture = Path(self.recipe.directory) / test.key(0)
        folder, picture, text = quote(str(picture.parent)), quote(str(picture)), quote(test.all_captions(0)[0])
        return [
            f"python sample.py match {out} {picture} {text}",
            f"python sample.py search {out} {folder} {text} --rerank 16 --save sheet.png",
            f"python sample.py attend {out} {picture} --save maps.png",
            *next_training("blip2", self.recipe.directory, starts_from=out),
        ]


# ---- stage 2 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BLIP2Recipe(Recipe):
    what = "a BLIP-2"
    learns_from = ("conversations",)
    judged_by = ("questions", "captions")
    lm: Literal["lm", "t5"] = "lm"  # a decoder, or an encoder and a decoder
    starts_from: str = "out/blip2-stage1"
    language_from: str | None = None  # None: out/lm or out/t5
    chat: str | None = None  # how turns are written, by name; None: as the language model has it
    system: str | None = None  # what the system says first; None: as the chat template has it; "": nothing
    from_scratch: bool = False  # without a stage 1: a new Q-Former on the tower of vision_from
    vision_from: str = "out/clip-resnet"
    vision_layers: tuple[int, ...] = (-2,)
    qformer: QFormerConfig = QUERIES
    holes: float = 0.75  # share of the samples in which a T5 that knows holes is asked all questions at once, not one
    data: ConversationsConfig = field(default_factory=ConversationsConfig)

    @property
    def speaker(self) -> str:
        return self.language_from or f"out/{self.lm}"

    def needs(self) -> dict[str, str]:
        eyes = {"clip-resnet": self.vision_from} if self.from_scratch else {"blip2-stage1": self.starts_from}
        return {**eyes, self.lm: self.speaker}

    def for_data(self, directory: str, out: str) -> BLIP2Recipe:
        """The same on another folder; what it builds on is trained on that folder as well, beside `out`."""
        beside = f"{Path(out).parent / Path(directory).resolve().name}"
        return suited(
            self,
            directory,
            summary=f"{self.summary}, on {directory}",
            data=replace(self.data, directory=directory),
            starts_from=f"{beside}-blip2-stage1",
            vision_from=f"{beside}-clip",
            language_from=f"{beside}-{self.lm}",
        )

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> BLIP2Work:
        model, processor = load(checkpoint) if checkpoint is not None else self.compose()
        model.freeze("vision", "language_model")
        problem = conversation_problem(processor, alone=isinstance(model.language_model, T5))
        train = open_train(self, processor.image_size, quiet=quiet, problem=problem)
        return BLIP2Work(self, model, processor, train)

    def compose(self) -> tuple[BLIP2, Processor]:
        """Eyes, Q-Former and language model put together, with a new projection between the last two."""
        if self.from_scratch:
            eyes, seen = load_vision_model(self.vision_from)
            parts = querying(eyes, self.qformer, self.vision_layers)
        else:
            eyes, seen = load(self.starts_from)
            if not isinstance(eyes, BLIP2Stage1):
                raise UserError(
                    f"--starts_from {self.starts_from} holds a {type(eyes).__name__}, but stage 1 of a BLIP-2 is wanted: "
                    "train one with `python train.py blip2-stage1`, or do without by --from_scratch."
                )
            c = eyes.config
            qformer = replace(c.qformer, vocab_size=None)
            parts = {field.name: getattr(c, field.name) for field in fields(VisionFeaturesConfig)} | {
                "qformer": qformer
            }
        speaker, words = self.load_speaker()
        config = BLIP2Config(**parts, language=speaker.config, image_token=words.image_token_id)
        model = build(BLIP2, config, seed=self.seed)
        take(model.vision, eyes.vision)
        if not self.from_scratch and model.standardise is not None:
            model.standardise.load_state_dict(eyes.standardise.state_dict())
        take(model.language_model, speaker)
        if not self.from_scratch:
            wanted = model.qformer.state_dict()  # the text's half stays behind
            model.qformer.load_state_dict({name: eyes.qformer.state_dict()[name] for name in wanted})
        processor = join_processors(seen, words, image_tokens=config.image_tokens, context=speaker.config.context)
        if self.lm == "t5" and processor.config.chat == "plain":
            processor = Processor(words.tokenizer, replace(processor.config, chat="encoder"))
        return model, processor

    def load_speaker(self) -> tuple[LanguageModel | T5, Processor]:
        speaker, words = load(self.speaker)
        wanted = {"lm": LanguageModel, "t5": T5}[self.lm]
        if not isinstance(speaker, wanted):
            other = {LanguageModel: "; take it with --lm lm", T5: "; take it with --lm t5"}
            raise UserError(
                f"--lm {self.lm} wants a {wanted.__name__}, but {self.speaker} holds a "
                f"{type(speaker).__name__}{other.get(type(speaker), '')}."
            )
        words = with_chat(words, self.chat, self.system)
        template_of(words)  # known before anything is trained
        return with_image_token(speaker, words)


class BLIP2Work(PrefixWork):
    def __init__(self, recipe: BLIP2Recipe, model: BLIP2, processor: Processor, train):
        new = recipe.from_scratch
        origins = {
            "vision": recipe.vision_from if new else recipe.starts_from,
            "qformer": "new" if new else recipe.starts_from,
            "projection": "new",
            "language_model": recipe.speaker,
        }
        super().__init__(recipe, model, processor, train, origins=origins, answers=True)
        self.knows_holes = all(processor.tokenizer.token_to_id(hole) is not None for hole in HOLES)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """As LLaVA's. A T5 reads picture and questions, and says the answers."""
        if isinstance(self.model.language_model, LanguageModel):
            return super().batch(step, rank, world)
        share = self.share(step, rank, world)
        pairs = [self.pair(index, rng) for index, rng in share]
        return collate_pairs(pairs, self.processor) | self.pictures([index for index, _ in share])

    def pair(self, index: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """What a T5 reads of a conversation, and what it is to say: all answers, or one."""
        whole = self.knows_holes and rng.random() < self.recipe.holes
        return self.all_answers(index, rng) if whole else self.one_answer(index, rng)

    def all_answers(self, index: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """A conversation with a hole for every answer, and the answers (datasets/span_corruption.py)."""
        turns = self.train.conversation(index, rng)
        marks = sum(turn.text.count(PLACEHOLDER) for turn in turns)
        places = self.processor.ids([Markup(PLACEHOLDER)]) * marks
        pieces = [as_text(without_marks(turn.text)) for turn in turns]
        read, said = with_holes(pieces, self.processor, context=self.processor.context - len(places))
        return places + read, said

    def one_answer(self, index: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """One question of a conversation, and its answer."""
        sample = self.exchange(index, rng)
        read = [token for token, label in zip(sample.tokens, sample.labels, strict=True) if label == IGNORED]
        return read, [label for label in sample.labels if label != IGNORED]

    def exchange(self, index: int, rng: np.random.Generator) -> Sample:
        """One question of a conversation, and its answer."""
        known = exchanges(self.train.conversation(index, rng))
        one = known[int(rng.integers(len(known)))]
        return encode_conversation(one, self.processor, context=self.processor.context)

    def next_commands(self, out: Path) -> list[str]:
        picture = self.held_out_picture()
        return [*super().next_commands(out), f"python sample.py attend {out} {picture} --save maps.png"]


BLIP2_RECIPES = {
    # Not better: 2,000 steps (94.7 %), features of the layer before (after 400 steps 76 %, not 82) or of both (77).
    "blip2-stage1": BLIP2Stage1Recipe(
        summary="BLIP-2, stage 1: a Q-Former learns to see through frozen eyes, by contrast, matching and generation",
        measured="20 min on one busy core: matching 95 %, Recall@1 100 % (3 seeds, before labels were smoothed)",
        optimiser=OptimiserConfig(learning_rate=1e-3, warmup=100),
        steps=1600,
        batch_size=64,
        bucket_steps=4,
        save_every=400,
    ),
    "blip2": BLIP2Recipe(
        summary="BLIP-2: a Q-Former and a projection learn to be read by a frozen language model",
        measured="13 min on one busy core: 89 % of balanced questions (3 seeds); --lm t5: 77 % (1 seed)",
        optimiser=OptimiserConfig(learning_rate=1e-3, warmup=100),
        steps=2500,
        batch_size=64,
        bucket_steps=4,
        save_every=500,
    ),
}
