"""Every assertion of minivlm.testing passes for a right module, and fails for one that is broken on purpose."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minivlm.testing import (
    assert_batch_independent,
    assert_cache_equals_full,
    assert_causal,
    assert_generation_independent,
    assert_gradient_does_not_reach,
    assert_gradient_reaches,
    assert_padding_invariant,
    assert_permutation_equivariant,
    assert_permutation_invariant,
    assert_same,
    assert_same_gradients,
    changed,
)


def fails(match: str):
    return pytest.raises(AssertionError, match=match)


class TestSame:
    def test_equal_up_to_rounding(self):
        x = torch.randn(3, 4) * 1000
        assert_same(x + 1e-3, x)
        assert_same(torch.tensor([torch.inf, 1.0]), torch.tensor([torch.inf, 1.0]))
        assert_same(torch.zeros(0, 3), torch.zeros(0, 3))

    def test_says_what_differs_where_and_by_how_much(self):
        x = torch.zeros(2, 3)
        y = x.clone()
        y[0, 2], y[1, 1] = 0.25, 0.5
        with fails(r"the sum: 2 of 6 .* first at \(0, 2\) \(0.25, expected 0\), the most at \(1, 1\) by 0.5"):
            assert_same(y, x, "the sum")

    def test_small_numbers_must_agree_as_well(self):
        with fails("differ"):
            assert_same(torch.tensor([1.1e-3]), torch.tensor([1.0e-3]))

    def test_nan_is_never_right(self):
        with fails("by inf"):
            assert_same(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]))

    def test_shapes(self):
        with fails(r"shape \(2,\), expected \(2, 1\)"):
            assert_same(torch.zeros(2), torch.zeros(2, 1))

    def test_zero_tolerance_means_to_the_bit(self):
        x = torch.ones(3)
        assert_same(x, x.clone(), tolerance=0.0)
        with fails("differ"):
            assert_same(x + 1e-7, x, tolerance=0.0)


class TestSameGradients:
    def test_two_ways_of_one_computation(self):
        w = torch.randn(4, 4, requires_grad=True)
        x = torch.randn(3, 4)
        assert_same_gradients(lambda x: x @ w, lambda x: F.linear(x, w.T), [x], [w])

    def test_another_value(self):
        with fails("the value"):
            assert_same_gradients(lambda x: x, lambda x: x + 1, [torch.randn(3)])

    def test_the_right_value_with_a_wrong_gradient(self):
        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                return 2 * grad

        with fails("the gradient of input 0"):
            assert_same_gradients(lambda x: x.clone(), Doubled.apply, [torch.randn(3)])

    def test_a_gradient_that_one_way_lost(self):
        with fails("reaches input 1 in the first way only"):
            assert_same_gradients(lambda x, y: x + y, lambda x, y: x + y.detach(), [torch.randn(3), torch.randn(3)])


class TestCausal:
    def test_sums_of_the_past(self):
        assert_causal(lambda x: x.cumsum(dim=1), torch.randn(2, 6, 3))
        assert_causal(lambda x: x.cumsum(dim=1), torch.randint(0, 5, (2, 6)))

    def test_a_glimpse_of_the_next_position(self):
        def leaks(x):
            return x + 1e-3 * x.roll(-1, dims=1)

        with fails("the past, after a change at position 1"):
            assert_causal(leaks, torch.randn(2, 6, 3))
        with fails("the past, after a change at position 4"):
            assert_causal(leaks, torch.randn(2, 6, 3), positions=[4])

    def test_a_leak_that_is_only_seen_when_several_positions_change(self):
        with fails("the past"):
            assert_causal(lambda x: x + (x.sum(dim=1, keepdim=True) > 5e2), torch.full((1, 4, 1), 3e2))

    def test_a_function_that_ignores_its_argument_shows_nothing(self):
        with fails("changes nothing at all"):
            assert_causal(torch.zeros_like, torch.randn(2, 6, 3))


class TestPadding:
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])

    @staticmethod
    def mean(x, mask):
        return (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)

    def test_masked_mean_and_mean_subtracted(self):
        x = torch.randn(3, 6, 4)
        assert_padding_invariant(self.mean, x, self.mask, pooled=True)
        assert_padding_invariant(lambda x, mask: x - self.mean(x, mask)[:, None], x, self.mask)

    def test_integers(self):
        assert_padding_invariant(
            lambda x, mask: x.masked_fill(~mask, 0).cumsum(1), torch.arange(18).view(3, 6), self.mask
        )

    def test_padding_that_is_read(self):
        with fails("other values at the padded ones"):
            assert_padding_invariant(lambda x, mask: x.mean(dim=1), torch.randn(3, 6, 4), self.mask, pooled=True)

    def test_padding_that_is_counted(self):
        def masked_but_divided_by_the_padded_length(x, mask):
            return (x * mask[..., None]).sum(dim=1) / x.shape[1]

        with fails("2 more columns"):
            assert_padding_invariant(
                masked_but_divided_by_the_padded_length, torch.randn(3, 6, 4), self.mask, pooled=True
            )
        with fails("each row alone"):
            assert_padding_invariant(
                masked_but_divided_by_the_padded_length, torch.randn(3, 6, 4), self.mask, pooled=True, extra=0
            )

    def test_masks_that_show_nothing(self):
        with pytest.raises(ValueError, match="no padding"):
            assert_padding_invariant(self.mean, torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.bool))
        with pytest.raises(ValueError, match="on the right"):
            assert_padding_invariant(self.mean, torch.randn(1, 3, 4), torch.tensor([[False, True, True]]))


class TestBatch:
    def test_rows_alone(self):
        assert_batch_independent(nn.BatchNorm1d(4).eval(), torch.randn(3, 4))
        assert_batch_independent(lambda x, y: x * y, torch.randn(3, 4), torch.randn(3, 4))

    def test_a_norm_over_the_batch(self):
        with fails("row 0 alone"):
            assert_batch_independent(lambda x: x - x.mean(dim=0), torch.randn(3, 4))


class TestPermutation:
    def test_a_map_of_each_position(self):
        assert_permutation_equivariant(nn.Linear(4, 5), torch.randn(2, 6, 4))
        with fails("order"):
            assert_permutation_equivariant(lambda x: x.cumsum(dim=1), torch.randn(2, 6, 4))

    def test_a_sum(self):
        assert_permutation_invariant(lambda x: x.sum(dim=2), torch.randn(2, 3, 6), dim=2)
        with fails("order"):
            assert_permutation_invariant(lambda x: x[:, 0], torch.randn(2, 6, 4))


class TestGradient:
    def test_reaches(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        assert_gradient_reaches(model(torch.randn(3, 4)), model)  # the plain sum behind a layer norm would be constant
        assert_gradient_does_not_reach(model(torch.randn(3, 4)).detach(), model)

    def test_a_cut_wire(self):
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        y = second(first(torch.randn(3, 4)).detach())
        assert_gradient_does_not_reach(y, first)
        with fails(r"reaches weight, bias \(2 of 2\)"):
            assert_gradient_reaches(y, first)
        with fails(r"reaches b \(up to .*\(1 of 2\)"):
            assert_gradient_does_not_reach(y, {"a": first.bias, "b": second.bias})

    def test_a_gate_that_is_shut_is_no_way(self):
        gate, x = torch.zeros(1, requires_grad=True), torch.randn(3, requires_grad=True)
        assert_gradient_reaches(gate * x, [gate])
        assert_gradient_does_not_reach(gate * x, [x])

    def test_not_finite(self):
        x = torch.zeros(3, requires_grad=True)
        with fails("not finite for parameter 0"):
            assert_gradient_reaches(x.sqrt(), [x])


class TestGeneration:
    """Counts on from the last token: 3 → 4 5 6; 9 ends an answer."""

    tokens, mask = torch.tensor([[1, 2, 5], [7, 0, 0]]), torch.tensor([[True, True, True], [True, False, False]])

    @staticmethod
    def count(tokens, mask, *, pad=0):
        last = tokens.gather(1, mask.sum(dim=1, keepdim=True) - 1)
        answers = last + torch.arange(1, 5)
        answers = answers.masked_fill(answers > 9, pad)
        return answers[:, : int((answers != pad).sum(dim=1).max())]

    def test_rows_alone(self):
        assert_generation_independent(self.count, self.tokens, self.mask)

    def test_padding_that_is_read(self):
        with fails("the answer to row 1, in the batch"):
            assert_generation_independent(lambda t, m: self.count(t, torch.ones_like(m)), self.tokens, self.mask)

    def test_something_behind_the_end(self):
        with fails("row 1, in the batch, behind its end"):
            assert_generation_independent(lambda t, m: self.count(t, m, pad=11), self.tokens, self.mask)


class RunningSum:
    """A model with a cache: position t is the sum of all up to t, and the cache keeps the sum so far."""

    def __init__(self, *, forgets=False, counts_padding=False):
        self.forgets, self.counts_padding = forgets, counts_padding

    def __call__(self, x, *, cache=None, mask=None):
        if cache is None:
            return x.cumsum(dim=1)
        y = cache["sum"] + x.cumsum(dim=1)
        if mask is None or self.counts_padding:
            mask = torch.ones(x.shape[:2], dtype=torch.bool)
        if not self.forgets or x.shape[1] == 1:
            cache["sum"] = cache["sum"] + (x * mask[..., None]).sum(dim=1, keepdim=True)
        return y

    @staticmethod
    def new_cache():
        return {"sum": torch.zeros(1)}


class TestCache:
    x = torch.arange(3 * 8 * 2.0).view(3, 8, 2)

    def test_running_sum(self):
        assert_cache_equals_full(RunningSum(), self.x, RunningSum.new_cache, prompt_lengths=[2, 4, 1])

    def test_right_one_by_one_but_not_in_pieces(self):
        with fails(r"in pieces of \[3, 1, 2, 2\]"):
            assert_cache_equals_full(RunningSum(forgets=True), self.x, RunningSum.new_cache)

    def test_padding_that_is_remembered(self):
        model = RunningSum(counts_padding=True)
        assert_cache_equals_full(model, self.x, model.new_cache)
        with fails(r"behind prompts of \[2, 4, 1\] tokens, new token 0"):
            assert_cache_equals_full(model, self.x, model.new_cache, prompt_lengths=[2, 4, 1])

    def test_a_cache_that_is_not_read(self):
        with fails(r"in pieces of \[1, 1, 1, 1, 1, 1, 1, 1\]"):
            assert_cache_equals_full(lambda x, cache=None: x.cumsum(dim=1), self.x, dict)


def test_changed_differs_everywhere_it_should_and_nowhere_else():
    for x in (torch.randn(3, 5), torch.randint(0, 4, (3, 5))):
        where = (slice(None), slice(2, 4))
        assert (changed(x, where) != x).nonzero()[:, 1].unique().tolist() == [2, 3]
        assert (changed(x) != x).all()
    with pytest.raises(ValueError, match="one value only"):
        changed(torch.zeros(3, dtype=torch.long))
