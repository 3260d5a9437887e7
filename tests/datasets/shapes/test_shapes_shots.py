"""Lessons with pictures: a word means a look and nothing else, places tell nothing, and what is held out is held out."""

from collections import Counter

import numpy as np
import pytest

from minivlm.datasets.shapes.episodes import is_held_out
from minivlm.datasets.shapes.scenes import SEEN, UNSEEN, draw_scenes
from minivlm.datasets.shapes.shots import Lessons, shot_episodes


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(3000, seed=0, stream=0)


@pytest.fixture(scope="module")
def lessons(scenes):
    return Lessons.of_scenes(scenes)


def drawn(lessons, n=200):
    rng = np.random.default_rng(0)
    return [lessons.lesson(rng) for _ in range(n)]


def looks(scenes, lesson):
    return [int(scenes.classes[picture, 0]) for picture, _ in lesson]


def test_a_lesson_shows_single_objects_and_no_picture_twice(scenes, lessons):
    for lesson in drawn(lessons):
        pictures = [picture for picture, _ in lesson]
        assert (scenes.count[pictures] == 1).all()
        assert len(set(pictures)) == len(pictures)


def test_within_a_lesson_words_and_looks_are_the_same_thing(scenes, lessons):
    for lesson in drawn(lessons):
        pairs = set(zip(looks(scenes, lesson), (word for _, word in lesson), strict=True))
        assert len(pairs) == len({look for look, _ in pairs}) == len({word for _, word in pairs})


def test_a_look_has_another_word_in_every_lesson(scenes, lessons):
    meanings = [set(zip(looks(scenes, lesson), (word for _, word in lesson), strict=True)) for lesson in drawn(lessons)]
    told = [pair for pairs in meanings for pair in pairs]
    assert len(set(told)) > 0.99 * len(told)  # of 540 syllables, two lessons may choose the same for one look


def test_training_has_no_held_out_word_and_episodes_no_other(lessons):
    assert not any(is_held_out(word) for lesson in drawn(lessons) for _, word in lesson)
    rng = np.random.default_rng(0)
    assert all(is_held_out(word) for _ in range(20) for _, word in lessons.episode(rng, shots=4, ways=2))


@pytest.mark.parametrize("shots", [0, 1, 2, 3, 8])
def test_an_episode_has_as_many_examples_of_each_word_as_can_be(lessons, shots):
    rng = np.random.default_rng(0)
    for _ in range(50):
        *examples, _ = lessons.episode(rng, shots=shots, ways=2)
        counts = Counter(word for _, word in examples)
        assert len(examples) == shots
        assert shots < 2 or sorted(counts.values()) == [shots // 2, shots - shots // 2]


def test_the_place_of_an_example_tells_nothing_about_the_answer(lessons):
    rng = np.random.default_rng(0)
    agree = np.zeros(4)
    for _ in range(2000):
        *examples, query = lessons.episode(rng, shots=4, ways=2)
        agree += [word == query.word for _, word in examples]
    assert np.abs(agree / 2000 - 0.5).max() < 0.04  # 3.5 standard deviations


def test_where_a_look_has_too_few_pictures_some_are_shown_again():
    lesson = Lessons(np.array([3, 7])).draw(np.random.default_rng(0), np.array([0, 1, 0, 1]), held_out=False)
    assert sorted(picture for picture, _ in lesson) == [0, 0, 1, 1]


class TestHeldOutEpisodes:
    def test_the_same_every_time(self):
        a, b = (shot_episodes(3, shots=2, seed=5, image_size=32) for _ in range(2))
        assert [e.query.label for e in a] == [e.query.label for e in b]
        assert all(np.array_equal(x.query.image, y.query.image) for x, y in zip(a, b, strict=True))
        assert a[0].query.image.shape == (32, 32, 3)

    def test_the_query_is_one_of_the_words_in_another_picture(self):
        for examples, query in shot_episodes(20, shots=4, image_size=32):
            same = [shot for shot in examples if shot.label == query.label]
            assert same
            assert not any(np.array_equal(shot.image, query.image) for shot in same)

    def test_looks_of_either_kind(self, monkeypatch):
        asked = {}

        def record(n, *, pairs, **rest):
            asked["pairs"] = pairs
            return draw_scenes(n, pairs=pairs, **rest)

        monkeypatch.setattr("minivlm.datasets.shapes.shots.draw_scenes", record)
        for name, pairs in (("seen", SEEN), ("unseen", UNSEEN)):
            shot_episodes(1, shots=2, looks=name, image_size=32)
            assert np.array_equal(asked["pairs"], pairs)

    def test_more_than_there_is(self):
        with pytest.raises(ValueError, match="8 looks"):
            shot_episodes(1, shots=9, ways=9, looks="unseen", image_size=32)
