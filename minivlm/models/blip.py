"""BLIP: one text transformer in three roles, which compares images with texts, matches them, and generates captions.

    images ─→ vision tower ─┬─────────────────────────┬──────────────────────────┐
                            │ vectors                 ▼ cross-attention          ▼ cross-attention
    [CLS] text ─→ encoder ──┴→ contrast   [ENC] text ─→ encoder ─→ matching      [DEC] text ─→ decoder ─→ generation
                  unimodal                       image-grounded                         image-grounded, causal

The two share all but self-attention. A question goes through the image-grounded encoder, and the decoder answers it.
Li et al. 2022, "BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation",
§3.1, §3.2 and figure 2; questions: §5.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.layers.bert import BERT, BERTConfig, TextHead
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.padding import padding_last
from minivlm.layers.position import add_positions
from minivlm.layers.tower import ImageFeatures, Images, check_reader, make_tower
from minivlm.losses import check_smoothing, in_parts, mean, next_token_loss
from minivlm.model import Model
from minivlm.models import image_text_matching as itm
from minivlm.models.blip_text import BLIPDecoding, are_questions, decode_as_given, rank, share_weights, with_first
from minivlm.models.momentum import Momentum, MomentumConfig
from minivlm.models.vision_features import VisionFeaturesConfig, make_standardise, vision_features


@dataclass(frozen=True, kw_only=True)
class BLIPConfig(VisionFeaturesConfig):
    """roles: "all" share what they can; published weights have one use: "match" the encoder alone, "caption" the decoder alone,
    "answer" both, unshared."""

    text: BERTConfig  # of the encoder; the decoder's is the same, but causal
    roles: Literal["all", "match", "caption", "answer"] = "all"
    embed_width: int = 256
    temperature: float | None = 0.07  # of the contrast, where it starts; None: cosines as they are, nothing to learn
    # Image features with a learned position each: those of a ResNet have none. 0: as they come
    positions: int = field(default=0, metadata={"was": "places"})
    decode_token: int  # the first token of a text that is generated
    encode_token: int | None = None  # the first of a text that is encoded with an image; None: the tokeniser's own
    end_token: int
    pad_token: int = 0
    attend_padding: bool = field(default=False, metadata={"was": "reads_padding"})  # of questions, as published ones do
    trained_on_questions: bool = field(default=True, metadata={"was": "asked"})  # as well, and so it answers some
    momentum: MomentumConfig | None = None  # soft labels and a queue for the contrast
    label_smoothing: float = field(default=0.1, metadata={"before": 0.0})  # of every generated token (released code)

    image_tokens: ClassVar[int] = 0  # positions that an image takes in a text

    def __post_init__(self):
        super().__post_init__()
        check_smoothing(self.label_smoothing)
        if self.text.causal or self.text.cross_attention_every < 1:
            raise ValueError("text is the encoder's: it is not causal, and its cross_attention_every is at least 1")
        check_reader(self.feature_width, self.text.context_width or self.text.width, "text model", "text.context_width")
        if self.roles == "answer" and not self.answers:
            raise ValueError(
                f"the decoder attends to questions of width {self.text.width} and to images of width "
                f"{self.feature_width}: the two must be the same"
            )
        if self.momentum is not None and not self.compares:
            raise ValueError(f"momentum is for the contrast, which a BLIP with roles={self.roles!r} does not learn")

    @property
    def compares(self) -> bool:
        return self.roles in ("all", "match")

    @property
    def answers(self) -> bool:
        """Whether it answers questions. The decoder's cross-attention takes image features and encoded questions alike."""
        return self.trained_on_questions and self.roles in ("all", "answer") and self.feature_width == self.text.width

    @property
    def captions(self) -> bool:
        return self.roles in ("all", "caption")


@dataclass(frozen=True)
class BLIPOutput:
    logits_per_image: Tensor | None  # (B, B'): row i scores every text for image i; None if it does not compare
    losses: dict[str, Tensor]  # by name, of training; none if images and texts are not pairs
    decode: Callable[[], Tensor] | None  # → (B, T, D), the input of the head for the text as it is given
    labels: Tensor | None
    head: nn.Linear | None

    @cached_property
    def logits(self) -> Tensor | None:
        """(B, T, V) of the next tokens of the text as it is given; computed when asked for, which training never does."""
        return None if self.hidden is None else self.head(self.hidden)

    @cached_property
    def loss(self) -> Tensor | None:
        """The next-token loss of the labels, without smoothing."""
        if self.hidden is None or self.labels is None:
            return None
        return next_token_loss(self.hidden, self.labels, self.head.weight, self.head.bias)

    @cached_property
    def hidden(self) -> Tensor | None:
        return None if self.decode is None else self.decode()


class BLIP(Model):
    """images (B, 3, H, W), tokens (B, T) with the tokeniser's start and end, mask (B, T), labels (B, T) → `BLIPOutput`.

    labels are the tokens, −100 = not counted; with roles="answer", tokens are questions and labels (B, T') answers that
    start with the decode token. Wherever it takes images it takes `ImageFeatures` as well.
    """

    config_class = BLIPConfig
    one_image = True
    image_attention = "*.cross_attention"  # of the encoder; of one that generates captions alone, of the decoder

    @property
    def abilities(self) -> frozenset[str]:
        c = self.config
        can = (
            {"attend"} | ({"encode", "match"} if c.compares else set()) | ({"caption"} if c.roles != "match" else set())
        )
        return frozenset(can | ({"answer", "chat", "rank"} if c.answers else set()))

    @property
    def caption_token(self) -> int | None:
        return self.config.decode_token if self.config.captions else None

    def __init__(self, config: BLIPConfig, *, seed: int = 0):
        super().__init__(config)
        c, D = config, config.text.width
        self.vision = make_tower(c.vision, torch.Generator().manual_seed(seed))
        self.standardise = make_standardise(c)
        self.encoder = None if c.roles == "caption" else BERT(c.text, seed=seed)
        self.decoder = None if c.roles == "match" else BERT(replace(c.text, causal=True), seed=seed)
        if c.roles == "all":
            share_weights(self.encoder, self.decoder)
        generator = torch.Generator().manual_seed(seed)
        self.image_position_embedding = nn.Parameter(torch.empty(c.positions, c.feature_width)) if c.positions else None
        if self.image_position_embedding is not None:
            normal(self.image_position_embedding.data, 0.5, generator)
        self.logit_scale = self.match_head = self.head = None
        if c.compares:
            self.vision_projection = nn.Linear(c.feature_width, c.embed_width)
            self.text_projection = nn.Linear(D, c.embed_width)
            self.match_head = nn.Linear(D, 2)
            for part in (self.vision_projection, self.text_projection, self.match_head):
                initialise_linears(part, generator)
            if c.temperature is not None:
                self.logit_scale = nn.Parameter(torch.tensor(-math.log(c.temperature)))
        if self.decoder is not None:
            self.text_head = TextHead(c.text)
            initialise_linears(self.text_head, generator)
            self.head = nn.Linear(D, c.text.vocab_size)
            self.head.weight = self.decoder.token_embedding.weight
            nn.init.zeros_(self.head.bias)
        self.momentum = Momentum(c.momentum, self, c.embed_width) if c.momentum else None
        if c.momentum:
            self.freeze("momentum.copies")

    def forward(
        self,
        images: Images,
        tokens: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        false: Tensor | None = None,
        false_mask: Tensor | None = None,
        question: Tensor | None = None,
        question_mask: Tensor | None = None,
        answer: Tensor | None = None,
        answer_mask: Tensor | None = None,
        micro_batch: int | None = None,
    ) -> BLIPOutput:
        """Text i belongs to image i, and so do question i and its answer (B, ·), if there are some.

        false, false_mask (B, F): texts that are nearly right, as negatives of matching; all masked: there is none.
        micro_batch: samples whose activations are held at a time, see `in_parts`.
        """
        c, losses, split = self.config, {}, partial(in_parts, size=micro_batch)
        if c.roles == "answer" and labels is None and question is None:
            raise ValueError("an answer is wanted: give labels (B, T'), or call generate")
        features = split(self.image_features, images)  # (B, N, C)
        paired, logits_per_image = len(features) == len(tokens), None
        given, mask = mask, torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if c.compares:
            vectors = split(self.encode_image, ImageFeatures(features)), split(self.encode_text, tokens, mask)
            logits_per_image = self.scale() * self.similarity(*vectors)
        if c.compares and paired:  # figure 2: ITC, then ITM
            if self.momentum is None:
                losses["contrast"], *similar = itm.contrast(*vectors, self.scale)
            else:
                losses["contrast"], *similar = self.momentum.contrast(self, *vectors, images, tokens, mask, split)
            wrong = None if false is None else (false, false_mask)
            how = dict(draw=self.training, micro_batch=micro_batch)
            losses["matching"] = itm.matching(self.match, features, tokens, mask, *similar, wrong, **how)
        if c.captions and paired:  # LM
            losses["generation"] = mean(split(self.generation_loss, features, tokens, mask), mask[:, 1:].sum())
        if question is not None:  # §5.3
            total = split(self.generation_loss, features, answer, answer_mask, question, question_mask)
            losses["answering"] = mean(total, answer_mask[:, 1:].sum())
        decode = partial(decode_as_given, self, features, tokens, given, labels)
        can_decode = paired and self.decoder is not None and (c.roles != "answer" or labels is not None)
        return BLIPOutput(logits_per_image, losses, decode if can_decode else None, labels, self.head)

    def losses(
        self, tokens: Tensor, mask: Tensor | None = None, images: Images | None = None, **batch
    ) -> dict[str, Tensor]:
        """The terms of the training loss, by name, as `forward` gives them."""
        return self(images, tokens, mask, **batch).losses

    # ---- the three roles -------------------------------------------------------------------------------------------------

    def image_features(self, images: Images) -> Tensor:
        """(B, 3, H, W) → (B, N, C): what the vision tower computes."""
        return vision_features(images, self.vision, self.standardise, self.config)

    def encode_image(self, images: Images) -> Tensor:
        """(B, 3, H, W) → (B, E), unit length: of the class token, or of the mean of all features where there is none."""
        return F.normalize(self.vision_projection(self.pooled_features(self.image_features(images))), dim=-1)

    def pooled_features(self, features: Tensor) -> Tensor:
        """(B, N, C) → (B, C)"""
        class_token = self.config.class_token and getattr(self.vision, "leading", 0)
        return features[:, 0] if class_token else features.mean(dim=1)

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) → (B, E), unit length: the state of the start token, projected."""
        return F.normalize(self.text_projection(self.encoder(tokens, mask).hidden[:, 0]), dim=-1)

    def match(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Does text i describe image i?  → logits (B, 2) of no and yes."""
        return self.match_head(self.encode_with_image(self.image_features(images), tokens, mask)[:, 0])

    def encode_with_image(self, features: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The image-grounded encoder: a text (B, T) that attends to image features (B, N, C) → (B, T, D)."""
        tokens = with_first(self.config.encode_token, tokens)
        return self.encoder(tokens, mask, context=add_positions(features, self.image_position_embedding)).hidden

    def decode(
        self, tokens: Tensor, mask: Tensor | None, context: Tensor, context_mask: Tensor | None = None
    ) -> Tensor:
        """The decoder: tokens (B, T) that attend to an image or a question (B, S, D) → the input of the head (B, T, D)."""
        return self.text_head(self.decoder(tokens, mask, context=context, context_mask=context_mask).hidden)

    # ---- its losses ------------------------------------------------------------------------------------------------------

    similarity = staticmethod(itm.similarity)
    scale, probabilities, backward_in_parts = itm.scale, itm.probabilities, itm.backward_in_parts

    def generation_loss(
        self, features: Tensor, tokens: Tensor, mask: Tensor, question: Tensor | None = None, real: Tensor | None = None
    ) -> Tensor:
        """The loss of a caption (B, T), or of an answer to a question with the mask `real`, summed over all tokens but the
        first. Labels are smoothed."""
        context = add_positions(features, self.image_position_embedding)
        if question is not None:
            context = self.encode_with_image(features, question, real)
        hidden = self.decode(with_first(self.config.decode_token, tokens), mask, context, real)
        labels, how = tokens.masked_fill(~mask, -100), dict(smoothing=self.config.label_smoothing, total=True)
        return next_token_loss(hidden, labels, self.head.weight, self.head.bias, **how)

    def chance_losses(self, batch_size: int) -> dict[str, float]:
        """The losses of a model that knows nothing but that one pair in three is right, and the size of the vocabulary."""
        queue = self.config.momentum.queue if self.momentum else 0
        losses = itm.chance_losses(batch_size) | {"contrast": math.log(batch_size + queue)}
        return losses | dict.fromkeys(("generation", "answering"), math.log(self.config.text.vocab_size))

    def remove_momentum(self) -> None:
        """Remove the momentum encoders and their queue, which are for training."""
        self.momentum, self.config = None, replace(self.config, momentum=None)
        self.frozen = tuple(part for part in self.frozen if part != "momentum.copies")

    # ---- generation --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, images: Images, tokens: Tensor, mask: Tensor | None = None, *, room: int) -> BLIPDecoding:
        """Process images and texts (B, T), captions to be continued or questions to be answered, with room for so many tokens.

        Where one model does both, a caption starts with the decode token.
        """
        if self.decoder is None:
            raise ValueError("this BLIP has no decoder, so it can compare and match, but not generate text")
        mask = None if mask is None or mask.all() else mask
        if mask is not None:
            tokens, mask = padding_last(tokens, mask)
        c, T = self.config, tokens.shape[1]
        if T + room > c.text.context:
            raise ValueError(f"a text of {T} tokens and {room} new ones do not fit the context of {c.text.context}")
        features = self.image_features(images)
        context, context_mask = add_positions(features, self.image_position_embedding), None
        if are_questions(c, tokens):
            context = self.encode_with_image(features, tokens, mask)
            context_mask = None if c.attend_padding else mask
            tokens, mask = tokens[:, :1], None
        return BLIPDecoding(self, with_first(c.decode_token, tokens), mask, context, context_mask, room=room)

    @torch.no_grad()
    def rank(
        self, images: Images, tokens: Tensor, mask: Tensor | None, answers: Tensor, answers_mask: Tensor, *, most=None
    ) -> Tensor:
        """Questions (B, T), answers (A, S) → log p of every answer to each question (B, A). most: see `blip_text.rank`."""
        context = self.encode_with_image(self.image_features(images), tokens, mask)
        return rank(self, context, mask, answers, answers_mask, most=most)

    @property
    def continues_prompt(self) -> bool:
        return self.config.roles != "answer"

    @property
    def decoder_start_token(self) -> int:
        return self.config.decode_token

    @property
    def endings(self) -> dict[str, Any]:
        return {"end_tokens": (self.config.end_token,), "pad_token": self.config.pad_token}

    @property
    def language_config(self) -> BERTConfig:
        return self.config.text
