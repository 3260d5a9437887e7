"""The fuse pattern as recipes: a frozen vision tower, words and regions in one encoder, answers of a fixed list.

    clip-resnet ─ vision tower, frozen ─→ regions ─┬→ visualbert, uniter, vilbert   questions; each fourth step captions
                                                   ├→ vqa                          questions
                                                   └→ multitask (multitask.py)     questions and captions, all at once

The papers train on captions first, then on questions. Here the two take turns, so that all heads of the model are good
when it is done, and no second run is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from minivlm import evaluate
from minivlm.checkpoint import load
from minivlm.conversation import IGNORED
from minivlm.datasets.answers import AnswerList, most_frequent
from minivlm.datasets.continuation import pad
from minivlm.datasets.conversations import Conversations, Question
from minivlm.datasets.masking import hide_regions, hide_words
from minivlm.datasets.shapes import is_world
from minivlm.errors import UserError
from minivlm.layers.bert import BERTConfig
from minivlm.layers.transformer import TransformerConfig
from minivlm.metrics import Score
from minivlm.models.joint_encoder import JointEncoderConfig
from minivlm.models.uniter import UNITER, UNITERConfig
from minivlm.models.vilbert import ViLBERT, ViLBERTConfig
from minivlm.models.visualbert import VisualBERT, VisualBERTConfig
from minivlm.models.vqa import VQAConfig, VQAModel
from minivlm.processor import Processor
from minivlm.recipes.base import Recipe
from minivlm.recipes.captioner import ConversationsConfig, Speaking, open_train
from minivlm.recipes.clip import CONTRAST_RECIPES
from minivlm.recipes.llava import PrefixWork
from minivlm.recipes.parts import load_vision_model, take
from minivlm.recipes.shared import build, suited
from minivlm.tasks.match import can_match
from minivlm.training import OptimiserConfig

MASK = "<mask>"  # stands where a word is hidden
ModelConfig = VisualBERTConfig | UNITERConfig | ViLBERTConfig | VQAConfig
CLASSES = {
    VisualBERTConfig: VisualBERT,
    UNITERConfig: UNITER,
    ViLBERTConfig: ViLBERT,
    VQAConfig: VQAModel,
}


@dataclass(frozen=True, kw_only=True)
class FusionRecipe(Recipe):
    what = "a model that chooses answers"
    learns_from = ("questions about one image each",)
    model: ModelConfig  # tower, vocabulary and answers follow from vision_from and the data
    vision_from: str = "out/clip-resnet"  # a CLIP of ours, a published one, or a hub id: its vision tower
    data: ConversationsConfig = field(default_factory=ConversationsConfig)
    most_answers: int = 3000  # the most frequent ones are to choose from
    captions_every: int = 4  # every so many-th step reads captions, of which something is hidden; 0: none does
    hide: Literal["words", "either", "both"] = "words"  # of a caption's pair; either: words or regions
    eyes: ClassVar[str] = "vision"  # the part of the model that is frozen

    @property
    def encoder(self) -> ModelConfig:
        """Of words and regions, with the answers."""
        return self.model

    @property
    def model_class(self) -> type[nn.Module]:
        return CLASSES[type(self.model)]

    def needs(self) -> dict[str, str]:
        return {"clip-resnet": self.vision_from}

    def for_data(self, directory: str, out: str) -> FusionRecipe:
        """The same on another folder; the tower is trained on that folder as well, beside `out`."""
        beside = Path(out).parent / Path(directory).resolve().name
        vocab_size = self.data.vocab_size if is_world(directory) else 4096
        data = replace(self.data, directory=directory, vocab_size=vocab_size)
        summary = f"{self.summary}, on {directory}"
        return suited(self, directory, summary=summary, data=data, vision_from=f"{beside}-clip")

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> FusionWork:
        processor = load(checkpoint)[1] if checkpoint is not None else load_vision_model(self.vision_from)[1]
        train = open_train(self, processor.image_size, quiet=quiet)
        asked = [train.asked(i, np.random.default_rng(i)) for i in range(len(train))]
        if checkpoint is not None:
            model, processor = load(checkpoint)
        else:
            model, processor = self.compose(
                train, most_frequent((q for some in asked for q in some), self.most_answers)
            )
        model.freeze(self.eyes)
        return self.work(model, processor, train, asked)

    def work(self, *parts) -> FusionWork:
        """model, processor, train, asked → what trains the model."""
        return FusionWork(self, *parts)

    def compose(self, train: Conversations, answers: tuple[str, ...]) -> tuple[nn.Module, Processor]:
        """The tower of a CLIP, a tokeniser of the data's questions, answers and captions, and all else new."""
        clip, seen = load_vision_model(self.vision_from)
        sizes = dict(vocab_size=self.data.vocab_size, image_size=seen.image_size, context=self.encoder.text.context)
        words = Processor.train(train.texts(), **sizes)
        words.tokenizer.add_special_tokens([MASK])
        read = dict(context=words.context, pad_token=words.pad_token, pad_to_context=False)
        processor = Processor(words.tokenizer, replace(seen.config, **read))
        config = self.complete(clip.config.vision, answers, processor)
        if not any(train.captions(i) for i in range(len(train))) and isinstance(config, JointEncoderConfig):
            config = replace(config, heads=())  # they would learn nothing: nobody is to ask whether a text matches
        model = build(self.model_class, config, seed=self.seed)
        take(model.vision, clip.vision)
        return model, processor

    def complete(self, vision, answers: tuple[str, ...], processor: Processor) -> ModelConfig:
        """The model's config with what follows from tower, data and tokeniser. UserError where these do not fit it."""
        return completed(self.model, vision, answers, processor)


def completed(config: ModelConfig, vision, answers: tuple[str, ...], processor: Processor) -> ModelConfig:
    text = replace(config.text, vocab_size=processor.vocab_size)
    try:
        width = vision.features_at(config.vision_layer)[1]
        seen = dict(region_width=width) if isinstance(config, JointEncoderConfig) else {}
        return replace(config, vision=vision, text=text, answers=answers, **seen)
    except ValueError as error:
        raise UserError(f"the model cannot be built: {error}.") from None


class FusionWork(PrefixWork):
    """Questions, and in every `captions_every`-th step captions, with what the frozen tower saw."""

    def __init__(
        self, recipe: FusionRecipe, model, processor: Processor, train: Conversations, asked: list[list[Question]]
    ):
        origins = {"vision": recipe.vision_from, "encoder": f"new, tower {recipe.vision_from}"}
        super().__init__(recipe, model, processor, train, origins=origins, answers=True)
        encoder = getattr(model.config, "encoder", model.config)
        self.list = AnswerList(encoder.answers)
        self.right = self.list.scores if encoder.answer_loss == "sigmoid" else self.list.weights
        known = [[self.list.knows(question) for question in some] for some in asked]
        self.samples = [i for i, some in enumerate(known) if any(some)]
        self.n = len(self.samples)
        if self.n < recipe.batch_size:
            raise UserError(
                f"a batch of {recipe.batch_size} cannot be filled from the {self.n} training samples with an answer "
                f"on the list; choose --batch_size {max(1, self.n)} or less, or more --most_answers."
            )
        self.questions_asked = sum(map(len, known))
        self.outside = self.questions_asked - sum(map(sum, known))
        self.captioned = [i for i in self.samples if train.captions(i)]
        self.has_captions = bool(self.captioned)
        self.mask_token = processor.tokenizer.token_to_id(MASK)
        self.special = {processor.start_token, processor.end_token, processor.pad_token}

    def notes(self) -> list[str]:
        """How large the list is, and how many questions it leaves without an answer."""
        recipe, answers = self.recipe, len(self.list.answers)
        notes = [
            *Speaking.notes(self),
            f"{answers} answers to choose from; {self.outside} of {self.questions_asked} questions that were looked at "
            "have none of them, and are not learnt from",
        ]
        if recipe.captions_every and not self.has_captions:
            notes.append(f"{recipe.data.directory} has no captions: questions alone are learnt from")
        return notes

    def key(self, index: int) -> str:
        return self.train.key(self.samples[index])

    def progress(self, line: dict[str, float]) -> str:
        """The losses of the step, each beside that of a model which knows nothing, where that is known."""
        chance, told = self.model.chance_losses(), []
        for name in line.keys() - {"step", "loss", "gradient_norm", "learning_rate"}:
            told.append(f"{name} {line[name]:.2f}" + (f" (chance {chance[name]:.2f})" if name in chance else ""))
        return ", ".join(sorted(told))

    # ---- batches -----------------------------------------------------------------------------------------------------

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """The arguments of `model.losses`, for a step of questions or of captions, of process `rank` of W."""
        share = self.share(step, rank, world)
        every = self.recipe.captions_every if self.has_captions else 0
        told = every and step % every == every - 1
        read, known = (self.captions, self.captioned) if told else (self.questions, self.samples)
        share = [(known[i % len(known)], rng) for i, rng in share]
        return {**read(share), **self.pictures([index for index, _ in share])}

    def questions(self, share: list[tuple[int, np.random.Generator]]) -> dict[str, Tensor]:
        """tokens, mask (B, T), answers (B, A): a question about each picture whose answer is on the list."""
        chosen = [self.question(index, rng) for index, rng in share]
        tokens, mask = self.processor.text([question.text for question in chosen], cut=True)
        answers = torch.from_numpy(np.stack([self.right(question) for question in chosen]))
        return {"tokens": tokens, "mask": mask, "answers": answers}

    def question(self, index: int, rng: np.random.Generator) -> Question:
        asked = [question for question in self.train.asked(index, rng) if self.list.knows(question)]
        return asked[rng.integers(len(asked))] if asked else Question(index, "", ())  # to which nothing is right

    def captions(self, share: list[tuple[int, np.random.Generator]]) -> dict[str, Tensor]:
        """tokens, mask, labels (B, T), matches (B,), hidden (B, R): true captions and false ones.

        Half of them are shown whole. Of the others, true and false alike, something is hidden, so that a mask does not tell
        whether they match; what it hides is to be told of the true ones alone.
        """
        regions = self.model.config.vision.features_at(self.model.config.vision_layer)[0]
        rows, labels, hidden, matches = [], [], [], []
        for index, rng in share:
            false = self.false_caption(index, rng) if rng.random() < 0.5 else None
            hide = self.recipe.hide if self.recipe.hide != "either" else "words" if rng.random() < 0.5 else "regions"
            whole = rng.random() < 0.5
            [row] = self.processor.encode([false or self.caption(index, rng)])
            shown, label = self.hide(self.processor.cut(row), rng, words=hide != "regions" and not whole)
            rows.append(shown)
            labels.append(label if false is None else [IGNORED] * len(label))
            hidden.append(hide_regions(regions, rng) & (hide != "words" and not whole))
            matches.append(false is None)
        tokens, mask = pad(rows, self.processor.pad_token), pad([[1] * len(row) for row in rows], 0).bool()
        batch = {"tokens": tokens, "mask": mask, "matches": torch.tensor(matches)}
        if "words" in self.model.config.heads:
            batch["labels"] = pad(labels, IGNORED)
        if "regions" in self.model.config.heads:
            batch["hidden"] = torch.from_numpy(np.stack(hidden))
        return batch

    def hide(self, row: list[int], rng: np.random.Generator, *, words: bool) -> tuple[list[int], list[int]]:
        if not words:
            return row, [IGNORED] * len(row)
        sizes = dict(mask_token=self.mask_token, vocab_size=self.processor.vocab_size, special=self.special)
        return hide_words(row, rng, **sizes)

    def length(self, index: int, rng: np.random.Generator) -> int:
        return len(self.question(self.samples[index], rng).text.split())

    def false_caption(self, index: int, rng: np.random.Generator) -> str | None:
        """One that is nearly right, where the data have some; else, and as often, that of another picture."""
        if rng.random() < 0.5 and (false := self.train.false_caption(index, rng)) is not None:
            return false
        other = self.caption(self.captioned[int(rng.integers(len(self.captioned)))], rng)
        return None if other in self.train.captions(index) else other

    # ---- what was learnt ---------------------------------------------------------------------------------------------

    def validate(self) -> float:
        return self.answers_score()

    def evaluate(self) -> dict[str, Score]:
        return evaluate.evaluate(self.model, self.processor, self.recipe.data.directory)

    def next_commands(self, out: Path) -> list[str]:
        test = self.test
        asked = test.questions()[0]
        picture = self.path(test, asked.index)
        commands = [f"python sample.py answer {out} {picture} {quote(asked.text)}"]
        if can_match(self.model) and (told := test.captions(asked.index)):
            commands.append(f"python sample.py match {out} {picture} {quote(told[0])}")
        return commands


# ---- sizes -----------------------------------------------------------------------------------------------------------

WORDS = BERTConfig(width=128, depth=4, heads=4, vocab_size=512, context=64, norm_eps=1e-5)
TOWER = dict(vision=CONTRAST_RECIPES["clip-resnet"].model.vision, vision_layer=-2)
COMMON = dict(text=WORDS, region_width=256, answers=("yes", "no"), **TOWER)
SMALL = dict(
    optimiser=OptimiserConfig(learning_rate=1e-3, warmup=100),
    steps=2000,
    batch_size=128,
    save_every=500,
)

FUSION_RECIPES = {
    "visualbert": FusionRecipe(
        summary="VisualBERT: regions are words of another type, in one BERT with the question",
        model=VisualBERTConfig(**COMMON, region_positions=True, heads=("words", "matching")),
        measured="9 min on one busy core: 93 % of balanced questions, 85 % about never-seen pairs (3 seeds)",
        **SMALL,
    ),
    "uniter": FusionRecipe(
        summary="UNITER: words and regions in one encoder, which also learns to align them",
        model=UNITERConfig(**COMMON, heads=("words", "regions", "matching")),
        hide="either",
        measured="10 min on one busy core: 93 % of balanced questions, 85 % about never-seen pairs (3 seeds, by a softmax)",
        **SMALL,
    ),
    "vilbert": FusionRecipe(
        summary="ViLBERT: a stream for words and one for regions, connected by co-attention",
        model=ViLBERTConfig(
            **COMMON,
            heads=("words", "regions", "matching"),
            regions=TransformerConfig(width=128, depth=2, heads=4, norm_place="post"),
            connections=2,
            joint_heads=4,
            joint_width=128,
        ),
        hide="both",
        measured="15 min on one busy core: 94 % of balanced questions, 85 % about never-seen pairs (3 seeds, by a softmax)",
        # After 1,000 steps 5e-4 answered 86 %, 1e-3 80 and 2e-3 39 % (one seed; chance 28.5).
        **SMALL | {"optimiser": OptimiserConfig(learning_rate=5e-4, warmup=100), "steps": 2800, "save_every": 700},
    ),
    "vqa": FusionRecipe(
        summary="the plain VQA model: an image encoder, a question encoder, fusion, a list of answers",
        model=VQAConfig(
            text=replace(WORDS, depth=2),
            fusion=TransformerConfig(width=128, depth=3, heads=4, cross_attention_every=1),
            answers=("yes", "no"),
            **TOWER,
        ),
        captions_every=0,
        measured="11 min on one busy core: 93 % of balanced questions, 83 % about never-seen pairs (3 seeds)",
        **SMALL | {"steps": 4000},
    ),
}
