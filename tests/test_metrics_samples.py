"""Intervals and paired differences from what scores are made of."""

import numpy as np
import pytest

from minivlm.errors import UserError
from minivlm.evaluate import table
from minivlm.evaluate.table import side_by_side
from minivlm.metrics import Samples, Score
from minivlm.metrics.samples import VALUES, read_samples, write_samples


def coins(n: int, p: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < p


def test_interval_of_a_share_is_that_of_the_normal_approximation():
    values = coins(2000, 0.7)
    share = values.mean()
    low, high = Samples.mean(values).interval()
    wide = 1.96 * np.sqrt(share * (1 - share) / len(values))
    assert low == pytest.approx(share - wide, abs=0.003) and high == pytest.approx(share + wide, abs=0.003)


def test_interval_covers_the_truth_nineteen_times_of_twenty():
    intervals = [Samples.mean(coins(200, 0.6, seed)).interval() for seed in range(200)]
    assert 0.9 <= np.mean([low <= 0.6 <= high for low, high in intervals]) <= 0.99


def test_samples_of_one_image_are_drawn_together():
    values = np.repeat(coins(100, 0.5), 10)  # ten questions about each image, all of them right or none
    alone, grouped = Samples.mean(values), Samples.mean(values, np.repeat(np.arange(100), 10))
    (low, high), (of_low, of_high) = alone.interval(), grouped.interval()
    assert alone.value == grouped.value and alone.n == grouped.n == 1000
    assert of_high - of_low > 2.5 * (high - low)


def test_where_all_are_right_the_bound_is_exact():
    assert Samples.mean([1.0] * 20).interval() == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    assert Samples.mean([0.0] * 20).interval() == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))


def test_values_are_those_of_their_definitions():
    values, classes = np.array([1.0, 0.0, 1.0, 1.0]), [0, 0, 2, 2]
    assert Samples.macro(values, classes, 4).value == pytest.approx((0.5 + 1) / 2)  # classes 1 and 3 do not occur
    assert Samples("f1", [[3, 1, 2]]).value == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert Samples("perplexity", [[2.0, 4], [4.0, 8]]).value == pytest.approx(np.exp(0.5))
    assert Samples("ratio", [[0, 0]]).value == 0


@pytest.mark.parametrize("kind", VALUES)
def test_every_kind_takes_any_leading_axes(kind):
    sums = np.random.default_rng(0).integers(1, 9, (3, 5, 20)).astype(float)
    columns = {"mean": 2, "ratio": 2, "perplexity": 2, "f1": 3, "explained": 3, "rsum": 4, "contrast": 4, "meteor": 6}
    sums = sums[..., : columns.get(kind)]
    found = VALUES[kind](sums)
    assert found.shape == (3, 5) and found[1, 2] == pytest.approx(float(VALUES[kind](sums[1, 2])))


def test_paired_difference_is_surer_than_two_intervals():
    hard = np.random.default_rng(0).random(500)  # the same questions are hard for both
    one, other = Samples.mean(hard < 0.64), Samples.mean(hard < 0.6)
    found = one.paired(other)
    assert found.value == pytest.approx(one.value - other.value) and found.low > 0 and found.p < 0.01
    assert one.interval()[0] < other.interval()[1]  # which overlap
    back, same = other.paired(one), one.paired(one)
    assert back.value == -found.value and same.value == same.low == same.high == 0 and same.p == 1


def test_paired_by_name_takes_what_both_have_in_any_order():
    one = Samples("mean", [[1, 1], [0, 1], [1, 1]], ("a", "b", "c"))
    other = Samples("mean", [[1, 1], [0, 1]], ("c", "a"))
    assert one.paired(other).value == pytest.approx(1.0 - 0.5)
    with pytest.raises(UserError, match="no samples in common"):
        one.paired(Samples("mean", [[1, 1]], ("d",)))
    assert not one.comparable(Samples("ratio", [[1, 1]], ("a",)))


def test_samples_are_written_and_read_back(tmp_path):
    some = {"a": Samples.mean([1, 0], ["x", "y"]), "b": Samples("f1", [[1, 2, 3]])}
    write_samples(tmp_path / "samples.npz", some)
    back = read_samples(tmp_path / "samples.npz")
    assert {name: (s.kind, s.ids, s.value) for name, s in back.items()} == {
        name: (s.kind, s.ids, s.value) for name, s in some.items()
    }
    (tmp_path / "samples.npz").write_text("no")
    with pytest.raises(UserError, match=r"samples\.npz does not hold the samples of scores"):
        read_samples(tmp_path / "samples.npz")


def test_score_keeps_n_and_interval_in_its_record():
    score = Score.of(Samples.mean(coins(100, 0.5)), 0.25)
    back = Score.from_record(score.record())
    assert back == score and back.n == 100 and back.interval == pytest.approx(score.interval)
    older = Score.from_record({"value": 0.5, "chance": 0.1, "share": True})
    assert older.n is None and older.interval is None and older.interval_text() == ""


def test_table_tells_interval_chance_and_n():
    lines = table({"accuracy": Score.of(Samples.mean([1, 1, 1, 0]), 0.25), "BLEU-4": Score(0.5, None)}).splitlines()
    assert lines[0].split() == ["score", "95", "%", "interval", "chance", "n"]
    assert lines[1].split() == ["accuracy", "75.0%", "25.0", "to", "100.0%", "25.0%", "4"]
    assert lines[2].split() == ["BLEU-4", "50.0%", "–"]


def test_two_columns_tell_the_difference():
    one, other = Samples.mean([1, 1, 0, 0]), Samples.mean([1, 0, 0, 0])
    lines = side_by_side({"a": {"x": Score.of(other, 0.1)}, "b": {"x": Score.of(one, 0.1)}}).splitlines()
    assert lines[1].split()[:4] == ["x", "25.0%", "50.0%", "+25.0"]
