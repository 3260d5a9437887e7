"""sample.py on folders, lists and questions files, and the files that it writes: continued, refused, read again as data."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

import minivlm
import sample
from minivlm import tasks
from minivlm.datasets.folder_entries import read_entries, read_folder
from minivlm.errors import UserError
from minivlm.layers import TextConfig
from tests import speakers
from tests.colours import paint
from tests.datasets.tars import write_tar

COLOURS = ("red", "green", "blue")
WHICH = "which colours?"


def clip():
    p = speakers.processor(image_tokens=0)
    text = TextConfig(
        width=16, depth=1, heads=2, vocab_size=p.vocab_size, context=speakers.CONTEXT, end_token=p.end_token
    )
    return minivlm.CLIP(minivlm.CLIPConfig(vision=speakers.VISION, text=text, embed_width=8)), p


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    speakers.colour_llava().save_pretrained(folder / "llava", processor=speakers.processor())
    speakers.llava().save_pretrained(folder / "other", processor=speakers.processor())
    speakers.language_model().save_pretrained(folder / "lm", processor=speakers.processor(image_tokens=0))
    speakers.colour_flamingo().save_pretrained(folder / "flamingo", processor=speakers.processor(image_tokens=1))
    model, processor = clip()
    model.save_pretrained(folder / "clip", processor=processor)
    for weights in model.parameters():
        weights.data.mul_(1.1)
    model.save_pretrained(folder / "clip2", processor=processor)
    return folder


@pytest.fixture(autouse=True)
def here(models, tmp_path, monkeypatch):
    """photos/ with seven images, of which one is broken, and two have one name."""
    monkeypatch.chdir(tmp_path)
    for one in models.iterdir():
        (tmp_path / one.name).symlink_to(one)
    for i in range(5):
        paint(tmp_path / f"photos/{i}.png", COLOURS[i % 3])
    paint(tmp_path / "photos/sub/0.png", "blue")
    (tmp_path / "photos/broken.jpg").write_text("no image")
    return tmp_path


def run(*argv):
    sample.main([*map(str, argv), "--device", "cpu"])


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_a_folder_goes_in_and_a_file_comes_out(capsys):
    run("caption", "llava", "photos", "--save", "captions.jsonl", "--batch", 3)
    out, err = capsys.readouterr()
    found = rows("captions.jsonl")
    assert [row["image"] for row in found] == [
        *(f"photos/{i}.png" for i in range(5)),
        "photos/broken.jpg",
        "photos/sub/0.png",
    ]
    alone = [tasks.caption(f"photos/{i}.png", *minivlm.load("llava")) for i in range(3)]
    assert [row.get("caption") for row in found[:3]] == alone == [f"a picture of {colour}" for colour in COLOURS]
    assert "cannot be read as an image" in found[5]["error"] and "caption" not in found[5]
    assert out == "wrote captions.jsonl: 7 rows; 1 has an error in place of a result\n"
    assert "skipped, because they cannot be read (1):" in err


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize("cut", [0, 1, 30, 61, 100, 1000])
def test_a_file_that_was_cut_off_is_continued_to_the_same_bytes(name, cut):
    command = ["answer", "llava", "photos", WHICH, "--batch", 2, "--temperature", 0.9, "--seed", 5]
    run(*command, "--save", name)
    whole = Path(name).read_bytes()
    os.truncate(name, min(cut, len(whole)))
    run(*command, "--save", name)
    assert Path(name).read_bytes() == whole
    run(*command, "--save", name)
    assert Path(name).read_bytes() == whole


def test_any_cut_is_mended(capsys):
    run("answer", "llava", "photos", 'which, "one"?', "--save", "a.csv")
    whole = Path("a.csv").read_bytes()
    for cut in range(len(whole) - 90, len(whole), 7):
        os.truncate("a.csv", cut)
        run("answer", "llava", "photos", 'which, "one"?', "--save", "a.csv")
        assert Path("a.csv").read_bytes() == whole
    with open("a.csv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert {row["question"] for row in read} == {'which, "one"?'} and len(read) == 7


def test_a_row_is_what_it_is_alone(capsys):
    how = ["--temperature", 1.5, "--seed", 3]
    run("answer", "other", "photos", WHICH, "--save", "a.jsonl", *how)
    for row in rows("a.jsonl")[:3]:
        capsys.readouterr()
        run("answer", "other", row["image"], WHICH, *how)
        assert capsys.readouterr().out == row["answer"] + "\n"


def test_a_list_of_questions_is_answered_with_its_ids(here):
    Path("photos/q.jsonl").write_text(
        "".join(
            json.dumps({"question_id": 7 + i, "image": f"{i}.png", "question": WHICH, "extra": i}) + "\n"
            for i in range(4)
        )
    )
    run("answer", "llava", "photos/q.jsonl", "--save", "a.jsonl", "--batch", 3)
    assert rows("a.jsonl")[1] == {"image": "photos/1.png", "question": WHICH, "question_id": 8, "answer": "green"}
    run("answer", "llava", "photos/q.jsonl", "--save", "result.json", "--batch", 3)
    result = json.loads(Path("result.json").read_text())
    assert result == [{"question_id": 7 + i, "answer": COLOURS[i % 3]} for i in range(4)]


def test_the_questions_of_vqa_find_their_images_by_number(here):
    for i, colour in ((42, "red"), (581929, "blue")):
        paint(here / f"val2014/COCO_val2014_{i:012d}.jpg", colour)
    questions = [{"image_id": i, "question": WHICH, "question_id": 10 * i} for i in (581929, 42)]
    Path("v2_questions.json").write_text(json.dumps({"questions": questions, "data_subtype": "val2014"}))
    run("answer", "llava", "v2_questions.json", "--image_folder", "val2014", "--save", "r.json")
    assert json.loads(Path("r.json").read_text()) == [
        {"question_id": 5819290, "answer": "blue"},
        {"question_id": 420, "answer": "red"},
    ]
    run("caption", "llava", "val2014", "--save", "c.json")
    assert json.loads(Path("c.json").read_text())[1] == {"image_id": 581929, "caption": "a picture of blue"}


def test_lists_are_read_in_every_form(monkeypatch):
    Path("l.txt").write_text("photos/1.png\n\nphotos/0.png\n")
    Path("l.csv").write_text("filepath,title\nphotos/1.png,x\nphotos/0.png,y\n")
    Path("l.json").write_text(json.dumps([{"image": "photos/1.png"}, {"image": "photos/0.png"}]))
    Path("l.jsonl").write_text('{"image": "photos/1.png"}\n{"image": "photos/0.png"}\n')
    Path("l2.csv").write_text("Image Path;x\nphotos/1.png;a\nphotos/0.png;b\n")
    Path("l.tsv").write_text("mine\tx\nphotos/1.png\t1\nphotos/0.png\t2\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("photos/1.png\nphotos/0.png\n"))
    for source in ("l.txt", "l.csv", "l.json", "l.jsonl", "-", "l2.csv", "l.tsv"):
        more = ["--image_key", "mine"] if source == "l.tsv" else []
        run("caption", "llava", source, "--save", f"of{source}.jsonl", *more)
        found = [(row["image"], row["caption"]) for row in rows(f"of{source}.jsonl")]
        assert found == [("photos/1.png", "a picture of green"), ("photos/0.png", "a picture of red")]


def test_what_is_written_is_data_again():
    run("caption", "llava", "photos", "--save", "photos/captions.jsonl")
    notes, again = [], Path("again/photos")
    again.parent.mkdir()
    again.symlink_to(Path("photos").absolute())
    assert [item.image for item in read_folder(Path("photos"), notes=notes)][-1] == "sub/0.png"
    assert notes == ["1 row is passed over in captions.jsonl, with an error in place of a result."]
    run("caption", "llava", "again/photos", "--save", "again/captions.csv")
    assert len(read_folder(Path("again"), notes=notes)) == 6 and "passed over in captions.csv" in notes[-1]
    run("caption", "llava", "photos", "--save", "captions.jsonl")
    assert [item.image for item in read_folder(Path())][-1] == "photos/sub/0.png"
    os.remove("photos/captions.jsonl")
    run("answer", "llava", "photos", WHICH, "--save", "photos/vqa.jsonl")
    assert [q.answer for entry in read_entries(Path("photos")) for q in entry.questions()][:3] == [*COLOURS]
    Path("elsewhere").mkdir()
    run("caption", "llava", "photos", "--save", "elsewhere/captions.jsonl")
    assert [row["image"] for row in rows("elsewhere/captions.jsonl")][-1] == "sub/0.png"  # to be moved into the folder
    run("answer", "llava", "photos", "--save", "again.jsonl")  # the questions that the folder holds
    assert [row["answer"] for row in rows("again.jsonl")][:3] == [*COLOURS]


def test_one_split_of_a_folder_of_data_and_the_members_of_tar_files(here, capsys):
    lines = [{"image": f"{i}.png", "caption": "x", "split": "test" if i % 2 else "train"} for i in range(5)]
    Path("photos/captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("caption", "llava", "photos", "--split", "test", "--save", "c.jsonl")
    assert [row["image"] for row in rows("c.jsonl")] == ["photos/1.png", "photos/3.png"]
    write_tar(here / "tars/a-000.tar", [(f"{i}.png", Path(f"photos/{i}.png").read_bytes()) for i in (1, 0)])
    run("caption", "llava", "tars", "--save", "t.jsonl")
    run("caption", "llava", "tars/a-000.tar", "--save", "t.jsonl")
    expected = [("tars/a-000.tar/0.png", "a picture of red"), ("tars/a-000.tar/1.png", "a picture of green")]
    assert [(row["image"], row["caption"]) for row in rows("t.jsonl")] == expected
    Path("l.txt").write_text("tars/a-000.tar/0.png\n")
    run("caption", "llava", "l.txt", "--save", "t.jsonl")
    assert "1 row, 1 of them before" in capsys.readouterr().out


def test_new_images_are_added_and_doubles_are_kept():
    Path("l.txt").write_text("photos/1.png\nphotos/1.png\n")
    run("caption", "llava", "l.txt", "--save", "c.jsonl")
    run("caption", "llava", "l.txt", "photos/2.png", "--save", "c.jsonl")
    assert [row["image"] for row in rows("c.jsonl")] == ["photos/1.png", "photos/1.png", "photos/2.png"]


def test_zero_shot_and_completion_to_files():
    Path("labels.txt").write_text("red\nblue\n")
    run("zero-shot", "clip", "photos", "--labels", "labels.txt", "--save", "z.jsonl")
    model, processor = minivlm.load("clip")
    [(label, p), *_] = minivlm.zero_shot_classify("photos/1.png", ["red", "blue"], model, processor)
    found = rows("z.jsonl")[1]
    assert found["label"] == label and found["probability"] == pytest.approx(p, abs=1e-6) and len(found["labels"]) == 2
    Path("t.txt").write_text("a picture\nwhich colours\n")
    run("complete", "lm", "t.txt", "--save", "t.csv", "--max_new_tokens", 4)
    lm = minivlm.load("lm")
    with open("t.csv", encoding="utf-8", newline="") as file:
        assert [(row["text"], row["completion"]) for row in csv.DictReader(file)] == [
            (text, tasks.complete(text, *lm, max_new_tokens=4)) for text in ("a picture", "which colours")
        ]


def test_examples_are_followed_for_every_image_of_a_folder():
    examples = ["--examples", "photos/0.png", "a picture of red", "photos/1.png", "a picture of green"]
    run("few-shot", "flamingo", *examples, "--query", "photos", "a picture of", "--save", "f.jsonl", "--batch", 4)
    assert [row.get("continuation") for row in rows("f.jsonl")] == [*COLOURS, "red", "green", None, "blue"]
    assert rows("f.jsonl")[0]["text"] == "a picture of"


def test_attention_is_drawn_for_every_image_of_a_folder(capsys):
    run("attend", "clip", "photos", "--save", "maps")
    assert sorted(p.relative_to("maps").as_posix() for p in Path("maps").rglob("*.png")) == [
        *(f"{i}.png.png" for i in range(5)),
        "sub/0.png.png",
    ]
    assert "broken.jpg cannot be read" in capsys.readouterr().err
    run("attend", "clip", "photos", "--save", "maps")
    assert "wrote" not in capsys.readouterr().out


def test_a_folder_is_printed_without_save(capsys):
    run("caption", "llava", "photos")
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "photos/0.png: a picture of red" and len(out.splitlines()) == 6
    assert "broken.jpg cannot be read" in err
    run("answer", "llava", "photos", WHICH)
    assert capsys.readouterr().out.splitlines()[2] == f"photos/2.png: {WHICH} blue"


def test_a_question_that_cannot_be_asked_is_an_error_of_its_row():
    Path("q.csv").write_text(
        f'image,question\nphotos/0.png,{WHICH}\nphotos/1.png,"{"red " * 99}"\nphotos/2.png,{WHICH}\n'
    )
    run("answer", "llava", "q.csv", "--save", "a.jsonl")
    assert [row.get("answer") for row in rows("a.jsonl")] == ["red", None, "blue"]
    assert "does not fit the context" in rows("a.jsonl")[1]["error"]


def test_images_that_a_list_names_and_are_not_there_are_told_and_recorded(capsys):
    Path("l.txt").write_text("photos/0.png\nphotos/1.png\ngone.png\n")
    run("caption", "llava", "l.txt", "--save", "c.jsonl")
    assert "l.txt names 1 of 3 images that are not there (gone.png)" in capsys.readouterr().err
    assert "missing" in rows("c.jsonl")[2]["error"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["caption", "x", "photos", "--save", "c.doc"], "has to end in .jsonl, .json, .csv or .tsv"),
        (["caption", "x", "photos", "--save", "no/c.csv"], "the folder no does not exist"),
        (["caption", "x", "photos", "--save", "mine.csv"], "a file of this name that sample.py did not write"),
        (["caption", "x", "mine.csv", "--save", "mine.csv"], "that is the file whose rows are read"),
        (["caption", "x", "empty"], "empty holds no images"),
        (["caption", "x", "gone.txt"], "gone.txt is missing"),
        (["caption", "x", "none.txt"], "none.txt is empty"),
        (["caption", "x", "away.txt", "--save", "c.csv"], "names 2 of 3 images that are not there (a.png, b.png)"),
        (["caption", "x", "mine.csv", "--image_key", "img"], "has no column img; it has mine, image"),
        (["caption", "x", "odd.csv"], "no column of images that is known by its name"),
        (["answer", "x", "mine.csv", "--save", "c.csv"], "no column question or text or prompt with the question"),
        (["answer", "x", "away.txt", "--save", "c.csv"], "with the question; it has image"),
        (["caption", "x", "broken.jsonl"], "broken.jsonl, line 1 is not JSON"),
        (["caption", "x", "list.jsonl"], "line 1 is no object in braces"),
        (["caption", "x", "photos/9.png", "--save", "c.csv"], "photos/9.png is missing"),
        (["caption", "x", "photos", "--save", "dir.csv"], "no regular file"),
        (["answer", "x", "photos", WHICH, "--save", "done.jsonl"], "was written by the task caption"),
        (
            ["caption", "x", "photos", "--prompt", "a", "--save", "done.jsonl"],
            "with no --prompt, and now there is --prompt a",
        ),
        (["caption", "other", "photos", "--save", "done.jsonl"], "was written with another model"),
        (["complete", "x", "odd.csv", "--save", "c.csv"], "odd.csv has no column text or caption"),
        (["answer", "x", "photos"], "photos holds no question about an image: write one behind it"),
        (["attend", "x", "photos", "--save", "photos/maps"], "lies in the folder that is read"),
        (["answer", "lm", "photos", WHICH, "--save", "c.csv"], "takes text alone"),
    ],
)
def test_a_mistake_is_one_sentence(argv, message, here):
    Path("mine.csv").write_text("mine,image\n1,photos/0.png\n")
    Path("odd.csv").write_text("a,b\n1,2\n")
    Path("away.txt").write_text("a.png\nb.png\nphotos/0.png\n")
    Path("none.txt").write_text("\n")
    Path("broken.jsonl").write_text("{\n")
    Path("list.jsonl").write_text("[1]\n")
    Path("empty").mkdir()
    Path("dir.csv").mkdir()
    run("caption", "llava", "photos/0.png", "--save", "done.jsonl")
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        run(*argv)
    assert message in str(error.value)


class TestEmbed:
    def vectors(self, folder="e", kind="img"):
        return np.concatenate([np.load(p) for p in sorted(Path(folder, f"{kind}_emb").glob("*.npy"))])

    def names(self, folder="e", kind="metadata", column="image_path"):
        return [row[column] for p in sorted(Path(folder, kind).glob("*.jsonl")) for row in rows(p)]

    def test_vectors_are_those_of_encode_image(self, here, capsys):
        run("embed", "clip", "photos", "--save", "e", "--part", 4)
        model, processor = minivlm.load("clip")
        expected = tasks.features.encode_images(
            [f"photos/{i}.png" for i in range(5)] + ["photos/sub/0.png"], model, processor
        )
        np.testing.assert_allclose(self.vectors(), expected.numpy(), atol=1e-6)
        assert np.load("e/img_emb/img_emb_0.npy").shape == (4, 8) and np.load("e/img_emb/img_emb_1.npy").shape == (2, 8)
        assert self.names() == [
            (here / row).as_posix() for row in [*(f"photos/{i}.png" for i in range(5)), "photos/sub/0.png"]
        ]
        assert "cannot be read" in rows("e/errors.jsonl")[0]["error"]
        capsys.readouterr()
        run("search", "clip", "e", "photos/1.png", "--top", 1)
        assert capsys.readouterr().out.split()[1:] == ["1.000", str(here / "photos/1.png")]

    @pytest.mark.parametrize("lost", ["img_emb/img_emb_1.npy", "metadata/metadata_1.jsonl", "both", "nothing"])
    def test_it_is_continued_where_it_was_killed(self, lost):
        command = ["embed", "clip", "photos", "--part", 2, "--batch", 1, "--dtype", "float16"]
        run(*command, "--save", "whole")
        run("embed", "clip", "photos/0.png", "photos/1.png", "photos/2.png", *command[3:], "--save", "e")
        if lost != "nothing":
            for name in ["img_emb/img_emb_1.npy", "metadata/metadata_1.jsonl"] if lost == "both" else [lost]:
                Path("e", name).unlink()
        run(*command, "--save", "e")
        run(*command, "--save", "e")
        for path in Path("whole").rglob("*.*"):
            if path.name != ".lock":
                assert Path("e", path.relative_to("whole")).read_bytes() == path.read_bytes()
        assert self.vectors().dtype == np.float16

    def test_texts_have_files_of_their_own(self):
        Path("t.txt").write_text("a red one\na blue one\n")
        run("embed", "clip", "--texts", "t.txt", "--save", "e")
        model, processor = minivlm.load("clip")
        expected = tasks.features.encode_texts(["a red one", "a blue one"], model, processor).numpy()
        np.testing.assert_allclose(self.vectors(kind="text"), expected, atol=1e-6)
        assert self.names(kind="text_metadata", column="caption") == ["a red one", "a blue one"]

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["embed", "x", "--save", "e"], "nothing to embed"),
            (["embed", "x", "photos", "--save", "no/e"], "the folder no does not exist"),
            (["embed", "x", "photos", "--save", "taken"], "that is a file"),
            (["embed", "x", "photos", "--save", "theirs"], "an img_emb that sample.py did not write"),
            (["embed", "x", "photos", "--save", "e", "--part", 3], "with --part 10000, and now there is --part 3"),
            (["embed", "llava", "photos", "--save", "f"], "cannot compare texts and images"),
            (["search", "clip2", "e", "red"], "made with another model"),
        ],
    )
    def test_a_mistake_is_one_sentence(self, argv, message):
        Path("taken").touch()
        Path("theirs/img_emb").mkdir(parents=True)
        run("embed", "clip", "photos/0.png", "--save", "e")
        with pytest.raises(UserError, match=r"^[^\n]*$") as error:
            run(*argv)
        assert message.replace("an img", "a img") in str(error.value).replace("an img", "a img")
