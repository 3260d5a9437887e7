"""What a run shows of itself: its log, its curves, and trackers."""

import json
import math
import sys
from types import ModuleType

import pytest
import torch
from PIL import Image

import train
from minivlm import trackers, training_log
from minivlm.datasets import make_shapes
from minivlm.errors import UserError
from minivlm.recipes.options import Options
from tests.test_train import TINY

NUMBERS = {"loss": 1.0, "learning_rates/a": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "clip"
    make_shapes(out.parent / "world", train=64, image_size=32, progress=False)
    where = {"data": out.parent / "world", "out": out, "device": "cpu", "save_every": 4, **TINY}
    train.main(["clip", *(str(word) for name, value in where.items() for word in (f"--{name}", value))])
    return out


def test_a_log_tells_pace_memory_and_validation(run):
    log = training_log.read_log(run / "log.jsonl")
    assert [line["step"] for line in log] == list(range(len(log)))
    assert all(line["samples_per_second"] > 0 and line["peak_memory"] > 10**6 for line in log)
    seconds = [line["seconds"] for line in log]
    assert seconds == sorted(seconds) and seconds[-1] > 0
    judged = {line["step"] + 1: line["validation"] for line in log if "validation" in line}
    record = json.loads(max((run / "checkpoints").iterdir()).joinpath("training.json").read_text())
    assert judged[record["step"]] == record["score"] and len(judged) >= 2
    assert log[-1]["validated"] == "text→image Recall@1"


def test_a_run_draws_its_curves(run):
    image = Image.open(run / "curves.png")
    assert image.format == "PNG" and image.size[0] > 800 and len(image.convert("L").getcolors()) > 10
    record = json.loads(max((run / "checkpoints").iterdir()).joinpath("training.json").read_text())
    assert record["chances"] == {"loss": pytest.approx(math.log(16))} and len(record["key"]) == 8


def test_the_time_before_a_resume_counts():
    pace = training_log.Pace(8, torch.device("cpu"), 100.0, 5)
    told = pace(5)
    assert 100 <= told["seconds"] < 101 and told["samples_per_second"] > 0
    assert "seconds" not in training_log.Pace(8, torch.device("cpu"), None, 5)(5)  # of an earlier version


def test_a_validation_stands_beside_its_step(tmp_path):
    log = training_log.Log(tmp_path / "log.jsonl", 0)
    log.add(0, {"loss_a": torch.tensor(1.0)}, torch.tensor(1.0), 1e-3)
    log.flush(lambda step: [])
    log.validated(1, "Recall@1", 0.5)
    log.validated(1, "Recall@1", 0.5)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1  # whoever reads lines finds the same in each
    [line] = training_log.read_log(tmp_path / "log.jsonl")
    assert line["loss"] == 1.0 and line["validation"] == 0.5
    again = training_log.Log(tmp_path / "log.jsonl", 1)  # resumed there
    assert training_log.read_log(again.path) == [line]


def test_trackers_are_refused_before_training_where_they_are_missing(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--log wandb needs the package wandb: pip install wandb"):
        trackers.require("wandb")
    with pytest.raises(ValueError, match=r"log is 'wandbb', but there are tensorboard, wandb, trackio$"):
        Options(log="tensorboard,wandbb")
    assert Options(log="tensorboard").resume_command("clip").endswith("--log tensorboard --resume")


@pytest.fixture
def fake(monkeypatch):
    """wandb and trackio as far as they are called."""
    sent = {}
    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        kept = sent[name] = {"lines": [], "finished": 0}

        def init(kept=kept, module=module, **about):
            kept["about"] = about
            return module

        def log(numbers, step=None, kept=kept):
            kept["lines"].append((step, numbers) if step is not None else (numbers.pop("step"), numbers))

        def finish(kept=kept):
            kept["finished"] += 1

        module.init, module.log, module.finish = init, log, finish
        module.define_metric = lambda name, step_metric=None: None
        monkeypatch.setitem(sys.modules, name, module)
    return sent


def test_trackers_get_every_number_under_one_name_for_a_run(fake, tmp_path):
    for first in (0, 2):  # and resumed
        tracked = trackers.Trackers("wandb,trackio", tmp_path / "clip", {"seed": 1}, first_step=first, key="0a1b")
        with tracked:
            tracked.send({"step": first, "loss": 1.0, "validated": "Recall@1", "learning_rates": {"a": 0.5}}, first)
    ids = {name: fake[name]["about"].get("id", fake[name]["about"]["name"]) for name in fake}
    assert all(fake[name]["lines"] == [(0, NUMBERS), (2, NUMBERS)] for name in fake)
    assert all(fake[name]["finished"] == 2 and fake[name]["about"]["resume"] == "allow" for name in fake)
    assert ids == {"wandb": "0a1b", "trackio": "clip-0a1b"}


def test_a_tracker_that_fails_is_told_of_once(fake, tmp_path, monkeypatch, capsys):
    def fail(numbers):
        raise ConnectionError("no network")

    tracked = trackers.Trackers("wandb,trackio", tmp_path / "clip", {}, first_step=0, key="0a1b")
    monkeypatch.setattr(sys.modules["wandb"], "log", fail)
    for step in range(3):
        tracked.send({"loss": 1.0}, step)
    assert (
        capsys.readouterr().err.count("--log wandb failed and is left out from here on (ConnectionError: no network)")
        == 1
    )
    assert len(fake["trackio"]["lines"]) == 3


def test_a_second_run_in_one_place_has_another_key():
    assert trackers.new_key() != trackers.new_key()


def test_what_waits_is_sent_when_training_ends_in_an_error(fake, tmp_path):
    with pytest.raises(UserError), trackers.Trackers("wandb", tmp_path, {}, first_step=0, key="0a1b"):
        raise UserError("the loss is not finite")
    assert fake["wandb"]["finished"] == 1


def test_the_bar_tells_of_losses_alone(tmp_path):
    log = training_log.Log(tmp_path / "log.jsonl", 0, pace=training_log.Pace(8, torch.device("cpu"), 0.0, 0))
    log.add(0, {"contrast": torch.tensor(1.0)}, torch.tensor(1.0), 1e-3)
    assert not log.flush(lambda step: []).keys() & {"seconds", "samples_per_second", "peak_memory"}
    [line] = training_log.read_log(tmp_path / "log.jsonl")
    assert line.keys() >= {"seconds", "samples_per_second", "peak_memory"}
