from collections import Counter

import numpy as np
import pytest
import torch

from minivlm.conversation import IGNORED, Turn
from minivlm.datasets.continuation import collate_pairs, split, tokens_of
from minivlm.datasets.shapes.episodes import documents
from minivlm.processor import Processor

TALK = "two shapes. is there a red circle? yes where is it? top left"
PAIRS = [("a red", "circle"), ("a", "blue star and")]


@pytest.fixture(scope="module")
def processor():
    return Processor.train(documents(0, "train", 50), vocab_size=300, image_size=32, context=12)


def test_both_parts_are_the_text():
    rng = np.random.default_rng(0)
    for text in documents(0, "train", 60):
        first, second = split(text, rng)
        assert f"{first} {second}" == text and first and second


def test_half_of_the_cuts_are_before_an_answer_and_the_others_anywhere():
    rng = np.random.default_rng(0)
    cuts = [len(split(TALK, rng)[0].split()) for _ in range(4000)]
    share = np.bincount(cuts, minlength=13) / 4000
    expected = np.full(13, 0.5 / 12)  # between any two of the thirteen words
    expected[0] = 0
    expected[[7, 11]] += 0.25
    assert np.abs(share - expected).max() < 0.025


def test_a_text_without_answers_is_cut_anywhere():
    rng = np.random.default_rng(0)
    assert {split("a red circle", rng) for _ in range(50)} == {("a", "red circle"), ("a red", "circle")}
    assert split("circle", rng) == ("", "circle")


def test_of_a_conversation_one_answer_is_said_and_all_before_it_is_read():
    rng = np.random.default_rng(0)
    turns = [
        Turn(*turn) for turn in zip(["user", "assistant"] * 3, ["a?", "one", "b?", "two", "c?", "three"], strict=True)
    ]
    cuts = Counter(split(turns, rng) for _ in range(3000))
    assert set(cuts) == {("a?", "one"), ("a? one b?", "two"), ("a? one b? two c?", "three")}
    assert min(cuts.values()) > 900


def test_rows_are_framed_and_padded(processor):
    batch = collate_pairs([tokens_of(pair, processor) for pair in PAIRS], processor)
    assert batch["mask"].dtype == torch.bool
    for i, (first, second) in enumerate(PAIRS):
        assert batch["tokens"][i][batch["mask"][i]].tolist() == processor.encode([first])[0]
        labels = batch["labels"][i]
        assert labels[labels != IGNORED].tolist() == [*processor.ids(second), processor.end_token]
        assert (batch["tokens"][i][~batch["mask"][i]] == processor.pad_token).all()


def test_what_is_far_from_the_cut_is_left_out(processor):
    first, second = " ".join(["red blue"] * 10), " ".join(["star ring"] * 10)
    batch = collate_pairs([tokens_of((first, second), processor)], processor)
    ids = [processor.start_token, *processor.ids(first)[-10:], processor.end_token]
    assert batch["tokens"].tolist() == [ids]
    assert batch["labels"].tolist() == [processor.ids(second)[:12]]
