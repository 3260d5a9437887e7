"""What must hold of an architecture, as assertions for a module of your own.

    from minivlm.testing import assert_causal, assert_padding_invariant

    def test_my_block():
        block = MyBlock(width=32).eval()
        assert_causal(block, torch.randn(2, 9, 32))

Each takes a callable on tensors (a module, a method, a lambda) and says what broke, where first, and by how much. The
callable must give the same answer twice: put a module with dropout or batch norm in eval mode. Values count as equal up
to `tolerance`, relative to the largest one expected; None is what rounding alone explains in the dtype at hand.

| an assertion                                                   | what it says                                      |
|----------------------------------------------------------------|---------------------------------------------------|
| assert_same, assert_same_gradients                             | two ways of one computation agree                 |
| assert_causal                                                  | the future does not leak into the past            |
| assert_padding_invariant, assert_batch_independent             | a row gets what it would get alone and unpadded   |
| assert_permutation_equivariant, assert_permutation_invariant   | order moves the results along, or changes nothing |
| assert_gradient_reaches, assert_gradient_does_not_reach        | who learns from a loss                            |
| assert_frozen                                                  | a part stays as it is while the rest is trained   |
| assert_cache_equals_full                                       | decoding in pieces is the full forward            |
| assert_can_overfit                                             | the thing can learn at all                        |
"""

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
    """f does not see the order of x along `dim`."""
    y = f(x)
    for order in orders(x, dim):
        what = f"the result for order {order.tolist()} along dim {dim}"
        assert_same(f(x.index_select(dim, order)), y, what, tolerance=tolerance)


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


def assert_frozen(
    module: nn.Module,
    step: Callable[[], Any],
    *,
    whole: nn.Module | None = None,
    optimiser: torch.optim.Optimizer | None = None,
) -> None:
    """A step of training leaves the module as it is: parameters and buffers to the bit, no gradients.

    step: one forward, backward and update. whole: the model around the module; putting it in train mode must leave the
    module in eval mode, and the step must change something in it. optimiser: must not hold the module's parameters.
    """
    if whole is not None:
        whole.train()
        if awake := [name or "the module itself" for name, m in module.named_modules() if m.training]:
            raise AssertionError(f"train() on the whole puts the frozen part in train mode: {listed(awake)}")
    inside = {id(p) for p in module.parameters()}
    rest = {} if whole is None else {n: p for n, p in whole.named_parameters() if id(p) not in inside}
    before, rest_before = snapshot(named_state(module)), snapshot(rest)
    step()
    for name, tensor in named_state(module).items():
        assert_same(tensor, before[name], f"{name}, after the step", tolerance=0.0)
    if grown := [n for n, p in module.named_parameters() if p.requires_grad or p.grad is not None]:
        raise AssertionError(f"frozen parameters have or ask for a gradient: {listed(grown)}")
    if optimiser is not None:
        held = {id(p) for group in optimiser.param_groups for p in group["params"]} | {id(p) for p in optimiser.state}
        if kept := [n for n, p in module.named_parameters() if id(p) in held]:
            raise AssertionError(f"the optimiser holds frozen parameters: {listed(kept)}")
    if whole is not None and all(torch.equal(p, rest_before[n]) for n, p in rest.items()):
        raise AssertionError("the step changes nothing in the whole model, so that it shows nothing")


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


def assert_can_overfit(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int = 200,
    target: float = 0.05,
    learning_rate: float = 1e-3,
) -> None:
    """Training on one batch alone brings loss_fn(model, batch) down to `target` within `steps` steps of Adam.

    A model that cannot do this has a part that does not learn, or a loss that does not ask. The model is left trained.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = loss_fn(model, batch)
        losses.append(loss.item())
        if losses[-1] <= target:
            return
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    raise AssertionError(
        f"one batch is not overfitted: from {losses[0]:.4g} the loss comes to {losses[-1]:.4g} in {steps} steps "
        f"(best {min(losses):.4g}), the target is {target:.4g}"
    )


def is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def named(parameters: nn.Module | Iterable[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(parameters, nn.Module):
        return dict(parameters.named_parameters())
    if isinstance(parameters, Mapping):
        return dict(parameters)
    return {f"parameter {i}": p for i, p in enumerate(parameters)}


def named_state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


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


def generator() -> torch.Generator:
    """Always the same numbers, and not those that a test is likely to have drawn its own inputs from."""
    return torch.Generator().manual_seed(20_170_612)


def uneven_pieces(T: int) -> list[int]:
    """3, 1, 2, 3, 1, 2 … until T is used up."""
    sizes: list[int] = []
    while sum(sizes) < T:
        sizes.append(min((3, 1, 2)[len(sizes) % 3], T - sum(sizes)))
    return sizes
