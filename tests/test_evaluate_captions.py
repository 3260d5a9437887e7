"""`python -m minivlm.evaluate --predictions FILE --references FILE` for captions: no model, in the forms that people have."""

import gzip
import json
from pathlib import Path

import pytest
from PIL import Image

from minivlm.datasets.shapes import ShapesWorld, make_shapes
from minivlm.errors import UserError
from minivlm.evaluate.command import main

OFFICIAL = json.loads((Path(__file__).parent / "fixtures/captions/official.json").read_text(encoding="utf-8"))
NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")
IDS = [100 + 7 * i for i in range(len(OFFICIAL["images"]))]


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    """METEOR alone takes seconds; tests/parity has it."""
    from minivlm.metrics import official_java

    monkeypatch.setattr(official_java.shutil, "which", lambda name: None)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes files in an empty folder, where the command runs."""
    monkeypatch.chdir(tmp_path)

    def write(**values):
        for name, value in values.items():
            text = value if isinstance(value, str) else json.dumps(value)
            (tmp_path / name.replace("_", ".")).write_text(text, encoding="utf-8")

    return write


def coco():
    """COCO's annotations, whose images stand in another order than their captions."""
    captions = [(i, text) for i, image in zip(IDS, OFFICIAL["images"], strict=True) for text in image["references"]]
    return {
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in IDS],
        "annotations": [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(reversed(captions))],
    }


def results(name_of=lambda i: i):
    return [{"image_id": name_of(i), "caption": one["caption"]} for i, one in zip(IDS, OFFICIAL["images"], strict=True)]


def judge(*more):
    main(["--predictions", "results.json", "--references", "references.json", "--save", "scores.json", *more])
    return json.loads(Path("scores.json").read_text())


@pytest.mark.parametrize(
    "name_of",
    [int, str, float, "{:012d}.jpg".format, "val/COCO_val2014_{:012d}.jpg".format],
    ids=lambda f: f("7" and 7),
)
def test_results_of_coco_are_saved_as_the_official_numbers(files, name_of, capsys):
    files(results_json=results(name_of), references_json=coco())
    assert judge() == pytest.approx({name: OFFICIAL["scores"][name] for name in NAMES}, abs=1e-12)
    told = capsys.readouterr().err
    assert "METEOR is left out: it needs" in told and "SPICE is left out" in told
    assert "1 of 30 predictions of results.json are empty" in told


def test_references_may_be_an_object_karpathys_or_gzipped(files, tmp_path):
    by_id = {str(i): one["references"] for i, one in zip(IDS, OFFICIAL["images"], strict=True)}
    files(results_json=results(), references_json=by_id)
    expected = judge()
    sentences = lambda texts: [{"raw": text} for text in texts]
    karpathy = [{"cocoid": int(i), "filename": f"{i}.jpg", "sentences": sentences(texts)} for i, texts in by_id.items()]
    files(references_json={"images": karpathy, "dataset": "coco"})
    assert judge() == expected
    (tmp_path / "references.json").write_bytes(gzip.compress(json.dumps(by_id).encode()))
    assert judge() == expected


def test_some_of_the_images_are_judged_as_the_official_script_does_and_it_is_told(files, capsys):
    files(results_json=results()[:5], references_json=coco())
    assert judge()["CIDEr"] > 0
    assert "25 of 30 images of references.json have no caption in results.json: not judged." in capsys.readouterr().err


def test_a_file_of_the_shapes_world_is_judged_by_its_scenes(files, tmp_path):
    make_shapes(world := tmp_path / "world", train=8, image_size=32, progress=False)
    scenes = ShapesWorld(world, "test")
    rows = [{"image": scenes.key(i), "caption": scenes.all_captions(i)[0]} for i in range(len(scenes))]
    files(results_json=rows)
    main(["--predictions", "results.json", "--references", str(world), "--save", "scores.json"])
    scores = json.loads(Path("scores.json").read_text())
    assert scores == {
        f"captions, {name}": 1.0 for name in ("exact scene match", "object precision", "object recall", "SPICE")
    }


def test_a_folder_that_holds_a_test_split_alone_gives_references(files, tmp_path):
    (tmp_path / "photos").mkdir()
    for i, colour in enumerate(("red", "green")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"photos/{i}.png")
    rows = [{"image": f"{i}.png", "caption": "a plain colour", "split": "test"} for i in range(2)]
    (tmp_path / "photos/captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files(results_json=[{"image_id": i, "caption": "a plain colour"} for i in range(2)])
    main(["--predictions", "results.json", "--references", "photos", "--save", "scores.json"])
    assert json.loads(Path("scores.json").read_text())["ROUGE-L"] == pytest.approx(1)


REFERENCES = {"1": ["a dog", "the dog"], "2": ["a cat"]}
WRONG = {
    "no references": ([{"image_id": 1, "caption": "a"}, *({"image_id": i, "caption": "b"} for i in range(7, 14))],
                      r"7 of 8 predictions of results.json have no reference in references.json \(image 7, .*image 11, …\)"),
    "another data set": ([{"image_id": 71, "caption": "a"}], "none of the 1 predictions .* are the two of one data set"),
    "described twice": ([{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}], "two predictions for image 1"),
    "no text": ([{"image_id": 1, "caption": 5}], "entry 1: its text is '5', but must be a string"),
    "NaN": ('[{"image_id": 1, "caption": NaN}]', "entry 1: its text is 'nan', but must be a string"),
    "no image": ('[{"image_id": NaN, "caption": "a"}]', "entry 1 names no image"),
    "no caption": ([{"image_id": 1, "caption": None}], "entry 1 has no caption"),
    "another form": ({"hello": 1}, "entry 1 has no caption and no answer; a prediction looks like"),
    "no JSON": ("hello", "results.json, line 1 is no JSON object"),
    "nothing": ([], "results.json holds no prediction"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "sentence"), WRONG.values(), ids=WRONG)
def test_files_that_cannot_be_judged_are_refused_in_a_sentence(files, rows, sentence):
    files(results_json=rows, references_json=REFERENCES)
    with pytest.raises(UserError, match=sentence):
        judge()
    assert not Path("scores.json").exists()


@pytest.mark.parametrize(
    ("references", "sentence"),
    [
        ({"1": ["a dog", 3]}, "references.json, 1: an image needs one or more captions, which are strings"),
        ({"images": [], "annotations": []}, "references.json holds no references"),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": [1]}]}, "it has no caption, no answer"),
        ({"images": [{"filename": "1.jpg", "sentences": []}]}, "image 1: an image needs one or more captions"),
    ],
)
def test_references_of_another_form_are_refused(files, references, sentence):
    files(results_json=[{"image_id": 1, "caption": "a dog"}], references_json=references)
    with pytest.raises(UserError, match=sentence):
        judge()


def test_an_empty_reference_counts_and_is_told(files, capsys):
    files(results_json=[{"image_id": 1, "caption": "a dog"}], references_json={"1": ["", "a dog"]})
    assert judge()["ROUGE-L"] == 1
    assert "1 captions of references.json are empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "sentence"), [(".", "is a folder"), ("not/there.json", "the folder not does not exist")]
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(files, place, sentence):
    with pytest.raises(UserError, match=sentence):
        main(["--predictions", "results.json", "--references", "references.json", "--save", place])
