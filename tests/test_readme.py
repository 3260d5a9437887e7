"""The front page and the pages of docs/: their commands and code, executed as they stand where that is quick, with fewer and
smaller steps where they train; and what else these pages promise."""

import io
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
import train
from minivlm import convert, info
from minivlm.datasets import check, make_shapes
from minivlm.evaluate import command as evaluate_command
from minivlm.layers import TextConfig, VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor
from minivlm.recipes import RECIPES
from minivlm.recipes.options import Options, dotted_names
from tests.data.test_prepare import prepare, save_omniglot
from tests.test_train import TINY

ROOT = Path(train.__file__).parent
FRONT, CHINESE = "README.md", "README_CN.md"
OTHERS = {"overview.md"}  # which has a test of its own
PAGES = [FRONT, *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in OTHERS)]
TEXTS = {
    page: (ROOT / page).read_text(encoding="utf-8")
    for page in [*PAGES, CHINESE, "data/README.md", "CONTRIBUTING.md", "docs/overview.md"]
}
SOURCES = [*(ROOT / "minivlm").rglob("*.py"), *(ROOT / "data").rglob("*.py"), ROOT / "sample.py"]
HUB = "openai/clip-vit-base-patch32"
SMALLER = {k: v for k, v in TINY.items() if k not in ("steps", "batch_size")}
RUN = {k: v for k, v in SMALLER.items() if "." not in k}
LANGUAGE = {"width": 16, "depth": 1, "heads": 2}
QFORMER = {f"model.qformer.{k}": v for k, v in dict(width=16, depth=2, heads=2).items()}
VOCABULARY = {"data.vocab_size": 300}
SMALL = {  # the options that make a recipe tiny
    "clip": SMALLER,
    "lm": RUN | VOCABULARY | {f"model.{k}": v for k, v in LANGUAGE.items()} | {"induction_heads": "false"},
    "t5": RUN | VOCABULARY | {f"model.{k}": v for k, v in LANGUAGE.items()},
    "llava-stage1": RUN | {"vision_from": "out/clip"},
    "llava": RUN,
    "blip2-stage1": RUN | QFORMER | {"model.embed_width": 8, "vision_from": "out/clip"},
    "blip2": RUN,
    "flamingo": RUN
    | {f"model.resampler.{k}": v for k, v in dict(width=16, depth=1, heads=2).items()}
    | {"vision_from": "out/clip"},
    "blip": RUN | VOCABULARY | {f"model.text.{k}": v for k, v in LANGUAGE.items()} | {"model.embed_width": 8},
    "uniter": RUN | {f"model.text.{k}": v for k, v in LANGUAGE.items()} | {"vision_from": "out/clip"},
    "captioner": RUN
    | VOCABULARY
    | {f"model.language.{k}": v for k, v in LANGUAGE.items()}
    | {k: v for k, v in SMALLER.items() if k.startswith("model.vision")},
}
BUILDS_ON = {  # what a command would train in full, were it not there
    "llava-stage1": ("clip", "lm"),
    "llava": ("llava-stage1",),
    "blip2-stage1": ("clip",),
    "blip2": ("blip2-stage1", "lm"),
    "flamingo": ("clip", "lm"),
    "uniter": ("clip",),
}
ELSEWHERE = {  # how a command begins that another test, or CI itself, runs
    "pip install -r requirements.txt": ".ci/run",
    "torchrun": "test_train.py::test_two_processes_take_the_steps_of_one",
    "python train.py clip --device cuda": "needs a GPU",
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


def commands(page):
    return "".join(blocks(page, "bash")).strip().splitlines()


def commands_in_tables(page):
    rows = [line for line in TEXTS[page].splitlines() if line.startswith("|")]
    return re.findall(r"`(python [^`]*)`", "".join(rows))


def links(page):
    return re.findall(r"\]\(([^)]+)\)", TEXTS[page])


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
    (desk / "my_shards").mkdir()
    for i in range(100):
        with tarfile.open(desk / "my_shards" / f"shard-{i:03d}.tar", "w") as archive:
            archive.add(desk / "my_photos" / "rose" / f"{i % 16}.png", f"{i}.png")
            words = tarfile.TarInfo(f"{i}.txt")
            words.size = len(text := f"rose number {i}".encode())
            archive.addfile(words, io.BytesIO(text))
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


@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs(page, desk, little_to_judge_by, monkeypatch, capsys):
    """And the first run prints the lines that the front page shows, but for their numbers and the progress bar."""
    monkeypatch.chdir(desk)
    earlier = {line for before in PAGES[: PAGES.index(page)] for line in commands(before)}
    for line in commands(page):
        if line not in earlier and not line.startswith(tuple(ELSEWHERE)):
            run(line, monkeypatch)
    if page == FRONT:
        printed, shown = capsys.readouterr().out, blocks(page, "text")[0]
        assert {line for line in without_numbers(shown) if "|" not in line} <= set(without_numbers(printed))
        assert len(commands(page)) >= 10


def without_numbers(text):
    return [" ".join(re.sub(r"\d[\d.:]*", "#", line).split()) for line in text.splitlines()]


def test_the_next_command_of_each_model_that_was_trained_here_runs(desk, little_to_judge_by, monkeypatch):
    monkeypatch.chdir(desk)
    models = {line: re.findall(r"out/([\w-]+)", line) for line in commands_in_tables(FRONT)}
    ran = [run(line, monkeypatch) for line, names in models.items() if names and names[0] in SMALL]
    assert len(ran) >= 5


def run(line, monkeypatch):
    """One command, after the models that it names, or trains on, have been made small."""
    words = shlex.split(line, comments=True)
    monkeypatch.setattr("sys.stdin", io.StringIO("is there a red circle?\n/quit\n"))
    if words[:2] == ["python", "train.py"]:
        have(*BUILDS_ON.get(words[2], ()) if len(words) > 2 else ())
        train_small(words[2:])
        return
    have(*(name for name in re.findall(r"out/([\w-]+)", line) if name in SMALL))
    if words[:2] == ["python", "data/omniglot/prepare.py"]:
        prepare("omniglot", *words[2:], "--out", "data/omniglot")
    elif words[:2] == ["python", "sample.py"]:
        sample.main(words[2:])
    elif words[:3] == ["python", "-m", "minivlm.evaluate"]:
        evaluate_command.main(words[3:])
    elif words[:4] in (["python", "-m", "minivlm", "evaluate"], ["python", "-m", "minivlm", "convert"]):
        (evaluate_command if words[3] == "evaluate" else convert).main(words[4:])
    elif words[:3] == ["python", "-m", "minivlm.datasets.check"]:
        with pytest.raises(SystemExit) as stop:
            check.main(words[3:])
        assert stop.value.code == 0
    elif words[:4] == ["python", "-m", "minivlm", "info"]:
        info.main(words[4:])
    else:
        pytest.fail(f"no test runs this command: {line}")


def have(*names):
    """These models, trained small where they are not there."""
    for name in names:
        if not Path("out", name).exists():
            have(*BUILDS_ON.get(name, ()))
            train_small([name])


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
    started = "--starts_from" in words  # its sizes are those of what it starts from
    sizes = {
        k: v for k, v in SMALL[recipe].items() if f"--{k}" not in words and not (started and k.startswith("model."))
    }
    small = [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
    train.main(words + small)


@pytest.mark.parametrize("page", PAGES)
def test_every_piece_of_code_runs(page, desk, monkeypatch, capsys):
    """One that names its file in its first line is a piece of that file, and stands there as it is; `...` leaves lines out."""
    monkeypatch.chdir(desk)
    for piece in blocks(page, "python"):
        if name := re.match(r"# (\w+/\S+\.py)\n", piece):
            parts = map(re.escape, re.split(r" *\.\.\.\n", piece[name.end() :]))
            assert re.search(".*?".join(parts), (ROOT / name[1]).read_text(encoding="utf-8"), re.DOTALL)
        else:
            exec(compile(piece, page, "exec"), {})
    assert page != FRONT or "torch.Size([2, 64])" in capsys.readouterr().out


def test_what_a_contributor_is_told_of_is_there():
    text = TEXTS["CONTRIBUTING.md"].replace("NAME", "clip")
    assert all(
        (ROOT / path).exists()
        for path in re.findall(r"`((?:minivlm|tests|docs)/[^`]*)`", text)
        if "pretrained/clip" not in path
    )
    registries = re.findall(r"`(\w+)` in `([\w/]+\.py)`", text)
    assert len(registries) == 2 and all(f"\n{name} = " in (ROOT / path).read_text() for name, path in registries)


@pytest.mark.parametrize("page", TEXTS)
def test_what_a_page_points_to_exists(page):
    named = re.findall(r"`(minivlm/[a-z_/0-9]+\.py)`", TEXTS[page])
    assert not [path for path in named if not (ROOT / path).exists()]
    for target in links(page):
        file, _, heading = target.partition("#")
        if "://" in target:
            continue
        found = (ROOT / page).parent / file if file else ROOT / page
        assert found.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            headings = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", one) for one in headings]  # a link counts by its words
            assert heading in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings], target


def test_the_chinese_page_has_the_same_commands_code_links_and_figures():
    assert commands(CHINESE) == commands(FRONT) and commands_in_tables(CHINESE) == commands_in_tables(FRONT)
    for language in ("python", "text"):
        assert blocks(CHINESE, language) == blocks(FRONT, language)
    assert links(CHINESE)[0] == FRONT and links(FRONT)[0] == CHINESE
    assert links(CHINESE)[1:] == links(FRONT)[1:]
    assert figures(CHINESE) == figures(FRONT)


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_names_only_options_recipes_and_tasks_that_exist(page):
    """In what nothing executes: prose and tables."""
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    sources = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    options = {f"--{name}" for one in (Options(), *RECIPES.values()) for name in dotted_names(one)}
    options |= set(re.findall(r'"(--\w+)"', sources))
    options |= {name.partition(".")[0] for name in options}
    named = [re.sub(r"^--rates\..*", "--rates", name) for name in re.findall(r"(?<![\w-])--\w+(?:\.\w+)*", prose)]
    assert not [name for name in named if name not in options]
    assert not [name for name in re.findall(r"train\.py ([a-z][\w-]*)", prose) if name not in RECIPES]
    assert not [name for name in re.findall(r"sample\.py ([a-z][\w-]*)", prose) if name not in sample.TASKS]


def figures(page):
    return sorted(re.findall(r"\d[\d.]* %", TEXTS[page]))


def test_a_figure_of_the_front_page_stands_in_the_results_too():
    """Or in the output of the first run, or in speed.md."""
    told = "".join(TEXTS[page] for page in PAGES[1:]) + "".join(blocks(FRONT, "text")).replace("%", " %")
    assert not [figure for figure in figures(FRONT) if figure not in told]
