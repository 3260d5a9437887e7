"""The fuse pattern: a frozen vision tower, text and image regions in one encoder, answers of a fixed list.

    clip-resnet ─ vision tower, frozen ─→ regions ─┬→ visualbert, uniter, vilbert   questions; each fourth step captions
                                                   ├→ vqa                          questions
                                                   └→ multitask (multitask.py)     questions and captions, all at once

The papers train on captions first, then on questions. Here the two take turns, so that all heads of the model are good
when it is done, and no second run is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Literal

import numpy as np
from torch import nn

from minivlm import evaluate
from minivlm.datasets.answers import AnswerList, most_frequent
from minivlm.datasets.batches import conversation_notes
from minivlm.datasets.conversations import Conversations, Question
from minivlm.datasets.question_batches import Alternating, MaskedCaptions, QuestionsOfList
from minivlm.errors import UserError
from minivlm.layers.bert import BERTConfig
from minivlm.layers.transformer import TransformerConfig
from minivlm.metrics import Score
from minivlm.metrics.vqa import normalise
from minivlm.models.joint_encoder import JointEncoderConfig
from minivlm.models.multitask import MultitaskVLM
from minivlm.models.uniter import UNITER, UNITERConfig
from minivlm.models.vilbert import ViLBERT, ViLBERTConfig
from minivlm.models.visualbert import VisualBERT, VisualBERTConfig
from minivlm.models.vqa import VQAConfig, VQAModel
from minivlm.origins import copy_marks
from minivlm.precision import cast, main_dtype
from minivlm.processor import Processor
from minivlm.recipes.clip import CLIP_RECIPES
from minivlm.recipes.folders import open_training_conversations
from minivlm.recipes.job import Job, Progress
from minivlm.recipes.parts import build, described, load_vision_tower, opened, take
from minivlm.recipes.recipe import FolderData, Recipe
from minivlm.recipes.scores import Generated
from minivlm.recipes.vision_cache import VisionCache
from minivlm.training import OptimiserConfig

MASK = "<mask>"  # stands where a word is hidden
MASKS = (MASK, "[MASK]")  # of ours, and of published tokenisers
EncoderConfig = VisualBERTConfig | UNITERConfig | ViLBERTConfig | VQAConfig
CLASSES = {VisualBERTConfig: VisualBERT, UNITERConfig: UNITER, ViLBERTConfig: ViLBERT, VQAConfig: VQAModel}


@dataclass(frozen=True, kw_only=True)
class FuseData(FolderData):
    vocab_size: int = 512  # of the byte-level BPE that is trained on questions, answers and captions
    most_answers: int = 3000  # the most frequent ones are to choose from
    captions_every: int = 4  # every so many-th step reads captions, of which something is hidden; 0: none does
    hide: Literal["words", "either", "both"] = "words"  # of a caption's pair; either: words or regions
    false_captions: float = 0.5  # share of its false captions that are nearly right, where the data have such
    paired: bool = False  # half as many images in such a step, each with a true caption and a false one


@dataclass(frozen=True, kw_only=True)
class FuseRecipe(Recipe):
    what = "a model that chooses answers"
    learns_from = ("questions about one image each",)
    vision_from: str = "out/clip-resnet"  # a CLIP or a tower alone (DINOv2), ours, published or a hub id
    model: EncoderConfig  # tower, vocabulary and answers follow from vision_from and the data
    data: FuseData = FuseData()

    def builds_on(self) -> dict[str, str]:
        return {"vision_from": "clip-resnet"}

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        kind = CLASSES[type(self.model)]
        model, processor, conversations, asked = open_parts(self, self.model, kind, checkpoint, quiet=quiet)
        model.freeze("vision")
        scores = Chosen(Generated(model, processor, self.data.source, ask=True))
        cache = VisionCache.of_conversations(model, processor, conversations)
        questions = list_questions(self, model.config, processor, conversations, asked, cache)
        captioned = [i for i in questions.samples if conversations.captions(i)]
        every, samples = self.data.captions_every, questions
        mask = next((mark for mark in MASKS if processor.tokenizer.token_to_id(mark) is not None), None)
        if every and captioned and model.config.heads and mask:
            c, hidden = (
                model.config,
                dict(hide=self.data.hide, mask=mask, paired=self.data.paired, nearly_right=self.data.false_captions),
            )
            regions = c.vision.features_at(c.vision_layer)[0]
            masked = MaskedCaptions(
                conversations, captioned, processor, cache, regions=regions, heads=c.heads, **hidden
            )
            samples = Alternating(questions, masked, every)
        elif every:
            lacks = f"{self.data.source} has no captions" if not captioned else "the model has no use for captions"
            questions.known_notes.append(f"{lacks}: questions alone are learnt from")
        origins = {} if self.continues else {"vision": self.vision_from, "encoder": f"new, tower {self.vision_from}"}
        return Job(self, model, processor, samples, scores, by_name(model), origins, cache.prepare)

    def complete(
        self, vision, answers: tuple[str, ...], processor: Processor, conversations: Conversations
    ) -> EncoderConfig:
        """The model's config with what follows from tower, data and tokeniser."""
        config = completed(self.model, vision, answers, processor)
        if isinstance(config, JointEncoderConfig) and not any(map(conversations.captions, range(len(conversations)))):
            return replace(config, heads=())  # they would learn nothing: nobody is to ask whether a text matches
        return config


def open_parts(
    recipe: Recipe, encoder: EncoderConfig, model_class: type[nn.Module], checkpoint: Path | None, *, quiet: bool
) -> tuple[nn.Module, Processor, Conversations, list[list[Question]]]:
    """Model, processor, the training samples, and some questions about each. Without a model to start from: a trained tower,
    a tokeniser of the data's questions, answers and captions, and all else new."""
    found = opened(recipe, model_class, checkpoint)
    model, processor = found or load_vision_tower(recipe.vision_from)
    if not model.takes_images if found else False:
        raise UserError(
            f"--starts_from {recipe.starts_from} holds a {model_class.__name__} that takes what a detector found in images: "
            "one with a vision tower is wanted."
        )
    conversations = open_training_conversations(recipe, processor.image_size, quiet=quiet)
    asked = [conversations.asked(i, np.random.default_rng(i)) for i in range(len(conversations))]
    if checkpoint is not None:
        return model, processor, conversations, asked
    tower, answers = model, most_frequent((q for some in asked for q in some), recipe.data.most_answers)
    if found:
        return with_answers(model, answers, seed=recipe.seed), processor, conversations, asked
    sizes = dict(vocab_size=recipe.data.vocab_size, image_size=processor.image_size, context=encoder.text.context)
    read = Processor.train(conversations.texts(), **sizes)
    read.tokenizer.add_special_tokens([MASK])
    texts = dict(context=read.context, pad_token=read.pad_token, pad_to_context=False)
    processor = Processor(read.tokenizer, replace(processor.config, **texts))
    model = build(model_class, recipe.complete(tower.config, answers, processor, conversations), seed=recipe.seed)
    take(model.vision, tower)
    return model, processor, conversations, asked


def with_answers(model: nn.Module, answers: tuple[str, ...], *, seed: int) -> nn.Module:
    """The model that knows these answers: itself, or one with a head for them, of which the rows of known ones are kept."""
    multitask = isinstance(model, MultitaskVLM)
    encoder = model.config.encoder if multitask else model.config
    index = AnswerList(encoder.answers or ()).index
    rows = [index.get(normalise(answer)) for answer in answers]
    if None not in rows:
        return model
    encoder = replace(encoder, answers=answers)
    made = build(type(model), replace(model.config, encoder=encoder) if multitask else encoder, seed=seed)
    cast(made, main_dtype(model.parameters()))
    state = {name: tensor for name, tensor in model.state_dict().items() if "answer_head." not in name}
    for name, tensor in made.state_dict().items():
        if "answer_head." in name:
            state[name] = tensor.clone()
            for row, known in enumerate(rows):
                if known is not None:
                    state[name][row] = model.state_dict()[name][known]
    made.load_state_dict(state)
    copy_marks(model, made)
    (made.encoder if multitask else made).answer_head.published = False
    return made


def completed(config: EncoderConfig, vision, answers: tuple[str, ...], processor: Processor) -> EncoderConfig:
    """The encoder's config with what follows from tower, data and tokeniser. UserError where these do not fit it."""
    text = replace(config.text, vocab_size=processor.vocab_size)
    try:
        width = vision.features_at(config.vision_layer)[1]
        regions = dict(region_width=width) if isinstance(config, JointEncoderConfig) else {}
        return replace(config, vision=vision, text=text, answers=answers, **regions)
    except ValueError as error:
        raise UserError(f"the model cannot be built: {error}.") from None


def list_questions(
    recipe: Recipe,
    encoder: EncoderConfig,
    processor: Processor,
    conversations: Conversations,
    asked: list[list[Question]],
    images: VisionCache,
) -> QuestionsOfList:
    """The samples with a question whose answer is on the encoder's list. UserError where they do not fill a batch."""
    answers = AnswerList(encoder.answers)
    known = [[answers.knows(question) for question in some] for some in asked]
    samples = [i for i, some in enumerate(known) if any(some)]
    if (n := len(samples)) < recipe.batch_size:
        raise UserError(
            f"a batch of {recipe.batch_size} cannot be filled from the {n} training samples with an answer "
            f"on the list; choose --batch_size {max(1, n)} or less, or more --data.most_answers."
        )
    total = sum(map(len, known))
    told = [
        *conversation_notes(conversations, recipe.data.source),
        f"{len(encoder.answers)} answers to choose from; {total - sum(map(sum, known))} of {total} questions that were "
        "looked at have none of them, and are not learnt from",
    ]
    if new := new_answers(recipe, encoder.answers):
        told.append(
            f"{new} of these answers are new to the model in {recipe.starts_from}: the head begins anew with them, and keeps "
            "what it knows of the others"
        )
    right = answers.scores if encoder.answer_loss == "sigmoid" else answers.weights
    return QuestionsOfList(conversations, samples, answers, right, processor, images, told)


def new_answers(recipe: Recipe, answers: tuple[str, ...]) -> int:
    """How many of the answers the model that the recipe starts from does not know."""
    if not recipe.continues:
        return 0
    config = described(recipe.starts_from).config
    known = AnswerList(getattr(config, "encoder", config).answers or ()).index
    return sum(normalise(answer) not in known for answer in answers)


def by_name(model: nn.Module) -> Progress:
    """The losses of the step, each beside that of a model which knows nothing, where that is known."""

    def tell(line: Mapping[str, float]) -> str:
        chance, told = model.chance_losses(), []
        for name in line.keys() - {"step", "loss", "gradient_norm", "learning_rate", "skipped"}:
            told.append(f"{name} {line[name]:.2f}" + (f" (chance {chance[name]:.2f})" if name in chance else ""))
        return ", ".join(sorted(told))

    return Progress(tell, model.chance_losses())


class Chosen:
    """Answers of a list, and all else that the model can do. generated: the same of models in general."""

    def __init__(self, generated: Generated):
        self.generated = generated
        self.name, self.validate, self.figure = generated.name, generated.answers_score, generated.figure

    def evaluate(self) -> dict[str, Score]:
        of = self.generated
        return evaluate.evaluate(of.model, of.processor, of.directory)

    def next_commands(self, out: Path) -> list[str]:
        of = self.generated
        asked = of.test.questions()[0]
        picture, told = of.path(asked.index), of.test.captions(asked.index)
        match = (
            [f"python sample.py match {out} {picture} {quote(told[0])}"]
            if told and "match" in of.model.abilities
            else []
        )
        return [f"python sample.py answer {out} {picture} {quote(asked.text)}", *match]


# ---- sizes -----------------------------------------------------------------------------------------------------------

TEXT = BERTConfig(width=128, depth=4, heads=4, vocab_size=512, context=64, norm_eps=1e-5)
TOWER = dict(vision=CLIP_RECIPES["clip-resnet"].model.vision, vision_layer=-2)
COMMON = dict(text=TEXT, region_width=256, answers=("yes", "no"), **TOWER)
SMALL = dict(
    optimiser=OptimiserConfig(learning_rate=1e-3, warmup=100),
    steps=2000,
    batch_size=128,
    save_every=500,
)

FUSE_RECIPES = {
    "visualbert": FuseRecipe(
        summary="VisualBERT: regions are tokens of another type, in one BERT with the question",
        model=VisualBERTConfig(**COMMON, region_positions=True, heads=("words", "matching")),
        measured="9 min on one busy core: 93 % of balanced questions, 85 % about never-seen pairs (3 seeds)",
        **SMALL,
    ),
    "uniter": FuseRecipe(
        summary="UNITER: text and regions in one encoder, which also learns to align them",
        model=UNITERConfig(**COMMON, heads=("words", "regions", "matching")),
        data=FuseData(hide="either"),
        measured="10 min on one busy core: 93 % of balanced questions, 85 % about never-seen pairs (3 seeds, by a softmax)",
        **SMALL,
    ),
    "vilbert": FuseRecipe(
        summary="ViLBERT: a stream for text and one for regions, connected by co-attention",
        model=ViLBERTConfig(
            **COMMON,
            heads=("words", "regions", "matching"),
            regions=TransformerConfig(width=128, depth=2, heads=4, norm_place="post"),
            connections=2,
            joint_heads=4,
            joint_width=128,
        ),
        data=FuseData(hide="both"),
        measured="15 min on one busy core: 94 % of balanced questions, 85 % about never-seen pairs (3 seeds, by a softmax)",
        # After 1,000 steps 5e-4 answered 86 %, 1e-3 80 and 2e-3 39 % (one seed; chance 28.5).
        **SMALL | {"optimiser": OptimiserConfig(learning_rate=5e-4, warmup=100), "steps": 2800, "save_every": 700},
    ),
    "vqa": FuseRecipe(
        summary="the plain VQA model: an image encoder, a question encoder, fusion, a list of answers",
        model=VQAConfig(
            text=replace(TEXT, depth=2),
            fusion=TransformerConfig(width=128, depth=3, heads=4, cross_attention_every=1),
            answers=("yes", "no"),
            **TOWER,
        ),
        data=FuseData(captions_every=0),
        measured="11 min on one busy core: 93 % of balanced questions, 83 % about never-seen pairs (3 seeds)",
        **SMALL | {"steps": 4000},
    ),
}
