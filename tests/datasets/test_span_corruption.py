from collections import Counter

import numpy as np
import pytest

from minivlm.conversation import Turn
from minivlm.datasets.shapes.episodes import document, documents, words
from minivlm.datasets.span_corruption import SENTINELS, drop, with_sentinels
from minivlm.processor import Processor

TALK = [Turn(*turn) for turn in [("user", "a?"), ("assistant", "one"), ("user", "b?"), ("assistant", "two")]]


def make_processor(context=64):
    processor = Processor.train(documents(0, "train", 50), vocab_size=300, image_size=32, context=context)
    processor.tokenizer.add_special_tokens(list(SENTINELS))
    return processor


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def test_the_pieces_are_the_text():
    rng = np.random.default_rng(0)
    for index in range(80):
        text = document(0, "train", index)
        pieces = drop(text, rng)
        assert " ".join(pieces).strip() == words(text)
        assert len(pieces) >= 2 and all(pieces[1:])


def test_of_a_conversation_all_answers_are_dropped():
    assert drop(TALK, np.random.default_rng(0)) == ["a?", "one", "b?", "two"]


def test_of_a_lesson_half_of_the_answers():
    rng = np.random.default_rng(0)
    dropped = Counter(word for _ in range(2000) for word in drop("red: dax. blue: wug.", rng)[1::2])
    assert set(dropped) == {"dax.", "wug."}
    # One of two at the least: where chance chooses none (1 in 4), either of them.
    assert all(abs(n / 2000 - (0.5 + 0.25 / 2)) < 0.04 for n in dropped.values())


def test_of_other_texts_some_words_and_neighbours_share_a_hole():
    rng = np.random.default_rng(0)
    text = "a red circle and a blue star in the centre"
    found = [drop(text, rng) for _ in range(2000)]
    n = len(text.split())
    share = sum(len(piece.split()) for pieces in found for piece in pieces[1::2]) / (2000 * n)
    assert share == pytest.approx(0.15 + 0.85**n / n, abs=0.01)  # and one where chance chooses none
    assert any(len(piece.split()) > 1 for pieces in found for piece in pieces[1::2])
    assert any(pieces[0] == "" for pieces in found)


def test_holes_are_marked_on_both_sides(processor):
    read, said = with_sentinels(["is there a circle?", "yes", "where?", "top left"], processor)
    ids, mark = processor.ids, [processor.tokenizer.token_to_id(hole) for hole in SENTINELS]
    start, end = processor.frame
    assert read == [start, *ids("is there a circle?"), mark[0], *ids("where?"), mark[1], end]
    assert said == [mark[0], *ids("yes"), mark[1], *ids("top left")]
    read, said = with_sentinels(["", "red", "circle"], processor)
    assert read == [start, mark[0], *ids("circle"), end] and said == [mark[0], *ids("red")]


@pytest.mark.parametrize("context", [8, 12, 20])
def test_what_does_not_fit_is_left_out_behind_and_of_a_long_beginning_before(context):
    processor = make_processor(context)
    mark = processor.tokenizer.token_to_id(SENTINELS[0])
    pieces = ["red " * 30, "blue", "star", "ring " * 30]
    read, said = with_sentinels(pieces, processor)
    assert len(read) == context and len(said) <= context
    assert (read[0], read[-1]) == processor.frame and mark in read and said[0] == mark
    marks = range(mark, mark + len(SENTINELS))
    assert {token for token in said if token in marks} <= {token for token in read if token in marks}


def test_a_hole_is_asked_for_only_where_it_is_shown(processor):
    """Whatever the context: also where what is read so far fills it to the last token."""
    pieces = ["a", "red", "b", "blue", "c d", "green", "e", "two"]
    marks = {processor.tokenizer.token_to_id(hole) for hole in SENTINELS}
    shown = []
    for context in range(3, 40):
        read, said = with_sentinels(pieces, processor, context=context)
        assert len(read) <= context and len(said) <= context
        shown.append([token for token in read if token in marks])
        asked = [token for token in said if token in marks]
        assert asked == shown[-1][: len(asked)]
        assert len(asked) == len(shown[-1]) or len(said) == context  # no answer is lost but to the context
    assert sorted(map(len, shown)) == [*map(len, shown)] and {*map(len, shown)} == {1, 2, 3, 4}


def test_there_are_no_more_holes_than_marks(processor):
    pieces = ["a", "b"] * (len(SENTINELS) + 5)
    read, said = with_sentinels(pieces, make_processor(200))
    marks = [processor.tokenizer.token_to_id(hole) for hole in SENTINELS]
    assert [token for token in read if token in marks] == marks == [token for token in said if token in marks]
