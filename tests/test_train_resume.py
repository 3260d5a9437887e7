"""train.py --resume: the trajectory that was begun, or a sentence that names what is different."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import minivlm
import train
from minivlm import training_log
from minivlm.datasets.fingerprint import changes, fingerprint
from minivlm.errors import UserError
from minivlm.recipes import plan
from minivlm.recipes.job import Job
from minivlm.recipes.options import Options
from minivlm.run import Run, read_record

HOW = ["--device", "cpu", "--precision", "fp32"]
SMALL = (
    "--model.vision.width 16 --model.vision.heads 2 --model.vision.depth 1 --model.text.width 16 --model.text.heads 2"
)
SMALL += " --model.text.depth 1 --model.embed_width 8 --model.vision.image_size 16 --data.vocab_size 300"
SMALL += " --batch_size 8 --steps 4 --save_every 2 --seed 3"


def a_picture(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), colour).save(path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run on a folder of two classes, stopped after two of four steps."""
    place = tmp_path_factory.mktemp("begun")
    for i in range(24):
        a_picture(place / f"photos/cat/{i}.png", (i * 8, 100, 50))
        a_picture(place / f"photos/dog/{i}.png", (i * 8, 200, 50))
    data = ["--data", str(place / "photos"), "--out", str(place / "a run/clip")]
    train.main(["clip", *data, *HOW, *SMALL.split(), "--stop_at", "2"])
    return place


@pytest.fixture
def place(begun, tmp_path, monkeypatch):
    """A copy of it; the data are where they were."""
    shutil.copytree(begun / "a run", tmp_path / "a run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copied(begun, place):
    """The data of the run are a copy as well."""
    shutil.copytree(begun / "photos", place / "photos")
    for path in place.glob("a run/clip/checkpoints/*/training.json"):
        path.write_text(path.read_text().replace(str(begun / "photos"), str(place / "photos")))
    return place


def resume(*words):
    train.main(["clip", "--out", "a run/clip", "--resume", *HOW, *words])


def steps_and_rates(out="a run/clip"):
    return {line["step"]: line["learning_rate"] for line in training_log.read_log(Path(out) / "log.jsonl")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "4"], "--seed is 3 in the run that is resumed, and 4 is asked for"),
        (["--batch_size", "16"], "--batch_size is 8 in the run"),
        (["--model.vision.depth", "2"], r"--model\.vision\.depth is 1 in the run"),
        (["--data.augment", "false"], r"--data\.augment is True in the run"),
        (["--bucket_steps", "2"], "--bucket_steps is 1 in the run"),
        (["--steps", "1"], "--steps 1: the run has done 2 steps already"),
        (["--stop_at", "2"], "--stop_at 2: the run has done 2 steps already"),
        (["--model.vision.dpeth", "2"], "unknown option --model.vision.dpeth"),
    ],
)
def test_what_would_make_another_run_of_it_is_refused_before_anything_is_done(words, message, place, capsys):
    with pytest.raises(UserError, match=message):
        resume(*words)
    assert capsys.readouterr().out == "" and Run("a run/clip").latest().name == "step-000002"


def test_what_may_change_is_applied_and_told(place, capsys):
    resume("--steps", "5", "--optimiser.learning_rate", "1e-5", "--keep", "3")
    said = capsys.readouterr().out
    for line in ("steps: 4 → 5, as asked for", "optimiser.learning_rate: 0.002 → 1e-05", "keep: 2 → 3"):
        assert line in said
    rates = steps_and_rates()
    assert list(rates) == [0, 1, 2, 3, 4] and rates[1] > 1e-4 and 0 < rates[2] <= 1e-5


def test_nothing_is_told_where_nothing_is_different(place, capsys):
    resume()
    said = capsys.readouterr().out
    assert (
        "resumed from a run/clip/checkpoints/step-000002\n" in said and "python sample.py search 'a run/clip' " in said
    )
    assert "→ " not in said.partition("resumed from")[2].partition("on held-out data")[0]


def test_another_number_of_threads_is_told(place, capsys, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    resume("--stop_at", "3")
    assert f"not to the bit what it would have been: threads {threads} → {threads + 1}" in capsys.readouterr().out


def test_the_command_that_goes_on_does_so_also_where_names_have_spaces(begun, place, capsys):
    resume("--stop_at", "3")
    command = capsys.readouterr().out.splitlines()[-1].partition("Go on with: ")[2]
    assert command.startswith("python train.py clip --out 'a run/clip' --device cpu")
    train.main(shlex.split(command)[2:])
    assert list(steps_and_rates()) == [0, 1, 2, 3]
    train.main(["clip", "--out", str(begun / "whole"), "--data", str(begun / "photos"), *HOW, *SMALL.split()])
    one, two = (
        load_file(d / "checkpoints/step-000004/model.safetensors") for d in (begun / "whole", Path("a run/clip"))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)  # three pieces are one whole


def replaced_by_one_of_the_same_size(photos):
    path = photos / "cat/3.png"
    size = path.stat().st_size
    a_picture(path, (9, 9, 9))
    assert path.stat().st_size == size


CHANGED = {
    "a class is renamed": (lambda photos: (photos / "dog").rename(photos / "hound"), "dog/.*24 files then, none now"),
    "a picture is new": (lambda photos: a_picture(photos / "cat/new.png", (1, 2, 3)), "cat/.*24 files then, 25 now"),
    "a picture is replaced": (replaced_by_one_of_the_same_size, "cat/.*the names or the contents of its 24 files"),
    "a picture is renamed": (lambda photos: (photos / "cat/3.png").rename(photos / "cat/x.png"), "cat/.*the names"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED)
def test_other_data_than_the_run_began_with_are_refused_by_name(change, message, copied):
    change(copied / "photos")
    with pytest.raises(UserError, match=rf"are not those that the run began with, in .*{message}"):
        resume()
    assert Run("a run/clip").latest().name == "step-000002"


def test_another_folder_is_refused_and_the_same_data_elsewhere_are_not(copied, capsys):
    a_picture(copied / "others/cat/new.png", (1, 2, 3))
    for name in ("cat", "dog"):
        shutil.copytree(copied / "photos" / name, copied / "others" / name, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"the data in others are not those that the run began with, in .*photos"):
        resume("--data", "others")
    (copied / "photos").rename(copied / "moved")
    (copied / "moved/README.md").write_text("what this is")
    resume("--data", "moved", "--stop_at", "3")
    assert f"the data are read from moved in place of {copied / 'photos'}" in capsys.readouterr().out


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_what_it_cannot_know(place, capsys):
    for path in place.glob("a run/clip/checkpoints/*/training.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({name: record[name] for name in ("step", "score", "recipe")}))
    resume("--stop_at", "3")
    assert "did not record its data: they cannot be compared" in capsys.readouterr().out
    assert read_record(Run("a run/clip").latest())["seconds"] is None


def test_a_checkpoint_tells_the_size_of_the_model_and_the_seconds_of_all_training(place):
    first, latest = (read_record(place / f"a run/clip/checkpoints/step-00000{step}") for step in (1, 2))
    assert 0 < first["seconds"] < latest["seconds"]
    resume("--save_every", "1", "--keep", "1")
    record, model = read_record(Run("a run/clip").latest()), minivlm.load(Run("a run/clip").latest())[0]
    assert record["seconds"] > latest["seconds"]
    assert record["parameters"] == record["trained"] == sum(p.numel() for p in model.parameters())


def test_a_checkpoint_that_is_not_whole_is_passed_over_and_told(place, capsys):
    (place / "a run/clip/checkpoints/step-000002/training.json").unlink()
    resume()
    said = capsys.readouterr().out
    assert "step-000002 is passed over: " in said and "resumed from a run/clip/checkpoints/step-000001" in said
    assert list(steps_and_rates()) == [0, 1, 2, 3]


def test_a_run_is_not_resumed_as_another_recipe(place):
    for name in ("clip-resnet", "vqa"):
        with pytest.raises(UserError, match=rf"a run/clip holds a run of clip, not of {name}"):
            train.main([name, "--out", "a run/clip", "--resume"])


def test_a_finished_run_says_that_it_is(place, capsys):
    resume()
    before = {path: path.stat().st_mtime_ns for path in Path("a run").rglob("*") if path.is_file()}
    capsys.readouterr()
    resume()
    assert "is finished: all 4 steps are done. For more, give --steps." in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("a run").rglob("*") if path.is_file()} == before
    resume("--steps", "5")
    assert Run("a run/clip").latest().name == "step-000005"


def test_the_model_is_there_before_it_is_evaluated(place, monkeypatch):
    def fail(self):
        raise UserError("a test picture is broken.")

    monkeypatch.setattr(Job, "evaluate", fail)
    sentence = r"a test picture is broken\. The model, of step \d, is in a run/clip all the same"
    with pytest.raises(UserError, match=sentence):
        resume()
    minivlm.load("a run/clip")
    assert not Path("a run/clip/metrics.json").exists()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    resume()
    assert Path("a run/clip/metrics.json").exists()


def test_a_finished_run_that_is_started_anew_and_stopped_is_still_there(begun, place):
    resume()
    wanted = load_file("a run/clip/model.safetensors")
    for _ in range(2):
        train.main(
            ["clip", "--data", str(begun / "photos"), "--out", "a run/clip", *HOW, *SMALL.split(), "--stop_at", "1"]
        )
    kept = load_file("a run/clip.previous/model.safetensors")
    assert wanted.keys() == kept.keys() and all(torch.equal(wanted[name], kept[name]) for name in wanted)
    assert Path("a run/clip.previous-2/log.jsonl").exists()


def test_a_chain_that_is_stopped_on_the_way_goes_on_with_the_command_it_began_with(place):
    argv = ["llava", "--out", "out/my llava"]
    todo = [("lm", None, Options(out="out/lm")), ("llava", None, Options(out="out/my llava"))]
    assert plan.go_on(todo, todo[0][2], argv) == "python train.py llava --out 'out/my llava'"
    assert plan.go_on(todo, todo[1][2], argv) == "python train.py llava --out 'out/my llava' --resume"


def test_what_a_chain_finds_and_was_trained_on_other_data_is_told(begun, place):
    shutil.copytree("a run/clip", "out/photos-clip")
    todo = plan.chain(*plan.command_line(["blip", "--data", str(begun / "photos")]))
    assert [name for name, *_ in todo] == ["clip", "blip"] and todo[0][2].resume  # it goes on with what was begun
    assert plan.announcement(todo) == "blip builds on what is not there yet; trained first: clip (out/photos-clip)"
    Path("out/photos-clip/config.json").touch()
    assert plan.announcement(plan.chain(*plan.command_line(["blip", "--data", str(begun / "photos")]))) == ""
    todo = plan.chain(*plan.command_line(["blip", "--data", "elsewhere/photos"]))
    told = f"out/photos-clip, which it builds on, was trained on {begun / 'photos'}, not on elsewhere/photos"
    assert plan.announcement(todo) == told


def test_the_batch_of_a_small_folder_is_one_that_the_processes_share(begun, place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "7")
    (name, recipe, _), _ = plan.chain(
        *plan.command_line(["flamingo", "--data", str(begun / "photos"), "--language_from", "x"])
    )
    assert name == "clip-resnet" and recipe.batch_size == 35  # of 38


def test_the_command_that_goes_on_is_torchruns_where_it_was(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Options().resume_command("clip") == "torchrun --nproc_per_node=2 train.py clip --resume"


def test_a_fingerprint_reads_texts_whole_and_leaves_out_what_is_hidden(tmp_path):
    (tmp_path / "captions.jsonl").write_text("a" * 20_000 + "red" + "a" * 20_000)
    before = fingerprint(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/x.bin").write_text("x")
    for name in ("README.md", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_text("x")
    assert fingerprint(tmp_path) == before
    (tmp_path / "captions.jsonl").write_text("a" * 20_000 + "rot" + "a" * 20_000)
    assert changes(before, fingerprint(tmp_path)) == ["*.jsonl: the names or the contents of its 1 files"]
