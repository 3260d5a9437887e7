"""BERT: every token attends to the whole text, before and behind.

    tokens (B, T) ─ word + position + type ─→ norm ─→ blocks (post-norm) ─→ (B, T, D)

With `causal` and `cross_attention_every` it is the decoder of BLIP, which attends to an image.
Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", §3 and figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minivlm.layers.attention import KeysValues
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.mlp import ACTIVATIONS
from minivlm.layers.position import Cache
from minivlm.layers.transformer import Transformer, TransformerConfig, make_norm
from minivlm.layers.vocabulary import TokenEmbedding
from minivlm.model import Model


@dataclass(frozen=True, kw_only=True)
class BERTConfig(TransformerConfig):
    vocab_size: int
    context: int = 512  # tokens a text may have
    token_types: int = 2  # kinds of text, such as question and passage; 0: none
    norm_place: Literal["pre", "post"] = "post"
    norm_eps: float = 1e-12


@dataclass(frozen=True)
class BERTOutput:
    hidden: Tensor  # (B, T, D)


class BERT(Model):
    """tokens (B, T), mask (B, T) with True = a real token, types (B, T) or None: all of type 0 → `BERTOutput`.

    context (B, S, C), context_mask (B, S): what blocks with cross-attention attend to; None: nothing. cache: see `Transformer`.
    """

    config_class = BERTConfig

    def __init__(self, config: BERTConfig, *, seed: int = 0):
        super().__init__(config)
        c = config
        self.token_embedding = TokenEmbedding(c.vocab_size, c.width)
        self.position_embedding = nn.Embedding(c.context, c.width)
        self.type_embedding = nn.Embedding(c.token_types, c.width) if c.token_types else None
        self.norm = make_norm(c)
        self.dropout = nn.Dropout(c.dropout)
        self.transformer = Transformer(c)
        initialise(self, torch.Generator().manual_seed(seed))

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        types: Tensor | None = None,
        *,
        context: Tensor | list[KeysValues | None] | None = None,
        context_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> BERTOutput:
        x = self.embed(tokens, types, None if cache is None else cache.next_positions(tokens.shape[1]))
        return BERTOutput(self.transformer(x, context, mask=mask, context_mask=context_mask, cache=cache))

    def first(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) → (B, D): the last hidden state of the first token, which stands for the text."""
        return self(tokens, mask).hidden[:, 0]

    def embed(self, tokens: Tensor, types: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """(B, T) → (B, T, D), normalised. positions (T,) or (B, T): where the tokens stand; None: 0, 1, 2 …"""
        T, context = tokens.shape[1], self.config.context
        if context < T:
            raise ValueError(f"texts have {T} tokens, but the context is {context}; cut them first")
        position = self.position_embedding.weight[:T] if positions is None else self.position_embedding(positions)
        x = self.token_embedding(tokens) + position
        if self.type_embedding is not None:
            x = x + self.type_embedding(torch.zeros_like(tokens) if types is None else types)
        return self.dropout(self.norm(x))


class TextHead(nn.Module):
    """hidden (B, T, D) → what the embedding is multiplied with to give logits.  Devlin et al. 2019, §3.1."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = make_norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(hidden)))


@torch.no_grad()
def initialise(model: BERT, generator: torch.Generator) -> None:
    """0.02 for the embeddings, as in BERT's released code; linear layers as in `initialise_linears`."""
    initialise_linears(model, generator)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            normal(module.weight, 0.02, generator)
