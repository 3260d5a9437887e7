"""The text side of BLIP: what encoder and decoder share, how a text begins, and how it is said token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivlm.generation import Decoding
from minivlm.layers.bert import BERT


class BLIPDecoding(Decoding):
    """A BLIP that generates a caption of an image or the answer to a question, read (B, S, C)."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        mask: Tensor | None,
        read: Tensor,
        read_mask: Tensor | None,
        *,
        room: int,
    ):
        self.model, self.read_mask, self.room = model, read_mask, room
        stack = model.decoder.transformer
        self.read = [pair and (pair[0].contiguous(), pair[1].contiguous()) for pair in stack.context_keys_values(read)]
        self.cache = stack.new_cache(len(tokens), tokens.shape[1] + room)
        self.logits = self.predict_all(tokens, mask)

    @torch.no_grad()
    def predict_all(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (B, T) → logits (B, V) of what follows the last real one."""
        read = dict(read=self.read, read_mask=self.read_mask)
        hidden = self.model.decoder(tokens, mask, **read, cache=self.cache).hidden
        rows = torch.arange(len(tokens), device=tokens.device)
        hidden = hidden[:, -1] if mask is None else hidden[rows, mask.sum(dim=1) - 1]
        return self.model.head(self.model.text_head(hidden)).float()

    def predict(self, tokens: Tensor) -> Tensor:
        return self.predict_all(tokens[:, None])

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.cache.reorder(rows)
        self.read = [pair and (pair[0][rows], pair[1][rows]) for pair in self.read]
        self.read_mask = None if self.read_mask is None else self.read_mask[rows]


def share(encoder: BERT, decoder: BERT) -> None:
    """The decoder's parts become the encoder's, but for self-attention and its norms: what tells the two tasks apart."""
    for name in ("token_embedding", "position_embedding", "type_embedding", "norm"):
        setattr(decoder, name, getattr(encoder, name))
    for mine, its in zip(decoder.transformer.blocks, encoder.transformer.blocks, strict=True):
        for name in ("cross_attention", "cross_attention_norm", "mlp", "mlp_norm"):
            setattr(mine, name, getattr(its, name))


def begin_with(token: int | None, tokens: Tensor) -> Tensor:
    """(B, T), the first of each row replaced; None: as it is."""
    return tokens if token is None else torch.cat([torch.full_like(tokens[:, :1], token), tokens[:, 1:]], dim=1)
