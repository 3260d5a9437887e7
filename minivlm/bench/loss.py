"""The contrastive loss alone, without the matrix of all pairs, beside open_clip's."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from minivlm.bench.contest import compare, import_peer, print_ratios


def loss_inputs(B: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.nn.functional.normalize(torch.randn(B, 512, generator=generator), dim=1).requires_grad_()
    return draw(), draw(), torch.tensor(14.3, requires_grad=True)


def loss_step(function: Callable[..., Tensor], B: int) -> Callable[[], float]:
    def run(inputs: tuple[Tensor, ...]) -> float:
        for tensor in inputs:
            tensor.grad = None
        value = function(*inputs)
        value.backward()
        return value.item()

    run(loss_inputs(64))  # what libraries allocate on first use is not the loss's
    inputs = loss_inputs(B)
    return lambda: run(inputs)


def loss_minivlm(B: int) -> Callable[[], float]:
    from minivlm.losses import softmax_loss

    return loss_step(lambda images, texts, scale: softmax_loss(images, texts, scale, chunk=1024), B)


def loss_open_clip(B: int) -> Callable[[], float]:
    import_peer("open_clip")
    import open_clip

    return loss_step(open_clip.ClipLoss(), B)


def bench_loss(options: argparse.Namespace) -> None:
    B = options.batch or 8192
    peers = {"minivlm": (loss_minivlm, (B,)), "open_clip": (loss_open_clip, (B,))}
    print(f"\ncontrastive loss, forward and backward, B = {B}, width 512, fp32")
    rows = compare(peers, options.rounds)
    for name, row in rows.items():
        print(
            f"{name:14} {row['median']:6.2f} s   {row['memory'] / 2**20:6.0f} MB beyond the inputs   loss {row['value']:.6f}"
        )
    print_ratios({name: row["median"] for name, row in rows.items()})
