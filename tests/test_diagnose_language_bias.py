"""--diagnose language-bias: constructed models, of which one answers from the question, one from the image, and one from both with
a strong prior, are told apart; and what was planted in a folder is found."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minivlm.datasets.balanced import balanced_pairs
from minivlm.datasets.conversations import Question, open_conversations
from minivlm.datasets.shapes.usual import BALANCED, make_usual, usual_colour
from minivlm.errors import UserError
from minivlm.evaluate.diagnose import diagnose
from minivlm.evaluate.diagnose.exchange import exchanged
from minivlm.evaluate.diagnose.language_bias import left_out
from minivlm.evaluate.diagnose.question_only import answers_by_words, question_only, usual_answers
from minivlm.layers.tower import ImageFeatures
from minivlm.metrics import Samples
from tests.matchers import WordProcessor

COLOURS = {"red": (220, 25, 35), "green": (30, 160, 60), "blue": (25, 95, 235)}
WHAT, IS_IT = "what colour is it?", "is it {}?"


class Words(WordProcessor):
    def encode(self, texts):
        return [text.split() for text in texts]


class Chooser(nn.Module):
    """Weighs what it sees and what is usual: red, and yes."""

    device, dtype = torch.device("cpu"), torch.float32
    abilities, takes_images = frozenset({"choose"}), True

    def __init__(self, processor, *, sees: float, prior: float):
        super().__init__()
        self.config = SimpleNamespace(answers=(*COLOURS, "yes", "no"))
        self.processor, self.sees, self.prior, self.encoded = processor, sees, prior, 0

    def image_features(self, images):
        if isinstance(images, ImageFeatures):
            return images.tensor
        self.encoded += len(images)
        return images.mean(dim=(2, 3))[:, None]  # (B, 1, 3)

    def answer(self, images, tokens, mask):
        rows = zip(self.image_features(images)[:, 0], self.processor.read(tokens, mask), strict=True)
        return torch.stack([self.logits(colour, text) for colour, text in rows])

    def logits(self, colour, text):
        distances = torch.stack([(colour - torch.tensor(rgb)).abs().sum() for rgb in COLOURS.values()])
        shown = list(COLOURS)[int(distances.argmin())] if distances.min() < 30 else None
        logits = torch.full((5,), -9.0)
        asked = next((name for name in COLOURS if name in text.split("?")[0].split()), None)
        if asked is None:
            logits[:3] = torch.tensor([self.sees * (name == shown) for name in COLOURS])
            logits[0] += self.prior
        else:
            logits[3:] = torch.tensor([self.sees * (asked == shown) + self.prior, self.sees * (asked != shown)])
        return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of 100 images 80 are red; each is asked for its colour, and whether it is one of two."""
    directory = tmp_path_factory.mktemp("coloured")
    rows = []
    for i in range(200):
        colour = "red" if i % 10 < 8 else ("green", "blue")[i % 2]
        Image.new("RGB", (32, 32), COLOURS[colour]).save(directory / f"{i}.png")
        other = list(COLOURS)[(list(COLOURS).index(colour) + 1) % 3]
        row = {"image": f"{i}.png", "split": "test" if i < 100 else "train"}
        rows.append(row | {"question": WHAT, "answer": colour, "kind": "colour"})
        rows += [
            row | {"question": IS_IT.format(c), "answer": a, "kind": "exist"}
            for c, a in ((colour, "yes"), (other, "no"))
        ]
    (directory / "vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def found(folder, **how):
    processor = Words()
    model = Chooser(processor, **how)
    [pitfall] = diagnose(model, processor, folder, ["language-bias"])
    return pitfall, model


def test_a_model_that_answers_from_the_question_alone_is_found(folder):
    pitfall, _ = found(folder, sees=0, prior=3)
    figures = pitfall.figures
    assert pitfall.verdict.startswith("found: of all questions, an image adds only 0.0 points")
    assert (
        "80%" not in pitfall.verdict
        and "100% are right where the usual answer is, 0% where it is not" in pitfall.verdict
    )
    assert (
        figures["what the image adds"].value == 0
        and figures["answers that another image leaves as they are"].value == 1
    )
    assert figures["balanced pairs: both right"].value == 0
    assert figures["balanced pairs: one answer to both"].value == 1
    assert figures["colour: own image"].value == figures["colour: question alone, usual answer"].value == 0.8


def test_a_model_that_answers_from_the_image_is_not(folder):
    pitfall, model = found(folder, sees=6, prior=0)
    assert pitfall.verdict.startswith("not found: the image of a question adds ")
    assert pitfall.figures["own image"].value == pitfall.figures["balanced pairs: both right"].value == 1
    assert pitfall.figures["what the image adds"].interval[0] > 0.2
    assert model.encoded <= 110  # of 100 images, each once, and a grey one for each batch
    assert pitfall.image.size[0] > 400


def test_a_strong_prior_is_found_and_dividing_by_it_helps_by_more_than_the_interval(folder):
    pitfall, _ = found(folder, sees=2, prior=3)
    assert pitfall.verdict.startswith("found: ")
    for name in ("accuracy where it is wrong", "balanced pairs: both right"):
        before, after = pitfall.effect[f"contrast: {name}"]
        assert before.value < 0.3 and after.value > 0.8
        assert after.samples.paired(before.samples).low > 0.5


def test_kinds_are_told_by_the_first_words_where_the_folder_names_none(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "vqa.jsonl").read_text().splitlines()]
    unnamed = [{key: row[key] for key in ("image", "question", "answer", "split")} for row in rows]
    for i in range(200):
        (tmp_path / f"{i}.png").symlink_to(folder / f"{i}.png")
    (tmp_path / "vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unnamed))
    pitfall, _ = found(tmp_path, sees=0, prior=3)
    assert {"what colour: own image", "is it: own image"} <= pitfall.figures.keys()


# ---- the question alone, other images, pairs -------------------------------------------------------------------------


def test_the_question_alone_is_learned_from_the_training_split(folder):
    test = open_conversations(folder, "test", image_size=32)
    alone, source = question_only(folder, test, test.questions())
    assert source == "the training split"
    right = Counter()
    for name, answers in alone.items():
        for question, answer in zip(test.questions(), answers, strict=True):
            right[name, question.kind] += answer == question.answers[0]
    assert right["usual answer", "colour"] == right["its words", "colour"] == 80
    # "is it red?" is mostly true, "is it green?" mostly false: the kind is balanced, its texts are not.
    assert right["its words", "exist"] == right["usual answer", "exist"] > 150


def test_a_folder_with_nothing_to_train_on_is_cross_validated(folder, tmp_path):
    lines = [line for line in (folder / "vqa.jsonl").read_text().splitlines() if '"test"' in line]
    (tmp_path / "vqa.jsonl").write_text("\n".join(lines))
    for i in range(100):
        (tmp_path / f"{i}.png").symlink_to(folder / f"{i}.png")
    test = open_conversations(tmp_path, "test", image_size=32)
    alone, source = question_only(tmp_path, test, test.questions())
    assert source == "the other images of the split itself" and all(alone["usual answer"])


def test_words_tell_more_than_the_kind():
    train = [Question(0, f"is the {x} a tool?", (a,)) for x, a in (("hammer", "yes"), ("cat", "no"), ("saw", "yes"))]
    asked = [Question(1, "is the big hammer a tool?", ("yes",)), Question(1, "is the cat here a tool?", ("no",))]
    assert answers_by_words(train * 4)(asked) == ["yes", "no"]
    assert usual_answers(train * 4)(asked) == ["yes", "yes"]


@pytest.mark.parametrize("n", [2, 3, 50])
def test_no_image_is_exchanged_for_itself(n):
    indices = [i for i in range(n) for _ in range(3)]
    rounds = exchanged(indices, 4)
    assert len(rounds) == min(4, n - 1)
    for some in rounds:
        assert all(a != b for a, b in zip(indices, some, strict=True))
    assert len({tuple(some) for some in rounds}) == len(rounds)


def test_balanced_pairs_are_of_one_text_and_two_answers():
    ask = lambda i, text, *answers: Question(i, text, answers)
    questions = [ask(i, "what colour?", c) for i, c in enumerate(["red", "red", "Red", "blue", "green"])]
    questions += [ask(5, "how many?", "two"), ask(6, "How many", "2"), ask(5, "What colour", "blue")]
    pairs = balanced_pairs(questions)
    used = [i for pair in pairs for i in pair]
    assert len(pairs) == 3 and len(set(used)) == 6 and not {5, 6} & set(used)
    assert all(questions[a].answers[0].lower() != questions[b].answers[0].lower() for a, b in pairs)
    assert balanced_pairs(questions, most=1) == pairs[:1]
    # of ten people, some gave the other's answer: neither is wrong then
    people = [ask(0, "what?", *["cat"] * 8, "dog", "dog"), ask(1, "what?", *["dog"] * 10)]
    assert balanced_pairs(people) == []


def test_the_difference_of_two_means_has_an_interval():
    rows = np.array([[3, 4, 1, 4]] * 50)
    samples = Samples("contrast", rows)
    assert samples.value == 0.5 and samples.interval() == (0.5, 0.5)


# ---- what is planted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("usual", [0.9, BALANCED])
def test_a_folder_of_usual_colours_has_them_as_often_as_it_is_told(tmp_path, usual):
    make_usual(tmp_path / "data", usual=usual, train=400, held_out=20, image_size=32)
    rows = [json.loads(line) for line in (tmp_path / "data/vqa.jsonl").read_text().splitlines()]
    colours = [row for row in rows if row["kind"] == "colour" and row["split"] == "train"]
    hits = [row["answer"] == usual_colour(row["question"][:-1].split()[-1]) for row in colours]
    assert abs(np.mean(hits) - usual) < 3 * np.sqrt(usual * (1 - usual) / len(hits))
    counts = Counter(row["answer"] for row in rows if row["kind"] == "count")
    assert set(counts) == {"one", "two", "three"} and min(counts.values()) > 100
    captions = (tmp_path / "data/captions.jsonl").read_text().splitlines()
    assert len(captions) == 440 and len(open_conversations(tmp_path / "data", "test", image_size=32)) == 20
    with pytest.raises(UserError, match="is there already"):
        make_usual(tmp_path / "data")
    with pytest.raises(UserError, match="train 0 is out of range"):
        make_usual(tmp_path / "other", train=0)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_asked_is_said_in_a_sentence(folder, tmp_path):
    model, processor = Chooser(Words(), sees=1, prior=0), Words()
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "b.png")
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "caption": "black"}\n')
    assert "holds no questions" in left_out(model, processor, tmp_path)
    with pytest.raises(UserError, match=r"language-bias: .* holds no questions .*vqa\.jsonl"):
        diagnose(model, processor, tmp_path, ["language-bias"])
    (tmp_path / "captions.jsonl").unlink()
    row = '{"image": "%s.png", "question": "is it?", "answer": "%s", "split": "test"}\n'
    (tmp_path / "vqa.jsonl").write_text(row % ("a", "yes") + row % ("b", "Yes."))
    assert "has the answer 'yes', which needs no image" in left_out(model, processor, tmp_path)
    (tmp_path / "vqa.jsonl").write_text(row % ("a", "yes") + row % ("a", "no"))
    assert "about one image" in left_out(model, processor, tmp_path)
    model.abilities = frozenset({"caption"})
    assert left_out(model, processor, folder) == "a Chooser answers no questions about images."
