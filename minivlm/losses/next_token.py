"""The loss of a language model: the cross-entropy of every next token, plain and memory-saving."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minivlm.losses.parts import mean


def next_token_loss(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    where: Tensor | None = None,
    chunk: int | None = None,
    smoothing: float = 0.0,
    total: bool = False,
) -> Tensor:
    """Mean cross-entropy of the labelled tokens, from logits that are computed only where there is a label; 0, with zero
    gradients, where no token has one.

    hidden (B, T, D), labels (B, T) aligned with the tokens (position t is judged by label t + 1), −100 = not counted;
    weight (V, D) and bias (V,) of the head. where: `labelled(labels)`, if the caller has it (finding it on a GPU waits for
    the GPU).
    chunk: rows of logits held at a time, for the same loss and gradients; None: all at once unless they exceed 2²⁶.
    smoothing: of the labels (Szegedy et al. 2016, §7): this share of each is spread over all V. For training alone; the
    surprise of a text is measured without. total: the sum instead of the mean.
    """
    where = labelled(labels) if where is None else where
    x = hidden.flatten(0, 1)[where]  # (M, D)
    if bias is not None:  # is the weight of one more input, which is always 1
        x, weight = F.pad(x, (0, 1), value=1.0), torch.cat([weight, bias[:, None]], dim=1)
    targets = labels.flatten()[where + 1]
    M, V = len(where), len(weight)
    if chunk is None and M * V <= 2**26:
        losses = F.cross_entropy((x @ weight.T).float(), targets, reduction="sum", label_smoothing=smoothing)
    else:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        losses = ChunkedCrossEntropy.apply(x, weight, targets, chunk or max(1, 2**26 // V), smoothing)
    return losses if total else mean(losses, M)


def labelled(labels: Tensor) -> Tensor:
    """labels (B, T) → (M,): the flat positions t whose next token has a label."""
    counted = labels[:, 1:] != -100
    return F.pad(counted, (0, 1)).flatten().nonzero()[:, 0]


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of logsumexp(z) − (1 − ε) z[target] − ε mean(z), where z = x Wᵀ, `chunk` rows at a time; the gradients are made on
    the way forward.

    x (M, D), weight (V, D), targets (M,); ε: smoothing. softmax − (1 − ε) onehot − ε/V is the gradient of the logits, so no
    chunk is needed twice.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, chunk: int, smoothing: float) -> Tensor:
        w = weight.to(x.dtype)
        # Slopes add up to the gradient of a weight, and are divided so that half precision holds the sum. In fp16, whose
        # smallest number is 6e-8, they are divided by less: the slopes of rare words would be zero.
        ctx.divisor = min(len(x), 32) if x.dtype == torch.float16 else len(x)
        total = x.new_zeros((), dtype=torch.float32)
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in torch.arange(len(x), device=x.device).split(chunk):
            logits = (x[part] @ w.T).float()  # (≤ chunk, V)
            gold = targets[part, None]
            truth = (1 - smoothing) * logits.gather(1, gold)[:, 0] + smoothing * logits.mean(dim=1)
            total += (logits.logsumexp(dim=1) - truth).sum()
            slope = logits.softmax(dim=1)
            slope.scatter_add_(1, gold, torch.full_like(gold, smoothing - 1, dtype=torch.float32))
            if smoothing:
                slope -= smoothing / logits.shape[1]
            slope = (slope / ctx.divisor).to(x.dtype)
            grad_x[part] = slope @ w
            if grad_weight is not None:
                grad_weight += slope.T @ x[part]
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        grad = grad * ctx.divisor
        if grad_weight is not None:
            grad_weight = grad_weight * grad
        if grad_x.dtype == torch.float16:  # which the scale of the loss alone may be too large for
            return (grad_x.float() * grad).half(), grad_weight, None, None, None
        return grad_x * grad.to(grad_x.dtype), grad_weight, None, None, None
