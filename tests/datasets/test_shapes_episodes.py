"""Lessons in new words: only the context tells the answer, and held-out words are held out."""

import re
from collections import Counter

import numpy as np
import pytest

from minivlm.datasets.shapes_episodes import (
    STREAMS,
    document,
    documents,
    episode,
    few_shot,
    is_held_out,
    lesson,
    new_words,
)
from minivlm.datasets.shapes_facts import UNSEEN_PAIRS
from minivlm.datasets.shapes_questions import KINDS, ask
from minivlm.datasets.shapes_scenes import COLOURS, SHAPES, draw_scenes
from minivlm.datasets.shapes_text import canonical, describe, parse


@pytest.fixture(scope="module")
def texts():
    return {stream: list(documents(0, stream, 4000)) for stream in STREAMS}


def lessons(texts):
    return [[example.split(": ") for example in text.rstrip(".").split(". ")] for text in texts if ": " in text]


def words_of(texts):
    return {word for examples in lessons(texts) for _, word in examples}


def test_words_are_new_and_a_tenth_is_held_out():
    rng = np.random.default_rng(0)
    drawn = [word for _ in range(400) for word in new_words(rng, 3, held_out=False)]
    assert all(re.fullmatch(r"([b-z][aeiou][b-x]){1,2}", word) for word in drawn) and len(set(drawn)) > 600
    assert not any(map(is_held_out, drawn))
    assert all(map(is_held_out, new_words(rng, 50, held_out=True)))
    assert is_held_out("dax") is False and is_held_out("wug") is False  # the hash is the same everywhere
    known = {word for scene in draw_scenes(300, seed=0, stream=0) for word in re.findall("[a-z]+", " ".join([
        canonical(scene), describe(scene, rng), *(f"{q.text} {q.answer}" for q in ask(scene, rng))]))}  # fmt: skip
    assert len(known) > 60 and not known & set(drawn)


@pytest.mark.parametrize("ways, shots", [(1, 1), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_an_episode_shows_every_word_equally_often(ways, shots):
    rng = np.random.default_rng(1)
    for _ in range(50):
        text, answer = episode(rng, ways=ways, shots=shots, held_out=True)
        *examples, query = text.split(". ") if shots else ["", text]
        pairs = [tuple(example.split(": ")) for example in examples]
        assert set(Counter(pairs).values()) == {shots} and len(set(pairs)) == ways
        assert len(dict(pairs)) == len({word for _, word in pairs}) == ways
        assert query.endswith(":") and dict(pairs)[query[:-1]] == answer and is_held_out(answer)


def test_neither_place_nor_order_tells_the_answer():
    """The last word, the first word, the most recent other: each is right half of the time."""
    episodes = few_shot(3000, shots=2)
    shown = [re.findall(r": (\w+)\.", text) for text, _ in episodes]
    for place in range(4):
        right = np.mean([words[place] == answer for words, (_, answer) in zip(shown, episodes, strict=True)])
        assert abs(right - 0.5) < 0.04, place
    assert episodes == few_shot(3000, shots=2) != few_shot(3000, shots=2, seed=1)
    sorts = Counter(
        "colour" if look in COLOURS else "shape" if look in SHAPES else "both"
        for look in (text.rsplit(". ", 1)[1][:-1] for text, _ in episodes)
    )
    assert min(sorts.values()) > 900


def test_a_number_of_words_that_cannot_be():
    for ways in (0, 9):
        with pytest.raises(ValueError, match=f"1 to 8 new words, not {ways}"):
            episode(np.random.default_rng(0), ways=ways)


def test_a_lesson_never_contradicts_itself_and_can_mostly_be_predicted():
    rng = np.random.default_rng(2)
    for _ in range(100):
        [examples] = lessons([lesson(rng, held_out=False)])
        meanings = dict(map(tuple, examples))
        assert 12 <= len(examples) <= 16 and 1 <= len(meanings) <= 4
        assert all(meanings[look] == word for look, word in examples)
        assert len(set(meanings.values())) == len(meanings)


def test_half_of_the_documents_are_lessons_and_the_rest_is_about_scenes(texts):
    for stream in STREAMS:
        assert abs(len(lessons(texts[stream])) / 4000 - 0.5) < 0.03
        rest = [text for text in texts[stream] if ": " not in text]
        captions = [text for text in rest if "?" not in text]
        read = [text for text in rest if "?" in text and parse(text.split(".")[0]) and ". " in text]
        assert abs(len(captions) / 4000 - 0.15) < 0.03 and abs(len(read) / 4000 - 0.2) < 0.03
        assert all(parse(caption) for caption in captions)
    assert re.search(r"is there an? \w+ \w+\? (yes|no) ", " ".join(texts["train"]))
    assert len(KINDS) == 6 and len({*texts["train"]} & {*texts["held out"]}) < 100  # short captions coincide


def test_held_out_words_and_unseen_pairs_are_never_in_training(texts):
    assert len(words_of(texts["train"])) > 2000 and not any(map(is_held_out, words_of(texts["train"])))
    assert all(map(is_held_out, words_of(texts["held out"])))
    together = "\n".join(texts["train"] + texts["held out"])
    assert "red circle" in together and not any(pair in together for pair in UNSEEN_PAIRS)


def test_a_document_depends_on_its_seed_stream_and_number_alone(texts):
    assert [document(0, "train", i) for i in (3999, 7, 1000)] == [texts["train"][i] for i in (3999, 7, 1000)]
    assert list(documents(1, "train", 20)) != texts["train"][:20]
    assert len(set(texts["train"])) > 3600
    with pytest.raises(ValueError, match="not in tuple"):
        document(0, "test", 0)
