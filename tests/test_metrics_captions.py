"""Captions read back to objects and compared with the scene."""

import numpy as np
import pytest

from minivlm.datasets.shapes.scenes import draw_scenes
from minivlm.datasets.shapes.text import canonical
from minivlm.errors import UserError
from minivlm.metrics import Score, scene_match

REFERENCES = [
    "a small red circle at the top left and a large blue star in the centre",
    "a large green ring on the right",
]


def values(captions, references=REFERENCES):
    return {name: score.value for name, score in scene_match(captions, references).items()}


def test_the_scene_in_other_words_and_another_order_is_exact():
    said = ["In the middle there is a large blue star, in the top left corner a small red circle.", REFERENCES[1]]
    assert set(values(said).values()) == {1.0}


@pytest.mark.parametrize(
    "first, exact, precision, recall",
    [
        ("a small red circle at the top left", 0.5, 1, 2 / 3),  # one is missing
        (REFERENCES[0] + " and a large blue star in the centre", 0.5, 3 / 4, 1),  # told twice, counted once
        ("a large red circle at the top left and a large blue star in the centre", 0.5, 2 / 3, 2 / 3),  # wrong size
        ("a small red circle at the top and a large blue star in the centre", 0.5, 2 / 3, 2 / 3),  # wrong place
        ("a red circle and a blue star", 0.5, 1 / 3, 1 / 3),  # not everything is told
        ("", 0.5, 1, 1 / 3),
    ],
)
def test_one_mistake(first, exact, precision, recall):
    got = values([first, REFERENCES[1]])
    assert list(got.values()) == pytest.approx([exact, precision, recall])
    assert list(got) == ["exact scene match", "object precision", "object recall"]


def test_a_caption_that_says_nothing():
    assert scene_match(["", "hello"], REFERENCES)["exact scene match"] == Score(0.0, 0.0)


def test_chance_is_what_the_captions_get_for_other_pictures():
    scenes = draw_scenes(400, seed=0, stream=2).read(np.arange(400))
    texts = [canonical(scene) for scene in scenes]
    perfect = scene_match(texts, texts)
    assert {score.value for score in perfect.values()} == {1.0}
    assert perfect["exact scene match"].chance < 0.01 and perfect["object recall"].chance < 0.02
    assert scene_match(["a small red circle on the left"] * 3, ["a small red circle on the left"] * 3)[
        "exact scene match"
    ] == Score(1.0, 1.0)


def test_wrong_numbers_and_nothing_to_measure():
    with pytest.raises(ValueError, match="2 scenes, but 1 captions"):
        scene_match(["a"], REFERENCES)
    with pytest.raises(UserError, match="no captions"):
        scene_match([], [])
