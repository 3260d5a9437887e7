from collections import Counter

import numpy as np
import pytest

from minivlm.datasets.answers import AnswerList, most_frequent
from minivlm.datasets.conversations import Question, open_conversations
from minivlm.datasets.shapes import make_shapes


def question(*answers):
    return Question(0, "what?", answers)


def test_the_most_frequent_answers_in_their_usual_spelling():
    asked = [
        question("Yes"),
        question("yes"),
        question("yes", "yes", "Two"),
        question("2"),
        question("two"),
        question("a kite"),
    ]
    assert most_frequent(asked, 2) == ("yes", "2")  # all three spellings of two are as frequent: the first by name
    assert most_frequent(asked, 9) == ("yes", "2", "a kite")


def test_right_answers_have_the_share_of_those_who_gave_them():
    answers = AnswerList(("yes", "two", "kite"))
    assert answers.weights(question("Yes.")).tolist() == [1, 0, 0]
    assert answers.weights(question("2", "two", "a kite", "bird")).tolist() == [0, 0.5, 0.25]
    assert answers.knows(question("bird", "the kite")) and not answers.knows(question("bird"))


def test_the_shapes_world_asks_to_learn_what_is_true(tmp_path):
    make_shapes(tmp_path, train=40, image_size=32, progress=False)
    talk = open_conversations(tmp_path, "train", image_size=32)
    asked = [talk.asked(i, np.random.default_rng(i)) for i in range(40)]
    assert asked == [talk.asked(i, np.random.default_rng(i)) for i in range(40)]
    turns = [turn.text for turn in talk.conversation(3, np.random.default_rng(1))]
    kinds = Counter(q.kind for some in asked for q in some)
    assert kinds.keys() == {"what", "colour", "count", "exist", "where", "compare"} and turns
    assert all(q.index == i and len(q.answers) == 1 for i, some in enumerate(asked) for q in some)
    assert talk.false_caption(0, np.random.default_rng(0)) not in talk.captions(0)


@pytest.mark.parametrize("index", [0, 1])
def test_a_folder_asks_all_that_it_knows(tmp_path, index):
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    lines = [f'{{"image": "{n}", "question": "what?", "answer": "{a}", "split": "train"}}' for n, a in
             (("a.png", "kite"), ("a.png", "bird"), ("b.png", "dog"))]  # fmt: skip
    (tmp_path / "vqa.jsonl").write_text("\n".join(lines))
    talk = open_conversations(tmp_path, "train", image_size=None)
    said = [q.answers for q in talk.asked(index, np.random.default_rng(0))]
    assert said == [[("kite",), ("bird",)], [("dog",)]][index]
    assert talk.false_caption(index, np.random.default_rng(0)) is None


def test_scores_are_those_that_people_give_and_need_not_sum_to_one():
    given = ["2"] * 4 + ["two dogs"] * 2 + ["3", "3.", "three", "unknown"]
    scores = AnswerList(["two", "Two dogs", "3", "bird"]).scores(question(*given))
    assert scores.tolist() == pytest.approx([1.0, 0.6, 0.9, 0.0])
    assert AnswerList(["yes", "no"]).scores(question("Yes.")).tolist() == [1, 0]
