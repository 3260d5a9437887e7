"""Co-attention: two streams, each of which attends to the other.

    words   (B, T, D) ─┬─ queries ─→ attention ─→ norm ─→ MLP ─→ norm ─→ (B, T, D)
                       └─ keys, values ──┐ ▲
                                         ╳ │
                       ┌─ keys, values ──┘ ▼
    regions (B, R, C) ─┴─ queries ─→ attention ─→ norm ─→ MLP ─→ norm ─→ (B, R, C)

Lu et al. 2019, "ViLBERT: Pretraining Task-Agnostic Visiolinguistic Representations", figure 2b.
"""

from __future__ import annotations

from torch import Tensor, nn

from minivlm.layers.attention import CrossAttention
from minivlm.layers.mlp import MLP
from minivlm.layers.transformer import TransformerConfig, make_norm


class CrossAttentionBlock(nn.Module):
    """A post-norm block that attends to another stream in place of its own: x (B, T, D), other (B, S, C) → (B, T, D)."""

    def __init__(self, config: TransformerConfig, other_width: int, *, heads: int, head_width: int):
        super().__init__()
        c = config
        self.attention = CrossAttention(
            c.width, heads, head_width=head_width, context_width=other_width, dropout=c.dropout
        )
        self.attention_norm = make_norm(c)
        self.mlp, self.mlp_norm = MLP(c.width, c.hidden_width, c.activation), make_norm(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask (B, S): which of the other stream's tokens are real."""
        x = self.attention_norm(x + self.dropout(self.attention(x, other, mask=mask)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class CoAttention(nn.Module):
    """words (B, T, D), regions (B, R, C) → the same, each after it has attended to the other as that was before.

    heads, head_width: of the attention in both directions, whatever the two widths are.
    """

    def __init__(self, words: TransformerConfig, regions: TransformerConfig, *, heads: int, head_width: int):
        super().__init__()
        self.words = CrossAttentionBlock(words, regions.width, heads=heads, head_width=head_width)
        self.regions = CrossAttentionBlock(regions, words.width, heads=heads, head_width=head_width)

    def forward(
        self, words: Tensor, regions: Tensor, mask: Tensor | None = None, region_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.words(words, regions, region_mask), self.regions(regions, words, mask)
