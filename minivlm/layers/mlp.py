"""The feed-forward half of a block: widen, bend, narrow. Plain (Vaswani et al. 2017, §3.3) or gated (Shazeer 2020)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.layers.autocast import cast_once, meet


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), OpenAI's approximation, written through silu, which has a fused kernel in both directions."""
    return F.silu(1.702 * x) / 1.702


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks & Gimpel 2016, §2), as GPT-2 and SigLIP use it."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)² (So et al. 2021, "Primer", §4), as Flamingo's feed-forward layers use it."""
    return F.relu(x).square()


Activation = Literal["gelu", "quick_gelu", "gelu_tanh", "relu", "squared_relu", "silu"]
ACTIVATIONS = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "squared_relu": squared_relu,
    "silu": F.silu,
}


class MLP(nn.Module):
    """x (…, D) → (…, D) through a hidden layer: down(f(up x)), or gated: down(f(gate x) ⊙ up x)."""

    def __init__(self, width: int, hidden_width: int, activation: str = "gelu", *, gated=False, bias=True):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up_proj = nn.Linear(width, hidden_width, bias=bias)
        self.gate_proj = nn.Linear(width, hidden_width, bias=bias) if gated else None
        self.down_proj = nn.Linear(hidden_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            hidden = self.activation(self.up_proj(x))
        else:
            x = cast_once(x)
            hidden = self.activation(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(meet(hidden, self.down_proj))  # which a T5 in fp16 has in fp32
