"""Where the weights of linear layers and blocks start; models call it first and then set what is their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from minivlm.layers.transformer import Transformer


@torch.no_grad()
def initialise_linears(model: nn.Module, generator: torch.Generator) -> None:
    """Normal with mean 0 (as in OpenAI's released CLIP, model.py); biases zero; convolutions as PyTorch starts them.

    | tensor                    | standard deviation          |
    |---------------------------|-----------------------------|
    | q, k, v, other linears    | 1/√(inputs)                 |
    | attention out, MLP down   | 1/√width · 1/√(2·depth)     |
    | MLP up                    | 1/√(2·width)                |
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            normal(module.weight, module.in_features**-0.5, generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    for module in model.modules():  # after the plain linears, since these refine some of them
        if isinstance(module, Transformer):
            width, shrink = module.config.width, (2 * len(module.blocks)) ** -0.5
            for block in module.blocks:
                normal(block.attention.out_proj.weight, width**-0.5 * shrink, generator)
                normal(block.mlp.down_proj.weight, width**-0.5 * shrink, generator)
                normal(block.mlp.up_proj.weight, (2 * width) ** -0.5, generator)


def normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """In place; nothing on the meta device, where there is no memory."""
    if not tensor.is_meta:
        tensor.normal_(0.0, std, generator=generator)
