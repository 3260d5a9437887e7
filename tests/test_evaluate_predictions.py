"""Predictions in files of any form are judged beside references of any form, without a model."""

import gzip
import json
import re

import pytest

from minivlm.datasets import make_shapes
from minivlm.datasets.conversations import open_conversations
from minivlm.errors import UserError
from minivlm.evaluate import command
from minivlm.evaluate.diagnose.objects import mentions
from minivlm.evaluate.predictions import ImageNames, Prediction, read_predictions, write_predictions
from minivlm.evaluate.references import joined, read_references
from minivlm.metrics.chair import chair_scores
from minivlm.metrics.pope import means_yes, pope_scores
from minivlm.metrics.vqa import rightness

CAPTIONS = {1: "a red kite", 2: "two dogs run", 3: "a man on a horse"}
KNOWN = {1: ["a red kite flies", "a kite"], 2: ["two dogs", "dogs that run"], 3: ["a man rides a horse", "a horse"]}
VQA = [
    {
        "question_id": 10 * i,
        "image_id": i,
        "question_type": "how many",
        "answer_type": "number",
        "answers": [{"answer_id": k, "answer": "2" if k < 6 else "two dogs"} for k in range(10)],
    }
    for i in (1, 2)
]
POPE = [
    {"question_id": i, "image": f"{i // 2}.jpg", "text": f"Is there a {name} in the image?", "label": label}
    for i, (name, label) in enumerate(
        [("kite", "yes"), ("dog", "no"), ("dog", "yes"), ("cat", "no"), ("horse", "yes"), ("kite", "no")], 2
    )
]


def written(path, value, *, lines=False):
    text = "".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def coco(captions=KNOWN):
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in captions]
    return {
        "images": images,
        "annotations": [{"id": 1, "image_id": i, "caption": c} for i, some in captions.items() for c in some],
    }


def judged(tmp_path, predictions, references, *options):
    out = tmp_path / "scores.json"
    words = ["--predictions", predictions, "--references", references, "--save", out, *options]
    command.main([str(word) for word in words])
    return json.loads(out.read_text())


@pytest.fixture
def results(tmp_path):
    return written(tmp_path / "results.json", [{"image_id": i, "caption": c} for i, c in CAPTIONS.items()])


@pytest.mark.parametrize("form", ["coco", "coco.gz", "dictionary", "table"])
def test_captions_are_judged_beside_every_form_of_references(form, results, tmp_path):
    references = {
        "coco": lambda: written(tmp_path / "r.json", coco()),
        "coco.gz": lambda: written(tmp_path / "r.json.gz", coco()),
        "dictionary": lambda: written(tmp_path / "r.json", {str(i): some for i, some in KNOWN.items()}),
        "table": lambda: written(
            tmp_path / "r.jsonl", [{"image": f"{i}.jpg", "captions": some} for i, some in KNOWN.items()], lines=True
        ),
    }[form]()
    scores = judged(tmp_path, results, references)
    assert {"BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"} <= set(scores) and scores["BLEU-1"] == pytest.approx(10 / 11)


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "files", "coco names"])
def test_predictions_are_read_in_every_form(form, tmp_path):
    rows = [{"image_id": i, "caption": c} for i, c in CAPTIONS.items()]
    path = tmp_path / f"p.{form if form in ('jsonl', 'csv') else 'json'}"
    if form == "csv":
        path.write_text("image,caption\n" + "".join(f"{i}.jpg,{c}\n" for i, c in CAPTIONS.items()))
    else:
        if form == "files":
            rows = [{"image": f"some/folder/{row['image_id']:012d}.jpg", "caption": row["caption"]} for row in rows]
        if form == "coco names":
            rows = [{"image": f"COCO_val2014_{row['image_id']:012d}.jpg", "caption": row["caption"]} for row in rows]
        written(path, rows, lines=form == "jsonl")
    assert judged(tmp_path, path, written(tmp_path / "r.json", coco()))["BLEU-1"] == pytest.approx(10 / 11)


def test_vqa_results_are_judged_by_type(tmp_path, capsys):
    answers = written(
        tmp_path / "a.json", [{"question_id": 10, "answer": "Two"}, {"question_id": 20, "answer": "two dogs"}]
    )
    scores = judged(tmp_path, answers, written(tmp_path / "r.json", {"annotations": VQA}))
    assert scores["accuracy"] == 1.0 == scores["accuracy, number"] == scores["accuracy, how many"]
    assert re.search(r"accuracy +100\.0% .* 2\n", capsys.readouterr().out)


def test_vqa_questions_stand_beside_their_annotations(tmp_path):
    answers = written(tmp_path / "a.json", [{"question_id": 10 * i, "answer": "2"} for i in (1, 2)])
    rows = [{"question_id": 10 * i, "image_id": i, "question": f"how many of {i}?"} for i in (1, 2)]
    questions = written(tmp_path / "q.json", {"questions": rows})
    with pytest.raises(UserError, match="holds questions without their answers"):
        judged(tmp_path, answers, questions)
    both = (questions, written(tmp_path / "r.json", {"annotations": VQA}))
    references = joined([one for path in both for one in read_references(path)])
    assert [q.text for q in references[0].questions] == ["how many of 1?", "how many of 2?"]
    words = ["--predictions", answers, "--references", *both, "--save", tmp_path / "s.json"]
    command.main([str(word) for word in words])
    assert json.loads((tmp_path / "s.json").read_text())["accuracy"] == 1.0


def test_what_ten_people_answer_alike_is_compared_as_it_is_written():
    assert rightness("Two", 10 * ["two"]) == 0.0  # as the official evaluation has it
    assert rightness("Two", [*(9 * ["two"]), "2."]) == 1.0
    assert rightness("a\nb ", 10 * ["a b"]) == 1.0


def test_pope_is_a_hand_computation():
    said = ["Yes, there is.", "No.", "There is not. Yes", "yes", "Yes", "Yes; not a dog"]
    assert [means_yes(text) for text in said] == [True, False, False, True, True, False]
    label = [True, False, True, False, True, True]  # TP 2, TN 1, FN 2, FP 1
    scores = {name: score.value for name, score in pope_scores([*zip(said, label, strict=True)]).items()}
    assert scores == {
        "accuracy": pytest.approx(3 / 6),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 4),
        "F1": pytest.approx(2 * 2 / (2 * 2 + 1 + 2)),
        "yes": pytest.approx(3 / 6),
    }
    with pytest.raises(UserError, match="all 2 questions have the answer yes"):
        pope_scores([("yes", True), ("no", True)])


@pytest.mark.parametrize("rows", ["ids", "questions", "order"])
def test_pope_files_are_judged_by_id_image_or_order(rows, tmp_path):
    texts = ["yes", "no", "no", "no", "yes", "yes"]
    about = {
        "ids": lambda q: {"question_id": q["question_id"]},
        "questions": lambda q: {"image": q["image"], "question": q["text"]},
        "order": lambda q: {"question": q["text"]},
    }[rows]
    answers = written(
        tmp_path / "a.jsonl", [about(q) | {"answer": text} for q, text in zip(POPE, texts, strict=True)], lines=True
    )
    scores = judged(tmp_path, answers, written(tmp_path / "pope.jsonl", POPE, lines=True))
    assert scores["POPE, accuracy"] == pytest.approx(4 / 6) and scores["POPE, F1"] == pytest.approx(2 / 3)


def test_chair_counts_mentions_of_what_is_not_there(tmp_path):
    named, there = [["dog", "cat", "cat"], ["kite"], []], [{"dog"}, {"kite", "man"}, {"horse"}]
    scores = {name: score.value for name, score in chair_scores(named, there).items()}
    assert scores == {
        "CHAIR_s": pytest.approx(1 / 3),
        "CHAIR_i": pytest.approx(2 / 4),
        "objects named": pytest.approx(2 / 4),
    }

    instances = {
        "images": coco()["images"],
        "annotations": [
            {"image_id": 1, "category_id": 7},
            {"image_id": 2, "category_id": 8},
            {"image_id": 3, "category_id": 9},
        ],
        "categories": [{"id": 7, "name": "kite"}, {"id": 8, "name": "cat"}, {"id": 9, "name": "horse"}],
    }
    (tmp_path / "objects.txt").write_text("kite\ncat\nhorse, pony\ndog, puppy\n")
    results = written(tmp_path / "results.json", [{"image_id": i, "caption": c} for i, c in CAPTIONS.items()])
    alone = judged(
        tmp_path, results, written(tmp_path / "instances.json", instances), "--objects", tmp_path / "objects.txt"
    )
    assert alone["CHAIR_s"] == pytest.approx(1 / 3)  # dogs where a cat is
    words = [
        "--predictions",
        results,
        "--references",
        written(tmp_path / "r.json", coco()),
        tmp_path / "instances.json",
    ]
    command.main([*map(str, words), "--objects", str(tmp_path / "objects.txt"), "--save", str(tmp_path / "s.json")])
    both = json.loads((tmp_path / "s.json").read_text())
    assert both["CHAIR_s"] == 0.0 and both["BLEU-1"] == pytest.approx(10 / 11)  # the references name dogs


def test_two_files_are_compared_on_the_same_images(results, tmp_path, capsys):
    worse = written(tmp_path / "worse.json", [{"image_id": i, "caption": "a photo"} for i in CAPTIONS])
    judged(tmp_path, results, written(tmp_path / "r.json", coco()), "--against", worse)
    assert "difference" in capsys.readouterr().out


def test_predictions_of_a_world_are_written_and_judged_again(tmp_path):
    make_shapes(tmp_path / "world", train=8, image_size=32, progress=False)
    data = open_conversations(tmp_path / "world", "test", image_size=None)
    rows = [Prediction(data.captions(i)[0], data.key(i)) for i in range(6)]
    rows += [Prediction(q.answers[0], data.key(q.index), q.text, kind=q.kind) for q in data.questions()]
    write_predictions(tmp_path / "p.jsonl", rows)
    assert read_predictions(tmp_path / "p.jsonl") == rows
    scores = judged(tmp_path, tmp_path / "p.jsonl", tmp_path / "world")
    assert scores["captions, exact scene match"] == 1.0 == scores["accuracy"] and len(scores) > 8


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}], "two predictions for image 1"),
        ([{"image_id": 1, "caption": 7}], "entry 1: its text is '7', but must be a string"),
        ([{"image_id": 1}], "entry 1 has no caption and no answer"),
        ([{"caption": "a kite"}], "names no image"),
        ([], "holds no prediction"),
        (["a kite"], "entry 1 is no object in braces"),
        ([{"image_id": 99, "caption": "a"}], "none of the 1 predictions .* are the two of one data set"),
        ([{"image_id": i, "caption": "a"} for i in (1, 99)], r"1 of 2 predictions .* \(image 99\).*--partial"),
        ([{"image": "a.jpg", "error": "no such file"}], "1 rows hold an error in place of a text"),
        ([{"image_id": 1, "caption": "a"}, {"image": "000000000001.jpg", "caption": "b"}], "captions of the same"),
    ],
)
def test_predictions_that_cannot_be_judged_are_refused_in_one_sentence(rows, why, tmp_path):
    path, references = written(tmp_path / "p.json", rows), written(tmp_path / "r.json", coco())
    with pytest.raises(UserError, match=why):
        judged(tmp_path, path, references)
    assert not (tmp_path / "scores.json").exists()


def test_missing_answers_are_counted_and_partial_leaves_them_out(tmp_path, capsys):
    answers = written(tmp_path / "a.json", [{"question_id": 10, "answer": "2"}])
    references = written(tmp_path / "r.json", {"annotations": VQA})
    with pytest.raises(UserError, match=r"1 of 2 questions .* have no answer"):
        judged(tmp_path, answers, references)
    assert judged(tmp_path, answers, references, "--partial")["accuracy"] == 1.0
    assert "left out" in capsys.readouterr().err


def test_a_question_that_is_asked_twice_about_an_image_is_answered_twice(tmp_path):
    asked = [{"image": "a.jpg", "question": "how many?", "answer": answer} for answer in ("one", "two")]
    references = written(tmp_path / "r.jsonl", asked, lines=True)
    write_predictions(tmp_path / "p.jsonl", [Prediction("one", "a.jpg", "how many?")] * 2)
    assert judged(tmp_path, tmp_path / "p.jsonl", references)["accuracy"] == 0.5
    write_predictions(tmp_path / "p.jsonl", [Prediction("one", "a.jpg", "how many?")] * 3)
    with pytest.raises(UserError, match="more answers than questions for image a"):
        judged(tmp_path, tmp_path / "p.jsonl", references)


def test_an_empty_caption_is_judged_and_told_of(tmp_path, capsys):
    rows = [{"image_id": i, "caption": c if i > 1 else ""} for i, c in CAPTIONS.items()]
    judged(tmp_path, written(tmp_path / "p.json", rows), written(tmp_path / "r.json", coco()))
    assert "1 of 3 predictions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--predictions", "p.json"], "name a MODEL, or what is to be judged"),
        (["--predictions", "p.json", "--references", "r.json", "--diagnose"], "--diagnose needs a MODEL"),
        (["out/clip", "--references", "r.json"], "--references belongs to --predictions"),
        (["out/clip", "--predictions", "p.txt"], r"has to end in \.jsonl or \.json"),
        (["out/clip", "--predictions", "nowhere/p.jsonl"], "the folder nowhere does not exist"),
        (["--predictions", "gone.json", "--references", "r.json"], r"gone\.json is missing"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=why):
        command.main(words)


def test_references_without_any_are_refused(tmp_path):
    for value, why in (([], "holds no references"), ([{"image": "a.jpg"}], "has no caption, no answer, and no label")):
        with pytest.raises(UserError, match=why):
            read_references(written(tmp_path / "r.json", value))


def test_names_of_images_are_found_where_they_mean_one():
    images = ImageNames(["test/000.png", "unseen/0", "a/b.jpg", "c/b.jpg"])
    assert images.find("test/000.png") == "test/000.png" and images.find("x/test/000.png") == "test/000.png"
    assert (
        images.find("b.jpg") is None
        and images.find("a/b.jpg") == "a/b.jpg"
        and images.find("data/c/b.jpg") == "c/b.jpg"
    )


def test_objects_are_found_in_singular_and_plural():
    named = mentions(
        {name: name for name in ("person", "knife", "wine glass", "glass", "mouse", "skis", "puppy", "bus")}
    )
    assert named("People with knives, wine glasses and mice; buses, a ski, puppies.") == (
        ["person", "knife", "wine glass", "mouse", "bus", "skis", "puppy"]
    )
    assert mentions({"man": "person", "woman": "person"})("two women and men, a manor") == ["person", "person"]


def test_scores_are_not_written_over_what_they_are_made_of(results, tmp_path):
    references = written(tmp_path / "r.json", coco())
    for option, place in (("predictions", results), ("references", references)):
        before = place.read_text()
        with pytest.raises(UserError, match=f"would be written over --{option}"):
            command.main(
                [
                    str(w)
                    for w in ("--predictions", results, "--references", references, "--save", tmp_path / place.name)
                ]
            )
        assert place.read_text() == before


@pytest.mark.parametrize("option", ["--split", "--image_key", "--neighbours"])
def test_an_option_that_says_nothing_without_a_model_is_refused(option, results, tmp_path):
    value = {"--split": "all", "--image_key": "x", "--neighbours": "3"}[option]
    with pytest.raises(UserError, match=f"{option} needs a MODEL"):
        judged(tmp_path, results, written(tmp_path / "r.json", coco()), option, value)


def test_references_in_several_files_are_judged_as_one(results, tmp_path):
    halves = [
        written(tmp_path / f"r{i}.json", coco({k: some for k, some in KNOWN.items() if (k == 1) == i})) for i in (0, 1)
    ]
    whole = judged(tmp_path, results, written(tmp_path / "r.json", coco()))
    out = tmp_path / "halves.json"
    command.main(["--predictions", str(results), "--references", *map(str, halves), "--save", str(out)])
    assert json.loads(out.read_text()) == pytest.approx(whole, abs=1e-9)


def test_questions_of_one_id_in_several_files_are_refused_for_one_file_of_answers(tmp_path):
    answers = written(
        tmp_path / "a.jsonl", [{"question_id": q["question_id"], "text": "yes"} for q in POPE], lines=True
    )
    files = [written(tmp_path / f"{name}.jsonl", POPE, lines=True) for name in ("random", "popular")]
    with pytest.raises(UserError, match="question 2 is twice in the references"):
        command.main(["--predictions", str(answers), "--references", *map(str, files)])


def test_a_prompt_that_also_says_how_to_answer_asks_the_same_question(tmp_path):
    hint, texts = "\nAnswer the question using a single word or phrase.", ["yes", "no", "no", "no", "yes", "yes"]
    for about in ("question_id", "image"):
        rows = [
            {about: q[about], "prompt": q["text"] + hint, "text": text} for q, text in zip(POPE, texts, strict=True)
        ]
        scores = judged(
            tmp_path, written(tmp_path / "a.jsonl", rows, lines=True), written(tmp_path / "p.jsonl", POPE, lines=True)
        )
        assert scores["POPE, accuracy"] == pytest.approx(4 / 6)


def test_references_in_the_place_of_predictions_are_told(tmp_path):
    pope, vqa = written(tmp_path / "p.jsonl", POPE, lines=True), written(tmp_path / "r.json", {"annotations": VQA})
    for file in (pope, vqa):
        with pytest.raises(UserError, match="is a reference, and no prediction"):
            judged(tmp_path, file, file)
    for label, why in (("maybe", "its label is 'maybe', but must be yes or no"), (" Yes ", None)):
        rows = [{**q, "label": label if i == 0 else q["label"]} for i, q in enumerate(POPE)]
        file = written(tmp_path / "q.jsonl", rows, lines=True)
        if why:
            with pytest.raises(UserError, match=why):
                read_references(file)
        else:
            assert read_references(file)[0].pope[0].answers == ("yes",)


def test_a_category_that_no_image_has_is_an_object_as_well(tmp_path):
    instances = {
        "images": coco()["images"],
        "annotations": [{"image_id": i, "category_id": 7} for i in KNOWN],
        "categories": [{"id": 7, "name": "kite"}, {"id": 8, "name": "horse"}],
    }
    results = written(tmp_path / "results.json", [{"image_id": i, "caption": c} for i, c in CAPTIONS.items()])
    scores = judged(tmp_path, results, written(tmp_path / "instances.json", instances))
    assert scores["CHAIR_s"] == pytest.approx(1 / 3) and scores["CHAIR_i"] == pytest.approx(1 / 2)  # the horse


def test_objects_that_cannot_be_counted_are_refused(results, tmp_path):
    (tmp_path / "twice.txt").write_text("dog, puppy\ncat, puppy\n")
    references = written(tmp_path / "r.json", coco())
    with pytest.raises(UserError, match="'puppy' is of 'dog' and of 'cat'"):
        judged(tmp_path, results, references, "--objects", tmp_path / "twice.txt")
    answers = written(tmp_path / "a.json", [{"question_id": q["question_id"], "answer": "2"} for q in VQA])
    with pytest.raises(UserError, match="objects are counted in captions"):
        judged(
            tmp_path,
            answers,
            written(tmp_path / "v.json", {"annotations": VQA}),
            "--objects",
            tmp_path / "twice.txt",
        )


def test_both_files_that_are_compared_are_saved(results, tmp_path):
    references = written(tmp_path / "r.json", coco())
    worse = written(tmp_path / "worse.json", [{"image_id": i, "caption": "a photo"} for i in CAPTIONS])
    both = judged(tmp_path, results, references, "--against", worse)
    assert both[str(results)]["BLEU-1"] > both[str(worse)]["BLEU-1"]
    with pytest.raises(UserError, match="is what --predictions names"):
        judged(tmp_path, results, references, "--against", results)
