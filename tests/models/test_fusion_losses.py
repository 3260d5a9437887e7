from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from minivlm.models.fusion_losses import (
    alignment_loss,
    answer_loss,
    chance_answer_loss,
    evenly,
    masked_region_loss,
    masked_word_loss,
    transport_distance,
    transport_plan,
)
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
    assert_same(masked_word_loss(logits, labels), F.cross_entropy(logits[hidden], labels[hidden]))
    assert masked_word_loss(logits, torch.full((2, 3), -100)) == 0


def test_hidden_regions_alone_are_judged():
    guess, features = torch.randn(2, 2, 3, 5)
    hidden = torch.tensor([[True, False, False], [False, True, True]])
    assert_same(masked_region_loss(guess, features, hidden), F.mse_loss(guess[hidden], features[hidden]))
    assert masked_region_loss(guess, features, torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_true_pairs_are_drawn_together_and_false_ones_apart():
    distance = torch.tensor([0.2, 0.9, 0.4])
    assert_same(alignment_loss(distance, torch.tensor([True, False, True])), torch.tensor((0.2 - 0.9 + 0.4) / 3))


def test_the_plan_moves_all_that_is_there_to_all_places():
    cost = torch.rand(3, 5, 4)
    source = evenly(torch.arange(5) < torch.tensor([[5], [3], [2]]))
    target = evenly(torch.arange(4) < torch.tensor([[4], [1], [3]]))
    plan = transport_plan(cost, source, target, iterations=300)
    assert_same(plan.sum(dim=2), source, tolerance=1e-3)
    assert_same(plan.sum(dim=1), target, tolerance=1e-5)
    assert (plan[1, 3:] == 0).all() and (plan[1, :, 1:] == 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_the_cheapest_one(seed):
    """Of five equal weights on both sides, a cheapest plan is a permutation (Birkhoff)."""
    cost = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed))
    best = min(sum(cost[i, p[i]] for i in range(5)) / 5 for p in permutations(range(5)))
    even = torch.full((1, 5), 0.2)
    plan = transport_plan(cost[None], even, even, beta=0.1, iterations=500)
    assert_same((plan * cost).sum(), best, tolerance=5e-3)


def test_words_that_are_their_regions_need_no_moving_and_opposites_the_most():
    x = F.normalize(torch.randn(2, 3, 16), dim=-1)
    real = torch.ones(2, 3, dtype=torch.bool)
    shuffled = x[:, [2, 0, 1]]
    assert (transport_distance(x, shuffled, real, real) < 0.02).all()
    assert (transport_distance(x[:, :1], -x[:, :1], real[:, :1], real[:, :1]) > 1.99).all()


def test_gradients_reach_the_costs_as_if_the_plan_were_given():
    words, regions = torch.randn(1, 3, 6, requires_grad=True), torch.randn(1, 4, 6)
    mask, region_mask = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    transport_distance(words, regions, mask, region_mask).sum().backward()
    other = words.detach().clone().requires_grad_()
    cost = 1 - F.normalize(other, dim=-1) @ F.normalize(regions, dim=-1).transpose(1, 2)
    plan = transport_plan(cost.detach(), evenly(mask), evenly(region_mask))
    (plan * cost).sum().backward()
    assert_same(words.grad, other.grad)


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
