"""The assertions of minivlm.testing about training: each passes for a right module, and fails for a broken one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minivlm.testing import assert_can_overfit, assert_frozen, assert_keeps_no_activations


def fails(match: str):
    return pytest.raises(AssertionError, match=match)


class Frozen(nn.Sequential):
    """Real freezing: no gradients, and train() passes it by."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)


class TestFrozen:
    def build(self, frozen: nn.Module, *, trained_too=()):
        model = nn.Sequential(frozen, nn.Linear(4, 4))
        optimiser = torch.optim.AdamW([*model[1].parameters(), *trained_too], lr=0.1)

        def step():
            optimiser.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            optimiser.step()

        return model, optimiser, step

    def test_frozen(self):
        frozen = Frozen(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        model, optimiser, step = self.build(frozen)
        assert_frozen(frozen, step, whole=model, optimiser=optimiser)

    def test_follows_the_whole_into_train_mode(self):
        part = nn.Linear(4, 4).requires_grad_(False)
        model, _, step = self.build(part)
        with fails("in train mode: the module itself"):
            assert_frozen(part, step, whole=model)

    def test_running_statistics_that_move(self):
        part = nn.BatchNorm1d(4).requires_grad_(False)
        _, _, step = self.build(part)
        with fails("running_mean, after the step"):
            assert_frozen(part, step)

    def test_parameters_that_ask_for_gradients(self):
        part = nn.Linear(4, 4)
        _, _, step = self.build(part)
        with fails("have or ask for a gradient: weight, bias"):
            assert_frozen(part, step)

    def test_parameters_that_are_trained(self):
        part = nn.Linear(4, 4)
        _, optimiser, step = self.build(part, trained_too=part.parameters())
        with fails("weight, after the step"):
            assert_frozen(part, step, optimiser=optimiser)

    def test_parameters_that_an_optimiser_would_decay(self):
        frozen = Frozen(nn.Linear(4, 4))
        model, optimiser, step = self.build(frozen, trained_too=frozen.parameters())
        with fails("the optimiser holds frozen parameters: 0.weight, 0.bias"):
            assert_frozen(frozen, step, whole=model, optimiser=optimiser)

    def test_a_step_that_trains_nothing(self):
        frozen = Frozen(nn.Linear(4, 4))
        model, _, _ = self.build(frozen)
        with fails("the step changes nothing in the whole model"):
            assert_frozen(frozen, lambda: None, whole=model)


class TestKeepsNoActivations:
    tower = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def test_a_tower_without_gradients(self):
        x = torch.randn(5, 4)
        assert_keeps_no_activations(torch.no_grad()(lambda: self.tower(x)))
        assert_keeps_no_activations(lambda: Frozen(*self.tower)(x))

    def test_a_tower_that_would_be_trained(self):
        tower = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        with torch.no_grad(), fails(r"4 tensors of 528 bytes together .* largest of shape \(5, 8\)"):
            assert_keeps_no_activations(lambda: tower(torch.randn(5, 4)))  # the caller's no_grad hides nothing

    def test_a_frozen_tower_behind_something_that_is_trained(self):
        frozen = Frozen(nn.Linear(4, 8), nn.GELU())
        with fails("are kept for a backward pass"):
            assert_keeps_no_activations(lambda: frozen(torch.randn(5, 4, requires_grad=True)))


class TestOverfit:
    @staticmethod
    def loss(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    def test_a_net_that_learns(self):
        model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
        batch = torch.randn(8, 4), torch.randn(8, 1)
        assert_can_overfit(model, batch, self.loss, learning_rate=1e-2)
        assert self.loss(model, batch) <= 0.05

    def test_a_net_that_cannot(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(dim=1), nn.Linear(4, 1))
        with torch.no_grad():
            model[2].weight.zero_()
        model[2].requires_grad_(False)
        with fails(r"from .* the loss comes to .* in 20 steps \(best .*\), the target is 0.05"):
            assert_can_overfit(model, (torch.randn(8, 4), torch.randn(8, 1)), self.loss, steps=20)
