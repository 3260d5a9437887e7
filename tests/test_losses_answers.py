"""Answers of a list, and masked words and regions."""

import pytest
import torch
import torch.nn.functional as F

from minivlm.losses import answer_loss, chance_answer_loss, masked_region_loss, masked_token_loss
from minivlm.testing import assert_same


def test_one_right_answer_is_a_cross_entropy_and_none_costs_nothing():
    logits, right = torch.randn(4, 6), torch.tensor([0, 5, 2, 2])
    answers = F.one_hot(right, 6).float()
    assert_same(answer_loss(logits, answers), F.cross_entropy(logits, right))
    answers[3] = 0
    assert_same(answer_loss(logits, answers), F.cross_entropy(logits[:3], right[:3], reduction="sum") / 4)


def test_several_right_answers_are_met_by_giving_each_its_share():
    answers = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    assert_same(answer_loss(answers.clamp(min=1e-9).log(), answers), torch.tensor(0.0))
    assert answer_loss(torch.zeros(1, 4), answers) > 0.1


def test_hidden_words_alone_are_judged():
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[-100, 4, -100], [-100, -100, 6]])
    hidden = labels != -100
    assert_same(masked_token_loss(logits, labels), F.cross_entropy(logits[hidden], labels[hidden]))
    assert masked_token_loss(logits, torch.full((2, 3), -100)) == 0


def test_hidden_regions_alone_are_judged():
    guess, features = torch.randn(2, 2, 3, 5)
    hidden = torch.tensor([[True, False, False], [False, True, True]])
    assert_same(masked_region_loss(guess, features, hidden), F.mse_loss(guess[hidden], features[hidden]))
    assert masked_region_loss(guess, features, torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_each_answer_by_itself_is_the_binary_cross_entropy_of_uniter_and_vilbert():
    """There: `loss.mean() * targets.size(1)`."""
    logits, scores = torch.randn(4, 6), torch.rand(4, 6)
    expected = F.binary_cross_entropy_with_logits(logits, scores) * 6
    assert_same(answer_loss(logits, scores, "sigmoid"), expected)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("n", [1, 2, 7, 3000])
def test_chance_is_what_is_lost_by_giving_each_answer_its_share(kind, n):
    share = torch.full((3, n), 1 / n, dtype=torch.float64)
    logits = share.log() if kind == "softmax" else torch.logit(share, eps=1e-12)
    answers = F.one_hot(torch.tensor([0, 0, n - 1]), n)
    assert chance_answer_loss(n, kind) == pytest.approx(answer_loss(logits, answers, kind).item(), rel=1e-3, abs=1e-6)
