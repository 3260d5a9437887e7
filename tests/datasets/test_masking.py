from collections import Counter

import numpy as np

from minivlm.conversation import IGNORED
from minivlm.datasets.masking import hide_regions, hide_words

ROW = [1, *range(10, 30), 2]
HOW = dict(mask_token=5, vocab_size=100, special={1, 2})


def test_fifteen_percent_of_the_words_are_to_be_told_and_the_rest_stays():
    shown, labels = hide_words(ROW, np.random.default_rng(0), **HOW)
    told = [i for i, label in enumerate(labels) if label != IGNORED]
    assert len(told) == 3 and all(labels[i] == ROW[i] for i in told)
    assert [s for i, s in enumerate(shown) if i not in told] == [t for i, t in enumerate(ROW) if i not in told]


def test_of_those_most_are_masked_some_are_others_and_some_stay():
    kinds, special = Counter(), 0
    for seed in range(1000):
        shown, labels = hide_words(ROW, np.random.default_rng(seed), **HOW)
        special += labels[0] != IGNORED or labels[-1] != IGNORED
        for new, old, label in zip(shown, ROW, labels, strict=True):
            if label != IGNORED:
                kinds["mask" if new == 5 else "same" if new == old else "other"] += 1
    assert not special and kinds.total() == 3000
    assert abs(kinds["mask"] / 3000 - 0.8) < 0.03 and abs(kinds["other"] / 3000 - 0.1) < 0.02


def test_at_least_one_is_hidden_where_there_is_one():
    assert hide_words([1, 10, 2], np.random.default_rng(0), **HOW)[1] == [IGNORED, 10, IGNORED]
    assert hide_words([1, 2], np.random.default_rng(0), **HOW) == ([1, 2], [IGNORED, IGNORED])
    assert hide_regions(4, np.random.default_rng(0)).sum() == 1
    assert hide_regions(40, np.random.default_rng(0)).sum() == 6
