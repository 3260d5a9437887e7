"""CoCa: one decoder that compares texts with images in its first half, and describes images in its second.

    images ─→ vision tower ─→ attention pooling ─┬─ 1 query ──→ image vector ─┐
                                                 │                            ├─→ contrast
    tokens ─→ embedding ─→ unimodal blocks ──────│─ [CLS] ────→ text vector ──┘
                                 │               │ Q queries
                                 └─→ multimodal blocks, which attend to them ─→ head ─→ the next token

Both losses come from one pass: [CLS] stands behind the text, where causal attention lets it attend to all of it.
Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text Foundation Models", §3.2 and figures 1 and 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.generation import Decoding
from minivlm.layers.attention import CrossAttention
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.language_model import LanguageModelConfig, check_decoder
from minivlm.layers.padding import padding_last
from minivlm.layers.tower import ImageFeatures, Images, TowerConfig, make_tower, tower_features
from minivlm.layers.transformer import Transformer, make_norm
from minivlm.layers.vocabulary import TokenEmbedding
from minivlm.losses import CLIPLoss, backward, in_parts, mean, next_token_loss
from minivlm.model import Model


@dataclass(frozen=True, kw_only=True)
class CoCaConfig:
    vision: TowerConfig
    text: LanguageModelConfig  # of the whole decoder; its first half has no image
    multimodal_depth: int  # of its blocks, the last so many attend to the image
    image_queries: int = 16  # tokens that the image becomes for them (the paper: 256)
    embed_width: int = 128  # of the vectors that are compared
    caption_weight: float = 2.0  # of the captioning loss, beside 1 for the contrast (§4.1)
    image_tokens: ClassVar[int] = 0  # positions of the text that an image takes

    def __post_init__(self):
        check_decoder(self.text, "CoCa")
        if not 0 < self.multimodal_depth < self.text.depth:
            raise ValueError(
                f"multimodal_depth is {self.multimodal_depth}, but must leave at least one of the {self.text.depth} blocks to "
                "each half"
            )


@dataclass(frozen=True)
class CoCaOutput:
    logits: Tensor  # (B, T, V)
    loss: Tensor | None  # of the labels: the mean over next tokens
    logits_per_image: Tensor  # (B, B'): row i scores every text for image i


class CoCa(Model):
    """images (B, 3, H, W), tokens (B, T) with the tokeniser's start and end, mask (B, T), labels (B, T) → `CoCaOutput`.

    labels: the tokens, −100 = not counted. Padding belongs on the right.
    """

    config_class = CoCaConfig
    abilities = frozenset({"encode", "caption"})
    one_image = True

    def __init__(self, config: CoCaConfig, *, seed: int = 0):
        super().__init__(config)
        c, D = config, config.text.width
        generator = torch.Generator().manual_seed(seed)
        self.vision = make_tower(c.vision, generator)
        self.image_pool = AttentionPooling(c, c.vision.features_at(-1)[1])
        self.image_projection = nn.Linear(D, c.embed_width, bias=False)
        self.token_embedding = TokenEmbedding(c.text.vocab_size, D)
        self.position_embedding = nn.Embedding(c.text.context, D)
        self.class_embedding = nn.Parameter(torch.empty(D))
        self.unimodal = Transformer(replace(c.text, depth=c.text.depth - c.multimodal_depth))
        self.text_norm = make_norm(c.text)
        self.text_projection = nn.Linear(D, c.embed_width, bias=False)
        self.multimodal = Transformer(replace(c.text, depth=c.multimodal_depth, cross_attention_every=1))
        self.norm = make_norm(c.text)
        self.head = nn.Linear(D, c.text.vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        self.loss = CLIPLoss()
        initialise(self, generator)

    def forward(
        self, images: Images, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> CoCaOutput:
        hidden, image_vectors, text_vectors = self.states(self.image_features(images), tokens, mask)
        loss = None if labels is None else next_token_loss(hidden, labels, self.head.weight)
        return CoCaOutput(self.head(hidden), loss, self.loss.logits(image_vectors, text_vectors))

    def states(self, features: Tensor, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """features (B, N, C), tokens (B, T) → the head's input (B, T, D), and vectors (B, E) of images and of texts."""
        image_vectors, image_tokens = self.pool_image(features)
        text_vectors, x = self.unimodal_states(tokens, mask)
        return self.norm(self.multimodal(x, image_tokens, mask=mask)), image_vectors, text_vectors

    # ---- the two halves ----------------------------------------------------------------------------------------------

    def image_features(self, images: Images) -> Tensor:
        """images (B, 3, H, W) → (B, N, C): what the vision tower computes."""
        return images.tensor if isinstance(images, ImageFeatures) else tower_features(self.vision, images, [-1])

    def pool_image(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) → vectors (B, E) of unit length, and the tokens (B, Q, D) that the multimodal blocks attend to."""
        pooled = self.image_pool(features)  # (B, 1 + Q, D)
        return F.normalize(self.image_projection(pooled[:, 0]), dim=-1), pooled[:, 1:]

    def unimodal_states(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T) → vectors (B, E) of unit length, and the states (B, T, D) of the tokens, which do not attend to [CLS]."""
        x = self.embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        x = torch.cat([x, self.class_embedding.to(x.dtype).expand(len(x), 1, -1)], dim=1)
        x = self.unimodal(x, mask=None if mask is None else F.pad(mask, (0, 1), value=True))
        return F.normalize(self.text_projection(self.text_norm(x[:, -1])), dim=-1), x[:, :-1]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if (T := int(positions.shape[-1])) > self.config.text.context:
            raise ValueError(f"texts have {T} tokens, but the context is {self.config.text.context}; cut them first")
        return self.token_embedding(tokens) + self.position_embedding(positions)

    def encode_image(self, images: Images) -> Tensor:
        """(B, 3, H, W) → (B, E), unit length."""
        return self.pool_image(self.image_features(images))[0]

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) → (B, E), unit length."""
        return self.unimodal_states(tokens, mask)[0]

    def probabilities(self, image_vectors: Tensor, text_vectors: Tensor) -> Tensor:
        """(N, E), (M, E) → (N, M): how probable each text is for each image, among the M texts."""
        return self.loss.logits(image_vectors, text_vectors).softmax(dim=1)

    # ---- training ----------------------------------------------------------------------------------------------------

    def losses(
        self, images: Images, tokens: Tensor, mask: Tensor | None = None, *, micro_batch: int | None = None
    ) -> dict[str, Tensor]:
        """The losses of captions (B, T) by name, to be added up. micro_batch: see `in_parts`."""
        split = partial(in_parts, size=micro_batch)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        features = split(self.image_features, images)
        total, image_vectors, text_vectors = split(self.caption_total, features, tokens, mask)
        return {
            "contrast": self.loss(image_vectors, text_vectors),
            "caption": self.config.caption_weight * mean(total, mask[:, 1:].sum()),
        }

    def caption_total(self, features: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the captions' losses, and the vectors of both sides, from one pass."""
        hidden, *vectors = self.states(features, tokens, mask)
        labels = tokens.masked_fill(~mask, -100)
        return next_token_loss(hidden, labels, self.head.weight, total=True), *vectors

    def backward_in_parts(self, batch: dict[str, Any], size: int) -> dict[str, Tensor]:
        self.check_parts(len(batch["tokens"]), size)
        return backward(self.losses(**batch, micro_batch=size))  # the contrast is over the whole batch

    def chance_losses(self, batch_size: int) -> dict[str, float]:
        """The losses of a model that knows nothing."""
        caption = self.config.caption_weight * math.log(self.config.text.vocab_size)
        return {"contrast": math.log(batch_size), "caption": caption}

    # ---- generation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, images: Images, tokens: Tensor, mask: Tensor | None = None, *, room: int) -> CoCaDecoding:
        """Process images and the prompts (B, T) of their captions, and be ready for `room` more tokens a row."""
        if (T := tokens.shape[1]) + room > (context := self.config.text.context):
            raise ValueError(f"a caption of {T} tokens and {room} new ones do not fit the context of {context}")
        if mask is not None and not mask.all():
            tokens, mask = padding_last(tokens, mask)
        image_tokens = self.pool_image(self.image_features(images))[1]
        return CoCaDecoding(self, image_tokens, tokens, mask, room=room)

    @property
    def language_config(self) -> LanguageModelConfig:
        return self.config.text

    @property
    def endings(self) -> dict[str, Any]:
        return {"end_tokens": self.config.text.end_tokens, "pad_token": self.config.text.pad_token}


class AttentionPooling(nn.Module):
    """features (B, N, C) → (B, 1 + Q, D): learned queries attend to all of them, one for the contrast, Q for captions."""

    def __init__(self, config: CoCaConfig, feature_width: int):
        super().__init__()
        D = config.text.width
        self.query = nn.Parameter(torch.empty(1 + config.image_queries, D))
        self.features_norm = nn.LayerNorm(feature_width)
        self.attention = CrossAttention(D, config.text.heads, context_width=feature_width)
        self.norm = make_norm(config.text)

    def forward(self, features: Tensor) -> Tensor:
        x = self.features_norm(features.to(self.query.dtype))
        return self.norm(self.attention(self.query.expand(len(x), -1, -1), x))


class CoCaDecoding(Decoding):
    """A CoCa that generates: keys and values of both halves, and of the image."""

    def __init__(self, model: CoCa, image_tokens: Tensor, tokens: Tensor, mask: Tensor | None, *, room: int):
        self.model, self.room = model, room
        self.caches = [
            half.new_cache(len(tokens), tokens.shape[1] + room) for half in (model.unimodal, model.multimodal)
        ]
        self.image = model.multimodal.context_keys_values(image_tokens)
        self.logits = self.process(tokens, mask)

    @torch.no_grad()
    def process(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (B, T) → logits (B, V) of what follows the last real one."""
        model, (first, second) = self.model, self.caches
        x = model.embed(tokens, first.next_positions(tokens.shape[1]))
        x = model.unimodal(x, mask=mask, cache=first)
        x = model.norm(model.multimodal(x, self.image, mask=mask, cache=second))
        rows = torch.arange(len(x), device=x.device)
        return model.head(x[:, -1] if mask is None else x[rows, mask.sum(dim=1) - 1]).float()

    def predict(self, tokens: Tensor) -> Tensor:
        return self.process(tokens[:, None])

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        for cache in self.caches:
            cache.reorder(rows)
        self.image = [(keys[rows], values[rows]) for keys, values in self.image]


@torch.no_grad()
def initialise(model: CoCa, generator: torch.Generator) -> None:
    """As GPT-2's embeddings (0.02 for tokens and [CLS], 0.01 for positions), queries 1/√D; the rest: `initialise_linears`."""
    for name, part in model.named_children():
        if name != "vision":
            initialise_linears(part, generator)
    normal(model.token_embedding.weight, 0.02, generator)  # the tied head as well
    normal(model.position_embedding.weight, 0.01, generator)
    normal(model.class_embedding, 0.02, generator)
    normal(model.image_pool.query, model.config.text.width**-0.5, generator)
