"""The Q-Former: a few learned queries attend to image features, and to a text that may stand beside them.

    queries (Q, D) ─┐                       ┌ cross-attention to the image ─ query MLP ─┐
                    ├─ norm ─ self-attention┤ (every second block)                      ├─→ next block
    text (B, T, D) ─┘  shared by both       └──────────────── MLP ──────────────────────┘

It is BERT with a second MLP and cross-attention; queries and text meet in self-attention, under one of three masks.
Li et al. 2023, "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and LLMs", figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from minivlm.layers.attention import Attention, CrossAttention, KeysValues
from minivlm.layers.autocast import cast_once
from minivlm.layers.bert import BERT
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.mlp import MLP
from minivlm.layers.position import add_positions
from minivlm.layers.transformer import TransformerConfig, make_norm
from minivlm.layers.vocabulary import TokenEmbedding

SelfAttention = Literal["bidirectional", "unimodal", "causal"]


@dataclass(frozen=True, kw_only=True)
class QFormerConfig(TransformerConfig):
    """Post-norm like BERT, from which it starts. context_width: of the image features."""

    queries: int = 32
    vocab_size: int | None = None  # None: it takes no text
    context: int = 512  # tokens a text may have
    # Image features with a learned position each: those of a ResNet have none. 0: as they come
    positions: int = field(default=0, metadata={"was": "places"})
    norm_place: Literal["post"] = "post"
    norm_eps: float = 1e-12
    cross_attention_every: int = 2

    def __post_init__(self):
        if self.cross_attention_every < 1:
            raise ValueError("cross_attention_every must be at least 1: without it the queries attend to no image")


@dataclass(frozen=True)
class QFormerOutput:
    queries: Tensor | None  # (B, Q, D)
    text: Tensor | None  # (B, T, D)
    keys_values: list[KeysValues] = field(default_factory=list)  # of each block's self-attention, (B, H, Q + T, K)


def attention_mask(kind: SelfAttention, queries: int, text_mask: Tensor) -> Tensor:
    """The mask of queries and text: (B, Q + T, Q + T), True = may be attended to. text_mask (B, T): True = a real token.

        "bidirectional"   q q t t t       "unimodal"   q q t t t       "causal"   q q t t t
                        q ■ ■ ■ ■ ■                  q ■ ■ · · ·                q ■ ■ · · ·
                        q ■ ■ ■ ■ ■                  q ■ ■ · · ·                q ■ ■ · · ·
                        t ■ ■ ■ ■ ■                  t · · ■ ■ ■                t ■ ■ ■ · ·
                        t ■ ■ ■ ■ ■                  t · · ■ ■ ■                t ■ ■ ■ ■ ·
                        t ■ ■ ■ ■ ■                  t · · ■ ■ ■                t ■ ■ ■ ■ ■
        for             matching                     contrast                   generation

    Li et al. 2023, figure 2, right. Nothing attends to padding.
    """
    B, T = text_mask.shape
    is_query = torch.arange(queries + T, device=text_mask.device) < queries
    query, key = is_query[:, None], is_query[None, :]
    match kind:
        case "bidirectional":
            allowed = query | ~query | key
        case "unimodal":
            allowed = query == key
        case "causal":
            allowed = key | (~query & torch.ones_like(query & key).tril())
        case _:
            raise ValueError(f"attention is {kind!r}; there are bidirectional, unimodal and causal")
    real = torch.cat([text_mask.new_ones(B, queries), text_mask], dim=1)
    return allowed & real[:, None, :]


class QFormerBlock(nn.Module):
    """Self-attention for all, cross-attention for the queries, an MLP for each; norm(x + f(x)) after every step."""

    def __init__(self, config: QFormerConfig, *, cross_attention: bool):
        super().__init__()
        c = config
        self.attention = Attention(c.width, c.heads, dropout=c.dropout)
        self.attention_norm = make_norm(c)
        self.cross_attention = None
        if cross_attention:
            width = c.context_width or c.width
            self.cross_attention = CrossAttention(c.width, c.heads, context_width=width, dropout=c.dropout)
            self.cross_attention_norm = make_norm(c)
        self.query_mlp, self.query_mlp_norm = MLP(c.width, c.hidden_width, c.activation), make_norm(c)
        if c.vocab_size is not None:
            self.mlp, self.mlp_norm = MLP(c.width, c.hidden_width, c.activation), make_norm(c)
        self.dropout = nn.Dropout(c.dropout)

    def attend(self, x: Tensor, mask: Tensor | None, before: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """Self-attention of x (B, T, D) with what came before it → its output, and all keys and values so far."""
        a, source = self.attention, cast_once(x)
        k, v = a.keys_values(source)
        if before is not None:
            k, v = (torch.cat(pair, dim=2) for pair in ((before[0], k), (before[1], v)))
        mask = None if mask is None else mask[:, None]  # (B, 1, T, S)
        attended = a.attend(a.queries(source), k, v, mask=mask)
        return self.attention_norm(x + self.dropout(attended)), (k, v)

    def update_queries(self, queries: Tensor, features: Tensor) -> Tensor:
        """Cross-attention of queries (B, Q, D) to image features (B, N, C), where the block has it, and the queries' MLP."""
        if self.cross_attention is not None:
            attended = self.cross_attention(queries, features)
            queries = self.cross_attention_norm(queries + self.dropout(attended))
        return self.query_mlp_norm(queries + self.dropout(self.query_mlp(queries)))

    def update_text(self, text: Tensor) -> Tensor:
        """The text's own MLP: (B, T, D) → (B, T, D)."""
        return self.mlp_norm(text + self.dropout(self.mlp(text)))


class QFormer(nn.Module):
    """features (B, N, C), tokens (B, T), mask (B, T) with True = a real token → `QFormerOutput`; one of the two may be None.

    attention: which of the masks, `attention_mask`.
    """

    def __init__(self, config: QFormerConfig, *, seed: int = 0):
        super().__init__()
        c = self.config = config
        self.queries = nn.Parameter(torch.empty(c.queries, c.width))
        table = nn.Parameter(torch.empty(c.positions, c.context_width or c.width)) if c.positions else None
        self.image_position_embedding = table
        takes_text = c.vocab_size is not None
        self.token_embedding = TokenEmbedding(c.vocab_size, c.width) if takes_text else None
        self.position_embedding = nn.Embedding(c.context, c.width) if takes_text else None
        self.norm = make_norm(c)
        self.dropout = nn.Dropout(c.dropout)
        every = c.cross_attention_every
        self.blocks = nn.ModuleList(QFormerBlock(c, cross_attention=i % every == 0) for i in range(c.depth))
        initialise(self, torch.Generator().manual_seed(seed))

    def forward(
        self,
        features: Tensor | None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        attention: SelfAttention = "bidirectional",
    ) -> QFormerOutput:
        if tokens is None:
            return self.query(features)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        x = self.embed_text(tokens, mask)
        Q = 0
        if features is not None:
            features = add_positions(features, self.image_position_embedding)
            x, Q = torch.cat([self.embed_queries(len(tokens)), x], dim=1), self.config.queries
        pairs = attention_mask(attention, Q, mask)
        for block in self.blocks:
            x, _ = block.attend(x, pairs)
            text = block.update_text(x[:, Q:])
            x = text if Q == 0 else torch.cat([block.update_queries(x[:, :Q], features), text], dim=1)
        return QFormerOutput(x[:, :Q] if Q else None, x[:, Q:])

    def query(self, features: Tensor) -> QFormerOutput:
        """The queries without a text. Their keys and values are all that a text needs to continue from: `continue_text`."""
        features = add_positions(features, self.image_position_embedding)
        x, keys_values = self.embed_queries(len(features)), []
        for block in self.blocks:
            x, pair = block.attend(x, None)
            x = block.update_queries(x, features)
            keys_values.append(pair)
        return QFormerOutput(x, None, keys_values)

    def continue_text(self, tokens: Tensor, mask: Tensor | None = None, *, after: QFormerOutput) -> QFormerOutput:
        """Causal text (B, T) after the output of `query`, or of this method for the tokens before.

        Queries never attend to text under the causal mask, so this equals `forward(…, attention="causal")` without computing
        the queries again. mask (B, T), or with the P tokens before (B, P + T). Gradients reach the keys and values.
        """
        (B, T), Q = tokens.shape, self.config.queries
        S = after.keys_values[0][0].shape[2] - Q + T  # of the whole text so far
        if mask is None:
            mask = tokens.new_ones(B, S, dtype=torch.bool)
        x, keys_values = self.embed_text(tokens, mask), []
        pairs = attention_mask("causal", Q, mask)[:, -T:]
        for block, before in zip(self.blocks, after.keys_values, strict=True):
            x, pair = block.attend(x, pairs, before)
            x = block.update_text(x)
            keys_values.append(pair)
        return QFormerOutput(None, x, keys_values)

    def embed_queries(self, batch: int) -> Tensor:
        """The queries as they enter the first block: (B, Q, D). They have no positions."""
        return self.dropout(self.norm(self.queries).expand(batch, -1, -1))

    def embed_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The last T tokens of texts whose mask is (B, S) → (B, T, D). Positions start at 0, padding does not count."""
        T, S, c = tokens.shape[1], mask.shape[1], self.config
        if self.token_embedding is None:
            raise ValueError("this Q-Former has no text side: its config has no vocab_size")
        if c.context < S:
            raise ValueError(f"texts have {S} tokens, but the context of the Q-Former is {c.context}; cut them first")
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -T:]
        return self.dropout(self.norm(self.token_embedding(tokens) + self.position_embedding(positions)))

    @torch.no_grad()
    def load_bert(self, bert: BERT) -> None:
        """Start from BERT: its self-attention, MLPs (for queries and text alike) and embeddings. Cross-attention stays new.

        BERT's token type 0 becomes part of the positions, so that text alone is read exactly as BERT reads it. Rows of
        the vocabulary beyond BERT's (such as [DEC]) stay new. Raises ValueError where the two do not fit.
        """
        mine, its = self.config, bert.config
        for name in ("width", "depth", "heads", "hidden_width", "activation"):
            if getattr(mine, name) != getattr(its, name):
                raise ValueError(f"{name} of the Q-Former is {getattr(mine, name)}, but BERT's is {getattr(its, name)}")
        for block, source in zip(self.blocks, bert.transformer.blocks, strict=True):
            for name in ("attention", "attention_norm", "mlp", "mlp_norm"):
                for part in [name, f"query_{name}"] if name.startswith("mlp") else [name]:
                    if hasattr(block, part):
                        getattr(block, part).load_state_dict(getattr(source, name).state_dict())
        self.norm.load_state_dict(bert.norm.state_dict())
        if self.token_embedding is not None:
            if mine.context > its.context or mine.vocab_size < its.vocab_size:
                raise ValueError(
                    f"the Q-Former reads {mine.context} tokens of a vocabulary of {mine.vocab_size}, but BERT has only "
                    f"{its.context} positions, and {its.vocab_size} words"
                )
            self.token_embedding.weight[: its.vocab_size] = bert.token_embedding.weight
            kind = 0 if bert.type_embedding is None else bert.type_embedding.weight[0]
            self.position_embedding.weight.copy_(bert.position_embedding.weight[: mine.context] + kind)


@torch.no_grad()
def initialise(model: QFormer, generator: torch.Generator) -> None:
    """0.02 for queries and embeddings, as in BERT's and BLIP-2's released code; the rest as `initialise_linears` says."""
    initialise_linears(model, generator)
    normal(model.queries, 0.02, generator)
    if model.image_position_embedding is not None:
        normal(model.image_position_embedding, 0.5, generator)
    if model.token_embedding is not None:
        normal(model.token_embedding.weight, 0.02, generator)
        normal(model.position_embedding.weight, 0.02, generator)
