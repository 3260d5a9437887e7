from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from minivlm.layers import MLP
from minivlm.layers.mlp import ACTIVATIONS, Activation, gelu_tanh, quick_gelu, squared_relu
from minivlm.testing import assert_gradient_reaches, assert_permutation_equivariant, assert_same, assert_same_gradients


def test_quick_gelu_is_its_definition():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    assert_same_gradients(quick_gelu, lambda x: x * torch.sigmoid(1.702 * x), [x])


def test_gelu_tanh_is_its_definition():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    c = (2 / torch.pi) ** 0.5
    assert_same_gradients(gelu_tanh, lambda x: 0.5 * x * (1 + torch.tanh(c * (x + 0.044715 * x**3))), [x])


def test_squared_relu_is_its_definition():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    assert_same_gradients(squared_relu, lambda x: torch.where(x > 0, x * x, 0.0), [x])
    assert set(get_args(Activation)) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_plain(activation):
    mlp, x = MLP(6, 10, activation), torch.randn(2, 3, 6)
    up, down = mlp.up_proj, mlp.down_proj
    y = ACTIVATIONS[activation](x @ up.weight.T + up.bias) @ down.weight.T + down.bias
    assert_same(mlp(x), y)
    assert_gradient_reaches(mlp(x), mlp)


def test_gated():
    mlp, x = MLP(6, 10, "silu", gated=True, bias=False), torch.randn(2, 3, 6)
    assert sorted(dict(mlp.named_parameters())) == ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]
    y = (F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    assert_same(mlp(x), y)
    assert_gradient_reaches(mlp(x), mlp)


def test_positions_do_not_meet():
    assert_permutation_equivariant(MLP(6, 10), torch.randn(2, 5, 6))


def test_an_unknown_activation():
    with pytest.raises(KeyError, match="swish"):
        MLP(6, 10, "swish")
