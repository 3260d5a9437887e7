"""Runs side by side: what is told of each, which options differ, which score is surely the best, and what is no run."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import minivlm.__main__ as command
from minivlm import compare
from minivlm.errors import UserError
from minivlm.metrics import Score
from minivlm.metrics.samples import Samples, write_samples

IDS = tuple(f"test/{i}.png" for i in range(400))


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Leaves what a run leaves, without its weights. right: which samples; scores: others, of which no samples are kept."""
    monkeypatch.setattr("minivlm.run.problem", lambda path, step: "")
    monkeypatch.chdir(tmp_path)

    def run(name, right=None, *, step=10, data="a", scores=None, kept=True, perplexity=None, **options):
        folder = tmp_path / "out" / name
        (folder / "checkpoints/step-000010").mkdir(parents=True)
        vision = {"type": "VisionConfig", "width": 8} | options.pop("vision", {})
        recipe = {"type": "CLIPRecipe", "summary": name, "steps": 10, "model": {"vision": vision}} | options
        record = {"step": step, "score": 0.5, "recipe": recipe, "name": "clip", "data": {"files": data}}
        record |= {"seconds": 90.0, "parameters": 1234, "trained": 1000, "on": {"device": "cpu"}}
        (folder / "checkpoints/step-000010/training.json").write_text(json.dumps(record))
        line = {"learning_rate": 0.1, "gradient_norm": 1.0, "samples_per_second": 100.0, "peak_memory": 2 * 10**9}
        lines = [line | {"step": i, "loss": 1 / (i + 1), "seconds": i + 1.0} for i in range(10)]
        lines += [{"step": 9, "validation": 0.5, "validated": "Recall@1"}]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        known = {} if right is None else {"accuracy": Score.of(Samples("mean", counts(right), IDS), 0.5)}
        if perplexity:
            known["perplexity"] = Score.of(
                Samples("perplexity", counts(np.full(400, perplexity)), IDS), 9.0, share=False
            )
        values = {name: score.record() for name, score in known.items()} | (scores or {})
        if values:
            (folder / "metrics.json").write_text(json.dumps(values))
            if kept:
                write_samples(folder / "samples.npz", {name: score.samples for name, score in known.items()})
        return f"out/{name}"

    return run


def counts(right):
    return np.stack([np.asarray(right, dtype=float), np.ones(len(right))], axis=1)


def first(n):
    return np.arange(400) < n


def side_by_side(capsys, *words):
    compare.main(list(words))
    return capsys.readouterr()


def row(said, name):
    return next(line for line in said.splitlines() if line.startswith(f"{name}  ")).removeprefix(name).strip()


def test_runs_stand_side_by_side_with_what_they_took_and_only_the_options_that_differ(ran, capsys):
    a, b = ran("a", first(300), batch_size=8), ran("b", first(340), batch_size=16, vision={"width": 16})
    said = side_by_side(capsys, a, b).out
    assert row(said, "parameters").split() == ["1,234", "1,234"] and row(said, "minutes").split() == ["1.5", "1.5"]
    assert row(said, "samples/s").split() == ["100", "100"] and row(said, "steps").split() == ["10", "10"]
    assert row(said, "peak memory") and "50.0% (step 10)" in row(said, "best validation")
    assert row(said, "batch_size").split() == ["8", "16"] and row(said, "model.vision.width").split() == ["8", "16"]
    assert "model.vision.type" not in said and "summary" not in said and "on device" not in said
    assert "75.0% (" in said and "85.0% (" in said


def test_the_best_is_marked_where_the_paired_bootstrap_says_so_though_intervals_overlap(ran, capsys):
    runs = [ran("a", first(300)), ran("b", first(312))]  # 75 and 78 %: the same samples, and 12 more
    said = side_by_side(capsys, *runs).out
    assert row(said, "accuracy").endswith("*") and row(said, "accuracy").count("*") == 1
    assert "surely the best" in said


@pytest.mark.parametrize("how", [{"kept": False}, {"data": "b"}], ids=["without its samples", "trained on other data"])
def test_otherwise_the_intervals_decide(ran, capsys, how):
    close = [ran("a", first(300)), ran("b", first(312), **how)]
    assert "*" not in side_by_side(capsys, *close).out
    assert row(side_by_side(capsys, close[0], ran("c", first(360), **how)).out, "accuracy").endswith("*")


def test_two_that_are_alike_and_one_alone_have_no_best(ran, capsys):
    mixed = np.arange(400) % 4 > 0
    a, b = ran("a", first(300)), ran("b", mixed)  # 75 % both
    assert "*" not in side_by_side(capsys, a, b).out and "*" not in side_by_side(capsys, a).out


def test_less_perplexity_is_better(ran, capsys):
    said = side_by_side(capsys, ran("a", perplexity=1.0), ran("b", perplexity=2.0)).out
    assert row(said, "perplexity").split("*")[0].strip().startswith("2.72") and row(said, "perplexity").count("*") == 1


def test_of_parts_of_different_types_the_types_are_told_rather_than_every_field(ran, capsys):
    a, b = ran("a", first(9)), ran("b", first(9), vision={"type": "ResNetConfig", "blocks": [1, 1], "width": 4})
    said = side_by_side(capsys, a, b).out
    assert row(said, "model.vision.type").split() == ["VisionConfig", "ResNetConfig"] and "blocks" not in said


def test_runs_that_are_not_finished_or_older_or_of_other_data_are_told_and_compared(ran, capsys):
    old = {"accuracy": {"value": 0.7, "chance": 0.5, "share": True}}
    runs = [ran("a", first(300)), ran("b", scores=old, kept=False), ran("c", step=4, data="b")]
    said = side_by_side(capsys, *runs)
    assert "note: out/b: an earlier version kept no samples" in said.err
    assert "note: out/c: it is not finished: step 4 of 10\n" in said.err and "out/c: it has no metrics.json" in said.err
    assert "trained on different data" in said.err
    assert row(said.out, "accuracy").split()[-2:] == ["70.0%", "–"] and "4 of 10" in row(said.out, "steps")


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("", "its log.jsonl is empty, so it has no curves"),
        ('{"step": 0, "loss": 1.0}\n{"st', "line 2 of 2 of its log.jsonl is broken"),
        ("\x00\n[]\n", "line 1 of 2 of its log.jsonl is broken"),
        (None, "it has no log.jsonl, so no curves"),
    ],
)
def test_a_log_that_is_empty_or_broken_is_told_in_a_sentence(ran, capsys, text, note):
    a, b = ran("a", first(300)), ran("b", first(300))
    path = compare.Path(b) / "log.jsonl"
    path.unlink() if text is None else path.write_text(text)
    said = side_by_side(capsys, a, b, "--save", "c.png")
    assert f"note: out/b: {note}" in said.err and Image.open("c.png").width > 500


def test_samples_that_cannot_be_read_are_told_and_intervals_are_taken(ran, capsys):
    a, b = ran("a", first(300)), ran("b", first(312))
    (compare.Path(b) / "samples.npz").write_bytes(b"PK\x03\x04 and no more")
    said = side_by_side(capsys, a, b)
    assert "out/b: samples.npz cannot be read, so scores are compared by their intervals" in said.err
    assert "78.0% (" in said.out and "*" not in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["out/none"], "out/none does not exist: name the directory of a run"),
        (["out/a/log.jsonl"], "log.jsonl is a file: name the directory of a run"),
        (["empty"], "empty holds no run: name a directory that train.py wrote"),
        (["out/a", "out/../out/a/"], "out/a and out/../out/a/ are the same run: name it once"),
        (["out/a", "--save", "a.txt"], "--save a.txt: the name has to end in .png, .html or .json"),
        (["out/a", "--save", "nowhere/a.json"], "--save nowhere/a.* the folder nowhere does not exist"),
        (["out/a", "--save", "empty.json"], "--save empty.json: that is a folder"),
        (["out/a", "--save", "nowhere/a.html"], "--save nowhere/a.html.* nowhere"),
        (["out/b"], "metrics.json does not hold the scores of a run"),
    ],
)
def test_what_cannot_be_compared_or_saved_is_one_sentence(ran, words, message):
    ran("a", first(300))
    ran("b", scores={"accuracy": 7})
    compare.Path("empty").mkdir()
    compare.Path("empty.json").mkdir()
    (compare.Path("empty") / "log.jsonl").touch()
    with pytest.raises(UserError, match=message):
        compare.main(words)


def test_curves_numbers_and_a_page_are_written(ran, capsys):
    runs = [ran("a", first(300)), ran("<b>", first(340))]
    for name in ("c.png", "c.json", "c.html"):
        assert f"wrote {name}" in side_by_side(capsys, *runs, "--save", name).out
    pixels = np.asarray(Image.open("c.png")).astype(int)
    for colour in ((0, 114, 178), (213, 94, 0)):
        assert (abs(pixels - colour).max(axis=-1) < 16).sum() > 50
    saved = json.loads(compare.Path("c.json").read_text(encoding="utf-8"))
    assert saved["scores"]["out/a"]["accuracy"]["n"] == 400 and saved["best"] == {"accuracy": "out/<b>"}
    page = compare.Path("c.html").read_text(encoding="utf-8")
    assert "out/&lt;b&gt;" in page and "<b>" not in page and "data:image/" in page and "://" not in page


def test_the_command_minivlm_compares(ran, capsys):
    command.main(["compare", ran("a", first(300))])
    assert "75.0% (" in capsys.readouterr().out
    shutil.rmtree("out/a/checkpoints")
    command.main(["compare", "out/a"])
    assert "it has no checkpoint, which tells its recipe" in capsys.readouterr().err
