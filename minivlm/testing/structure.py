"""What depends on what: time, padding, neighbours in the batch, order, caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from minivlm.testing.values import assert_same, generator


@torch.no_grad()
def assert_causal(
    f: Callable[[Tensor], Tensor], x: Tensor, *, positions: Iterable[int] | None = None, tolerance: float | None = None
) -> None:
    """Changing x (B, T, …) from position t on changes f(x) (B, T, …) there, and nowhere before t.

    positions: the t to try; None tries all. Integers are replaced by others that occur in x.
    """
    y = f(x)
    for t in range(1, x.shape[1]) if positions is None else positions:
        for span in (slice(t, t + 1), slice(t, None)):  # one position alone, then everything that follows
            z = f(changed(x, (slice(None), span)))
            assert_same(z[:, :t], y[:, :t], f"the past, after a change at position {t}", tolerance=tolerance)
            if torch.equal(z, y):
                raise AssertionError(f"a change at position {t} changes nothing at all: does f read its argument?")


@torch.no_grad()
def assert_padding_invariant(
    f: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    mask: Tensor,
    *,
    pooled: bool = False,
    extra: int = 2,
    tolerance: float | None = None,
) -> None:
    """What stands at padded positions, and how much padding there is, does not change what real positions get.

    x (B, T, …), mask (B, T) with True = real, padding on the right → f(x, mask) (B, T, …), or (B, …) if pooled.
    extra: columns of padding added beyond T; 0 for a module that takes no more than T positions.
    """
    lengths = mask.sum(dim=1)
    if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        raise ValueError("the mask must be padded on the right: True … True False … False in every row")
    if mask.all():
        raise ValueError("the mask holds no padding, so there is nothing to try")

    def real(y: Tensor) -> Tensor:
        return y if pooled else y[:, : mask.shape[1]][mask]

    y = real(f(x, mask))
    other = torch.where(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x, changed(x))
    what = "what real positions get, with other values at the padded ones"
    assert_same(real(f(other, mask)), y, what, tolerance=tolerance)
    if extra:
        longer = torch.cat([x, changed(x)[:, :1].expand(-1, extra, *x.shape[2:])], dim=1)
        longer_mask = torch.cat([mask, mask.new_zeros(len(mask), extra)], dim=1)
        what = f"what real positions get, with {extra} more columns of padding"
        assert_same(real(f(longer, longer_mask)), y, what, tolerance=tolerance)
    alone = [f(x[i : i + 1, :n], mask[i : i + 1, :n])[0] for i, n in enumerate(lengths.tolist()) if n]
    expected = y[lengths > 0] if pooled else y
    alone = torch.stack(alone) if pooled else torch.cat(alone)
    assert_same(alone, expected, "what real positions get, each row alone and without padding", tolerance=tolerance)


@torch.no_grad()
def assert_batch_independent(f: Callable[..., Tensor], *inputs: Tensor, tolerance: float | None = None) -> None:
    """Every row of f(*inputs) is what the row gets alone. Each input is (B, …)."""
    y = f(*inputs)
    for i in range(len(y)):
        alone = f(*(x[i : i + 1] for x in inputs))
        assert_same(alone[0], y[i], f"row {i} alone", tolerance=tolerance)


@torch.no_grad()
def assert_generation_independent(
    generate: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, mask: Tensor, *, pad_token: int = 0
) -> None:
    """Every row of a batch is answered as it is alone and unpadded, token by token.

    generate(tokens (B, T), mask (B, T)) → (B, ≤ N), the padding of `tokens` on the right, pad_token behind an end token.
    """
    answers = generate(tokens, mask)
    for i, length in enumerate(mask.sum(dim=1).tolist()):
        alone = generate(tokens[i : i + 1, :length], mask[i : i + 1, :length])[0]
        rest = answers[i, len(alone) :]
        what = f"the answer to row {i}, in the batch"
        assert_same(answers[i, : len(alone)], alone, what, tolerance=0.0)
        assert_same(rest, torch.full_like(rest, pad_token), f"{what}, behind its end", tolerance=0.0)


@torch.no_grad()
def assert_permutation_equivariant(
    f: Callable[[Tensor], Tensor], x: Tensor, dim: int = 1, *, tolerance: float | None = None
) -> None:
    """f of a reordered x is f(x), reordered in the same way, along `dim`."""
    y = f(x)
    for order in orders(x, dim):
        what = f"the result for order {order.tolist()} along dim {dim}"
        assert_same(f(x.index_select(dim, order)), y.index_select(dim, order), what, tolerance=tolerance)


@torch.no_grad()
def assert_permutation_invariant(
    f: Callable[[Tensor], Tensor], x: Tensor, dim: int = 1, *, tolerance: float | None = None
) -> None:
    """f does not depend on the order of x along `dim`."""
    y = f(x)
    for order in orders(x, dim):
        what = f"the result for order {order.tolist()} along dim {dim}"
        assert_same(f(x.index_select(dim, order)), y, what, tolerance=tolerance)


@torch.no_grad()
def assert_cache_equals_full(
    f: Callable[..., Tensor],
    x: Tensor,
    new_cache: Callable[[], Any],
    *,
    prompt_lengths: Sequence[int] | None = None,
    tolerance: float | None = None,
) -> None:
    """Decoding x (B, T, …) token by token, and in uneven pieces, gives what one forward of all of it gives.

    f(x) is the full forward, f(piece, cache=cache) goes on behind what the cache holds; both → (B, T, …).
    new_cache: makes an empty cache for B rows of T tokens. prompt_lengths (B): begin with prompts of these lengths
    as well, padded on the right as f(prompts, cache=cache, mask=mask), and go on one token a row behind each.
    """
    T = x.shape[1]
    full = f(x)
    for sizes in ([1] * T, uneven_pieces(T)):
        cache, pieces = new_cache(), []
        for piece in x.split(sizes, dim=1):
            pieces.append(f(piece, cache=cache))
        assert_same(torch.cat(pieces, dim=1), full, f"decoding in pieces of {sizes}", tolerance=tolerance)
    if prompt_lengths is None:
        return
    lengths = torch.tensor(prompt_lengths, device=x.device)
    longest, rows = int(lengths.max()), torch.arange(len(x), device=x.device)
    mask = torch.arange(longest, device=x.device) < lengths[:, None]
    cache = new_cache()
    y = f(x[:, :longest], cache=cache, mask=mask)
    what = f"decoding behind prompts of {list(prompt_lengths)} tokens"
    assert_same(y[mask], full[:, :longest][mask], f"{what}, the prompts", tolerance=tolerance)
    for i in range(T - longest):
        y = f(x[rows, lengths + i][:, None], cache=cache)
        assert_same(y[:, 0], full[rows, lengths + i], f"{what}, new token {i}", tolerance=tolerance)


def changed(x: Tensor, where: Any = ...) -> Tensor:
    """x with every value at `where` replaced by another: a random one, or for integers another one that occurs in x."""
    x = x.clone()
    if x.is_floating_point():
        x[where] = torch.randn(x[where].shape, generator=generator()).to(x)
        return x
    values, index = x.unique(return_inverse=True)
    if len(values) < 2:
        raise ValueError("x holds one value only, so there is no other to put in its place; give more varied tokens")
    x[where] = values.roll(1)[index][where]
    return x


def orders(x: Tensor, dim: int) -> list[Tensor]:
    """The reverse and two random orders of x along `dim`."""
    n, source = x.shape[dim], generator()
    random = [torch.randperm(n, generator=source) for _ in range(2)]
    return [order.to(x.device) for order in (torch.arange(n).flip(0), *random)]


def uneven_pieces(T: int) -> list[int]:
    """3, 1, 2, 3, 1, 2 … until T is used up."""
    sizes: list[int] = []
    while sum(sizes) < T:
        sizes.append(min((3, 1, 2)[len(sizes) % 3], T - sum(sizes)))
    return sizes
