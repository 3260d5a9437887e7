"""Two computations agree, in what they give and in who learns from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def assert_same(actual: Tensor, expected: Tensor, what: str = "the result", *, tolerance: float | None = None) -> None:
    """Equal shapes and values. The message counts what differs, and shows the first and the worst place.

    tolerance: relative to the largest |expected| (or to 0.01, if that is smaller); 0 asks for equality to the bit.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if tolerance is None:
        tolerance = max(TOLERANCE.get(t.dtype, 0.0) for t in (actual, expected))
    a, b = actual.detach().cpu().double(), expected.detach().cpu().double()
    allowed = tolerance * max(0.01, b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0)
    difference = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf)  # a NaN is infinitely wrong
    wrong = difference > allowed
    if not wrong.any():
        return
    first = tuple(wrong.nonzero()[0].tolist())
    worst = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} values differ by more than {allowed:.2g}, "
        f"the first at {first} ({a[first].item():.6g}, expected {b[first].item():.6g}), "
        f"the most at {worst} by {difference[worst].item():.3g}"
    )


def assert_same_gradients(
    f: Callable[..., Tensor],
    g: Callable[..., Tensor],
    inputs: Sequence[Any],
    parameters: nn.Module | Iterable[Tensor] | Mapping[str, Tensor] = (),
    *,
    tolerance: float | None = None,
) -> None:
    """f(*inputs) and g(*inputs) have one value, and one gradient for every floating-point input and given parameter."""
    inputs = [x.detach().clone().requires_grad_() if is_floating(x) else x for x in inputs]
    leaves = {f"input {i}": x for i, x in enumerate(inputs) if is_floating(x)} | named(parameters)
    y, z = f(*inputs), g(*inputs)
    assert_same(y, z, "the value", tolerance=tolerance)
    for name, a, b in zip(leaves, gradients(y, leaves), gradients(z, leaves), strict=True):
        if (a is None) != (b is None):
            raise AssertionError(f"a gradient reaches {name} in {'the second' if a is None else 'the first'} way only")
        if a is not None:
            assert_same(a, b, f"the gradient of {name}", tolerance=tolerance)


def assert_gradient_reaches(output: Tensor, parameters: nn.Module | Iterable[Tensor] | Mapping[str, Tensor]) -> None:
    """Every parameter gets a finite gradient from the loss or output that is not zero everywhere."""
    parameters = named(parameters)
    grads = dict(zip(parameters, gradients(output, parameters), strict=True))
    if dead := [name for name, grad in grads.items() if grad is None or not grad.any()]:
        raise AssertionError(f"no gradient reaches {listed(dead)} ({len(dead)} of {len(grads)})")
    if broken := [name for name, grad in grads.items() if not grad.isfinite().all()]:
        raise AssertionError(f"the gradient is not finite for {listed(broken)} ({len(broken)} of {len(grads)})")


def assert_gradient_does_not_reach(
    output: Tensor, parameters: nn.Module | Iterable[Tensor] | Mapping[str, Tensor]
) -> None:
    """No parameter gets a gradient from the loss or output, or one that is zero everywhere."""
    parameters = named(parameters)
    grads = dict(zip(parameters, gradients(output, parameters), strict=True))
    if reached := [f"{name} (up to {g.abs().max():.3g})" for name, g in grads.items() if g is not None and g.any()]:
        raise AssertionError(f"a gradient reaches {listed(reached)} ({len(reached)} of {len(grads)})")


def is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def named(parameters: nn.Module | Iterable[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(parameters, nn.Module):
        return dict(parameters.named_parameters())
    if isinstance(parameters, Mapping):
        return dict(parameters)
    return {f"parameter {i}": p for i, p in enumerate(parameters)}


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def gradients(output: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor | None]:
    """Of a fixed random projection of the output: a plain sum is constant behind a layer norm or a softmax."""
    wanted = [p for p in parameters.values() if p.requires_grad]
    if not output.requires_grad or not wanted:
        return [None] * len(parameters)
    weights = torch.randn(output.shape, generator=generator()).to(output) if output.dim() else 1.0
    grads = iter(torch.autograd.grad((output * weights).sum(), wanted, retain_graph=True, allow_unused=True))
    return [next(grads) if p.requires_grad else None for p in parameters.values()]


def generator() -> torch.Generator:
    """Always the same numbers, and not those that a test is likely to have drawn its own inputs from."""
    return torch.Generator().manual_seed(20_170_612)
