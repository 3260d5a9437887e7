"""The text side of BLIP: the weights that encoder and decoder share, the first token of a text, and decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minivlm.generation import Decoding
from minivlm.layers.bert import BERT
from minivlm.layers.position import add_positions


class BLIPDecoding(Decoding):
    """BLIP in the middle of a caption or an answer; context (B, S, C): features of an image, or an encoded question."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        mask: Tensor | None,
        context: Tensor,
        context_mask: Tensor | None,
        *,
        room: int,
    ):
        self.model, self.context_mask, self.room = model, context_mask, room
        stack = model.decoder.transformer
        of_blocks = stack.context_keys_values(context)
        self.context = [pair and (pair[0].contiguous(), pair[1].contiguous()) for pair in of_blocks]
        self.cache = stack.new_cache(len(tokens), tokens.shape[1] + room)
        self.logits = self.predict_all(tokens, mask)

    @torch.no_grad()
    def predict_all(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (B, T) → logits (B, V) of what follows the last real one."""
        context = dict(context=self.context, context_mask=self.context_mask)
        hidden = self.model.decoder(tokens, mask, **context, cache=self.cache).hidden
        rows = torch.arange(len(tokens), device=tokens.device)
        hidden = hidden[:, -1] if mask is None else hidden[rows, mask.sum(dim=1) - 1]
        return self.model.head(self.model.text_head(hidden)).float()

    def predict(self, tokens: Tensor) -> Tensor:
        return self.predict_all(tokens[:, None])

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.cache.reorder(rows)
        self.context = [pair and (pair[0][rows], pair[1][rows]) for pair in self.context]
        self.context_mask = None if self.context_mask is None else self.context_mask[rows]


def share_weights(encoder: BERT, decoder: BERT) -> None:
    """The decoder's parts become the encoder's, but for self-attention and its norms, in which the two tasks differ."""
    for name in ("token_embedding", "position_embedding", "type_embedding", "norm"):
        setattr(decoder, name, getattr(encoder, name))
    for block, other in zip(decoder.transformer.blocks, encoder.transformer.blocks, strict=True):
        for name in ("cross_attention", "cross_attention_norm", "mlp", "mlp_norm"):
            setattr(block, name, getattr(other, name))


def with_first(token: int | None, tokens: Tensor) -> Tensor:
    """tokens (B, T) with another first token in each row; None: as they are."""
    return tokens if token is None else torch.cat([torch.full_like(tokens[:, :1], token), tokens[:, 1:]], dim=1)


def decode_as_given(
    model: nn.Module, features: Tensor, tokens: Tensor, mask: Tensor | None, labels: Tensor | None
) -> Tensor:
    """The input of the head (B, T, D) for captions as they are given, whatever their first token; or, of a model that only
    answers, for the answers `labels` to the questions `tokens`."""
    if model.config.roles != "answer":
        return model.decode(tokens, mask, add_positions(features, model.image_position_embedding))
    answers = labels.masked_fill(labels == -100, model.config.pad_token)
    return model.decode(answers, None, model.encode_with_image(features, tokens, mask), mask)


def are_questions(config: Any, tokens: Tensor) -> bool:
    """Whether texts (B, T) are questions rather than captions. ValueError for both kinds at once, and for a BLIP that answers
    none."""
    if config.roles != "all":
        return config.roles == "answer"
    captions = tokens[:, 0] == config.decode_token
    if captions.any() and not captions.all():
        raise ValueError("some texts start with the decode token, the others are questions: give them apart")
    if not captions.all() and not config.answers:
        raise ValueError("this BLIP answers no questions; a caption starts with the decode token")
    return not captions.all()


def rank(
    model: nn.Module,
    context: Tensor,
    mask: Tensor | None,
    answers: Tensor,
    answers_mask: Tensor,
    *,
    most: int | None = None,
) -> Tensor:
    """Encoded questions (B, T, D), answers (A, S) → log p of every answer to each question (B, A).

    most: only so many answers are scored as a whole, those whose first token is likeliest; the others are −∞.
    """
    B, A = len(context), len(answers)
    answers = with_first(model.config.decode_token, answers)
    first = model.head(model.decode(answers[:1, :1].expand(B, -1), None, context, mask))[:, 0]  # (B, V)
    chosen = first.log_softmax(dim=-1)[:, answers[:, 1]].topk(min(most or A, A), dim=1).indices  # (B, K)
    K = chosen.shape[1]
    scored, real = answers[chosen].flatten(0, 1), answers_mask[chosen].flatten(0, 1)  # (B·K, S)
    context, mask = (None if x is None else x.repeat_interleave(K, dim=0) for x in (context, mask))
    log_p = model.head(model.decode(scored, real, context, mask)).log_softmax(dim=-1)
    log_p = log_p[:, :-1].gather(2, scored[:, 1:, None])[..., 0] * real[:, 1:]  # (B·K, S − 1)
    total = log_p.sum(dim=1).view(B, K).float()
    return torch.full((B, A), -torch.inf, device=total.device).scatter(1, chosen, total)
