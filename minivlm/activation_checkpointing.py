"""Activation checkpointing: a block keeps its input alone, and the backward pass computes what lies inside again.

    memory of activations   a stack of L blocks: L inputs and the inside of one block, in place of L insides
    time                    one more forward pass, about a third of a step

Losses and gradients are the same to the bit: dropout draws the same numbers again, and batch norm counts a batch once.
Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", §4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from minivlm.errors import UserError
from minivlm.layers.co_attention import CoAttention
from minivlm.layers.efficientnet import MBConv
from minivlm.layers.gated_cross_attention import GatedCrossAttention
from minivlm.layers.perceiver import PerceiverBlock
from minivlm.layers.qformer import QFormerBlock
from minivlm.layers.resnet import Bottleneck
from minivlm.layers.transformer import Block
from minivlm.model import batch_norms

FORWARD = ("forward",)
BLOCKS: dict[type[nn.Module], tuple[str, ...]] = {  # and the methods by which models run them
    Block: ("forward", "state_at"),
    QFormerBlock: ("attend", "update_queries", "update_text"),
    **dict.fromkeys((PerceiverBlock, CoAttention, GatedCrossAttention, Bottleneck, MBConv), FORWARD),
}


def checkpoint_activations(model: nn.Module, *, compiled: bool = False) -> int:
    """Every block of the model computes its inside again in the backward pass; how many do. In place: names of parameters
    and checkpoints stay as they are, and what runs without gradients runs as before.

    compiled: the model will be compiled afterwards. UserError for a model without blocks, and for compiled batch norm.
    """
    blocks = [module for module in model.modules() if type(module) in BLOCKS]
    for block in blocks:
        for name in BLOCKS[type(block)]:
            # A partial of a bound method: a deep copy of the model then runs its own blocks.
            setattr(block, name, partial(run_twice, getattr(block, name)))
    if not blocks:
        raise UserError(
            f"--activation_checkpointing: a {type(model).__name__} of these parts has no blocks whose activations could be "
            "computed again: leave it out, or lower --micro_batch."
        )
    if compiled and (norms := batch_norms(model)):
        raise UserError(
            f"--activation_checkpointing and --compile do not go together for {norms} that is trained: leave out one of them."
        )
    return len(blocks)


def run_twice(method: Callable[..., Any], *args, **options) -> Any:
    """method(*args, **options), whose activations are dropped and computed again where gradients are wanted."""
    if not torch.is_grad_enabled():
        return method(*args, **options)
    norms = [m for m in method.__self__.modules() if isinstance(m, _BatchNorm) and m.training]
    again = {"context_fn": lambda: (nullcontext(), counted_already(norms))} if norms else {}
    return checkpoint(method, *args, use_reentrant=False, **again, **options)


@contextmanager
def counted_already(norms: list[_BatchNorm]) -> Iterator[None]:
    """Inside, batch norm normalises by a batch whose mean and variance are already among those that it remembers."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
