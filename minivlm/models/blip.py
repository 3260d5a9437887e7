"""BLIP: one text transformer in three roles, that compares texts with pictures, matches them, and says what it sees.

    images ─→ vision tower ─┬─────────────────────────┬──────────────────────────┐
                            │ vectors                 ▼ cross-attention          ▼ cross-attention
    [CLS] text ─→ encoder ──┴→ contrast   [ENC] text ─→ encoder ─→ matching      [DEC] text ─→ decoder ─→ generation
                  alone                          with the picture                       causal

The two share all but self-attention. A question is read by the encoder, with the picture, and answered by the decoder.
Li et al. 2022, "BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and Generation",
§3.1, §3.2 and figure 2; questions: §5.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.layers.bert import BERT, BERTConfig, TextHead
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.language_model import to_the_left
from minivlm.layers.position import add_positions
from minivlm.layers.tower import ImageFeatures, Images, check_reader, make_tower
from minivlm.losses import check_smoothing, in_parts, mean, next_token_loss
from minivlm.model import Model
from minivlm.models.blip_text import BLIPDecoding, begin_with, share
from minivlm.models.image_text_matching import Matching
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
    decode_token: int  # begins what is said
    encode_token: int | None = None  # begins what is read together with a picture; None: the tokeniser's own
    end_token: int
    pad_token: int = 0
    reads_padding: bool = False  # of questions, while it answers, as the published one does
    asked: bool = True  # it was trained on questions as well, and so may be asked some
    momentum: MomentumConfig | None = None  # soft labels and a queue for the contrast
    label_smoothing: float = field(default=0.1, metadata={"before": 0.0})  # of every token that is said (released code)

    def __post_init__(self):
        super().__post_init__()
        check_smoothing(self.label_smoothing)
        if self.text.causal or self.text.cross_attention_every < 1:
            raise ValueError("text is the encoder's: it is not causal, and its cross_attention_every is at least 1")
        check_reader(self.feature_width, self.text.context_width or self.text.width, "text model", "text.context_width")
        if self.roles == "answer" and not self.answers:
            raise ValueError(
                f"answers are read from questions of width {self.text.width} by what reads pictures of width "
                f"{self.feature_width}: the two must be the same"
            )
        if self.momentum is not None and not self.compares:
            raise ValueError(f"momentum is for the contrast, which a BLIP with roles={self.roles!r} does not learn")

    @property
    def compares(self) -> bool:
        return self.roles in ("all", "match")

    @property
    def answers(self) -> bool:
        """The same cross-attention reads pictures for captions and questions for answers."""
        return self.asked and self.roles in ("all", "answer") and self.feature_width == self.text.width

    @property
    def speaks(self) -> bool:
        return self.roles != "match"

    @property
    def caption_token(self) -> int | None:
        """What a caption begins with; None: it says none."""
        return self.decode_token if self.roles in ("all", "caption") else None

    one_picture: ClassVar[bool] = True  # for a text, and it takes no place in it
    image_tokens: ClassVar[int] = 0


@dataclass(frozen=True)
class BLIPOutput:
    logits: Tensor | None  # (B, T, V) of what is said; None for roles="match"
    loss: Tensor | None  # of the labels
    logits_per_image: Tensor | None  # (B, B'): row i scores every text for image i; None if it does not compare
    losses: dict[str, Tensor]  # by name, as `losses` gives them; none if images and texts are not pairs


class BLIP(Matching, Model):
    """images (B, 3, H, W), tokens (B, T) with the tokeniser's start and end, mask (B, T), labels (B, T) → `BLIPOutput`.

    tokens are what is said, and labels the same with −100 = not counted; with roles="answer", tokens are questions and
    labels (B, T') answers that begin with the decode token. Wherever it takes images it takes `ImageFeatures` as well.
    """

    config_class = BLIPConfig
    one_image = True
    image_attention = "*.cross_attention"  # of the encoder; of one that generates captions alone, of the decoder

    @property
    def abilities(self) -> frozenset[str]:
        c = self.config
        can = {"attend"} | ({"encode", "match"} if c.compares else set()) | ({"caption"} if c.speaks else set())
        return frozenset(can | ({"answer", "chat", "rank"} if c.answers else set()))

    @property
    def caption_token(self) -> int | None:
        return self.config.caption_token

    def __init__(self, config: BLIPConfig, *, seed: int = 0):
        super().__init__(config)
        c, D = config, config.text.width
        self.vision = make_tower(c.vision, torch.Generator().manual_seed(seed))
        self.standardise = make_standardise(c)
        self.encoder = None if c.roles == "caption" else BERT(c.text, seed=seed)
        self.decoder = None if c.roles == "match" else BERT(replace(c.text, causal=True), seed=seed)
        if c.roles == "all":
            share(self.encoder, self.decoder)
        generator = torch.Generator().manual_seed(seed)
        self.image_position_embedding = nn.Parameter(torch.empty(c.positions, c.feature_width)) if c.positions else None
        if self.image_position_embedding is not None:
            normal(self.image_position_embedding.data, 0.5, generator)
        self.logit_scale = self.match_head = None
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
        self, images: Images, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> BLIPOutput:
        c = self.config
        features = self.image_features(images)
        seen = ImageFeatures(features)
        pairs, logits, loss, compared = len(tokens) == len(features), None, None, None
        if c.compares:
            compared = self.similarity(self.encode_image(seen), self.encode_text(tokens, mask)) * self.scale()
        if c.roles == "answer":
            if labels is None:
                raise ValueError("an answer is wanted: give labels (B, T'), or call generate to let it speak")
            said = labels.masked_fill(labels == -100, c.pad_token)
            hidden = self.tell(said, None, self.fuse(features, tokens, mask), mask)
        elif self.decoder is not None and pairs:
            hidden = self.tell(tokens, mask, add_positions(features, self.image_position_embedding))
        if self.decoder is not None and pairs:
            logits = self.head(hidden)
            loss = None if labels is None else next_token_loss(hidden, labels, self.head.weight, self.head.bias)
        return BLIPOutput(logits, loss, compared, self.losses(tokens, mask, seen) if pairs else {})

    # ---- the three roles -------------------------------------------------------------------------------------------------

    def image_features(self, images: Images) -> Tensor:
        """(B, 3, H, W) → (B, N, C): what the vision tower computes."""
        return vision_features(images, self.vision, self.standardise, self.config)

    def encode_image(self, images: Images) -> Tensor:
        """(B, 3, H, W) → (B, E), unit length: of the class token, or of all features on average where there is none."""
        return F.normalize(self.vision_projection(self.whole(self.image_features(images))), dim=-1)

    def whole(self, features: Tensor) -> Tensor:
        """(B, N, C) → (B, C)"""
        return (
            features[:, 0] if self.config.class_token and getattr(self.vision, "leading", 0) else features.mean(dim=1)
        )

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) → (B, E), unit length: read at the start token."""
        return F.normalize(self.text_projection(self.encoder(tokens, mask).hidden[:, 0]), dim=-1)

    def match(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Does text i tell what picture i shows?  → logits (B, 2) of no and yes."""
        return self.match_head(self.fuse(self.image_features(images), tokens, mask)[:, 0])

    def fuse(self, features: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Words (B, T) as they are understood in front of a picture (B, N, C): (B, T, D)."""
        tokens = begin_with(self.config.encode_token, tokens)
        return self.encoder(tokens, mask, read=add_positions(features, self.image_position_embedding)).hidden

    def tell(self, tokens: Tensor, mask: Tensor | None, read: Tensor, read_mask: Tensor | None = None) -> Tensor:
        """What is said (B, T) of a picture, or of a question as it was understood (B, S, D) → what the head reads (B, T, D)."""
        return self.text_head(self.decoder(tokens, mask, read=read, read_mask=read_mask).hidden)

    # ---- its losses ------------------------------------------------------------------------------------------------------

    def losses(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        images: Images | None = None,
        features: Tensor | None = None,
        false: Tensor | None = None,
        false_mask: Tensor | None = None,
        question: Tensor | None = None,
        question_mask: Tensor | None = None,
        answer: Tensor | None = None,
        answer_mask: Tensor | None = None,
        *,
        micro_batch: int | None = None,
    ) -> dict[str, Tensor]:
        """What training adds up. Text i belongs to picture i, and so do question i and its answer (B, ·), if there are some.

        false, false_mask (B, F): texts that are nearly right, to be told from the right ones; all masked: there is none.
        micro_batch: samples whose activations are held at a time, see `in_parts`.
        """
        c, losses, split = self.config, {}, partial(in_parts, size=micro_batch)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        images = images if features is None else ImageFeatures(features)
        seen = split(self.image_features, images)
        if c.compares:
            losses["contrast"], *alike = self.compare(images, seen, tokens, mask, split)
            nearly = None if false is None else (false, false_mask)
            losses["matching"] = self.matching(seen, tokens, mask, *alike, nearly, micro_batch=micro_batch)
        if c.roles in ("all", "caption"):
            losses["generation"] = mean(split(self.saying, seen, tokens, mask), mask[:, 1:].sum())
        if question is not None:
            total = split(self.saying, seen, answer, answer_mask, question, question_mask)
            losses["answering"] = mean(total, answer_mask[:, 1:].sum())
        return losses

    def compare(
        self, images: Images, features: Tensor, tokens: Tensor, mask: Tensor, split: Callable
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`contrast`, or that of the slow copy and its queue (see `Momentum`)."""
        vectors = split(self.encode_image, ImageFeatures(features)), split(self.encode_text, tokens, mask)
        if self.momentum is None:
            return self.contrast(*vectors)
        with torch.no_grad():
            if self.training:
                self.momentum.follow(self)
            slow = split(partial(self.momentum.vectors, self), images, tokens, mask)
        return self.momentum.contrast(*vectors, *slow, self.scale())

    def saying(
        self,
        features: Tensor,
        tokens: Tensor,
        mask: Tensor,
        question: Tensor | None = None,
        question_mask: Tensor | None = None,
    ) -> Tensor:
        """How well a text (B, T), or the answer to a question, is foretold token by token, the first of them given: the sum
        over all tokens. Labels are smoothed."""
        read = (
            add_positions(features, self.image_position_embedding)
            if question is None
            else self.fuse(features, question, question_mask)
        )
        hidden = self.tell(begin_with(self.config.decode_token, tokens), mask, read, question_mask)
        labels, how = tokens.masked_fill(~mask, -100), dict(smoothing=self.config.label_smoothing, total=True)
        return next_token_loss(hidden, labels, self.head.weight, self.head.bias, **how)

    def chance_losses(self, batch_size: int) -> dict[str, float]:
        """The losses of a model that knows nothing but that one pair in three is right, and how many words there are."""
        queue = self.config.momentum.queue if self.momentum else 0
        losses = super().chance_losses(batch_size) | {"contrast": math.log(batch_size + queue)}
        return losses | dict.fromkeys(("generation", "answering"), math.log(self.config.text.vocab_size))

    def forget(self) -> None:
        """Leave the slow copy and its queue behind: they were for training."""
        self.momentum, self.config = None, replace(self.config, momentum=None)
        self.frozen = tuple(part for part in self.frozen if part != "momentum.copies")

    # ---- generation --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, images: Images, tokens: Tensor, mask: Tensor | None = None, *, room: int) -> BLIPDecoding:
        """Look at pictures, and be ready for `room` tokens a row: what follows the beginnings (B, T) of captions, or answers
        to questions (B, T). Where one model does both, a beginning is told by the decode token in front."""
        if self.decoder is None:
            raise ValueError("this BLIP has no decoder, so it can compare and match, but not speak")
        mask = None if mask is None or mask.all() else mask
        if mask is not None:
            tokens, mask = to_the_left(tokens[..., None], mask)
            tokens = tokens[..., 0]
        if (T := tokens.shape[1]) + room > (context := self.config.text.context):
            raise ValueError(f"a text of {T} tokens and {room} new ones do not fit the context of {context}")
        features = self.image_features(images)
        c, read, read_mask = self.config, add_positions(features, self.image_position_embedding), None
        if self.is_question(tokens):
            read, read_mask = self.fuse(features, tokens, mask), None if c.reads_padding else mask
            tokens, mask = tokens[:, :1], None
        return BLIPDecoding(self, begin_with(c.decode_token, tokens), mask, read, read_mask, room=room)

    def is_question(self, tokens: Tensor) -> bool:
        """ValueError for texts of both kinds, and for questions to a BLIP that cannot answer."""
        c = self.config
        if c.roles != "all":
            return c.roles == "answer"
        begun = tokens[:, 0] == c.decode_token
        if begun.any() and not begun.all():
            raise ValueError(
                "some texts begin with the decode token and go on, the others are questions: give them apart"
            )
        if not begun.all() and not c.answers:
            raise ValueError("this BLIP answers no questions; a caption begins with the decode token")
        return not begun.all()

    @torch.no_grad()
    def rank(
        self,
        images: Images,
        tokens: Tensor,
        mask: Tensor | None,
        answers: Tensor,
        answers_mask: Tensor,
        *,
        most: int | None = None,
    ) -> Tensor:
        """Questions (B, T), answers (A, S) → log p of every answer to each question (B, A).

        most: only so many answers are judged as a whole, those whose first word is likeliest; the others are −∞.
        """
        read = self.fuse(self.image_features(images), tokens, mask)
        B, A = len(read), len(answers)
        answers = begin_with(self.config.decode_token, answers)
        first = self.head(self.tell(answers[:1, :1].expand(B, -1), None, read, mask))[:, 0]  # (B, V)
        chosen = first.log_softmax(dim=-1)[:, answers[:, 1]].topk(min(most or A, A), dim=1).indices  # (B, K)
        K = chosen.shape[1]
        said, real = answers[chosen].flatten(0, 1), answers_mask[chosen].flatten(0, 1)  # (B·K, S)
        mask = None if mask is None else mask.repeat_interleave(K, dim=0)
        log_p = self.head(self.tell(said, real, read.repeat_interleave(K, dim=0), mask)).log_softmax(dim=-1)
        log_p = log_p[:, :-1].gather(2, said[:, 1:, None])[..., 0] * real[:, 1:]  # (B·K, S − 1)
        total = log_p.sum(dim=1).view(B, K).float()
        return torch.full((B, A), -torch.inf, device=total.device).scatter(1, chosen, total)

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
