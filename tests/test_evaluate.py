"""Evaluation of a model on a dataset: the numbers, the table, the picture, the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm import evaluate
from minivlm.datasets.shapes import ShapesWorld, make_shapes
from minivlm.errors import UserError
from minivlm.evaluate import command as evaluate_command
from minivlm.evaluate import compare
from minivlm.layers import TextConfig, VisionConfig
from minivlm.metrics import Score
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=16, image_size=32, progress=False)
    return directory


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """An untrained CLIP: its numbers are near chance, which is known."""
    processor = Processor.train(ShapesWorld(world, "train").texts(), vocab_size=300, image_size=32, context=96)
    ids = dict(vocab_size=processor.vocab_size, end_token=processor.end_token)
    vision = VisionConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2)
    text = TextConfig(width=16, depth=1, heads=2, context=96, **ids)
    model = CLIP(CLIPConfig(vision=vision, text=text, embed_width=16))
    directory = tmp_path_factory.mktemp("out")
    model.save_pretrained(directory, processor=processor)
    return directory, model, processor


def test_the_command_prints_and_saves_what_the_function_computes(trained, world, tmp_path, capsys):
    directory, model, processor = trained
    evaluate_command.main(
        [str(directory), "--data", str(world), "--device", "cpu", "--save", str(tmp_path / "scores.json")]
    )
    want = evaluate.contrast(model, processor, world)
    assert capsys.readouterr().out.strip() == evaluate.table(want).strip()
    got = {name: Score.from_record(score) for name, score in json.loads((tmp_path / "scores.json").read_text()).items()}
    assert got == want
    assert got["text→image R@5"].chance == pytest.approx(5 / 500)
    assert got["zero-shot, never-seen pairs"].chance == pytest.approx(1 / 64)
    assert got["text→image R@1"].value < 0.05  # it knows nothing


def test_an_oracle_gets_everything_right(world, monkeypatch):
    """Features that spell out the scene: the plumbing between images, captions and classes loses nothing."""
    test = ShapesWorld(world, "test")
    codes = {text: torch.randn(64, generator=torch.Generator().manual_seed(i)) for i, text in enumerate(test.texts())}
    unit = lambda texts: torch.nn.functional.normalize(torch.stack([codes[t] for t in texts]), dim=1)
    captions = {i: test.all_captions(i)[0] for i in range(len(test))}
    monkeypatch.setattr(compare, "encode_texts", lambda texts, *a, **k: unit(texts))
    monkeypatch.setattr(compare, "encode_split", lambda m, p, split, b: unit([captions[i] for i in range(len(split))]))
    scores = evaluate.retrieval(None, None, test)
    assert scores["text→image R@1"].value == scores["image→text R@1"].value == scores["text→image mAP"].value == 1


def test_the_picture_marks_what_the_scene_bears_out(world):
    test = ShapesWorld(world, "test")
    for i in range(20):
        assert evaluate.shows(test.all_captions(i)[0])(test, i)
    thing = test.scenes[0].objects[0]
    assert evaluate.shows(f"a {thing.colour} {thing.shape}")(test, 0)
    other = "small" if thing.size == "large" else "large"
    same = [o for o in test.scenes[0].objects if (o.shape, o.colour, o.size) == (thing.shape, thing.colour, other)]
    assert evaluate.shows(f"a {other} {thing.colour} {thing.shape}")(test, 0) == bool(same)


def test_a_picture_of_a_folder_with_classes_is_drawn(trained, tmp_path):
    _, model, processor = trained
    for c in range(3):
        for i in range(5):
            path = tmp_path / "data/test" / f"kind_{c}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), 80 * c + i, dtype=np.uint8)).save(path)
            train = tmp_path / "data/train" / f"kind_{c}" / f"{i}.png"
            train.parent.mkdir(parents=True, exist_ok=True)
            train.hardlink_to(path)
    evaluate.retrieval_sheet(model, processor, tmp_path / "data", tmp_path / "sheet.png", top=4)
    assert Image.open(tmp_path / "sheet.png").height > 3 * 96


def test_a_directory_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        evaluate_command.main([str(tmp_path), "--device", "cpu"])
