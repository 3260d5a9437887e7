"""The README's commands and code, executed: as they stand where that is quick, with fewer and smaller steps where it trains."""

import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
import train
from minivlm import evaluate
from minivlm.datasets import check, make_shapes
from minivlm.layers import TextConfig, VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor
from tests.data.test_prepare import prepare, save_omniglot
from tests.test_train import TINY

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB = "openai/clip-vit-base-patch32"
SMALLER = {k: v for k, v in TINY.items() if k not in ("steps", "batch_size")}
RUN = {k: v for k, v in SMALLER.items() if "." not in k}
LANGUAGE = {"width": 16, "depth": 1, "heads": 2}
QFORMER = {"qformer.width": 16, "qformer.depth": 2, "qformer.heads": 2}
VOCABULARY = {"data.vocab_size": 300}
SMALL = {  # the options that make a recipe tiny
    "clip": SMALLER,
    "lm": RUN | VOCABULARY | {f"model.{k}": v for k, v in LANGUAGE.items()} | {"induction_heads": "false"},
    "t5": RUN | VOCABULARY | {f"model.{k}": v for k, v in LANGUAGE.items()},
    "llava-stage1": RUN,
    "llava": RUN,
    "blip2-stage1": RUN | QFORMER | {"embed_width": 8, "vision_from": "out/clip"},
    "blip2": RUN,
    "flamingo": RUN
    | {f"resampler.{k}": v for k, v in dict(width=16, depth=1, heads=2).items()}
    | {"vision_from": "out/clip"},
    "blip": RUN | {f"text.{k}": v for k, v in LANGUAGE.items()} | {"embed_width": 8, "vocab_size": 300},
    "uniter": RUN | {f"model.text.{k}": v for k, v in LANGUAGE.items()} | {"vision_from": "out/clip"},
    "captioner": RUN
    | VOCABULARY
    | {f"model.language.{k}": v for k, v in LANGUAGE.items()}
    | {k: v for k, v in SMALLER.items() if k.startswith("model.vision")},
}
ELSEWHERE = {  # what another test, or CI itself, runs
    "pip install -r requirements.txt": ".ci/run",
    "pip install -r requirements.txt && pytest": ".ci/run",
    "torchrun": "test_train.py::test_two_processes_take_the_steps_of_one",
    "python train.py clip --device cuda": "needs a GPU",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A working directory with the data that the README speaks of, made small."""
    desk = tmp_path_factory.mktemp("desk")
    make_shapes(desk / "data/shapes", train=64, image_size=32, progress=False)
    rng = np.random.default_rng(0)
    for name in ("rose", "tulip"):
        for i in range(16):
            path = desk / "my_photos" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(desk / "photo.png")
    processor = Processor.train(["a photo of a cat"], vocab_size=300, image_size=32, context=77)
    vision = VisionConfig(image_size=32, patch_size=16, width=16, depth=1, heads=2)
    text = TextConfig(
        width=16, depth=1, heads=2, vocab_size=processor.vocab_size, context=77, end_token=processor.end_token
    )
    model = CLIP(CLIPConfig(vision=vision, text=text, embed_width=16))
    model.save_pretrained(desk / HUB, processor=processor, layout="hf")  # stands in for the hub
    for i, alphabets in enumerate((("Greek", "Sanskrit"), ("Korean", "Tagalog")), start=1):
        save_omniglot(desk / f"images_background_small{i}.zip", alphabets, characters=5)
    return desk


def test_every_command_runs(desk, little_to_judge_by, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.setattr("sys.stdin", io.StringIO("is there a red circle?\n/quit\n"))
    ran = 0
    for line in "".join(blocks("bash")).strip().splitlines():
        if any(line == start or (line.startswith(start) and " " in start) for start in ELSEWHERE) or line.startswith(
            "torchrun"
        ):
            continue
        words = shlex.split(line)
        if words[:3] == ["python", "train.py", "llava"]:
            train_small(["llava-stage1", "--vision_from", "out/clip"])  # which the command would train in full
        if words[:2] == ["python", "train.py"]:
            train_small(words[2:])
        elif words[:2] == ["python", "data/omniglot/prepare.py"]:
            prepare("omniglot", *words[2:], "--out", "data/omniglot")
        elif words[:2] == ["python", "sample.py"]:
            sample.main(words[2:])
        elif words[:3] == ["python", "-m", "minivlm.evaluate"]:
            evaluate.main(words[3:])
        elif words[:3] == ["python", "-m", "minivlm.datasets.check"]:
            with pytest.raises(SystemExit) as stop:
                check.main(words[3:])
            assert stop.value.code == 0
        else:
            pytest.fail(f"the README has a command that no test runs: {line}")
        ran += 1
    assert ran >= 10


def train_small(words):
    """The command with its own options, on a tiny model, for a few steps of a few samples."""
    words = list(words)
    if "--list" in words or "--resume" in words:
        train.main(words)
        return
    for option, most in (("--steps", 3), ("--batch_size", 16), ("--micro_batch", 4)):
        if option in words:
            words[words.index(option) + 1] = str(most)
    if "--steps" not in words:
        words += ["--steps", "3"]
    if "--batch_size" not in words:
        words += ["--batch_size", "16"]
    recipe = words[0] if words and not words[0].startswith("--") else "clip"
    small = [str(x) for name, value in SMALL[recipe].items() if f"--{name}" not in words for x in (f"--{name}", value)]
    train.main(words + small)


def test_every_piece_of_code_runs(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    code = blocks("python")
    assert len(code) >= 2
    for piece in code:
        exec(compile(piece, "README.md", "exec"), {})
    assert "torch.Size([2, 64])" in capsys.readouterr().out


def test_the_files_it_points_to_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets and not [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert "@" not in re.sub(r"R@|Recall@", "", README)  # nothing left to fill in
