"""Contrastive losses: the symmetric softmax of CLIP and the pairwise sigmoid of SigLIP, each plain and memory-saving.

    image_features (B, D) ┐
                          ├─ scale · I Tᵀ (+ bias) ─→ (B, B), the diagonal is true ─→ one number
    text_features  (B, D) ┘

Radford et al. 2021 (CLIP), figure 3; Zhai et al. 2023 (SigLIP), equation 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minivlm.losses.parts import first_row, gather, is_distributed

MAX_SCALE = 100.0  # the softmax's 1 / temperature is clamped to it in training, as CLIP's was; SigLIP's has no limit


class CLIPLoss(nn.Module):
    """The contrastive loss of a batch of image and text vectors; the temperature is a parameter.

    image_features, text_features (B, D) → a scalar; row i of one belongs to row i of the other. Rows are scaled to unit
    length (`unit_length`).
    kind: "softmax" (each image picks its text among B, and the reverse) or "sigmoid" (each of B² pairs: true or not).
    chunk: rows handled at a time. None holds the B×B matrix; a number never does, for the same value and gradients.
    smoothing: of the softmax's labels (Szegedy et al. 2016, §7; ALIGN: Jia et al. 2021, §5): this share of each is spread
    over all B.
    """

    def __init__(
        self,
        kind: str = "softmax",
        *,
        temperature: float = 0.07,
        bias: float = -10.0,
        chunk: int | None = None,
        smoothing: float = 0.0,
    ):
        super().__init__()
        if kind not in ("softmax", "sigmoid"):
            raise ValueError(f"unknown loss {kind!r}; there are softmax and sigmoid")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}, but must be at least 1 row, or None for all")
        if not 0 <= smoothing < 1 or (smoothing and kind == "sigmoid"):
            raise ValueError(f"smoothing is {smoothing}, but must be at least 0 and below 1, and 0 for the sigmoid")
        self.kind, self.chunk, self.smoothing = kind, chunk, smoothing
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.logit_bias = nn.Parameter(torch.tensor(bias)) if kind == "sigmoid" else None

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        if image_features.shape != text_features.shape:
            shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
            raise ValueError(f"image and text features must have one shape (B, D), not {shapes}")
        if self.training and self.kind == "softmax":
            with torch.no_grad():
                self.logit_scale.clamp_(max=math.log(MAX_SCALE))
        images, texts = unit_length(image_features), unit_length(text_features)
        with full_precision(images.device):
            if self.kind == "sigmoid":
                return sigmoid_loss(images, texts, self.scale(), self.logit_bias, chunk=self.chunk)
            loss = softmax_loss(images, texts, self.scale(), chunk=self.chunk)
            return loss + self.smoothing * self.scale() * lead(images, texts) if self.smoothing else loss

    def scale(self) -> Tensor:
        """1 / temperature."""
        return self.logit_scale.exp()

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """(B, D), (C, D) → (B, C), of rows that are scaled to unit length."""
        with full_precision(image_features.device):
            logits = self.scale() * unit_length(image_features) @ unit_length(text_features).T
        return logits if self.logit_bias is None else logits + self.logit_bias


def unit_length(x: Tensor) -> Tensor:
    """Rows (…, D) divided by their lengths, in fp32. A row whose length is 1 but for the rounding of bf16, in which an
    encoder may have computed it, stays as it is, to the bit."""
    x = x.float()
    length = x.norm(dim=-1, keepdim=True)
    return x / torch.where((length - 1).abs() > torch.finfo(torch.bfloat16).eps, length.clamp(min=1e-12), 1.0)


def check_smoothing(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"label smoothing is {share}, but must be at least 0 and below 1")


def full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast: bf16 near a logit of 100 has steps of half a unit."""
    known = torch.amp.is_autocast_available(device.type)  # the meta device has no autocast to switch off
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def softmax_loss(images: Tensor, texts: Tensor, scale: Tensor, *, chunk: int | None = None) -> Tensor:
    """Mean of the cross-entropies image→text and text→image.  images, texts (B, D), scale () → ()."""
    if not is_distributed():
        if chunk is not None:
            return ChunkedSoftmaxLoss.apply(images, texts, scale, chunk)
        logits = scale * images @ texts.T
        labels = torch.arange(len(images), device=images.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    to_texts = by_rows(pick_column, images, gather(texts), scale, chunk=chunk)
    to_images = by_rows(pick_column, texts, gather(images), scale, chunk=chunk)
    return (to_texts + to_images) / (2 * len(images))


def lead(images: Tensor, texts: Tensor) -> Tensor:
    """The mean cosine of the true pairs minus that of all pairs.  (B, D) twice → ().

    With a share ε of each label spread over all B columns, a cross-entropy becomes (1 − ε)(−log p_true) + ε mean(−log p),
    which is larger by ε (z_true − mean z): what all columns share cancels, and the mean of all pairs is a product of means.
    """
    all_images, all_texts = gather(images).mean(dim=0), gather(texts).mean(dim=0)
    every = (images.mean(dim=0) @ all_texts + texts.mean(dim=0) @ all_images) / 2
    return (images * texts).sum(dim=1).mean() - every


def sigmoid_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, *, chunk: int | None = None) -> Tensor:
    """−log σ(±logit), summed over the texts, mean over the images.  images, texts (B, D), scale and bias () → ()."""
    return by_rows(judge_pairs, images, gather(texts), scale, bias, chunk=chunk) / len(images)


def pick_column(rows: Tensor, columns: Tensor, first: int, scale: Tensor) -> Tensor:
    """Cross-entropy of each row (b, D) against all columns (B, D), summed; row i belongs to column first + i."""
    labels = first + torch.arange(len(rows), device=rows.device)
    return F.cross_entropy(scale * rows @ columns.T, labels, reduction="sum")


def judge_pairs(rows: Tensor, columns: Tensor, first: int, scale: Tensor, bias: Tensor) -> Tensor:
    """Binary cross-entropy of every pair of rows (b, D) and columns (B, D), summed; row i belongs to column first + i."""
    logits = scale * rows @ columns.T + bias
    sign = torch.full_like(logits, -1.0)
    sign.diagonal(first).fill_(1.0)
    return -F.logsigmoid(sign * logits).sum()


def by_rows(part: Callable, rows: Tensor, columns: Tensor, *parameters: Tensor, chunk: int | None) -> Tensor:
    """Sum of part(rows, columns, …) over blocks of rows; each block's logits are made again in backward, never kept."""
    first = first_row(len(rows))
    if chunk is None:
        return part(rows, columns, first, *parameters)
    total = rows.new_zeros(())
    for i in range(0, len(rows), chunk):
        total = total + checkpoint(part, rows[i : i + chunk], columns, first + i, *parameters, use_reentrant=False)
    return total


class ChunkedSoftmaxLoss(torch.autograd.Function):
    """`softmax_loss` without the B×B matrix: one pass for the normalisers, one for the gradient.

    With z = s·I Tᵀ, row normalisers R_i = log Σ_j e^z_ij and column normalisers C_j = log Σ_i e^z_ij:

        loss = mean_i (R_i + C_i) / 2 − z_ii          ∂loss/∂z = (e^(z−R) + e^(z−C) − 2·1) / 2B

    Both directions share z, so four matrix products do what plain autograd needs six for.
    """

    @staticmethod
    def forward(ctx, images: Tensor, texts: Tensor, scale: Tensor, chunk: int) -> Tensor:
        B = len(images)
        row_lse = images.new_empty(B)
        column_max, column_sum = images.new_full((B,), -torch.inf), images.new_zeros(B)
        for i in range(0, B, chunk):
            z = (images[i : i + chunk] * scale) @ texts.T  # (chunk, B)
            row_lse[i : i + chunk] = z.logsumexp(dim=1)
            new_max = torch.maximum(column_max, z.amax(dim=0))  # a running log-sum-exp over the blocks
            column_sum = column_sum * (column_max - new_max).exp() + z.sub_(new_max).exp_().sum(dim=0)
            column_max = new_max
        column_lse = column_max + column_sum.log()
        ctx.save_for_backward(images, texts, scale, row_lse, column_lse)
        ctx.chunk = chunk
        return ((row_lse + column_lse) / 2 - scale * (images * texts).sum(dim=1)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        images, texts, scale, row_lse, column_lse = ctx.saved_tensors
        B = len(images)
        grad_images, grad_texts = torch.empty_like(images), torch.zeros_like(texts)
        for i in range(0, B, ctx.chunk):
            rows = images[i : i + ctx.chunk]
            z = (rows * scale) @ texts.T
            p = (z - row_lse[i : i + ctx.chunk, None]).exp_()
            p += z.sub_(column_lse).exp_()
            p.diagonal(i).sub_(2)  # (chunk, B): ∂loss/∂z · 2B
            grad_images[i : i + ctx.chunk] = p @ texts
            grad_texts.addmm_(p.T, rows)
        factor = grad / (2 * B)
        grad_scale = (grad_images * images).sum() * factor
        return grad_images.mul_(factor * scale), grad_texts.mul_(factor * scale), grad_scale, None
