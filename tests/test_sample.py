"""sample.py by its main(argv), with a model whose right answers are known; and once as a user starts it."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import minivlm
import sample
from minivlm.command_line import check_sheet_name
from minivlm.errors import UserError
from minivlm.layers import TextConfig, VisionConfig
from tests.colours import ColourModel, ColourProcessor, paint

LABELS = ["--labels", "red circle", "blue square"]


@pytest.fixture(autouse=True)
def model(monkeypatch, tmp_path):
    """`out` is a model's directory; whatever is loaded is the colour model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    model = ColourModel()
    monkeypatch.setitem(minivlm.__dict__, "load", lambda name, *, device: (model.to(device), ColourProcessor()))
    return model


@pytest.fixture
def pictures(tmp_path):
    for name, colour in (("red.png", "red"), ("b/blue.jpg", "blue"), ("b/green.png", "green")):
        paint(tmp_path / "pictures" / name, colour)
    return tmp_path / "pictures"


def run(*argv):
    sample.main([str(word) for word in argv])


def test_zero_shot_prints_label_bar_and_percent(pictures, capsys):
    run("zero-shot", "out", pictures / "red.png", pictures / "b/blue.jpg", *LABELS, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(pictures / "red.png") and lines[3] == str(pictures / "b/blue.jpg")
    assert [line.split()[:2] for line in lines[1:3]] == [["red", "circle"], ["blue", "square"]]
    assert [line.split()[:2] for line in lines[4:6]] == [["blue", "square"], ["red", "circle"]]
    percents = [float(line.split()[-1].rstrip("%")) for line in lines[1:3]]
    assert percents[0] > 95 and sum(percents) == pytest.approx(100, abs=0.11)
    assert len(lines[1]) == len(lines[2]) == len(lines[5])
    assert lines[1].count("█") > lines[2].count("█")


def test_zero_shot_shows_as_many_as_asked_for_and_takes_templates(pictures, capsys):
    run("zero-shot", "out", pictures / "red.png", *LABELS, "green", "--top", 1, "--templates", "photo")
    assert len(capsys.readouterr().out.splitlines()) == 2
    run("zero-shot", "out", pictures / "red.png", *LABELS, "--templates", "{} {}", "a blue {}")
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(("share", "length"), [(0, 0), (1, 24), (0.5, 12), (0.999, 24), (1 / 48, 1), (1 / 24 / 8, 1)])
def test_bars_are_as_long_as_their_share(share, length, monkeypatch):
    assert len(sample.bar(share)) == 24 and len(sample.bar(share).rstrip()) == length
    monkeypatch.setattr(sys, "stdout", type("ASCII", (), {"encoding": "ascii"}))
    assert sample.bar(share) == ("#" * round(24 * share)).ljust(24)


def test_search_prints_the_best_first_and_keeps_its_index_with_the_model(pictures, model, capsys):
    before = sorted(pictures.rglob("*"))
    run("search", "out", pictures, "a blue thing", "--top", 2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].split()[0] == "1" and float(lines[0].split()[1]) > 0.99 and Path(lines[0].split()[2]).is_file()
    assert lines[0].endswith("blue.jpg")
    assert len(list(Path("out/index").iterdir())) == 1 and sorted(pictures.rglob("*")) == before
    run("search", "out", pictures, "red")
    assert model.calls == 3  # indexed once
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_search_takes_a_picture_and_a_hub_id(pictures, capsys):
    run("search", "somebody/clip", pictures, pictures / "b/green.png", "--top", 1)
    assert capsys.readouterr().out.split()[2].endswith("green.png")
    assert len(list(Path("cache/minivlm/index").iterdir())) == 1 and not Path("somebody").exists()


def test_search_saves_a_sheet(pictures, capsys):
    run("search", "out", pictures, "red", "--save", "sheet.png")
    assert capsys.readouterr().out.endswith("wrote sheet.png\n")
    with Image.open("sheet.png") as page:
        assert (255, 0, 0) in {colour for _, colour in page.getcolors(1 << 24)} and page.width > 3 * 160


def test_search_names_what_it_skips(pictures, capsys):
    for i in range(7):
        (pictures / f"broken{i}.png").write_text("no picture")
    run("search", "out", pictures, "red")
    error = capsys.readouterr().err
    assert "cannot be read (7):" in error and "broken0.png cannot be read" in error and "… and 2 more" in error


def test_without_a_task_it_lists_them(capsys):
    run()
    text = capsys.readouterr().out
    assert all(f"python sample.py {name} " in text for name in sample.TASKS)
    for name in sample.TASKS:
        with pytest.raises(SystemExit, match="0"):
            run(name, "--help")
        assert sample.TASKS[name].example in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["zeroshot", "out"], "unknown task 'zeroshot'. Did you mean zero-shot"),
        (["zero-shot", "out", "red.png"], "required: --labels; see python sample.py zero-shot --help"),
        (["zero-shot", "out", "red.png", "--lables", "a", "b"], "unknown option --lables. Did you mean --labels"),
        (["zero-shot", "out", "red.png", *LABELS, "--top", "0"], "--top: '0' is not a number from 1"),
        (["zero-shot", "out", "red.png", "--labels", "red"], "at least two labels"),
        (["zero-shot", "out", "red.png", "--labels", "red", ""], "label 2 of 2 is empty"),
        (["zero-shot", "out", "red.png", "--labels", "red", "red"], "'red' is given twice"),
        (["zero-shot", "out", "red.png", *LABELS, "--templates", "a photo"], "'a photo' has no place"),
        (["zero-shot", "out", "gone.png", *LABELS], "gone.png is missing"),
        (["zero-shot", "out", "text.png", *LABELS], "text.png cannot be read as an image"),
        (["zero-shot", "out", "cut.png", *LABELS], "cut.png cannot be read as an image"),
        (["zero-shot", "out", "red.png", *LABELS, "--device", "tpu9"], "tpu9"),
        (["search", "out", "nowhere", "red"], "nowhere is not a folder"),
        (["search", "out", "empty", "red"], "empty holds no images"),
        (["search", "out", "pictures", " "], "query is empty"),
        (["search", "out", "pictures", "red " * 40], "has 40 tokens, but the model takes 12; make it shorter"),
        (["search", "out", "pictures", "red", "blue"], "unrecognized arguments: blue"),
        (["search", "out", "pictures", "red", "--save", "sheet.doc"], "has to end in .png"),
        (["search", "out", "pictures", "red", "--save", "no/sheet.png"], "the folder no does not exist"),
        (["search", "out", "pictures", "red", "--save", "taken.png"], "taken.png: that is a folder; name a file"),
    ],
)
def test_a_mistake_is_one_sentence(argv, message, pictures, tmp_path):
    paint(tmp_path / "red.png", "red", size=(200, 200))
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        run(*argv)
    assert message in str(error.value)


def test_a_model_that_cannot_compare_is_refused(pictures, monkeypatch):
    monkeypatch.setitem(minivlm.__dict__, "load", lambda name, *, device: (SimpleNamespace(abilities=set()), None))
    with pytest.raises(UserError, match="cannot compare texts and images as vectors; no task can use it"):
        run("search", "out", pictures, "red")
    monkeypatch.setitem(minivlm.__dict__, "load", lambda name, *, device: (ColourModel(), None))
    with pytest.raises(UserError, match="no processor beside this ColourModel"):
        run("search", "out", pictures, "red")


def test_a_real_model_from_its_directory(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(minivlm.__dict__, "load")
    processor = minivlm.Processor.train(
        [f"a {label}" for label in LABELS[1:]], vocab_size=270, image_size=16, context=40
    )
    text = TextConfig(
        vocab_size=processor.vocab_size, context=40, width=16, depth=1, heads=2, end_token=processor.end_token
    )
    vision = VisionConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2)
    minivlm.CLIP(minivlm.CLIPConfig(vision=vision, text=text, embed_width=8)).save_pretrained(
        "tiny", processor=processor
    )
    run("zero-shot", "tiny", pictures / "red.png", *LABELS, "--device", "cpu")
    percents = [float(line.split()[-1].rstrip("%")) for line in capsys.readouterr().out.splitlines()[1:]]
    assert percents == sorted(percents, reverse=True) and sum(percents) == pytest.approx(100, abs=0.11)
    run("search", "tiny", pictures, pictures / "red.png", "--top", 1, "--device", "cpu")
    assert capsys.readouterr().out.split() == ["1", "1.000", str(pictures / "red.png")]
    with pytest.raises(UserError, match=r"the text 'red red [red ]+…' has \d+ tokens, but the model takes 40"):
        run("search", "tiny", pictures, "red " * 40)


def test_the_command_line_exits_with_two_and_says_why():
    script = Path(sample.__file__)
    done = subprocess.run([sys.executable, script, "compleet", "out"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown task 'compleet'. Did you mean complete?\n"


def test_a_kind_of_picture_that_is_read_alone_is_refused_before_the_work():
    with pytest.raises(UserError, match=r"--save film\.mpg: the name has to end in \.png"):
        check_sheet_name("film.mpg")
