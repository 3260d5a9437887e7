"""Judging vectors as users of CLIP do: splits, templates, retrieval with five captions an image, and probes."""

import json
import warnings
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm.datasets.folder import open_pairs
from minivlm.datasets.source import Source
from minivlm.errors import Note, UserError
from minivlm.evaluate import How, command, evaluate, probe
from minivlm.evaluate.vectors import ImageVectors
from minivlm.layers import TextConfig, VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor

pytestmark = pytest.mark.filterwarnings("ignore::minivlm.errors.Note")
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (220, 220, 220)}


def save(path, colour, seed):
    noise = np.random.default_rng(seed).integers(-25, 25, (32, 32, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Four classes, 8 training and 3 test images each."""
    directory = tmp_path_factory.mktemp("colours")
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(11):
            save(directory / ("train" if i < 8 else "test") / name / f"{i}.png", colour, 100 * c + i)
    return directory


@pytest.fixture(scope="module")
def clip():
    texts = [f"a photo of a {name}." for name in COLOURS] + ["a bad image of the small thing, drawn"]
    processor = Processor.train(texts, vocab_size=260, image_size=32, context=48)
    ids = dict(vocab_size=processor.vocab_size, end_token=processor.end_token)
    vision = VisionConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2)
    text = TextConfig(width=16, depth=1, heads=2, context=48, **ids)
    return CLIP(CLIPConfig(vision=vision, text=text, embed_width=12)).eval(), processor


@pytest.fixture(scope="module")
def saved(clip, tmp_path_factory):
    model, processor = clip
    directory = tmp_path_factory.mktemp("out") / "clip"
    model.save_pretrained(directory, processor=processor)
    return directory


def notes_of(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, " ".join(str(one.message) for one in caught if issubclass(one.category, Note))


@pytest.mark.parametrize(("split", "n"), [("train", 28), ("val", 4), ("test", 12), ("all", 44), (None, 12)])
def test_another_split_or_all_of_them_can_be_judged(clip, colours, split, n):
    pairs = open_pairs(Source(colours, judged_split=split), "test", image_size=32)
    scores = evaluate(*clip, Source(colours, judged_split=split))
    assert scores["zero-shot, top-1"].n == scores["image→text R@1"].n == len(pairs) == n
    assert pairs.cache is None, "what is judged is decoded from the originals"
    if split not in (None, "test"):
        assert ("All 44 samples" if split == "all" else f"The {n} samples of the {split} split") in " ".join(
            pairs.notes
        )


def test_a_probe_of_colours_is_right_and_is_told_how_it_was_fitted(clip, colours):
    scores, notes = notes_of(lambda: evaluate(*clip, colours, how=How(probes=("knn", "linear"))))
    for space in ("vision tower", "shared space"):
        assert scores[f"{space}, kNN (k = 1), top-1"].value == 1
        assert (
            scores[f"{space}, linear probe, top-1"].value == scores[f"{space}, linear probe, mean per class"].value == 1
        )
        assert scores[f"{space}, linear probe, top-1"].chance == pytest.approx(1 / 4)
    assert scores["zero-shot, top-1"].n == scores["vision tower, linear probe, top-1"].n == 12
    assert "L2 strength" in notes and "chosen on 4 images" in notes
    assert "There is no top-5: of 4 classes" in notes and not any("top-5" in name for name in scores)


def test_the_command_prints_all_of_it_in_one_table(saved, colours, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("a photo of a {}.\n\nthe {c}\n", encoding="utf-8")
    options = ["--split", "all", "--templates", str(tmp_path / "mine.txt"), "--probe", "knn", "--neighbours", "3"]
    command.main([str(saved), "--data", str(colours), *options, "--device", "cpu", "--save", str(tmp_path / "s.json")])
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["zero-shot, top-1"]["n"] == 44, "all images"
    assert written["shared space, kNN (k = 3), top-1"]["n"] == 12, "those that are not fitted"
    printed = capsys.readouterr()
    assert "kNN (k = 3), top-1" in printed.out and "All 44 samples are judged" in printed.err


def test_each_image_is_encoded_once_whatever_is_made_of_it(clip, colours, monkeypatch):
    model, processor = clip
    seen = []
    real = type(processor).images
    monkeypatch.setattr(type(processor), "images", lambda self, images: seen.append(len(images)) or real(self, images))
    evaluate(
        model, processor, Source(colours, judged_split="all"), how=How(probes=("knn", "linear"), templates=["a {}"])
    )
    assert sum(seen) == 44


def test_the_shared_space_is_what_encode_image_gives(clip, colours):
    model, processor = clip
    pairs = open_pairs(colours, "test", image_size=32)
    pixels = processor.images(list(pairs.images(range(len(pairs)))))
    got = ImageVectors(model, processor).of(pairs)
    with torch.no_grad():
        torch.testing.assert_close(got["shared space"], model.encode_image(pixels))
        torch.testing.assert_close(got["vision tower"], model.vision(pixels))


def test_one_split_alone_is_divided_by_a_seed_and_that_is_told(clip, tmp_path):
    for c, (name, colour) in enumerate(COLOURS.items()):
        for i in range(5 if c else 1):
            save(tmp_path / "test" / name / f"{i}.png", colour, 10 * c + i)
    scores, notes = notes_of(lambda: evaluate(*clip, tmp_path, how=How(probes=("linear",))))
    assert "there is one split alone with labels, so a fifth of each class (3 images, by seed 0) is judged" in notes
    assert scores["vision tower, linear probe, top-1"].n == 3, "the class with one image is fitted, and not judged"
    again, _ = notes_of(lambda: evaluate(*clip, tmp_path, how=How(probes=("linear",))))
    assert again == scores


BAD = {
    "a probe that is none": (["--probe", "svm"], r"--probe svm: there is no probe 'svm'.*knn"),
    "a set of templates that is none": (["--templates", "imagnet"], "no set of templates called 'imagnet'.*imagenet"),
    "a template without a place": (["--templates", "a photo"], "'a photo' has no place for the label"),
    "an empty file of templates": (["--templates", "empty.txt"], "empty.txt holds no template"),
    "a file of templates without a place": (
        ["--templates", "wrong.json"],
        "wrong.json: the template 'a photo' has no place",
    ),
    "a file that is no list": (
        ["--templates", "object.json"],
        r"object.json is no list of templates, \[\"a photo of \{\}",
    ),
    "a file that is missing": (["--templates", "gone.txt"], "gone.txt"),
    "neighbours without knn": (["--probe", "linear", "--neighbours", "3"], "--neighbours belongs to --probe knn"),
    "more neighbours than images": (
        ["--probe", "knn", "--neighbours", "99"],
        "99 neighbours .* there are 32 training images",
    ),
    "no fold of a thousand": (["--retrieval", "coco-1k"], "1,000 images at a time, but there are 12"),
    "a probe judged by what it was fitted to": (["--probe", "knn", "--split", "train"], "cannot be judged by it"),
    "a split that is none": (["--split", "tset"], "invalid choice: 'tset'"),
    "two tables": (["--probe", "knn", "--shots", "2"], "--probe and --shots are tables of their own"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(saved, colours, tmp_path, monkeypatch, name):
    options, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "wrong.json").write_text('["a photo"]')
    (tmp_path / "object.json").write_text('{"a": "b {}"}')
    with pytest.raises(UserError, match=message) as error:
        command.main([str(saved), "--data", str(colours), "--device", "cpu", *options])
    assert "\n" not in str(error.value)


def test_what_has_no_two_classes_or_no_labels_is_refused(clip, tmp_path):
    knn = How(probes=("knn",))
    for i in range(4):
        save(tmp_path / "one" / ("train" if i < 2 else "test") / "red" / f"{i}.png", COLOURS["red"], i)
        save(tmp_path / "captions" / "images" / f"{i}.png", COLOURS["red"], i)
        save(tmp_path / "single" / "test" / f"colour {i}" / "1.png", COLOURS["red"], i)
    rows = [json.dumps({"image": f"images/{i}.png", "caption": f"red number {i}"}) for i in range(4)]
    (tmp_path / "captions" / "captions.jsonl").write_text("\n".join(rows))
    for folder, message in (
        ("one", "one class sub-folder only, 'red': at least two are needed"),
        ("captions", "have no classes: give class folders"),
        ("single", "each class of .*single has one image"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(*clip, tmp_path / folder, how=knn)
    with pytest.raises(UserError, match=r"--templates: the images of .* have no classes"):
        evaluate(*clip, tmp_path / "captions", how=How(templates=["a {}"]))


def test_a_model_of_texts_alone_and_one_that_has_diverged_are_refused(clip, colours):
    model, processor = clip
    with pytest.raises(UserError, match="LanguageModel takes no images"):
        ImageVectors(language_model(), processor)
    broken = CLIP(model.config)
    broken.vision.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or infinite"):
        evaluate(broken, processor, colours, how=How(probes=("knn",)))


def language_model():
    from minivlm.layers import LanguageModel, LanguageModelConfig

    return LanguageModel(LanguageModelConfig(vocab_size=20, width=8, depth=1, heads=2, context=8))


def test_the_shapes_world_has_no_split_of_all(monkeypatch):
    monkeypatch.setattr(probe, "is_world", lambda data: True)
    with pytest.raises(UserError, match="are judged one by one"):
        probe.check_split(Source("data/shapes", judged_split="all"), Namespace(shots=None))


# ---- retrieval as published ------------------------------------------------------------------------------------------


def test_each_of_five_captions_is_a_query_of_its_own(clip, colours):
    scores = evaluate(*clip, colours, how=How(retrieval="coco"))
    assert scores["text→image R@1"].n == 60, "five captions of 12 images, of which four are of one class"
    assert scores["text→image R@1"].chance == pytest.approx(1 / 12)
    assert scores["image→text R@1"].chance == pytest.approx(5 / 60)
    assert 0 <= scores["rsum"].value <= 600 and scores["rsum"].interval[0] <= scores["rsum"].value
    assert scores["text→image median rank"].chance == 6
    assert evaluate(*clip, colours)["text→image R@1"].n == 20, "the 20 distinct ones, as before"


def test_more_or_fewer_than_five_captions_are_told(clip, tmp_path):
    for i, n in enumerate((7, 5, 2)):
        save(tmp_path / f"{i}.png", COLOURS["red"], i)
        with (tmp_path / "captions.jsonl").open("a") as file:
            row = {"image": f"{i}.png", "captions": [f"a photo {i} {j}" for j in range(n)], "split": "test"}
            file.write(json.dumps(row) + "\n")
    scores, notes = notes_of(lambda: evaluate(*clip, tmp_path, how=How(retrieval="coco")))
    assert "1 image has more, of which the first five count, 1 image has fewer" in notes
    assert scores["text→image R@5"].n == 5 + 5 + 2


def test_two_models_are_compared_by_their_probes_on_the_same_images(clip, colours):
    model, processor = clip
    one, two = (evaluate(m, processor, colours, how=How(probes=("knn",))) for m in (model, CLIP(model.config, seed=1)))
    for name, score in one.items():
        assert score.samples.comparable(two[name].samples), name
