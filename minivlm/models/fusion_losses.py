"""Losses of models that fuse: what was hidden is told from the rest, answers are chosen, words and regions are aligned.

Devlin et al. 2019 (BERT), §3.1: masked words; Chen et al. 2020 (UNITER), §3.2: masked regions, word-region alignment;
Xie et al. 2018, "A Fast Proximal Point Method for Computing Exact Wasserstein Distance", algorithm 1 (IPOT).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.losses import mean

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
    """Of a model that knows nothing but that one of so many answers is right: −log 1/A, and for each of the others of the
    sigmoid −log (1 − 1/A)."""
    others = -(answers - 1) * math.log1p(-1 / answers) if kind == "sigmoid" and answers > 1 else 0.0
    return math.log(answers) + others


def masked_word_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of hidden words: logits (B, T, V), labels (B, T), −100 where none was hidden."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return mean(losses, (labels != -100).sum())


def masked_region_loss(guess: Tensor, features: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error of hidden regions: guess, features (B, R, C), hidden (B, R) bool; 0 if none is hidden."""
    error = (guess.float() - features.float()).square().mean(dim=-1)  # (B, R)
    return mean((error * hidden).sum(), hidden.sum())


def alignment_loss(distance: Tensor, matches: Tensor) -> Tensor:
    """Words of a true pair are to be moved to their regions cheaply, those of a false one at a cost.

    distance (B,), matches (B,) bool. As in UNITER's released code: the sum over true pairs less that over false ones,
    by the number of both.
    """
    return (distance * torch.where(matches, 1.0, -1.0)).mean()


def transport_distance(words: Tensor, regions: Tensor, mask: Tensor, region_mask: Tensor) -> Tensor:
    """How far the words have to be moved to become the regions: (B, T, D), (B, R, D), masks → (B,) between 0 and 2.

    Each word has the same weight, each region has; moving costs 1 − cosine. The plan is taken as given: gradients reach
    the costs alone, as the paper has it (Chen et al. 2020, §3.2, equation 4).
    """
    with torch.autocast(words.device.type, enabled=False):
        words, regions = F.normalize(words.float(), dim=-1), F.normalize(regions.float(), dim=-1)
        cost = 1 - words @ regions.transpose(1, 2)  # (B, T, R)
        plan = transport_plan(cost.detach(), evenly(mask), evenly(region_mask))
        return (plan * cost).sum(dim=(1, 2))


def evenly(mask: Tensor) -> Tensor:
    """(B, T) bool → (B, T): weights that sum to one in each row, none for padding."""
    return mask / mask.sum(dim=1, keepdim=True)


@torch.no_grad()
def transport_plan(cost: Tensor, source: Tensor, target: Tensor, *, beta: float = 0.5, iterations: int = 50) -> Tensor:
    """cost (B, T, R), source (B, T) and target (B, R), each summing to one → how much goes where, (B, T, R).

    IPOT: each iteration is a Sinkhorn step on the kernel times the plan so far, which walks to the exact optimum, where
    Sinkhorn's own fixed point is blurred by beta.
    """
    tiny = torch.finfo(cost.dtype).tiny
    kernel = (-cost / beta).exp()
    plan = source[:, :, None] * target[:, None, :]
    right = target.clone()  # (B, R), the factors of the columns
    for _ in range(iterations):
        q = kernel * plan
        left = source / torch.einsum("btr,br->bt", q, right).clamp(min=tiny)
        right = target / torch.einsum("btr,bt->br", q, left).clamp(min=tiny)
        plan = left[:, :, None] * q * right[:, None, :]
    return plan
