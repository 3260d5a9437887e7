"""The text transformer of a dual encoder: token ids in, one vector a text out.

    (B, T) ids ─ embedding + positions ─→ blocks ─→ norm ─→ pool ─→ (B, D)

Radford et al. 2021 (CLIP), §2.4: causal, pooled at the end token. SigLIP: bidirectional, pooled at the last position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minivlm.layers.transformer import Transformer, TransformerConfig, make_norm
from minivlm.layers.vocabulary import TokenEmbedding


@dataclass(frozen=True, kw_only=True)
class TextConfig(TransformerConfig):
    """A text tower. The defaults are CLIP's."""

    vocab_size: int = 49408
    context: int = 77  # tokens a text may have
    causal: bool = True
    pool: Literal["end", "argmax", "first", "last"] = "end"
    end_token: int | None = None  # pool "end": the text is pooled at the first of these; None: at its last real token
    use_mask: bool = True  # False: padding is attended to like text, as SigLIP was trained


class TextTransformer(nn.Module):
    """tokens (B, T), mask (B, T) with True = a real token → (B, D); `features` gives every token's state (B, T, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        c = self.config = config
        self.output_width = c.width
        self.token_embedding = TokenEmbedding(c.vocab_size, c.width)
        self.position_embedding = nn.Parameter(nn.init.normal_(torch.empty(c.context, c.width), std=0.02))
        self.transformer = Transformer(c)
        self.norm = make_norm(c)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        position = self.pooled_position(tokens, mask)
        x, mask = self.embed(tokens, mask)
        return self.norm(self.transformer.state_at(x, position, mask=mask))

    def features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) → (B, T, D): the state of every token, after the last norm."""
        x, mask = self.embed(tokens, mask)
        return self.norm(self.transformer(x, mask=mask))

    def embed(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T) → (B, T, D), and the mask that attention needs."""
        T = tokens.shape[1]
        if self.config.context < T:
            raise ValueError(f"texts have {T} tokens, but the context is {self.config.context}; cut them first")
        x = self.token_embedding(tokens) + self.position_embedding[:T]
        if self.config.causal or not self.config.use_mask:
            mask = None  # padding stands on the right, where causal attention does not reach
        return x, mask

    def pooled_position(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) → (B,): the position at which each text is pooled. argmax: its largest id, which CLIP's end token is."""
        match self.config.pool:
            case "first":
                return torch.zeros_like(tokens[:, 0])
            case "last":
                return torch.full_like(tokens[:, 0], tokens.shape[1] - 1)
            case "argmax":
                return tokens.argmax(dim=1)
            case "end" if self.config.end_token is not None:
                return (tokens == self.config.end_token).int().argmax(dim=1)
            case "end" if mask is not None:
                return mask.long().sum(dim=1) - 1  # padding stands on the right
            case "end":
                return torch.full_like(tokens[:, 0], tokens.shape[1] - 1)
