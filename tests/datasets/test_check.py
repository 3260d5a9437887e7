"""The command that reads a whole folder: what it counts, every problem it names, its exit code, its picture."""

import json

import numpy as np
import pytest
from PIL import Image

from minivlm.datasets import check, check_sheet
from minivlm.errors import UserError

FLOWERS = [
    "a red rose at the top",
    "a yellow tulip",
    "a lily on the left",
    "a poppy",
    "a very long caption " * 20,
    "a daisy",
]


@pytest.fixture
def folder(tmp_path):
    """Six labelled photographs: four to train on, one for val, one for test."""
    rng = np.random.default_rng(0)
    lines = []
    for i, caption in enumerate(FLOWERS):
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        split = {4: "val", 5: "test"}.get(i, "train")
        lines.append({"image": f"{i}.png", "captions": [caption], "split": split, "label": "AB"[i % 2]})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def run(capsys, *argv):
    """The exit code and the printed lines of the command."""
    with pytest.raises(SystemExit) as stop:
        check.main([str(a) for a in argv])
    return stop.value.code, capsys.readouterr().out.splitlines()


def test_a_good_folder_is_described(folder, capsys):
    code, lines = run(capsys, folder, "--image_size", 16, "--samples", 4)
    assert code == 0 and lines[-1] == "no problems"
    assert [line.split() for line in lines[:4]] == [
        ["split", "images", "captions", "classes"],
        ["train", "4", "4", "2"],
        ["val", "1", "1", "1"],
        ["test", "1", "1", "1"],
    ]
    text = "\n".join(lines)
    assert "images a class: A 3, B 3" in text
    assert "context 32, exceeded by 1 of 6 captions" in text
    assert "1 captions name a side or sign: their images are not mirrored" in text
    assert "2 captions name a place: their images are not cropped" in text  # the left is a place, too
    assert "2 captions name a colour" in text
    for image in ("0.png", "1.png", "2.png", "3.png"):
        assert f"  {image}   label: " in text
    assert "  4.png" not in text  # samples are training images
    assert sorted(p.name for p in folder.iterdir()) == [
        *(f"{i}.png" for i in range(6)),
        "captions.jsonl",
    ]  # nothing is written


def test_tokens_are_those_of_the_processor(folder, capsys):
    from minivlm.processor import Processor

    _, lines = run(capsys, folder, "--samples", 1, "--context", 9)
    processor = Processor.train(FLOWERS, image_size=64, context=9)
    caption = next(line for line in lines if line.startswith("    caption  ")).removeprefix("    caption  ")
    tokens, _ = processor.text([caption], cut=True)
    assert f"    ids      {' '.join(map(str, tokens[0].tolist()))}" in lines
    pieces = next(line for line in lines if line.startswith("    tokens   ")).split()[1:]
    assert [processor.tokenizer.token_to_id(piece) for piece in pieces] == tokens[0].tolist()


def test_a_model_brings_its_tokeniser_context_and_image_size(folder, capsys, tmp_path):
    from minivlm.layers.text import TextConfig
    from minivlm.layers.vit import VisionConfig
    from minivlm.models.clip import CLIP, CLIPConfig
    from minivlm.processor import Processor

    processor = Processor.train(["zebra zebra"], image_size=16, context=12)
    sizes = {"width": 16, "depth": 1, "heads": 2}
    text = TextConfig(**sizes, vocab_size=processor.vocab_size, context=12, end_token=processor.end_token)
    model = CLIP(CLIPConfig(vision=VisionConfig(**sizes, image_size=16, patch_size=8), text=text, embed_width=8))
    model.save_pretrained(tmp_path / "model", processor=processor)
    code, lines = run(capsys, folder, "--model", tmp_path / "model", "--samples", 4)
    assert code == 0
    assert any("context 12, exceeded by" in line for line in lines)
    tokens, mask = processor.text(["a poppy"], cut=True)
    assert f"    ids      {' '.join(map(str, tokens[0][mask[0]].tolist()))}" in lines

    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="has no tokeniser"):
        check.main([str(folder), "--model", str(tmp_path / "bare")])


def test_every_problem_is_named(folder, capsys):
    (folder / "1.png").write_text("no image")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:1000])
    with (folder / "captions.jsonl").open("a") as file:
        file.write('\n{"image": "0.png"\n{"image": "none.png", "caption": "x"}\n{"image": "0.png"}')
    code, lines = run(capsys, folder)
    assert code == 1
    problems = lines[lines.index("problems: 5") + 1 :]
    for problem, named in zip(problems, ["line 7: it is not JSON", "line 8: there is no image 'none.png'", "line 9: it has no caption",
                                         "1.png cannot be read as an image", "4.png cannot be read as an image"], strict=True):  # fmt: skip
        assert named in problem
    assert lines[1].split() == ["train", "3", "3", "2"]


def test_images_without_a_line_are_counted_and_named(folder, capsys):
    assert not any("that no line names" in line for line in run(capsys, folder)[1])
    (folder / "more").mkdir()
    Image.new("RGB", (50, 70)).save(folder / "more" / "new.png")
    said = run(capsys, folder)[1]
    assert "Images that no line names, and that are not used: 1 (more/new.png)." in said


def test_a_folder_of_broken_lines_alone_is_all_problems(folder, capsys):
    (folder / "captions.jsonl").write_text("{\n[]")
    code, lines = run(capsys, folder)
    assert code == 1 and lines[1] == "problems: 2" and len(lines) == 4


def test_what_is_no_dataset_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is no dataset that is recognised"):
        check.main([str(tmp_path)])


def test_a_picture_that_cannot_be_written_is_one_sentence(folder, tmp_path):
    for name in ("nowhere/sheet.png", "sheet.xyz"):
        with pytest.raises(UserError, match=rf"the image .*{name} could not be written"):
            check.main([str(folder), "--save", str(tmp_path / name)])


def test_a_folder_with_only_a_test_split_can_be_checked(folder, capsys):
    line = {"image": "0.png", "caption": "a rose", "split": "test"}
    (folder / "captions.jsonl").write_text(json.dumps(line))
    code, lines = run(capsys, folder)
    assert code == 0 and [line.split()[:2] for line in lines[1:3]] == [["val", "1"], ["test", "1"]]


def test_class_folders_and_drawn_splits(tmp_path, capsys):
    for name in ("black_cat", "dog"):
        for i in range(30):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (20, 20)).save(tmp_path / name / f"{i}.png")
    code, lines = run(capsys, tmp_path, "--image_size", 16)
    assert code == 0
    assert sum(int(line.split()[1]) for line in lines[1:4]) == 60
    assert "No val and test split are given: a tenth of the images each, by a hash of the file name." in lines
    assert "images a class: black cat 30, dog 30" in lines


def test_a_shapes_world_is_described(tmp_path, capsys):
    from minivlm.datasets import make_shapes

    make_shapes(tmp_path, train=50, progress=False)
    code, lines = run(capsys, tmp_path, "--save", tmp_path / "sheet.png", "--samples", 2)
    assert code == 0
    assert [line.split()[:2] for line in lines[1:4]] == [["train", "50"], ["val", "500"], ["test", "500"]]
    assert (tmp_path / "sheet.png").is_file()


def test_the_sheet_begins_with_the_evaluation_view(folder, capsys, tmp_path):
    from minivlm.processor import Processor

    _, lines = run(capsys, folder, "--samples", 2, "--save", tmp_path / "sheet.png", "--seed", 1)
    images = [line.split()[0] for line in lines if "label: " in line]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    processor = Processor.train(FLOWERS, image_size=64, context=32)
    for row, image in enumerate(images):
        view = check_sheet.to_image(processor.images([folder / image])[0], processor.config)
        top = row * (check_sheet.TILE + check_sheet.CAPTION)
        tile = sheet[top : top + check_sheet.TILE, : check_sheet.TILE]
        assert np.array_equal(tile, np.asarray(view))
        beside = sheet[top : top + check_sheet.TILE, check_sheet.TILE + 12 :][:, : check_sheet.TILE]
        assert not np.array_equal(tile, beside)
