"""BERT: every token sees the whole text, before and behind.

    tokens (B, T) ─ word + position + type ─→ norm ─→ blocks (post-norm) ─→ (B, T, D)

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", §3 and figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minivlm.base import Model
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.transformer import Transformer, TransformerConfig, make_norm


@dataclass(frozen=True, kw_only=True)
class BERTConfig(TransformerConfig):
    vocab_size: int
    context: int = 512  # tokens a text may have
    token_types: int = 2  # kinds of text told apart, such as question and passage; 0: none
    norm_place: Literal["pre", "post"] = "post"
    norm_eps: float = 1e-12


@dataclass(frozen=True)
class BERTOutput:
    hidden: Tensor  # (B, T, D)


class BERT(Model):
    """tokens (B, T), mask (B, T) with True = a real token, types (B, T) or None: all of type 0 → `BERTOutput`."""

    config_class = BERTConfig

    def __init__(self, config: BERTConfig, *, seed: int = 0):
        super().__init__(config)
        c = config
        self.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.position_embedding = nn.Embedding(c.context, c.width)
        self.type_embedding = nn.Embedding(c.token_types, c.width) if c.token_types else None
        self.norm = make_norm(c)
        self.dropout = nn.Dropout(c.dropout)
        self.transformer = Transformer(c)
        initialise(self, torch.Generator().manual_seed(seed))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> BERTOutput:
        return BERTOutput(self.transformer(self.embed(tokens, types), mask=mask))

    def embed(self, tokens: Tensor, types: Tensor | None = None) -> Tensor:
        """(B, T) → (B, T, D), normalised."""
        T, context = tokens.shape[1], self.config.context
        if context < T:
            raise ValueError(f"texts have {T} tokens, but the context is {context}; cut them first")
        x = self.token_embedding(tokens) + self.position_embedding.weight[:T]
        if self.type_embedding is not None:
            x = x + self.type_embedding(torch.zeros_like(tokens) if types is None else types)
        return self.dropout(self.norm(x))


@torch.no_grad()
def initialise(model: BERT, generator: torch.Generator) -> None:
    """0.02 for the embeddings, as in BERT's released code; the rest as `initialise_linears` says."""
    initialise_linears(model, generator)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            normal(module.weight, 0.02, generator)
