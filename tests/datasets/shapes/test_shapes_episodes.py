"""Lessons in new words: only the context tells the answer, and held-out words are held out."""

import re
from collections import Counter

import numpy as np
import pytest

from minivlm.conversation import DESCRIBE, PLACEHOLDER
from minivlm.datasets.shapes.episodes import (
    STREAMS,
    document,
    documents,
    episode,
    few_shot,
    held_out_scenes,
    is_held_out,
    lesson,
    new_words,
    words,
)
from minivlm.datasets.shapes.facts import UNSEEN_PAIRS
from minivlm.datasets.shapes.questions import KINDS, ask
from minivlm.datasets.shapes.scenes import COLOURS, SHAPES, draw_scenes
from minivlm.datasets.shapes.text import canonical, describe, parse

N = 4000


@pytest.fixture(scope="module")
def drawn():
    return {stream: [document(0, stream, i) for i in range(N)] for stream in STREAMS}


@pytest.fixture(scope="module")
def texts(drawn):
    return {stream: list(map(words, drawn[stream])) for stream in STREAMS}


def is_text(document):
    return isinstance(document, str)


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


def test_a_tenth_are_lessons_a_twentieth_captions_and_the_rest_conversations_mostly_about_scenes_told_in_words(drawn):
    for stream in STREAMS:
        talks = [turns for turns in drawn[stream] if not is_text(turns)]
        captions = [text for text in drawn[stream] if is_text(text) and ": " not in text]
        told = [turns for turns in talks if parse(turns[0].text.split(". ")[0]) and ". " in turns[0].text]
        shares = [len(some) / N for some in (lessons(filter(is_text, drawn[stream])), captions, talks)]
        assert shares == pytest.approx([0.1, 0.05, 0.85], abs=0.02)
        assert len(told) / len(talks) == pytest.approx(0.9, abs=0.02)
        assert all(parse(caption) for caption in captions)
    assert len(KINDS) == 6 and len({*map(words, drawn["train"])} & {*map(words, drawn["held out"])}) < 100


def test_conversations_ask_and_answer_and_may_ask_for_the_scene_in_words(drawn):
    talks = [turns for turns in drawn["train"] if not is_text(turns)]
    for turns in talks:
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2) and len(turns) >= 2
        assert all(turn.text.endswith(("?", ".")) for turn in turns[::2]) and all(turn.text for turn in turns)
        assert not any(PLACEHOLDER in turn.text for turn in turns)  # there is no picture
    described = [turns for turns in talks if turns[0].text.endswith(DESCRIBE)]
    assert len(described) / len(talks) == pytest.approx(0.2, abs=0.03)
    assert all(parse(turns[1].text) for turns in described)
    told = [turns for turns in described if ". " in turns[0].text]
    assert told and all(turns[0].text == f"{turns[1].text}. {DESCRIBE}" for turns in told)
    assert re.search(r"is there an? \w+ \w+\? (yes|no)", " ".join(map(words, talks)))


def test_what_is_told_answers_the_questions(drawn):
    """Counting whole scenes needs no picture, only the words in front of the question."""
    asked = Counter()
    for turns in drawn["held out"]:
        if is_text(turns):
            continue
        caption, dot, _ = turns[0].text.partition(". ")
        if not dot or not (things := parse(caption)):
            continue
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            for colour in COLOURS:
                if question.text.endswith(f"how many {colour} shapes are there?"):
                    count = sum(thing.colour == colour for thing in things)
                    assert answer.text == ["zero", "one", "two", "three"][count], turns
                    asked[answer.text] += 1
    assert len(asked) >= 2


def test_held_out_scenes_are_those_of_the_held_out_stream(drawn):
    scenes = held_out_scenes(0, 600)
    assert len(scenes) == 600 and scenes[:10] == held_out_scenes(0, 10)
    told = [
        (canonical(scenes[i]), turns[0].text)
        for i, turns in enumerate(drawn["held out"][:600])
        if not is_text(turns) and ". " in turns[0].text
    ]
    assert len(told) > 300 and all(text.startswith(f"{caption}. ") for caption, text in told)


def test_held_out_words_and_unseen_pairs_are_never_in_training(texts):
    assert len(words_of(texts["train"])) > 800 and not any(map(is_held_out, words_of(texts["train"])))
    assert all(map(is_held_out, words_of(texts["held out"])))
    together = "\n".join(texts["train"] + texts["held out"])
    assert "red circle" in together and not any(pair in together for pair in UNSEEN_PAIRS)


def test_a_document_depends_on_its_seed_stream_and_number_alone(drawn, texts):
    assert [document(0, "train", i) for i in (3999, 7, 1000)] == [drawn["train"][i] for i in (3999, 7, 1000)]
    assert list(documents(0, "train", 300)) == texts["train"][:300]
    assert list(documents(1, "train", 20)) != texts["train"][:20]
    assert len(set(texts["train"])) > 3600
    with pytest.raises(ValueError, match="not in tuple"):
        document(0, "test", 0)
