"""What training changes, what it must leave alone, and what it keeps in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.testing.values import assert_same, listed


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


def assert_keeps_no_activations(call: Callable[[], Any]) -> None:
    """call() runs a frozen part, and nothing of what happens in it is kept in memory for a backward pass."""
    kept: list[Tensor] = []
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    if kept:
        largest = max(kept, key=lambda t: t.nbytes)
        raise AssertionError(
            f"{len(kept)} tensors of {sum(t.nbytes for t in kept):,} bytes together are kept for a backward pass, "
            f"the largest of shape {tuple(largest.shape)}"
        )


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


def named_state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}
