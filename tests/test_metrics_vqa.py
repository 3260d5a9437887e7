"""Accuracy of answers against the definition, and what a guess is worth."""

import itertools
from typing import NamedTuple

import pytest

from minivlm.errors import UserError
from minivlm.metrics import Score, vqa_accuracy
from minivlm.metrics.vqa import MISSPELT, agreement, normalise


class Question(NamedTuple):
    index: int
    text: str
    answers: tuple
    kind: str


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("Yes.", "yes"),
        ("  The red   Circle!", "red circle"),
        ("two", "2"),
        ("2", "2"),
        ("none", "0"),
        ("an apple and a pear", "apple and pear"),
        ("top-left", "top left"),
        ("red, green", "red green"),
        ("yes/no", "yes no"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont", "don't"),
        ("Don't!", "don't"),
        ("that's couldn'tve, Twas yall'll", "that's couldn't've 'twas y'all'll"),
        ("it's im ive", "it's im ive"),  # not in the official table, or only with capitals, which are gone by then
        ("don\N{RIGHT SINGLE QUOTATION MARK}t", "don\N{RIGHT SINGLE QUOTATION MARK}t"),
        ("$5: 50%", "$5: 50%"),
        ("u.s.a.", "usa"),
        (".5 x.5 5. p.m.", ".5 x.5 5 pm"),
        ("at\nthe\ttop", "at top"),
        ("another", "another"),
        ("", ""),
        ("?", ""),
    ],
)
def test_normalise(answer, normal):
    assert normalise(answer) == normal == normalise(normal)


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("top-left - right", "topleft right"),  # a mark at any edge of the answer as it was given: all of its kind go
        ("a/b c-d", "b c d"),  # inside words they become spaces, one kind at a time; "a" is then an article
        ("c-d /-e", "c d e"),  # the slash stands at an edge, the dash only when the slash is gone
        ("x/-y - z", "x y z"),
        ("x-y -z", "xy z"),  # before a word or behind one
        ("x-y- z", "xy z"),
        ("1,000 yes/no", "1000 yesno"),  # a number with a comma: every mark goes
        ("1, 2", "1 2"),
        ("one, two", "1 2"),
        ("?yes", "yes"),
        ("- none", "0"),
        ("." * 40 + "x", "." * 8 + "x"),  # no more than 32 full stops go: a slip of the official script's
    ],
)
def test_edges_are_those_of_the_answer_as_it_was_given(answer, normal):
    assert normalise(answer) == normal


def test_the_table_of_contractions_is_the_official_one():
    assert len(MISSPELT) == 114  # without those that change nothing, and those with capitals
    known = {"ow's'at": "'ow's'at", "'ow'sat": "'ow's'at", "y'alld've": "y'all'd've", "somebody'd": "somebodyd"}
    known |= {"hes": "he's", "notve": "not've", "oclock": "o'clock", "therere": "there're", "we'dve": "we'd've"}
    assert known.items() <= MISSPELT.items()
    assert not {"its", "wed", "shed", "ill", "were", "let's", "couldntve"} & MISSPELT.keys()


@pytest.mark.parametrize("matches", range(11))
def test_agreement_with_ten_people_is_the_average_over_leaving_one_out(matches):
    answers = ["red"] * matches + ["blue"] * (10 - matches)
    definition = [min(1, left.count("red") / 3) for left in map(list, itertools.combinations(answers, 9))]
    assert agreement("red", answers) == pytest.approx(sum(definition) / 10)


def test_agreement_with_ten_people_in_known_numbers():
    known = [agreement("a", ["a"] * n + ["b"] * (10 - n)) for n in range(5)]
    assert known == pytest.approx([0, 0.3, 0.6, 0.9, 1.0])  # the well-known table


@pytest.mark.parametrize(
    "answers, value", [(["red"], 1), (["blue", "red"], 1), (["blue"], 0), (9 * ["x"] + ["red", "red"], 1)]
)
def test_agreement_without_ten_people_is_a_match(answers, value):
    assert agreement("red", answers) == value


def test_accuracy_over_all_and_by_kind():
    questions = [
        Question(0, "what colour?", ("red",), "colour"),
        Question(1, "what colour?", ("blue",), "colour"),
        Question(2, "how many?", ("two", "2 or 3"), "count"),
        Question(3, "how much?", tuple(3 * ["four"] + 7 * ["5"]), "count"),
    ]
    scores = vqa_accuracy(questions, ["Red.", "green", "2", "4"])
    assert list(scores) == ["accuracy", "accuracy, colour", "accuracy, count"]
    assert scores["accuracy, colour"] == Score(0.5, 0.5)
    assert scores["accuracy, count"].value == pytest.approx((1 + 0.9) / 2)
    assert scores["accuracy"].value == pytest.approx((0.5 * 2 + 1.9) / 4)


def test_chance_is_the_usual_answer_of_a_frequent_text_and_else_of_the_kind():
    often = [Question(i, "is it day?", ("yes" if i < 15 else "no",), "exist") for i in range(20)]
    rare = [Question(i, f"is it {i}?", ("no" if i < 6 else "yes",), "exist") for i in range(10)]
    scores = vqa_accuracy(often + rare, 30 * ["yes"])
    assert scores["accuracy"].chance == pytest.approx((15 + 6) / 30)
    assert scores["accuracy"].value == pytest.approx((15 + 4) / 30)
    assert vqa_accuracy(rare, 10 * [""])["accuracy, exist"] == Score(0, 0.6)
    # one text fewer, and nobody can know what is usual for it
    assert vqa_accuracy(often[1:] + rare, 29 * ["yes"])["accuracy"].chance == pytest.approx(18 / 29)


def test_chance_with_ten_people_is_their_agreement():
    questions = [Question(i, f"{i}?", tuple(2 * ["red"] + 8 * [f"{i}"]), "colour") for i in range(4)]
    assert vqa_accuracy(questions, 4 * ["red"])["accuracy"] == Score(pytest.approx(0.6), pytest.approx(0.6))


def test_wrong_numbers_and_nothing_to_measure():
    with pytest.raises(ValueError, match="1 questions, but 2 predictions"):
        vqa_accuracy([Question(0, "?", ("a",), "k")], ["a", "b"])
    with pytest.raises(UserError, match="no questions"):
        vqa_accuracy([], [])
