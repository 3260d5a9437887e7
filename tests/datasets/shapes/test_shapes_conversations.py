"""The shapes world in conversation: the pictures of the world, true answers, and questions to judge by."""

from collections import Counter

import numpy as np
import pytest

from minivlm.conversation import Turn, with_images
from minivlm.datasets.conversations import Conversations
from minivlm.datasets.shapes import ShapesWorld, make_shapes, split_scenes
from minivlm.datasets.shapes.conversations import ShapesConversations
from minivlm.datasets.shapes.facts import UNSEEN_PAIRS
from minivlm.datasets.shapes.questions import KINDS, true_questions
from minivlm.datasets.shapes.scenes import SEEN, UNSEEN
from minivlm.datasets.shapes.text import canonical
from minivlm.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("talk")
    make_shapes(directory, seed=4, train=600, image_size=32, progress=False)
    return directory


@pytest.fixture(scope="module")
def train(world):
    return ShapesConversations(world, "train")


def test_it_shows_the_pictures_of_the_world(world, train):
    assert isinstance(train, Conversations) and len(train) == 600 and train.split == "train" and not train.notes
    pictures = train.images([3, 599, 3])
    assert [len(sample) for sample in pictures] == [1, 1, 1]
    expected = ShapesWorld(world, "train").images([3, 599, 3])
    assert all(np.array_equal(sample[0], picture) for sample, picture in zip(pictures, expected, strict=True))
    assert train.key(3) == "train/3" and ShapesConversations(world, "test").key(3) == "test/003.png"


def test_a_conversation_is_a_caption_or_questions_with_true_answers(train):
    rng = np.random.default_rng(0)
    captions = 0
    for i in range(600):
        turns = train.conversation(i, rng)
        scene = train.scenes[i]
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2) and len(turns) <= 12
        assert turns[0].text.startswith(with_images("")) and sum(turn.text.count("<image>") for turn in turns) == 1
        if turns[0].text == with_images("describe the picture."):
            captions += 1
            assert turns[1:] == [Turn("assistant", canonical(scene))]
        else:
            true = {(question.text, question.answer) for question in true_questions(scene)}
            texts = [turn.text.removeprefix(with_images("")) for turn in turns]
            assert set(zip(texts[::2], texts[1::2], strict=True)) <= true
    assert 90 < captions < 150


def test_conversations_are_worded_anew_and_repeat_with_the_same_generator(train):
    first, again, other = (train.conversation(5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_caption_for_alignment(train):
    turns = train.caption_conversation(7, np.random.default_rng(0))
    assert turns == [Turn("user", with_images("describe the picture.")), Turn("assistant", train.captions(7)[0])]
    assert train.captions(7) == [canonical(train.scenes[7])]


@pytest.mark.parametrize(
    "split, least, most", [("train", 0, 0), ("val", 540, 600), ("test", 1740, 1800), ("unseen", 840, 900)]
)
def test_questions_of_each_split(world, split, least, most):
    talk = ShapesConversations(world, split)
    questions = talk.questions()
    assert least <= len(questions) <= most and questions == ShapesConversations(world, split).questions()
    assert set(Counter(question.kind for question in questions)) == (set(KINDS) if most else set())
    for index, text, answers, kind in questions:
        assert (text, *answers, kind) in {(q.text, q.answer, q.kind) for q in true_questions(talk.scenes[index])}


def test_the_unseen_split_has_an_unseen_object_in_every_scene_among_others(world):
    unseen = ShapesWorld(world, "unseen")
    present = unseen.scenes.classes[unseen.scenes.present]
    assert len(unseen) == 500 and set(present) == {*SEEN, *UNSEEN}
    strange = [
        sum(f"{o.colour} {o.shape}" in UNSEEN_PAIRS for o in scene.objects)
        for scene in ShapesConversations(world, "unseen").scenes
    ]
    assert min(strange) == 1 and 1.05 < np.mean(strange) < 1.2
    assert np.array_equal(split_scenes("unseen", seed=4, train=9).x, unseen.scenes.x)


def test_texts_hold_every_word_once(train):
    texts = list(train.texts())
    assert len(texts) == len(set(texts)) and "describe the picture." in texts
    words = set(" ".join(texts).replace(",", "").replace("?", "").split())
    assert {
        "zero",
        "three",
        "yes",
        "no",
        "crosses",
        "larger",
        "left",
        "below",
        "corner",
        "photo",
        "orange",
        "many",
    } <= words
    assert {"two", "top left", "is there a red circle?"} <= set(texts)


def test_an_unknown_split(world, tmp_path):
    with pytest.raises(UserError, match=r"no conversations for a split 'unsen'\. Did you mean unseen"):
        ShapesConversations(world, "unsen")
    with pytest.raises(UserError, match="single_seen"):
        ShapesConversations(world, "single_seen")
    with pytest.raises(UserError, match="no complete shapes world"):
        ShapesConversations(tmp_path, "train")
