"""Every recipe on every kind of folder: it trains to the end, or is refused before the first step in one sentence."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from minivlm.errors import UserError
from minivlm.evaluate import command as evaluate_command
from minivlm.recipes import RECIPES, plan, scores
from minivlm.recipes.folders import check_suits
from minivlm.recipes.fuse import FUSE_RECIPES
from minivlm.run_directory import foreign

SIDE, N = 16, 40
TOWER = dict(image_size=SIDE, patch_size=8, width=16, depth=1, heads=2, mlp_width=16, stem="patch")
SMALL = dict(width=16, depth=1, heads=2)
T5 = {"depth": 1, "decoder_depth": 1, "width": 16, "heads": 2, "mlp_width": 16}
FUSION = {f"model.text.{k}": v for k, v in SMALL.items()}
SIZES = {
    "clip": {f"model.vision.{k}": v for k, v in TOWER.items()} | {f"model.text.{k}": v for k, v in SMALL.items()},
    "clip-resnet": {f"model.text.{k}": v for k, v in SMALL.items()},
    "align": {f"model.text.{k}": v for k, v in SMALL.items()},
    "lm": {f"model.{k}": v for k, v in SMALL.items()} | {"induction_heads": "false"},
    "t5": {f"model.{k}": v for k, v in T5.items()} | {"induction_heads": "false"},
    "coca": {f"model.vision.{k}": v for k, v in TOWER.items()}
    | {f"model.text.{k}": v for k, v in SMALL.items() if k != "depth"}
    | {"model.text.depth": 2, "model.multimodal_depth": 1, "model.image_queries": 2},
    "captioner": {f"model.vision.{k}": v for k, v in TOWER.items()}
    | {f"model.language.{k}": v for k, v in SMALL.items()},
    "blip": {f"model.text.{k}": v for k, v in SMALL.items()} | {"model.embed_width": 8},
    "blip2-stage1": {f"model.qformer.{k}": v for k, v in dict(width=16, heads=2, depth=2, queries=4).items()},
    "flamingo": {f"model.resampler.{k}": v for k, v in dict(width=16, heads=2, depth=1, latents=2).items()},
    "vilbert": FUSION
    | {f"model.regions.{k}": v for k, v in SMALL.items()}
    | {"model.joint_width": 16, "model.joint_heads": 2, "model.connections": 1},
    "vqa": {f"model.{part}.{k}": v for part in ("text", "fusion") for k, v in SMALL.items()},
    "multitask": {f"model.encoder.text.{k}": v for k, v in SMALL.items()},
}
SIZES |= dict.fromkeys(("blip-noisy", "blip-capfilt"), SIZES["blip"]) | dict.fromkeys(("visualbert", "uniter"), FUSION)
ON_CLIP = ("blip", "blip-noisy", "blip2-stage1", *FUSE_RECIPES, "multitask")
PARTS = {  # what each builds on
    **{name: {"vision_from": "clip"} for name in ON_CLIP},
    "llava-stage1": {"vision_from": "clip", "language_from": "lm"},
    "llava": {"starts_from": "llava-stage1"},
    "blip-capfilt": {"vision_from": "clip", "starts_from": "blip-noisy"},
    "blip2": {"starts_from": "blip2-stage1", "language_from": "lm"},
    "flamingo": {"vision_from": "clip", "language_from": "lm"},
}
ALIKE = ("vlm-stage1", "vlm")  # other values of the classes of llava-stage1 and llava
ALL = set(RECIPES) - set(ALIKE)
PAIRS = {"clip", "clip-resnet", "align", "blip", "blip-noisy", "blip-capfilt", "blip2-stage1"}
TALK = {"llava-stage1", "llava", "blip2", "flamingo"}
CHOOSERS = {"vqa", "visualbert", "uniter", "vilbert"}
TRAINS = {  # kind of folder → the recipes that learn from it
    "captions": PAIRS | TALK | {"captioner", "coca", "lm", "t5"},
    "labelled": PAIRS | TALK | {"captioner", "coca", "lm", "t5"},
    "conversations": PAIRS | TALK | CHOOSERS | {"lm", "t5"},
    "questions": PAIRS | TALK | CHOOSERS | {"lm", "t5"},
    "mixed": ALL,
    "classes": PAIRS | {"captioner", "coca", "llava-stage1", "llava", "blip2", "flamingo"},
    "documents": {"lm", "t5", "flamingo"},
    "texts": {"lm", "t5"},
    "few": PAIRS | TALK | {"captioner", "coca", "lm", "t5"},
    "one class": set(),
}


def arguments(name, **options):
    common = {"steps": 2, "batch_size": 4, "save_every": 2, "bucket_steps": 1, "device": "cpu", "precision": "fp32"}
    given = common | SIZES.get(name, {}) | options
    return [name, *(str(x) for option, value in given.items() for x in (f"--{option}", value))]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def paint(path, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 24), (i * 6, 90, 240 - i * 6)).save(path)
    return path.name


def captions(folder, n=N, **more):
    write_lines(
        folder / "captions.jsonl",
        ({"image": paint(folder / f"{i}.png", i), "caption": f"thing {i}"} | more for i in range(n)),
    )


def labelled(folder):
    rows = [{"image": paint(folder / f"{i}.png", i), "caption": f"thing {i}", "label": "abc"[i % 3]} for i in range(N)]
    write_lines(folder / "captions.jsonl", rows)


def questions(folder):
    rows = [
        {"image": paint(folder / f"{i}.png", i), "question": f"which is {i}?", "answer": f"thing {i % 5}"}
        for i in range(N)
    ]
    write_lines(folder / "vqa.jsonl", rows)


def mixed(folder):
    """Some pictures have captions, some questions, and some both."""
    split = lambda i: {"split": {0: "val", 5: "test"}.get(i % 10, "train")}
    paths = [paint(folder / f"{i}.png", i) for i in range(N)]
    write_lines(folder / "captions.jsonl", ({"image": paths[i], "caption": f"thing {i}"} | split(i) for i in range(30)))
    asked = ({"image": paths[i], "question": "which?", "answer": f"thing {i % 5}"} | split(i) for i in range(10, N))
    write_lines(folder / "vqa.jsonl", asked)


def conversations(folder, mark="<image>\n"):
    said = lambda i: [
        {"from": "human", "value": f"{mark}which is {i}?"},
        {"from": "gpt", "value": f"it is thing {i % 5}"},
    ]
    entries = [{"id": str(i), "conversations": said(i)} for i in range(N)]
    if mark:
        entries = [entry | {"image": paint(folder / f"{i}.png", i)} for i, entry in enumerate(entries)]
    (folder / "conversations.json").write_text(json.dumps(entries), encoding="utf-8")


def classes(folder, names="abcdef"):
    for split in ("train", "val", "test"):
        for k, name in enumerate(names):
            for i in range(4):
                paint(folder / split / name / f"{i}.png", 4 * k + i)


def documents(folder):
    segments = lambda i: [
        {"text": f"here is {i}"},
        {"image": paint(folder / f"{i}.png", i)},
        {"text": f"it is thing {i}"},
    ]
    write_lines(folder / "interleaved.jsonl", map(segments, range(N)))


FOLDERS = {
    "captions": captions,
    "labelled": labelled,
    "conversations": conversations,
    "questions": questions,
    "mixed": mixed,
    "classes": classes,
    "documents": documents,
    "texts": lambda folder: conversations(folder, mark=""),
    "few": lambda folder: captions(folder, 5, split="train"),
    "one class": lambda folder: classes(folder, "a"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for kind, fill in FOLDERS.items():
        (root / kind).mkdir()
        fill(root / kind)
    return root


@pytest.fixture(scope="module")
def bases(folders, tmp_path_factory):
    """What the recipes build on, as it is before the first step."""
    out = tmp_path_factory.mktemp("bases")
    for name in ("clip", "lm", "llava-stage1", "blip-noisy", "blip2-stage1"):
        _, recipe, _ = plan.command_line(arguments(name, data=folders / "captions", **parts(name, out)))
        work = recipe.start(quiet=True)
        work.model.save_pretrained(out / name, processor=work.processor)
    return out


def parts(name, bases):
    return {option: bases / base for option, base in PARTS.get(name, {}).items()}


@pytest.fixture(autouse=True)
def few_episodes(monkeypatch):
    monkeypatch.setattr(scores, "VALIDATED", 4)
    monkeypatch.setattr(importlib.import_module("minivlm.evaluate.few_shot"), "EPISODES", 4)


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ALIKE])
def test_a_recipe_trains_to_the_end_or_is_refused_before_the_first_step(name, kind, folders, bases, tmp_path, capsys):
    data, out = folders / kind, tmp_path / "out"
    more = {"data.threshold": 0.0} if name == "blip-capfilt" else {}
    argv = arguments(name, data=data, out=out, **parts(name, bases), **more)
    if name in TRAINS[kind]:
        train.main(argv)
        said = capsys.readouterr().out
        assert {"config.json", "metrics.json", "picture.png"} <= {path.name for path in out.iterdir()}
        assert not foreign(out)  # so that the next run moves it aside
        found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        assert found and all(np.isfinite(score["value"]) for score in found.values())
        on_training_pictures = "What is judged has been trained on." in said.partition("the best checkpoint")[2]
        assert on_training_pictures == (kind == "few")
        check_next_commands(said.partition("Try next:")[2].splitlines(), data)
    else:
        with pytest.raises(UserError, match=r"^[^\n]+$") as refused:
            train.main(argv)
        assert not out.exists() and str(data) in str(refused.value)
        assert kind == "one class" or re.search(r"holds .* but .* learns from .*: train [a-z]", str(refused.value))


def check_next_commands(commands, data):
    """Every path that is proposed exists, and the pictures are those of the folder."""
    assert commands
    for command in commands:
        assert not re.search("red|circle", command)
        for word in shlex.split(command)[2:]:
            if "/" in word and word.startswith(str(data)):
                assert Path(word).exists(), command


def test_evaluation_says_where_it_judges_by_what_was_trained_on(folders, bases, capsys):
    evaluate_command.main([str(bases / "clip"), "--data", str(folders / "few"), "--device", "cpu"])
    out, told = capsys.readouterr()
    assert "There are no test images: the train images stand in for them. What is judged has been trained on." in told
    assert "R@1" in out
    evaluate_command.main([str(bases / "clip"), "--data", str(folders / "captions"), "--device", "cpu"])
    assert "No val and test split are given: a tenth of the images each" in capsys.readouterr().err


def test_a_folder_smaller_than_a_batch_is_trained_on_whole_in_fewer_steps(folders, tmp_path):
    _, recipe, _ = plan.command_line(["clip", "--data", str(folders / "captions"), "--out", str(tmp_path / "out")])
    train_images = check_suits(recipe, folders / "captions")
    assert recipe.batch_size == train_images < N
    todo = plan.chain(*plan.command_line(["vqa", "--data", str(folders / "questions"), "--batch_size", "4"]))
    assert [(name, part.batch_size) for name, part, _ in todo] == [("clip-resnet", train_images), ("vqa", 4)]


def test_what_does_not_suit_is_refused_before_what_it_builds_on_is_trained(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"images in class folders .* but a small language model learns from texts"):
        train.main(arguments("llava", data=folders / "classes"))
    assert not any(tmp_path.iterdir())
