"""The assertions about images and gates pass for what is right, and fail for what is broken on purpose."""

import pytest
import torch
from torch import nn

from minivlm.testing import (
    assert_images_seen_only_where_allowed,
    assert_later_image_changes_nothing_before,
    assert_zero_gates_change_nothing,
)

PLACEHOLDER = 9
TOKENS = torch.tensor([[1, PLACEHOLDER, 2, PLACEHOLDER, 3], [1, 2, PLACEHOLDER, 3, 4]])


def fails(match):
    return pytest.raises(AssertionError, match=match)


class TestZeroGates:
    def test_closed_gates(self):
        gate, x = nn.Parameter(torch.tensor([0.7])), torch.randn(3, 4)
        assert_zero_gates_change_nothing(lambda x: x + gate.tanh() * x, lambda x: x, x, gates=[gate])
        assert gate.item() == pytest.approx(0.7)  # as it was

    def test_what_gets_past_a_closed_gate(self):
        gate, x = nn.Parameter(torch.zeros(1)), torch.randn(3, 4)
        with fails("with all gates at zero: 12 of 12"):
            assert_zero_gates_change_nothing(lambda x: x * (1 + 1e-6) + gate * x, lambda x: x, x, gates=[gate])

    def test_a_gate_without_a_way_through(self):
        gates, x = [nn.Parameter(torch.zeros(1)) for _ in range(2)], torch.randn(3, 4)
        with fails("gate 1 at 1 changes nothing at all"):
            assert_zero_gates_change_nothing(lambda x: x + gates[0] * x, lambda x: x, x, gates=gates)

    def test_no_gates(self):
        with pytest.raises(ValueError, match="there are no gates"):
            assert_zero_gates_change_nothing(lambda x: x, lambda x: x, torch.ones(1), gates=[])


class TestImagesWhereAllowed:
    allowed = torch.tensor([[[0, 0], [1, 0], [0, 1]]]).bool()  # (1, 3, 2)

    def read(self, weights):
        return lambda images: torch.einsum("bti,bic->btc", weights.to(images), images)

    def test_right(self):
        assert_images_seen_only_where_allowed(self.read(self.allowed), torch.randn(1, 2, 4), self.allowed)

    def test_a_leak(self):
        leak = self.allowed.float()
        leak[0, 0, 1] = 0.01
        with fails("may not see image 1, after a change"):
            assert_images_seen_only_where_allowed(self.read(leak), torch.randn(1, 2, 4), self.allowed)

    def test_a_blind_token(self):
        with fails("position 1 of row 0 may see image 0, but a change of it does not show"):
            blind = self.allowed & torch.tensor([[[1], [0], [1]]]).bool()
            assert_images_seen_only_where_allowed(self.read(blind), torch.randn(1, 2, 4), self.allowed)


class TestLaterImage:
    def read(self, forward):
        """Each token gets the mean of the images whose marks stood before it, or of all of them."""

        def f(images, tokens):
            marks = (tokens == PLACEHOLDER).cumsum(dim=1)[..., None]
            number = torch.arange(1, images.shape[1] + 1)
            return (number <= marks if forward else number <= marks.amax(dim=1, keepdim=True)).float() @ images

        return f

    def test_right(self):
        assert_later_image_changes_nothing_before(self.read(True), torch.randn(2, 2, 4), TOKENS, PLACEHOLDER)

    def test_a_look_ahead(self):
        with fails("the text before an image that was added at the end"):
            assert_later_image_changes_nothing_before(self.read(False), torch.randn(2, 2, 4), TOKENS, PLACEHOLDER)
