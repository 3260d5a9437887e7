import numpy as np
import pytest

from minivlm.datasets.noisy import NoisyPairs
from minivlm.datasets.pairs import Pairs
from minivlm.errors import UserError


class Numbers(Pairs):
    """Picture i shows i, and its caption says so; several wordings."""

    split, classes, labels, notes = "train", ["even", "odd"], np.arange(50) % 2, ["counted"]

    def __init__(self, captions=lambda i: [f"the number {i}", f"this is {i}"]):
        self.all_captions = captions

    def __len__(self):
        return 50

    def images(self, indices):
        return [np.full((1, 1, 3), i, dtype=np.uint8) for i in indices]

    def key(self, index):
        return f"{index}.png"


def number(caption):
    return int(caption.split()[-1])


def test_the_share_is_wrong_and_known():
    pairs = NoisyPairs(Numbers(), 0.4)
    assert pairs.wrong.sum() == 20 and len(pairs) == 50
    captions = pairs.captions(range(50), np.random.default_rng(0))
    assert [number(c) != i for i, c in enumerate(captions)] == pairs.wrong.tolist()
    assert [number(c) for c in captions] == pairs.source.tolist()
    assert [number(pairs.all_captions(i)[0]) for i in range(50)] == pairs.source.tolist()
    assert [int(image[0, 0, 0]) for image in pairs.images(range(50))] == list(range(50))
    assert pairs.notes == ["counted", "20 of the 50 captions are those of another image"]
    assert (pairs.split, pairs.classes, pairs.key(3)) == ("train", ["even", "odd"], "3.png")
    assert pairs.labels is Numbers.labels and set(pairs.texts()) == set(Numbers().texts())


def test_a_seed_is_a_set_of_mistakes():
    first, again, other = (NoisyPairs(Numbers(), 0.4, seed=seed).source.tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_what_another_picture_says_as_well_is_not_wrong():
    same = NoisyPairs(Numbers(lambda i: ["a number"]), 0.4)
    assert not same.wrong.any() and same.notes[-1].startswith("0 of the 50")
    parity = NoisyPairs(Numbers(lambda i: [f"even or odd {i % 2}"]), 1.0)
    assert (parity.source % 2 != np.arange(50) % 2).all()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_between_nothing_and_all(share):
    with pytest.raises(UserError, match=f"share of wrong captions is {share}, but must be between 0 and 1"):
        NoisyPairs(Numbers(), share)
