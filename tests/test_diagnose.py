"""--diagnose: which pitfalls are measured, what is printed and written, and what is refused before the work."""

import json

import numpy as np
import pytest
from PIL import Image

from minivlm.command_line import names_among
from minivlm.datasets.shapes import ShapesWorld, make_shapes
from minivlm.errors import UserError
from minivlm.evaluate.command import main
from minivlm.evaluate.diagnose import PITFALLS, diagnose
from minivlm.layers import LanguageModel, LanguageModelConfig, TextConfig, VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=16, image_size=32, progress=False)
    return directory


@pytest.fixture(scope="module")
def clip(world, tmp_path_factory):
    """An untrained CLIP, in a directory."""
    processor = Processor.train(ShapesWorld(world, "train").texts(), vocab_size=300, image_size=32, context=96)
    vision = VisionConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2)
    ids = dict(vocab_size=processor.vocab_size, end_token=processor.end_token)
    text = TextConfig(width=16, depth=1, heads=2, context=96, **ids)
    directory = tmp_path_factory.mktemp("out")
    CLIP(CLIPConfig(vision=vision, text=text, embed_width=16)).save_pretrained(directory, processor=processor)
    return directory


def test_a_pitfall_is_printed_drawn_and_saved(clip, world, tmp_path, capsys):
    where = ["--data", str(world), "--images", str(tmp_path / "images"), "--save", str(tmp_path / "found.json")]
    main([str(clip), *where, "--device", "cpu", "--diagnose", "modality-gap,language-bias"])
    out = capsys.readouterr().out
    assert out.startswith("modality-gap: ") and "95 % interval" in out and "difference" in out
    assert "language-bias: left out, because " in out
    assert Image.open(tmp_path / "images/modality-gap.png").size[0] > 600
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["modality-gap"]["figures"]["distance of the centroids"]["n"] == 500
    assert found["modality-gap"]["verdict"].startswith(("found", "not found"))
    effect = found["modality-gap"]["effect"]["mean-shift: distance of the centroids"]
    assert effect["difference"]["low"] <= effect["difference"]["value"] <= effect["difference"]["high"]
    assert found["language-bias"].keys() == {"left_out"}


def test_pitfalls_are_named_by_a_list():
    pitfalls = names_among(PITFALLS, option="--diagnose", what="pitfall")
    assert pitfalls("resolution, modality-gap,resolution") == ("resolution", "modality-gap")


def test_an_unknown_pitfall_is_refused():
    with pytest.raises(UserError, match=r"no pitfall 'modality'\. Did you mean modality-gap"):
        main(["out/clip", "--diagnose", "modality"])


def test_a_model_that_can_have_no_pitfall_is_refused(world):
    language = LanguageModel(LanguageModelConfig(vocab_size=64, width=16, depth=1, heads=2, context=8))
    with pytest.raises(UserError, match=r"no pitfall to diagnose in this LanguageModel .*modality-gap: .* no vectors"):
        diagnose(language, None, world, ["modality-gap"])


def test_a_place_that_images_cannot_be_written_to_is_refused_before_the_work(clip, world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--images .*file: images cannot be written there"):
        main([str(clip), "--data", str(world), "--diagnose", "--images", str(tmp_path / "file")])


def test_a_folder_with_one_image_has_no_clouds(clip, tmp_path):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "caption": "a red circle"}\n')
    with pytest.raises(UserError, match="has one image to judge by"):
        main([str(clip), "--data", str(tmp_path), "--diagnose", "modality-gap", "--images", str(tmp_path / "images")])


def test_one_image_leaves_out_what_needs_two_and_not_the_whole_diagnosis(clip, tmp_path, capsys):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "caption": "a red circle"}\n')
    main([str(clip), "--data", str(tmp_path), "--diagnose", "--images", str(tmp_path / "images")])
    out = capsys.readouterr().out
    assert "modality-gap: left out" in out and "resolution: left out" in out and out.count("one image to judge by") == 2


def test_every_pitfall_has_a_module_with_both_functions():
    from importlib import import_module

    for module in PITFALLS.values():
        module = import_module(f"minivlm.evaluate.diagnose.{module}")
        assert callable(module.left_out) and callable(module.diagnose)
