"""Losses of a batch that is computed in parts, or by several processes: its mean is that of the whole batch.

Under torchrun each process holds its rows of a batch. Every loss of the package is one whose mean over the processes is the
loss of the whole batch, values and gradients alike: a mean is divided by the count of all processes, and what is compared
is gathered from all. Gradient caching: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_parts(function: Callable, *tensors: Tensor | None, size: int | None) -> Tensor | tuple[Tensor, ...]:
    """function(*tensors) that keeps the activations of `size` rows at a time; backward computes those of the others again.

    Every tensor is (B, …), or None. function gives tensors of as many rows as it is given, which are put together, or sums
    (), which are added. None, or all rows at once: it is simply called. Random layers draw the same numbers both times. Gao
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


_scale: ContextVar[Callable[[Tensor], Tensor]] = ContextVar("scale", default=lambda loss: loss)


@contextmanager
def scaled(scale: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, gradients are those of scale(loss), as fp16 needs them larger (see `training.loss_scaler`); losses stay."""
    token = _scale.set(scale)
    try:
        yield
    finally:
        _scale.reset(token)


def backward(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Backpropagates the sum of the losses; returns them detached."""
    _scale.get()(sum(losses.values())).backward()
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
    _scale.get()(value).backward()
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
    """The number of processes that share the batch."""
    return dist.get_world_size() if is_distributed() else 1


def first_row(rows: int) -> int:
    """The index of this process's first row among those of all processes."""
    return dist.get_rank() * rows if is_distributed() else 0


def gather(x: Tensor) -> Tensor:
    """(b, D) of this process → (W·b, D) of all W, in rank order; gradients come back from every process."""
    return Gather.apply(x) if is_distributed() else x


class Gather(torch.autograd.Function):
    """all_gather whose backward sums the gradients of every process's loss for our rows."""

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
