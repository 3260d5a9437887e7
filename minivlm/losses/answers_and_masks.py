"""Losses of joint encoders: the answer of a list, masked words, masked regions."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from minivlm.losses.parts import mean

AnswerLoss = Literal["softmax", "sigmoid"]


def answer_loss(logits: Tensor, answers: Tensor, kind: AnswerLoss = "softmax") -> Tensor:
    """The mean over questions: logits (B, A), answers (B, A), how right each of them is.

    "softmax": KL(answers ‖ softmax). Of one right answer it is the cross-entropy; ten people's answers are a distribution (Li
    et al. 2019, VisualBERT, released code). A row of zeros, whose answer is not on the list, adds nothing.
    "sigmoid": every answer by itself is right or not, or in part; the sum of the A binary cross-entropies (Chen et al. 2020,
    UNITER, and Lu et al. 2019, ViLBERT, §3.3, released code).
    """
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits.float(), answers.float(), reduction="sum") / len(answers)
    return F.kl_div(logits.float().log_softmax(dim=-1), answers.float(), reduction="batchmean")


def chance_answer_loss(answers: int, kind: AnswerLoss = "softmax") -> float:
    """The loss of a model that knows nothing but that one of so many answers is right: −log 1/A, and for each of the others
    of the sigmoid −log (1 − 1/A)."""
    others = -(answers - 1) * math.log1p(-1 / answers) if kind == "sigmoid" and answers > 1 else 0.0
    return math.log(answers) + others


def masked_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of hidden words: logits (B, T, V), labels (B, T), −100 where none was hidden."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return mean(losses, (labels != -100).sum())


def masked_region_loss(guess: Tensor, features: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error of hidden regions: guess, features (B, R, C), hidden (B, R) bool; 0 if none is hidden."""
    error = (guess.float() - features.float()).square().mean(dim=-1)  # (B, R)
    return mean((error * hidden).sum(), hidden.sum())
