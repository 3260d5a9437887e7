from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from minivlm.layers import BERTConfig, VisionConfig
from minivlm.models.uniter import UNITER, UNITERConfig, alignment_loss, evenly, transport_distance, transport_plan
from minivlm.testing import assert_same

CONFIG = UNITERConfig(
    text=BERTConfig(vocab_size=40, context=10, width=24, depth=3, heads=2),
    vision=VisionConfig(image_size=16, patch_size=8, width=12, depth=2, heads=2, pool="mean"),
    vision_layer=-2,
    region_width=12,
    heads=("regions", "matching"),
)
TOKENS = torch.tensor([[1, 5, 6, 7, 8, 2], [1, 9, 3, 2, 0, 0]])
MASK = TOKENS != 0


def test_a_hidden_region_is_told_only_where_the_text_tells_of_the_picture():
    model, images = UNITER(CONFIG).eval(), torch.randn(2, 3, 16, 16)
    hidden = torch.tensor([[True, False, False, True]] * 2)
    both = model.losses(images, TOKENS, MASK, hidden=hidden)["regions"]
    of = lambda *matches: model.losses(images, TOKENS, MASK, hidden=hidden, matches=torch.tensor(matches))["regions"]
    assert of(True, False) != of(False, True)
    assert_same((of(True, False) + of(False, True)) / 2, both)
    assert_same(of(True, True), both)
    assert of(False, False) == 0


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
