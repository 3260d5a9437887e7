"""Kappa as it was published, and by hand."""

import numpy as np
import pytest

from minivlm.metrics.agreement import cohen_kappa, fleiss_kappa

# Fleiss 1971, table 1: 30 patients, 6 psychiatrists each, five diagnoses.
FLEISS = [
    [0, 0, 0, 6, 0], [0, 3, 0, 0, 3], [0, 1, 4, 0, 1], [0, 0, 0, 0, 6], [0, 3, 0, 3, 0], [2, 0, 4, 0, 0],
    [0, 0, 4, 0, 2], [2, 0, 3, 1, 0], [2, 0, 0, 4, 0], [0, 0, 0, 0, 6], [1, 0, 0, 5, 0], [1, 1, 0, 4, 0],
    [0, 3, 3, 0, 0], [1, 0, 0, 5, 0], [0, 2, 0, 3, 1], [0, 0, 5, 0, 1], [3, 0, 0, 1, 2], [5, 1, 0, 0, 0],
    [0, 2, 0, 4, 0], [1, 0, 2, 0, 3], [0, 0, 0, 0, 6], [0, 1, 0, 5, 0], [0, 2, 0, 1, 3], [2, 0, 0, 4, 0],
    [1, 0, 0, 4, 1], [0, 5, 0, 1, 0], [4, 0, 0, 0, 2], [0, 2, 0, 4, 0], [1, 0, 5, 0, 0], [0, 0, 0, 0, 6],
]  # fmt: skip


def test_fleiss_kappa_of_the_table_of_1971_is_the_published_one():
    assert fleiss_kappa(np.array(FLEISS)) == pytest.approx(0.430, abs=5e-4)


def test_cohen_kappa_of_two_readers_by_hand():
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 35/50, p_e = 25/50 · 30/50 + 25/50 · 20/50 = 1/2
    one = ["yes"] * 25 + ["no"] * 25
    other = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(one, other) == pytest.approx(0.4)
    assert cohen_kappa(other, one) == pytest.approx(0.4)


def test_ordered_answers_count_by_the_square_of_their_distance():
    # costs 0, 1, 4, 1: their mean is 1.5; by chance (ratings 1, 2, 3, 4 against 1, 3, 5, 5) it is 5
    assert cohen_kappa([1, 2, 3, 4], [1, 3, 5, 5], ordered=True) == pytest.approx(1 - 1.5 / 5)
    assert cohen_kappa([1, 5], [1, 5], ordered=True) == 1


def test_raters_who_rated_only_part_count_where_two_of_them_did():
    full = np.array([[2, 0], [1, 1], [0, 3]])  # agree on 1, 0 and 3 of 1, 1 and 3 pairs; 3 of 7 answers are the first
    chance = (3 / 7) ** 2 + (4 / 7) ** 2
    assert fleiss_kappa(full) == pytest.approx((2 / 3 - chance) / (1 - chance))
    assert fleiss_kappa(np.vstack([full, [[1, 0]], [[0, 0]]])) == fleiss_kappa(full)


def test_agreement_is_not_defined_where_all_give_the_same_answer():
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None and cohen_kappa([], []) is None
    assert fleiss_kappa(np.array([[3, 0], [2, 0]])) is None and fleiss_kappa(np.array([[1, 0]])) is None
    with pytest.raises(ValueError, match="2 answers and 1"):
        cohen_kappa([1, 2], [1])
