"""Losses: contrastive.py, next_token.py, answers_and_masks.py; parts.py: of a batch in parts or over processes."""

from minivlm.losses.answers_and_masks import (
    AnswerLoss,
    answer_loss,
    chance_answer_loss,
    masked_region_loss,
    masked_token_loss,
)
from minivlm.losses.contrastive import CLIPLoss, check_smoothing, full_precision, sigmoid_loss, softmax_loss
from minivlm.losses.next_token import labelled, next_token_loss
from minivlm.losses.parts import (
    alone,
    backward,
    backward_with_gradient_cache,
    first_row,
    gather,
    in_parts,
    is_distributed,
    mean,
    per_process,
    processes,
    scaled,
)

__all__ = [
    "AnswerLoss",
    "CLIPLoss",
    "alone",
    "answer_loss",
    "backward",
    "backward_with_gradient_cache",
    "chance_answer_loss",
    "check_smoothing",
    "first_row",
    "full_precision",
    "gather",
    "in_parts",
    "is_distributed",
    "labelled",
    "masked_region_loss",
    "masked_token_loss",
    "mean",
    "next_token_loss",
    "per_process",
    "processes",
    "scaled",
    "sigmoid_loss",
    "softmax_loss",
]
