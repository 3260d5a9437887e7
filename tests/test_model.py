"""What every model shares."""

import pytest
import torch
from torch import nn

from minivlm.errors import UserError
from minivlm.layers import LanguageModel, LanguageModelConfig
from minivlm.model import Model
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


def test_labelled_tokens_weigh_alike_wherever_their_sample_stands():
    """A part of few labels must not count as much as one of many."""
    model = LanguageModel(LanguageModelConfig(width=8, depth=1, heads=2, vocab_size=9, context=8))
    tokens = torch.randint(1, 9, (6, 8))
    labels = tokens.masked_fill(torch.arange(8) < torch.tensor([[0], [7], [3], [7], [5], [2]]), -100)
    whole = model.losses(tokens, labels)["next token"]
    parts = model.backward_in_parts({"tokens": tokens, "labels": labels}, 4)
    assert_same(parts["next token"], whole)


def test_frozen_parts_stay_in_eval_mode_and_get_no_gradients():
    model = Regression()
    model.tower = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    model.freeze("tower")
    model.train()
    assert model.training and model.line.training and not model.tower.training and not model.tower[1].training
    assert not any(p.requires_grad for p in model.tower.parameters()) and model.line.weight.requires_grad


def test_a_model_without_prefill_generates_nothing():
    with pytest.raises(UserError, match="a Regression generates no text"):
        Regression().generate(torch.ones(1, 1, dtype=torch.long))


def test_a_part_without_any_label_and_a_batch_without_add_nothing():
    model = LanguageModel(LanguageModelConfig(width=8, depth=1, heads=2, vocab_size=9, context=8))
    tokens = torch.randint(1, 9, (4, 8))
    labels = tokens.clone()
    labels[:2] = -100
    whole = model.losses(tokens, labels)["next token"]
    assert_same(model.backward_in_parts({"tokens": tokens, "labels": labels}, 2)["next token"], whole)
    assert_same(model.backward_in_parts({"tokens": tokens, "labels": labels}, 3)["next token"], whole)
    model.zero_grad()
    nothing = model.backward_in_parts({"tokens": tokens, "labels": torch.full_like(tokens, -100)}, 3)
    assert nothing["next token"] == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)
