"""BLIP-2 in its two stages (Li et al. 2023, §3): a Q-Former learns to read a frozen vision tower, then to be read by a
frozen language model.

    clip-resnet ─ vision tower, frozen ─┬→ blip2-stage1 (contrast, matching, generation) ─┐
    lm or t5 ─ language model, frozen ──┼─────────────────────────────────────────────────┴→ blip2 (conversations)
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import log
from pathlib import Path
from typing import Any, Literal

from minivlm.checkpoint import load
from minivlm.conversation import template_of, with_chat
from minivlm.datasets.batches import CaptionsWithNegatives
from minivlm.datasets.conversations import open_conversations
from minivlm.datasets.folder import open_pairs
from minivlm.datasets.judge import conversation_problem
from minivlm.datasets.sequence_batches import ConversationTurns, QuestionsToEncoder
from minivlm.errors import UserError
from minivlm.layers.bert import BERT
from minivlm.layers.language_model import LanguageModel
from minivlm.layers.qformer import QFormerConfig
from minivlm.layers.t5 import T5
from minivlm.layers.tower import TowerConfig, features_of, learned_positions
from minivlm.models.blip2 import BLIP2, BLIP2Config
from minivlm.models.blip2_stage1 import BLIP2Stage1, BLIP2Stage1Config
from minivlm.models.vision_features import VisionFeaturesConfig
from minivlm.origins import is_published
from minivlm.processor import Processor
from minivlm.recipes.folders import (
    check_fills_a_batch,
    check_held_out,
    next_training,
    open_training_conversations,
    open_world,
)
from minivlm.recipes.job import Job, against, each_against
from minivlm.recipes.parts import (
    build,
    holds,
    join_processors,
    load_vision_tower,
    opened,
    reading,
    take,
    with_image_token,
)
from minivlm.recipes.recipe import FolderData, Recipe
from minivlm.recipes.scores import Generated, Matching
from minivlm.recipes.vision_cache import VisionCache
from minivlm.training import OptimiserConfig

PARTS = ("vision", "qformer", "projection", "language_model")
DECODE = "<decode>"  # stands where a text begins that is to be generated; elsewhere texts begin with <start>
VOCABULARY = 512  # of the byte-level BPE that is trained where the tower has no tokeniser
QUERIES = QFormerConfig(width=128, depth=4, heads=4, queries=16, context=64, norm_eps=1e-5)


def querying(vision: TowerConfig, qformer: QFormerConfig, layers: tuple[int, ...], **text) -> dict[str, Any]:
    """The fields of a `BLIP2Config`, or of stage 1's, for a tower, whose features before the last norm are read."""
    width, positions = features_of(vision, layers)[1], learned_positions(vision, layers)
    qformer = replace(qformer, context_width=width, positions=positions, **text)
    return dict(**reading(vision, layers), qformer=qformer)


# ---- stage 1 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stage1Model:
    vision_layers: tuple[int, ...] = (-2,)
    qformer: QFormerConfig = QUERIES  # its vocab_size and context_width follow from the tokeniser and the tower
    embed_width: int = 128
    label_smoothing: float = 0.1  # of the contrast and of every token that is generated


@dataclass(frozen=True, kw_only=True)
class NegativesData(FolderData):
    false_captions: float = 0.75  # share of the samples that come with a nearly right caption, where the data have some


@dataclass(frozen=True, kw_only=True)
class BLIP2Stage1Recipe(Recipe):
    what = "stage 1 of a BLIP-2"
    learns_from = ("pairs",)
    taken_by = "--starts_from"
    vision_from: str = "out/clip-resnet"  # a CLIP or a tower alone (DINOv2), ours, published or a hub id
    bert_from: str | None = None  # published BERT weights to start the Q-Former from; its tokeniser comes along
    model: Stage1Model = Stage1Model()
    data: NegativesData = NegativesData()

    def builds_on(self) -> dict[str, str]:
        return {"vision_from": "clip-resnet"}

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        model, processor = opened(self, BLIP2Stage1, checkpoint) or self.compose()
        model.freeze("vision")
        directory, size = self.data.source, processor.image_size
        open_world(self, size, quiet=quiet)
        pairs = open_pairs(directory, "train", image_size=size)
        check_fills_a_batch(len(pairs), self.batch_size, "training images", directory)
        check_held_out(directory, size)

        more = lambda out, picture: [
            f"python sample.py attend {out} {picture} --save maps.png",
            *next_training("blip2", directory, starts_from=out),
        ]
        cache = VisionCache(model, processor, len(pairs), pairs.images)
        false = self.data.false_captions
        samples = CaptionsWithNegatives(pairs, processor, cache, directory, false_captions=false)
        scores = Matching(model, processor, directory, more)
        progress = each_against(model.chance_losses(self.batch_size))
        origins = {} if self.continues else {"vision": self.vision_from, "qformer": self.bert_from or "new"}
        return Job(self, model, processor, samples, scores, progress, origins, cache.prepare)

    def compose(self) -> tuple[BLIP2Stage1, Processor]:
        """The tower of a CLIP, a new Q-Former, and the CLIP's tokeniser with one more token. For a tower without texts a
        tokeniser is trained on the captions."""
        tower, processor = load_vision_tower(self.vision_from)
        bert, c = None, self.model
        if self.bert_from is not None:
            bert, read = load(self.bert_from)
            if not isinstance(bert, BERT):
                raise UserError(f"--bert_from {self.bert_from} holds a {type(bert).__name__}, but a BERT is wanted.")
            processor = Processor(read.tokenizer, replace(processor.config, pad_token=read.pad_token))
        elif processor.source is None:
            processor = self.train_tokenizer(processor)
        processor.tokenizer.add_special_tokens([DECODE])
        context = min(c.qformer.context, processor.context)
        processor = Processor(processor.tokenizer, replace(processor.config, context=context, pad_to_context=False))
        config = BLIP2Stage1Config(
            **querying(tower.config, c.qformer, c.vision_layers, vocab_size=processor.vocab_size),
            embed_width=c.embed_width,
            label_smoothing=c.label_smoothing,
            start_token=processor.start_token,
            decode_token=processor.tokenizer.token_to_id(DECODE),
            end_token=processor.end_token,
            pad_token=processor.pad_token,
        )
        model = build(BLIP2Stage1, config, seed=self.seed)
        take(model.vision, tower)
        if bert is not None:
            try:
                model.qformer.load_bert(bert)
            except ValueError as error:
                raise UserError(f"--bert_from {self.bert_from} does not fit: {error}.") from None
        return model, processor

    def train_tokenizer(self, images: Processor) -> Processor:
        """The images as they were, and a tokeniser of the captions."""
        conversations = open_conversations(self.data.source, "train", image_size=None)
        context = self.model.qformer.context
        text = Processor.train(
            conversations.texts(), vocab_size=VOCABULARY, image_size=images.image_size, context=context
        )
        return Processor(text.tokenizer, replace(images.config, context=context, pad_token=text.pad_token))


# ---- stage 2 ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NewQFormer:
    """Of --from_scratch; otherwise the Q-Former is that of stage 1."""

    vision_layers: tuple[int, ...] = (-2,)
    qformer: QFormerConfig = QUERIES


@dataclass(frozen=True, kw_only=True)
class AskedData(FolderData):
    holes: float = 0.75  # share of the samples in which a T5 that knows holes is asked all questions at once, not one


@dataclass(frozen=True, kw_only=True)
class BLIP2Recipe(Recipe):
    what = "a BLIP-2"
    learns_from = ("conversations",)
    judged_by = ("questions", "captions")
    lm: Literal["lm", "t5"] = "lm"  # a decoder, or an encoder and a decoder
    starts_from: str = "out/blip2-stage1"
    language_from: str | None = None  # None: out/lm or out/t5
    from_scratch: bool = False  # without a stage 1: a new Q-Former on the tower of vision_from
    vision_from: str = "out/clip-resnet"
    model: NewQFormer = NewQFormer()
    data: AskedData = AskedData()
    chat: str | None = None  # how turns are written, by name; None: as the language model has it
    system: str | None = None  # what the system says first; None: as the chat template has it; "": nothing

    def builds_on(self) -> dict[str, str]:
        if self.from_scratch:
            return {"vision_from": "clip-resnet", "language_from": self.lm}
        whole = {} if holds(self.starts_from, BLIP2) else {"language_from": self.lm}
        return {"starts_from": "blip2-stage1", **whole}

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        model, processor = load(checkpoint) if checkpoint is not None else self.compose()
        model.freeze("vision", "language_model")
        encodes, directory = isinstance(model.language_model, T5), self.data.source
        problem = conversation_problem(processor, alone=encodes)
        conversations = open_training_conversations(self, processor.image_size, quiet=quiet, problem=problem)

        more = lambda out, picture: [f"python sample.py attend {out} {picture} --save maps.png"]
        scores = Generated(model, processor, directory, more, ask=True)
        cache = VisionCache.of_conversations(model, processor, conversations)
        samples = ConversationTurns(conversations, processor, cache, directory)
        if encodes:
            samples = QuestionsToEncoder(samples, all_at_once=self.data.holes)
        vision = self.vision_from if self.from_scratch else self.starts_from
        origins = {"vision": vision, "qformer": "new" if self.from_scratch else vision}
        language = self.needs().get(self.lm)  # None: all is from one model
        origins |= {"projection": "new", "language_model": language} if language else dict.fromkeys(PARTS, vision)
        progress = against("uniform", log(processor.vocab_size))
        return Job(self, model, processor, samples, scores, progress, origins, cache.prepare)

    def compose(self) -> tuple[BLIP2, Processor]:
        """Vision tower, Q-Former and language model put together, with a new projection between the last two."""
        if self.from_scratch:
            tower, images = load_vision_tower(self.vision_from)
            parts = querying(tower.config, self.model.qformer, self.model.vision_layers)
        else:
            source, images = load(self.starts_from)
            if isinstance(source, BLIP2):
                return opened(self, BLIP2)
            if not isinstance(source, BLIP2Stage1):
                raise UserError(
                    f"--starts_from {self.starts_from} holds a {type(source).__name__}, but stage 1 of a BLIP-2 is "
                    "wanted: train one with `python train.py blip2-stage1`, or do without by --from_scratch."
                )
            c, tower = source.config, source.vision
            parts = {field.name: getattr(c, field.name) for field in fields(VisionFeaturesConfig)}
            parts["qformer"] = replace(c.qformer, vocab_size=None)
        language, text = self.load_language_model()
        config = BLIP2Config(**parts, language=language.config, image_token=text.image_token_id)
        model = build(BLIP2, config, seed=self.seed)
        take(model.vision, tower)
        take(model.language_model, language)
        if not self.from_scratch:
            if model.standardise is not None:
                model.standardise.load_state_dict(source.standardise.state_dict())
            wanted = model.qformer.state_dict()  # the text's half stays behind
            model.qformer.load_state_dict({name: source.qformer.state_dict()[name] for name in wanted})
            model.qformer.published = is_published(source.qformer)
        processor = join_processors(images, text, image_tokens=config.image_tokens, context=language.config.context)
        if self.lm == "t5" and processor.config.chat == "plain":
            processor = Processor(text.tokenizer, replace(processor.config, chat="encoder"))
        return model, processor

    def load_language_model(self) -> tuple[LanguageModel | T5, Processor]:
        source = self.needs()[self.lm]
        language, read = load(source)
        wanted = {"lm": LanguageModel, "t5": T5}[self.lm]
        if not isinstance(language, wanted):
            other = {LanguageModel: "; take it with --lm lm", T5: "; take it with --lm t5"}
            raise UserError(
                f"--lm {self.lm} wants a {wanted.__name__}, but {source} holds a "
                f"{type(language).__name__}{other.get(type(language), '')}."
            )
        read = with_chat(read, self.chat, self.system)
        template_of(read)  # known before anything is trained
        return with_image_token(language, read)


BLIP2_RECIPES = {
    # Not better: 2,000 steps (94.7 %), features of the layer before (after 400 steps 76 %, not 82) or of both (77).
    "blip2-stage1": BLIP2Stage1Recipe(
        summary="BLIP-2, stage 1: a Q-Former on a frozen vision tower, by contrast, matching and generation",
        measured="20 min on one busy core: matching 95 %, Recall@1 100 % (3 seeds, before labels were smoothed)",
        optimiser=OptimiserConfig(learning_rate=1e-3, warmup=100),
        steps=1600,
        batch_size=64,
        bucket_steps=4,
        save_every=400,
    ),
    "blip2": BLIP2Recipe(
        summary="BLIP-2: a Q-Former and a projection give a frozen language model its image tokens",
        measured="13 min on one busy core: 89 % of balanced questions (3 seeds); --lm t5: 77 % (1 seed)",
        optimiser=OptimiserConfig(learning_rate=1e-3, warmup=100),
        steps=2500,
        batch_size=64,
        bucket_steps=4,
        save_every=500,
    ),
}
