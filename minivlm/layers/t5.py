"""T5: an encoder processes a text (or whatever is embedded like one), a decoder generates another, token by token.

    tokens (B, S) ─ embedding ─→ encoder ─ norm ─→ (B, S, D) ─────────────┐ keys and values of the cross-attention
                        │                                                 ▼
    start, labels… (B, T) ─────────→ decoder: self-attention, cross-attention, MLP ─ norm ─ head ─→ logits (B, T, V)

A learnt number per head and distance is added to the scores, in place of any position embedding. Scores are not divided by
√K; the weights start that much smaller. Nothing has a bias.
Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", §2.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.generation import Decoding
from minivlm.layers.attention import Attention, KeysValues
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.language_model import LMOutput
from minivlm.layers.mlp import Activation
from minivlm.layers.packed_decoding import PackedT5, PackedWeights
from minivlm.layers.position import Cache
from minivlm.layers.transformer import Transformer, TransformerConfig, make_norm
from minivlm.layers.vocabulary import TokenEmbedding
from minivlm.losses import next_token_loss
from minivlm.model import Model


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The defaults are those of the first T5 but for `scale_head`. Its version 1.1 and Flan-T5: activation="gelu_tanh",
    gated_mlp, and no tie_head."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    decoder_depth: int | None = None  # None: as deep as the encoder
    head_width: int | None = None  # None: width / heads
    mlp_width: int | None = None  # None: four times the width
    activation: Activation = "relu"
    gated_mlp: bool = False
    norm_eps: float = 1e-6
    relative_buckets: int = 32  # distances that have a number of their own
    relative_distance: int = 128  # all that are further apart share the last bucket
    tie_head: bool = True  # the head is the embedding
    scale_head: bool = False  # its input is multiplied by width^-0.5: the first T5, whose embeddings are large
    context: int = 512  # tokens at most, of a processor; the model itself has no limit
    start_token: int = 0  # the first input of the decoder
    end_tokens: tuple[int, ...] = ()  # any of these ends an answer
    pad_token: int = 0
    dropout: float = 0.0

    def __post_init__(self):
        if self.relative_buckets < 4 or self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_buckets is {self.relative_buckets} and relative_distance {self.relative_distance}: a T5 needs 4 "
                "buckets or more, and a distance beyond half as many"
            )

    @property
    def encoder(self) -> TransformerConfig:
        return TransformerConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            head_width=self.head_width,
            mlp_width=self.mlp_width,
            norm="rmsnorm",
            norm_eps=self.norm_eps,
            activation=self.activation,
            gated_mlp=self.gated_mlp,
            **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), False),
            attention_scale=1.0,
            relative_buckets=self.relative_buckets,
            relative_distance=self.relative_distance,
            dropout=self.dropout,
        )

    @property
    def decoder(self) -> TransformerConfig:
        return replace(self.encoder, depth=self.decoder_depth or self.depth, causal=True, cross_attention_every=1)


class T5(Model):
    """tokens (B, S), mask (B, S) with True = a real token, labels (B, T), the text to be generated → `LMOutput`.

    logits (B, T, V): position i predicts labels[:, i] from those before it. A label of −100 is not counted.
    embeddings (B, S, D), as `embed` makes them, may be given in place of tokens. Padding may stand at either end.
    """

    config_class = T5Config
    abilities = frozenset({"answer", "chat", "complete"})
    takes_images = False
    continues_prompt = False
    fp32_in_fp16 = "mlp.down_proj.weight"  # as transformers does it: its output exceeds 65,504

    def __init__(self, config: T5Config, *, seed: int = 0):
        super().__init__(config)
        c = config
        self.token_embedding = TokenEmbedding(c.vocab_size, c.width)  # of both sides
        self.dropout = nn.Dropout(c.dropout)
        self.encoder = Transformer(c.encoder)
        self.encoder_norm = make_norm(c.encoder)
        self.decoder = Transformer(c.decoder)
        self.decoder_norm = make_norm(c.decoder)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)
        if c.tie_head:
            self.head.weight = self.token_embedding.weight
        self.packing = PackedWeights(PackedT5)
        initialise(self, torch.Generator().manual_seed(seed))

    def forward(
        self,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
    ) -> LMOutput:
        if labels is None:
            raise ValueError("T5 needs labels (B, T), the text to be generated; without them, call generate")
        context = self.encode(tokens, mask, embeddings=embeddings)
        hidden = self.states(self.shift(labels), context, mask)
        # `next_token_loss` compares position t with label t + 1; here the labels are a text of their own.
        loss = next_token_loss(F.pad(hidden, (0, 0, 0, 1)), F.pad(labels, (1, 0), value=-100), self.head.weight)
        return LMOutput(hidden, self.head, loss)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, S) → (B, S, D)"""
        return self.token_embedding(tokens)

    def encode(
        self, tokens: Tensor | None = None, mask: Tensor | None = None, *, embeddings: Tensor | None = None
    ) -> Tensor:
        """tokens (B, S), or embeddings (B, S, D) → the encoder's output (B, S, D), to which the decoder attends."""
        x = self.embed(tokens) if embeddings is None else embeddings
        return self.dropout(self.encoder_norm(self.encoder(self.dropout(x), mask=mask)))

    def states(
        self,
        tokens: Tensor,
        context: Tensor | list[KeysValues | None],
        mask: Tensor | None = None,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        """The decoder's tokens (B, T), start token first, and context (B, S, D) → last hidden states (B, T, D).

        context: of `encode`, or its keys and values, of `decoder.context_keys_values`. mask (B, S): of it. With a cache, the
        tokens continue what it holds.
        """
        if torch.is_grad_enabled():
            self.packing.clear()  # the weights are about to change
        x = self.decoder(self.dropout(self.embed(tokens)), context, context_mask=mask, cache=cache)
        x = self.dropout(self.decoder_norm(x))
        return x * self.config.width**-0.5 if self.config.scale_head else x

    def shift(self, labels: Tensor) -> Tensor:
        """labels (B, T) → the decoder's input for them: the start token, then all but the last."""
        tokens = F.pad(labels[:, :-1], (1, 0), value=self.config.start_token)
        return tokens.masked_fill(tokens == -100, self.config.pad_token)

    def losses(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The training losses."""
        return {"next token": self(tokens, mask, labels).loss}

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Model.counts`. Here the first label counts as well."""
        return super().counts(batch) | {"next token": (batch["labels"] != -100).sum()}

    # ---- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        room: int,
    ) -> T5Decoding:
        """Encode a text (B, S) → a decoding with room for `room` tokens a row."""
        mask = None if mask is None or mask.all() else mask
        context = self.encode(tokens, mask, embeddings=embeddings)
        return T5Decoding(self, self.decoder.context_keys_values(context), mask, batch=len(context), room=room)

    @property
    def decoder_start_token(self) -> int:
        return self.config.start_token

    @property
    def endings(self) -> dict[str, Any]:
        return {"end_tokens": self.config.end_tokens, "pad_token": self.config.pad_token}


class T5Decoding(Decoding):
    """A T5 that generates.

    context: for every block the keys and values of the encoded text, each (B, H, S, K), made once; mask (B, S): its padding.
    """

    def __init__(self, model: T5, context: list[KeysValues], mask: Tensor | None, *, batch: int, room: int):
        self.model, self.mask, self.room = model, mask, room
        self.context = [(k.contiguous(), v.contiguous()) for k, v in context]  # else they would be copied in every step
        self.cache = model.decoder.new_cache(batch, 1 + room)
        self.packed: PackedT5 | None = None
        self.steps = 0
        self.texts = torch.arange(batch, device=model.device)  # which of the texts belongs to a row
        self.logits = self.predict(torch.full_like(self.texts, model.config.start_token))

    def step(self, tokens: Tensor) -> None:
        if self.steps == 0 and (self.mask is None or self.mask.any(dim=1).all()):  # see `LMDecoding.step`
            self.packed = self.model.packing.of(self.model, self.cache.keys.dtype)
        super().step(tokens)
        self.steps += 1

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """tokens (B,) → logits (B, V) of what follows."""
        if self.packed is not None:
            return self.packed(tokens, self.cache, self.context, self.mask).float()
        hidden = self.model.states(tokens[:, None], self.context, self.mask, cache=self.cache)
        return self.model.head(hidden[:, 0]).float()

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.cache.reorder(rows)
        texts = self.texts[rows]
        if not torch.equal(texts, self.texts):  # else beams change places with others of the same text
            self.context = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.context]
            self.mask = None if self.mask is None else self.mask[rows]
            self.texts = texts


@torch.no_grad()
def initialise(model: T5, generator: torch.Generator) -> None:
    """Initialise as `initialise_linears` does, but for q, which has the scale that the scores are not divided by.

    Embeddings: 0.02 as GPT-2's; 1 as T5's where the head is scaled down instead. Position biases: width^-0.5, as T5's.
    """
    c = model.config
    initialise_linears(model, generator)
    for module in model.modules():
        if isinstance(module, Attention):
            normal(module.q_proj.weight, (c.width * module.head_width) ** -0.5, generator)
    for stack in (model.encoder, model.decoder):
        normal(stack.relative.table.weight, c.width**-0.5, generator)
    normal(model.token_embedding.weight, 1.0 if c.scale_head else 0.02, generator)  # the tied head as well
    if not c.tie_head:
        normal(model.head.weight, 1.0 if c.scale_head else 0.02, generator)
