"""What every model shares."""

import torch
from torch import nn

from minivlm.base import Model
from minivlm.testing import assert_same


class Regression(Model):
    """The mean squared error of a line, as a model with one loss."""

    def __init__(self):
        super().__init__(config=None)
        self.line = nn.Linear(3, 1)

    def losses(self, x, y):
        return {"square": (self.line(x)[:, 0] - y).square().mean()}


def test_gradients_in_parts_are_those_of_the_whole_batch_where_the_last_part_is_short():
    model, batch = Regression(), {"x": torch.randn(10, 3), "y": torch.randn(10)}
    whole = model.losses(**batch)["square"]
    whole.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parts = model.backward_in_parts(batch, 4)
    assert_same(parts["square"], whole)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert_same(parameter.grad, gradient)
