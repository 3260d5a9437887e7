"""Losses that compare (the symmetric softmax of CLIP, the pairwise sigmoid of SigLIP) and the one that speaks (the next
token), each plain and memory-saving.

    image_features (B, D) ┐
                          ├─ scale · I Tᵀ (+ bias) ─→ (B, B), the diagonal is true ─→ one number
    text_features  (B, D) ┘

Under torchrun each process holds its rows of a batch, and every loss here is one whose mean over the processes is the loss
of the whole batch, values and gradients alike: contrast sees the columns of all, and a mean is divided by the count of all.
Radford et al. 2021 (CLIP), figure 3; Zhai et al. 2023 (SigLIP), equation 1; gradient caching: Gao et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class CLIPLoss(nn.Module):
    """How well images and texts find each other in their batch; the temperature is learnt.

    image_features, text_features (B, D), unit length → a scalar; row i of one belongs to row i of the other.
    kind: "softmax" (each image picks its text among B, and the reverse) or "sigmoid" (each of B² pairs: true or not).
    max_scale: the softmax's scale (1 / temperature) is clamped to it in training, as CLIP's was; SigLIP's has no limit.
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
        max_scale: float = 100.0,
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
        self.kind, self.max_scale, self.chunk, self.smoothing = kind, max_scale, chunk, smoothing
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.logit_bias = nn.Parameter(torch.tensor(bias)) if kind == "sigmoid" else None

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        if image_features.shape != text_features.shape:
            shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
            raise ValueError(f"image and text features must have one shape (B, D), not {shapes}")
        if self.training and self.kind == "softmax":
            with torch.no_grad():
                self.logit_scale.clamp_(max=math.log(self.max_scale))
        images, texts = image_features.float(), text_features.float()
        with full_precision(images.device):
            if self.kind == "sigmoid":
                return sigmoid_loss(images, texts, self.scale(), self.logit_bias, chunk=self.chunk)
            loss = softmax_loss(images, texts, self.scale(), chunk=self.chunk)
            return loss + self.smoothing * self.scale() * lead(images, texts) if self.smoothing else loss

    def scale(self) -> Tensor:
        """1 / temperature."""
        return self.logit_scale.exp()

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """(B, D), (C, D) → (B, C)"""
        with full_precision(image_features.device):
            logits = self.scale() * image_features.float() @ text_features.float().T
        return logits if self.logit_bias is None else logits + self.logit_bias


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
    """By how much the cosine of the true pairs exceeds that of all, on average.  (B, D) twice → ().

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
    first = dist.get_rank() * len(rows) if is_distributed() else 0
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


# ---- whole batches from parts, and over processes ----------------------------------------------------------------------


def in_parts(function: Callable, *tensors: Tensor | None, size: int | None) -> Tensor | tuple[Tensor, ...]:
    """function(*tensors) that keeps the activations of `size` rows at a time; backward computes those of the others again.

    Every tensor is (B, …), or None. function gives tensors of as many rows as it is given, which are put together, or sums
    (), which are added. None, or all rows at once: it is simply called. Random layers see the same numbers both times. Gao
    et al. 2021, §3 (gradient caching); Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    B = len(next(t for t in tensors if t is not None))
    if size is None or size >= B:
        return function(*tensors)
    found = []
    for i in range(0, B, size):
        part = (None if t is None else t[i : i + size] for t in tensors)
        found.append(checkpoint(function, *part, use_reentrant=False))
    join = lambda parts: torch.cat(parts) if parts[0].dim() else torch.stack(parts).sum()
    return join(found) if torch.is_tensor(found[0]) else tuple(map(join, zip(*found, strict=True)))


def backward(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Backpropagates the sum of the losses; returns them detached."""
    sum(losses.values()).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def backward_with_gradient_cache(
    encoders: tuple[Callable[..., Tensor], ...],
    inputs: tuple[tuple[Tensor, ...], ...],
    loss: Callable[..., Tensor],
    *,
    chunk: int,
) -> Tensor:
    """loss(*(encode(*x) for encode, x in zip(encoders, inputs))).backward(), with activations of only `chunk` rows at a time,
    for one more forward pass. Every input tensor is (B, …). Returns the loss, detached. See `in_parts`."""
    value = loss(*(in_parts(encode, *x, size=chunk) for encode, x in zip(encoders, inputs, strict=True)))
    value.backward()
    return value.detach()


def mean(total: Tensor, count: Tensor | int) -> Tensor:
    """total / count of the whole batch: the mean of it over the processes is the sum of all totals by the sum of all counts.
    0 where nothing is counted."""
    if is_distributed():
        count = per_process(count if torch.is_tensor(count) else torch.full((), count, device=total.device))
        return total / torch.where(count > 0, count, 1.0)
    return total / (count.clamp(min=1) if torch.is_tensor(count) else max(1, count))


def per_process(counts: Tensor) -> Tensor:
    """The counts of all processes together, by the number of processes; alone, as they are."""
    counts = counts.float()
    if is_distributed():
        counts = counts.clone()
        dist.all_reduce(counts)
        counts = counts / dist.get_world_size()
    return counts


_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, losses ignore the other processes: for a caller that counts the rows of all processes itself."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def is_distributed() -> bool:
    """Whether several processes share this step. What is computed without gradients, such as validation, is not shared."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several and torch.is_grad_enabled() and not _ALONE.get()


def processes() -> int:
    """How many processes share the batch."""
    return dist.get_world_size() if is_distributed() else 1


def gather(x: Tensor) -> Tensor:
    """(b, D) of this process → (W·b, D) of all W, in rank order; gradients come back from every process."""
    return Gather.apply(x) if is_distributed() else x


class Gather(torch.autograd.Function):
    """all_gather whose backward sums what every process's loss says about our rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


# ---- the next token --------------------------------------------------------------------------------------------------


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
            slope = (slope / len(x)).to(x.dtype)  # so small that half precision holds what it adds up to
            grad_x[part] = slope @ w
            if grad_weight is not None:
                grad_weight += slope.T @ x[part]
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        grad = grad * len(grad_x)
        if grad_weight is not None:
            grad_weight = grad_weight * grad
        return grad_x * grad.to(grad_x.dtype), grad_weight, None, None, None


# ---- answers of a list, and what was masked ----------------------------------------------------------------------------

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


def masked_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of hidden words: logits (B, T, V), labels (B, T), −100 where none was hidden."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return mean(losses, (labels != -100).sum())


def masked_region_loss(guess: Tensor, features: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error of hidden regions: guess, features (B, R, C), hidden (B, R) bool; 0 if none is hidden."""
    error = (guess.float() - features.float()).square().mean(dim=-1)  # (B, R)
    return mean((error * hidden).sum(), hidden.sum())
