"""Batches of like length: the same samples as without, fewer places for padding, and nothing that a resumed run would miss."""

from itertools import chain, pairwise

import numpy as np
import pytest
from torch import nn

from minivlm.recipes import plan
from minivlm.recipes.job import Job
from minivlm.recipes.recipe import FOLDER, Recipe
from tests.test_train_blip2 import bases, world  # noqa: F401
from tests.test_train_captioner import arguments


class Sentences:
    """Sample i has a length that its random numbers decide as well."""

    def __init__(self, bucket_steps, n=40, batch_size=4):
        how = dict(steps=100, batch_size=batch_size, bucket_steps=bucket_steps, seed=3)
        recipe, self.n = Recipe(summary="sentences", data=FOLDER, **how), n
        job = Job(recipe=recipe, model=nn.Linear(1, 1), processor=None, samples=self, scores=None, progress=None)
        self.ids, self.indices, self.share = job.ids, job.order.indices, job.order.share

    def __len__(self):
        return self.n

    def length(self, index, rng):
        return index + int(rng.integers(20))

    def key(self, index):
        return f"sentence {index}"

    def lengths(self, step, rank=0, processes=1):
        return [self.length(*sample) for sample in self.share(step, rank, processes)]


def drawn(work, steps):
    """What each of these steps draws: the samples, and the first number of their chance."""
    return [sorted((index, rng.random()) for index, rng in work.share(step, 0, 1)) for step in steps]


def test_every_epoch_has_every_sample_once_and_in_an_order_of_its_own():
    work = Sentences(1, n=43)
    epochs = [[index for step in range(first, first + 10) for index in work.indices(step)] for first in (0, 10, 20)]
    assert all(len({*epoch}) == 40 for epoch in epochs)  # three are left over, others each time
    assert len({tuple(epoch) for epoch in epochs}) == 3 and {*epochs[0]} != {*epochs[1]}


def test_a_window_has_the_samples_that_its_steps_would_have_had():
    plain, bucketed = Sentences(1), Sentences(5)
    for window in (range(5), range(5, 10), range(20, 25)):  # the second one crosses from one epoch into the next
        a, b = drawn(plain, window), drawn(bucketed, window)
        assert a != b and sorted(chain(*a)) == sorted(chain(*b))


def test_batches_are_of_like_length_and_in_no_order():
    work, turns = Sentences(5), set()
    for window in range(8):
        batches = [work.lengths(5 * window + i) for i in range(5)]
        order = sorted(range(5), key=lambda i: batches[i])
        assert all(max(batches[a]) <= min(batches[b]) for a, b in pairwise(order))
        turns.add(tuple(order))
    assert len(turns) > 4


def test_a_run_that_begins_in_the_middle_of_a_window_sees_the_same():
    whole = [drawn(Sentences(5), range(12))[step] for step in range(12)]
    assert [drawn(Sentences(5), [step])[0] for step in range(12)] == whole
    work = Sentences(5)
    assert [drawn(work, [step])[0] for step in (11, 3, 7)] == [whole[step] for step in (11, 3, 7)]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_batch_of_like_length(processes):
    parts = [Sentences(5).lengths(7, rank, processes) for rank in range(processes)]
    assert sorted(chain(*parts)) == sorted(Sentences(5).lengths(7))
    assert {len(part) for part in parts} == {4 // processes}


def test_messages_name_the_samples_of_the_step():
    work = Sentences(5)
    assert (
        work.ids(7)
        == [f"sentence {index}" for index, _ in work.share(7, 0, 1)]
        != [f"sentence {index}" for index in work.indices(7)]
    )


def test_a_window_of_one_step_is_no_window():
    assert drawn(Sentences(1), range(3)) == [
        sorted(
            (int(i), np.random.default_rng((3, step, at)).random()) for at, i in enumerate(Sentences(1).indices(step))
        )
        for step in range(3)
    ]
    with pytest.raises(ValueError, match="bucket_steps is 0, but must be at least 1"):
        Sentences(0)


EYES, WORDS = {"vision_from": "clip"}, {"language_from": "lm"}
BUILT_ON = {
    "clip": {},
    "lm": {},
    "t5": {},
    "captioner": {},
    "llava-stage1": EYES | WORDS,
    "blip2-stage1": EYES,
    "blip2": EYES | WORDS | {"from_scratch": True},
    "flamingo": EYES | WORDS,
    "blip": EYES,
    "vqa": EYES,
    "multitask": EYES,
}


@pytest.mark.parametrize("name", BUILT_ON)
def test_every_recipe_knows_how_long_its_texts_are(name, bases, world):  # noqa: F811
    """Batches of like length hold less padding than others of the same samples."""
    given = {option: bases / value if isinstance(value, str) else value for option, value in BUILT_ON[name].items()}
    given |= {"data": world, "batch_size": 4} | ({"data.lessons": 0} if name == "flamingo" else {})
    padding = []
    for steps in (1, 4):
        work = plan.command_line(arguments(name, **given, bucket_steps=steps))[1].start(quiet=True)
        batches = [work.batch(step) for step in range(8)]
        pad_token = work.processor.pad_token
        texts = [batch[name] for batch in batches for name in ("tokens", "false", "question") if name in batch]
        padding.append(np.mean([(tokens == pad_token).float().mean().item() for tokens in texts]))
    assert padding[1] < 0.9 * padding[0]
