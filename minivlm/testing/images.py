"""Text that attends to images: closed gates, which token attends to which image, and images that come later."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from minivlm.testing.structure import changed
from minivlm.testing.values import assert_same


@torch.no_grad()
def assert_zero_gates_change_nothing(
    f: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor | None, gates: Iterable[Tensor]
) -> None:
    """With all gates at zero, f(*inputs) is plain(*inputs) to the bit; with any one of them at 1 it is not.

    gates: parameters of f; they are set, and come back as they were.
    """
    gates = list(gates)
    if not gates:
        raise ValueError("there are no gates, so there is nothing to try")
    before = [gate.clone() for gate in gates]
    try:
        for gate in gates:
            gate.zero_()
        expected = plain(*inputs)
        assert_same(f(*inputs), expected, "the result with all gates at zero", tolerance=0.0)
        for i, gate in enumerate(gates):
            gate.fill_(1.0)
            if torch.equal(f(*inputs), expected):
                raise AssertionError(f"gate {i} at 1 changes nothing at all: does anything pass through it?")
            gate.zero_()
    finally:
        for gate, value in zip(gates, before, strict=True):
            gate.copy_(value)


@torch.no_grad()
def assert_images_seen_only_where_allowed(
    f: Callable[[Tensor], Tensor], images: Tensor, allowed: Tensor, *, tolerance: float | None = None
) -> None:
    """Another image in place of image i, or images i and i + 1 in each other's places, changes f(images) (B, T, …) where
    one of them may be seen, and nowhere else.

    images (B, I, …), allowed (B, T, I): True = position t may learn of image i, of itself or through earlier positions.
    """
    y, count = f(images), images.shape[1]
    trials = [([i], changed(images, (slice(None), i))) for i in range(count)]
    for i in range(count - 1):
        order = [*range(i), i + 1, i, *range(i + 2, count)]
        trials.append(([i, i + 1], images[:, order]))
    for moved, others in trials:
        z, may = f(others), allowed[..., moved].any(dim=-1)  # (B, T)
        what = f"what may not see image {' or '.join(map(str, moved))}, after a change of it"
        assert_same(z[~may], y[~may], what, tolerance=tolerance)
        differs = (z != y).flatten(2).any(dim=-1)  # (B, T)
        if blind := (may & ~differs).nonzero().tolist():
            row, t = blind[0]
            raise AssertionError(
                f"position {t} of row {row} may see image {moved[0]}, but a change of it does not show"
            )


@torch.no_grad()
def assert_later_image_changes_nothing_before(
    f: Callable[[Tensor, Tensor], Tensor], images: Tensor, tokens: Tensor, mark: int, *, tolerance: float | None = None
) -> None:
    """One more image, with its mark at the end of the text, leaves f(images (B, I, …), tokens (B, T)) (B, T, …) as it was."""
    more = torch.cat([images, changed(images[:, -1:])], dim=1)
    longer = torch.cat([tokens, tokens.new_full((len(tokens), 1), mark)], dim=1)
    z = f(more, longer)[:, : tokens.shape[1]]
    assert_same(z, f(images, tokens), "the text before an image that was added at the end", tolerance=tolerance)
