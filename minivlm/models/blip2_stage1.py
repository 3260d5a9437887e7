"""Stage 1 of BLIP-2: a Q-Former learns which visual features a text describes. The vision tower is frozen.

    images ─→ vision tower ─→ queries ─┬─ each compared with the text's vector ─→ contrast     unimodal mask
                                       ├─ attending to the text and it to them ─→ matching     bidirectional mask
                                       └─ in front of the text                 ─→ generation   causal mask

Li et al. 2023, "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models",
§3.1 and figure 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.generation.decoding import Decoding, check_context
from minivlm.layers.bert import TextHead
from minivlm.layers.initialise import initialise_linears
from minivlm.layers.padding import padding_first
from minivlm.layers.qformer import QFormer, QFormerConfig, QFormerOutput
from minivlm.layers.tower import ImageFeatures, Images, check_reader, make_tower
from minivlm.losses import check_smoothing, in_parts, mean, next_token_loss
from minivlm.model import Model
from minivlm.models import image_text_matching as itm
from minivlm.models.vision_features import VisionFeaturesConfig, make_standardise, vision_features


@dataclass(frozen=True, kw_only=True)
class BLIP2Stage1Config(VisionFeaturesConfig):
    qformer: QFormerConfig
    embed_width: int = 256
    temperature: float | None = 0.07  # of the contrast, where it starts; None: cosines as they are, nothing to learn
    text_head: bool = True  # it generates captions; published weights of stage 1 cannot
    start_token: int  # before every text …
    decode_token: int  # … and in its place where the text is to be generated
    end_token: int
    pad_token: int = 0
    # Of the contrast and of every generated token (released code).
    label_smoothing: float = field(default=0.1, metadata={"before": 0.0})

    image_tokens: ClassVar[int] = 0  # positions that an image takes in a text

    def __post_init__(self):
        q = self.qformer
        check_reader(self.feature_width, q.context_width or q.width, "Q-Former", "qformer.context_width")
        super().__post_init__()
        check_smoothing(self.label_smoothing)
        if self.qformer.vocab_size is None:
            raise ValueError("stage 1 compares images with texts: the Q-Former needs a vocab_size")


@dataclass(frozen=True)
class BLIP2Stage1Output:
    logits_per_image: Tensor  # (B, B'): row i scores every text for image i
    losses: dict[str, Tensor]  # by name; none if images and texts are not pairs
    image_features: Tensor  # (B, Q, E), unit length
    text_features: Tensor  # (B', E), unit length


class BLIP2Stage1(Model):
    """images (B, 3, H, W), tokens (B, T) that start with the start token, mask (B, T) → `BLIP2Stage1Output`.

    Wherever it takes images it takes `ImageFeatures` as well.
    """

    config_class = BLIP2Stage1Config
    image_attention = "queries"

    def __init__(self, config: BLIP2Stage1Config, *, seed: int = 0):
        super().__init__(config)
        c = config
        self.vision = make_tower(c.vision, torch.Generator().manual_seed(seed))
        self.standardise = make_standardise(c)
        self.qformer = QFormer(c.qformer, seed=seed)
        self.vision_projection = nn.Linear(c.qformer.width, c.embed_width)
        self.text_projection = nn.Linear(c.qformer.width, c.embed_width)
        self.match_head = nn.Linear(c.qformer.width, 2)
        learnt = c.temperature is not None
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(c.temperature))) if learnt else None
        self.text_head = TextHead(c.qformer) if c.text_head else None
        generator = torch.Generator().manual_seed(seed)
        for part in (self.vision_projection, self.text_projection, self.match_head, self.text_head):
            if part is not None:
                initialise_linears(part, generator)

    @property
    def abilities(self) -> frozenset[str]:
        return frozenset({"encode", "match", "attend"} | ({"caption"} if self.text_head is not None else set()))

    @property
    def caption_token(self) -> int | None:
        return None if self.text_head is None else self.config.decode_token

    def forward(
        self,
        images: Images,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        false: Tensor | None = None,
        false_mask: Tensor | None = None,
        micro_batch: int | None = None,
    ) -> BLIP2Stage1Output:
        """Text i belongs to image i. Under torchrun the negatives are those of all processes.

        false, false_mask (B, F): texts that are nearly right, as negatives of matching; all masked: there is none.
        micro_batch: samples whose activations are held at a time, see `in_parts`.
        """
        split, smoothing = partial(in_parts, size=micro_batch), self.config.label_smoothing
        features = split(self.image_features, images)  # (B, N, C)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if len(features) != len(tokens):
            image_vectors, text_vectors = self.encode_image(ImageFeatures(features)), self.encode_text(tokens, mask)
            logits = self.scale() * self.similarity(image_vectors, text_vectors)
            return BLIP2Stage1Output(logits, {}, image_vectors, text_vectors)
        image_vectors, total = split(self.vectors_and_generation, features, tokens, mask)
        text_vectors = split(self.encode_text, tokens, mask)
        loss, *similar = itm.contrast(image_vectors, text_vectors, self.scale, smoothing=smoothing)
        wrong, how = None if false is None else (false, false_mask), dict(draw=self.training, micro_batch=micro_batch)
        losses = {
            "contrast": loss,
            "matching": itm.matching(self.match, features, tokens, mask, *similar, wrong, **how),
        }
        if self.text_head is not None:
            losses["generation"] = mean(total, mask[:, 1:].sum())
        logits = self.scale() * self.similarity(image_vectors, text_vectors)
        return BLIP2Stage1Output(logits, losses, image_vectors, text_vectors)

    def losses(
        self, tokens: Tensor, mask: Tensor | None = None, images: Images | None = None, **batch
    ) -> dict[str, Tensor]:
        """The terms of the training loss, by name, as `forward` gives them."""
        return self(images, tokens, mask, **batch).losses

    def image_features(self, images: Images) -> Tensor:
        """(B, 3, H, W) → (B, N, C): what the vision tower computes."""
        return vision_features(images, self.vision, self.standardise, self.config)

    def encode_image(self, images: Images) -> Tensor:
        """(B, 3, H, W) → (B, Q, E): a vector for each query, unit length."""
        return F.normalize(self.vision_projection(self.qformer.query(self.image_features(images)).queries), dim=-1)

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) → (B, E), unit length: the state of the start token, projected."""
        text = self.qformer(None, tokens, mask, attention="unimodal").text
        return F.normalize(self.text_projection(text[:, 0]), dim=-1)

    def match(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Does text i describe image i?  → logits (B, 2) of no and yes, the mean of those of all queries."""
        features = self.image_features(images)
        return self.match_head(self.qformer(features, tokens, mask, attention="bidirectional").queries).mean(dim=1)

    # ---- its three losses ----------------------------------------------------------------------------------------------

    similarity = staticmethod(itm.similarity)
    scale, probabilities, backward_in_parts = itm.scale, itm.probabilities, itm.backward_in_parts

    def vectors_and_generation(self, features: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """One pass of the queries gives vectors (B, Q, E), and the loss of generated texts, summed over their tokens."""
        queried = self.qformer.query(features)
        vectors = F.normalize(self.vision_projection(queried.queries), dim=-1)
        if self.text_head is None:
            return vectors, vectors.new_zeros(())
        hidden = self.text_head(self.qformer.continue_text(self.with_decode_token(tokens), mask, after=queried).text)
        labels, weight = tokens.masked_fill(~mask, -100), self.qformer.token_embedding.weight
        return vectors, next_token_loss(hidden, labels, weight, smoothing=self.config.label_smoothing, total=True)

    def with_decode_token(self, tokens: Tensor) -> Tensor:
        """tokens with the decode token in place of the start token."""
        return tokens.masked_fill(tokens == self.config.start_token, self.config.decode_token)

    def chance_losses(self, batch_size: int) -> dict[str, float]:
        """The losses of a model that knows nothing but that one pair in three is right, and the size of the vocabulary."""
        losses = itm.chance_losses(batch_size)
        return losses | ({"generation": math.log(self.config.qformer.vocab_size)} if self.text_head else {})

    # ---- generation ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, images: Images, tokens: Tensor, mask: Tensor | None = None, *, room: int) -> Stage1Decoding:
        """Process images and the prompts (B, T) of their captions, with room for so many more tokens a row."""
        if self.text_head is None:
            raise ValueError("this stage 1 has no text_head, so it can compare and match, but not generate text")
        tokens, mask = padding_first(tokens, mask)
        check_context(tokens.shape[1], room, self.config.qformer.context)
        return Stage1Decoding(
            self, self.with_decode_token(tokens), mask, self.qformer.query(self.image_features(images)), room=room
        )

    @property
    def endings(self) -> dict[str, Any]:
        return {"end_tokens": (self.config.end_token,), "pad_token": self.config.pad_token}

    @property
    def language_config(self) -> QFormerConfig:
        return self.config.qformer


class Stage1Decoding(Decoding):
    """Stage 1 that generates a caption: it keeps keys and values of queries and text."""

    def __init__(self, model: BLIP2Stage1, tokens: Tensor, mask: Tensor, so_far: QFormerOutput, *, room: int):
        self.model, self.mask, self.room, self.so_far = model, mask, room, so_far
        self.logits = self.predict_all(tokens)

    @torch.no_grad()
    def predict_all(self, tokens: Tensor) -> Tensor:
        """tokens (B, T), the last that `mask` counts → logits (B, V) of what follows."""
        self.so_far = self.model.qformer.continue_text(tokens, self.mask, after=self.so_far)
        hidden = self.model.text_head(self.so_far.text[:, -1])
        return (hidden @ self.model.qformer.token_embedding.weight.T).float()

    def predict(self, tokens: Tensor) -> Tensor:
        self.mask = F.pad(self.mask, (0, 1), value=True)
        return self.predict_all(tokens[:, None])

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.mask = self.mask[rows]
        self.so_far = replace(self.so_far, keys_values=[(k[rows], v[rows]) for k, v in self.so_far.keys_values])
