"""The loss of the next token: only where there is a label, whole or in chunks."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minivlm.losses import labelled, next_token, next_token_loss
from minivlm.testing import assert_same, assert_same_gradients
from tests.test_losses import LargestTensor

B, T, D, V = 3, 7, 5, 11
LABELS = torch.tensor([[-100, -100, 3, 4, 5, 6, 7], [1, 2, -100, 4, -100, -100, -100], [0, 10, 9, 8, 7, 6, 5]])


def inputs(dtype=torch.float64):
    return torch.randn(B, T, D).to(dtype), torch.randn(V, D).to(dtype)


def plain(hidden, weight):
    """All logits, shifted by one, −100 left out: as a textbook has it."""
    logits = hidden @ weight.T
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), ignore_index=-100)


def loss(hidden, weight, **options):
    return next_token_loss(hidden, LABELS, weight, **options)


def test_by_hand():
    hidden, weight = inputs()
    surprises = []
    for b in range(B):
        for t in range(T - 1):
            if LABELS[b, t + 1] != -100:
                z = [float(hidden[b, t] @ weight[v]) for v in range(V)]
                surprises.append(math.log(sum(map(math.exp, z))) - z[LABELS[b, t + 1]])
    assert loss(hidden, weight).item() == pytest.approx(sum(surprises) / len(surprises), rel=1e-6)  # summed in fp32


def test_labelled_are_the_positions_whose_successor_has_a_label():
    assert labelled(LABELS).tolist() == [1, 2, 3, 4, 5, 7, 9, *range(14, 20)]
    assert labelled(torch.full((2, 3), -100)).tolist() == []


def test_the_first_label_of_a_row_judges_nothing_and_least_of_all_the_row_before():
    hidden, weight = inputs()
    other = LABELS.clone()
    other[1:, 0] = 5
    assert torch.equal(next_token_loss(hidden, other, weight), loss(hidden, weight))


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 13, 100])
def test_is_the_plain_loss_in_value_and_gradient(chunk):
    assert_same_gradients(plain, partial(loss, chunk=chunk), inputs(torch.float32))


@pytest.mark.parametrize("chunk", [None, 3])
def test_where_may_be_given(chunk):
    hidden, weight = inputs()
    assert torch.equal(loss(hidden, weight, where=labelled(LABELS), chunk=chunk), loss(hidden, weight, chunk=chunk))


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_frozen_head_gets_no_gradient_and_costs_none(chunk):
    hidden, weight = inputs()
    loss(hidden.requires_grad_(), weight, chunk=chunk).backward()
    assert weight.grad is None and hidden.grad[0, 1].any()
    assert not hidden.grad[0, 0].any() and not hidden.grad[:, -1].any()  # no label judges these


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_loss_that_counts_for_less(chunk):
    hidden, weight = (x.requires_grad_() for x in inputs())
    (0.25 * loss(hidden, weight, chunk=chunk)).backward()
    expected = torch.autograd.grad(0.25 * plain(hidden, weight), [hidden, weight])
    assert_same(hidden.grad, expected[0], tolerance=1e-5)
    assert_same(weight.grad, expected[1], tolerance=1e-5)


def test_logits_are_computed_only_where_there_is_a_label():
    hidden, weight = torch.randn(2, 50, 4), torch.randn(1000, 4)
    labels = torch.full((2, 50), -100)
    labels[:, 10:13] = 7
    with LargestTensor() as largest:
        next_token_loss(hidden.requires_grad_(), labels, weight).backward()
    assert largest.numel == 6 * 1000


def test_chunks_hold_no_more_logits_than_they_are_told_to():
    hidden, weight = torch.randn(2, 50, 4), torch.randn(1000, 4)
    labels = torch.randint(0, 1000, (2, 50))
    with LargestTensor() as largest:
        next_token_loss(hidden.requires_grad_(), labels, weight.requires_grad_(), chunk=10).backward()
    assert largest.numel == 10 * 1000


def test_many_logits_are_chunked_unasked(monkeypatch):
    told = SimpleNamespace(apply=lambda x, weight, targets, chunk, smoothing: chunk)
    monkeypatch.setattr(next_token, "ChunkedCrossEntropy", told)
    hidden, labels = torch.randn(1, 9, 1), torch.arange(9)[None]
    assert next_token_loss(hidden, labels, torch.empty(2**24, 1), total=True) == 4  # 8 rows of them are twice 2²⁶


@pytest.mark.parametrize("chunk", [None, 3])
def test_under_autocast_sums_are_in_fp32(chunk):
    hidden, weight = inputs(torch.float32)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(hidden, weight, chunk=chunk)
    value.backward()
    assert value.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    grads = torch.autograd.grad(plain(hidden, weight), [hidden, weight])
    assert value.item() == pytest.approx(plain(hidden, weight).item(), rel=0.02)
    for mine, exact in zip((hidden.grad, weight.grad), grads, strict=True):
        assert_same(mine, exact, tolerance=0.02)


def test_a_head_may_have_a_bias():
    hidden, weight, bias = torch.randn(2, 5, 6), torch.randn(9, 6), torch.randn(9)
    labels = torch.randint(9, (2, 5))
    labels[1, 3:] = -100
    expected = F.cross_entropy((hidden @ weight.T + bias)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for chunk in (None, 2):
        assert_same(next_token_loss(hidden, labels, weight, bias, chunk=chunk), expected)


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize("biased", [False, True])
def test_smoothed_labels_are_those_of_cross_entropy(chunk, biased):
    def plain(hidden, weight, bias=0.0):
        logits = (hidden @ weight.T + bias)[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, LABELS[:, 1:].flatten(), label_smoothing=0.3)

    def smooth(hidden, weight, bias=None):
        return loss(hidden, weight, bias=bias, chunk=chunk, smoothing=0.3)

    assert_same_gradients(plain, smooth, (*inputs(torch.float32), *[torch.randn(V)] * biased))


@pytest.mark.parametrize("chunk", [None, 2])
def test_without_any_label_the_loss_is_zero_and_so_are_its_gradients(chunk):
    hidden, weight = torch.randn(2, 5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    loss = next_token_loss(hidden, torch.full((2, 5), -100), weight, chunk=chunk)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()
