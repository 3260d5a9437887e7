"""Checkpoints of a run: whole or passed over, in the order of their steps, and the best is never lost."""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minivlm import processes, training
from minivlm.errors import UserError
from minivlm.run import Run, read_record, restore, restore_random, restore_weights
from minivlm.run_directory import check_out, foreign


@dataclass(frozen=True)
class Nothing:
    steps: int = 1


class Small(nn.Linear):
    def __init__(self):
        super().__init__(2, 3)
        self.config = Nothing()


@pytest.fixture
def small():
    model = Small()
    optimiser = training.make_optimiser(model, training.OptimiserConfig())
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    return model, optimiser


def save(run, step, small, score=0.5):
    run.save(step, small[0], None, small[1], Nothing(), score, [processes.random_state(torch.device("cpu"))])


def names(run):
    return [path.name for path in run.all()]


def test_pruning_keeps_the_last_and_the_best_however_old_that_is(tmp_path, small):
    run = Run(tmp_path, keep=2)
    for step, score in enumerate([0.1, 0.9, 0.2, 0.3, 0.8, 0.4], start=1):
        save(run, step, small, score)
    assert names(run) == ["step-000002", "step-000005", "step-000006"] and run.best().name == "step-000002"
    assert run.latest().name == "step-000006"


def test_of_equal_scores_the_latest_is_the_best_and_the_others_go(tmp_path, small):
    run = Run(tmp_path, keep=1)
    for step in (1, 2, 3):
        save(run, step, small, 0.5)
        assert run.best().name == f"step-00000{step}"
    assert names(run) == ["step-000003"]
    save(run, 4, small, 0.5 - 1e-9)
    assert run.best().name == "step-000003"


def test_a_score_that_is_no_number_is_never_the_best(tmp_path, small):
    run = Run(tmp_path, keep=3)
    for step, score in ((1, 0.0), (2, float("nan")), (3, 0.0)):
        save(run, step, small, score)
    assert run.best().name == "step-000003"


def test_steps_sort_as_numbers_beyond_a_million(tmp_path, small):
    run = Run(tmp_path, keep=1)
    for step in (999_999, 1_000_000, 10_000_000):
        save(run, step, small)
        assert run.latest().name == f"step-{step}"
    assert names(run) == ["step-10000000"]


DAMAGES = {
    "no record": lambda path: (path / "training.json").unlink(),
    "half a record": lambda path: (path / "training.json").write_text('{"step": 2, "sco'),
    "a record of another kind": lambda path: (path / "training.json").write_text("[]"),
    "deep JSON": lambda path: (path / "training.json").write_text("[" * 100_000),
    "a score that is none": lambda path: (path / "training.json").write_text(
        '{"step": 2, "score": null, "recipe": {}}'
    ),
    "another's record": lambda path: (path / "training.json").write_text('{"step": 7, "score": 1.0, "recipe": {}}'),
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "half of the weights": lambda path: os.truncate(path / "model.safetensors", 100),
    "a pipe for weights": lambda path: [(path / "model.safetensors").unlink(), os.mkfifo(path / "model.safetensors")],
    "no moments": lambda path: (path / "training.safetensors").unlink(),
    "no config": lambda path: (path / "config.json").unlink(),
    "nothing at all": lambda path: [one.unlink() for one in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_does_not_hinder_the_next(damage, tmp_path, small):
    run = Run(tmp_path, keep=2)
    save(run, 1, small, 0.1)
    save(run, 2, small, 0.9)
    damage(run.checkpoints / "step-000002")
    assert run.latest().name == run.best().name == "step-000001"
    [problem] = [problem for _, problem in run.examined() if problem]
    assert "step-000002" in problem
    save(run, 3, small, 0.2)
    assert names(run)[-1] == "step-000003"
    save(run, 2, small, 0.3)  # the run went on from the first, and comes to it again
    assert "step-000002" in names(run)


def test_what_is_no_checkpoint_is_left_alone(tmp_path, small):
    run = Run(tmp_path, keep=1)
    for name in ("step-000009.bak", "step-x", "notes"):
        (run.checkpoints / name).mkdir(parents=True)
    (run.checkpoints / "step-000008").write_text("a file")
    save(run, 1, small)
    save(run, 2, small)
    assert names(run) == ["step-000002"] and len(list(run.checkpoints.iterdir())) == 5


def test_a_checkpoint_with_something_of_the_user_in_it_is_not_deleted(tmp_path, small):
    run = Run(tmp_path, keep=1)
    save(run, 1, small)
    (run.checkpoints / "step-000001/notes.txt").write_text("mine")
    for step in (2, 3):
        save(run, step, small)
    assert (run.checkpoints / "step-000001/notes.txt").read_text() == "mine" and len(run.all()) == 2


@pytest.mark.parametrize("call", ["rmtree", "rename"])
@pytest.mark.parametrize("at", range(1, 7))
def test_a_run_that_is_killed_while_it_saves_goes_on_from_what_was_saved(call, at, tmp_path, small, monkeypatch):
    """At the n-th removal or renaming; a removal breaks off with half of the files gone."""
    run = Run(tmp_path, keep=1)
    save(run, 1, small, 0.1)
    save(run, 2, small, 0.2)
    calls, original = [], (shutil.rmtree if call == "rmtree" else Path.rename)

    def kill(path, *args, **kwargs):
        if path.exists():
            calls.append(path)
        if len(calls) == at:
            calls.append(path)
            if call == "rmtree":
                next(path.iterdir()).unlink()
            raise KeyboardInterrupt
        return original(path, *args, **kwargs)

    monkeypatch.setattr(*((shutil, "rmtree", kill) if call == "rmtree" else (Path, "rename", kill)))
    with contextlib.suppress(KeyboardInterrupt):
        save(run, 3, small, 0.3)
    monkeypatch.undo()
    with Run(tmp_path, keep=1) as again:
        assert read_record(again.latest())["step"] in (2, 3)
        assert not list(again.checkpoints.glob(".step-*"))
        restore(again.latest(), *small)
        save(again, 4, small, 0.4)
        assert names(again) == ["step-000004"]


def test_a_run_that_was_killed_while_its_log_was_begun_can_be_started_again(tmp_path):
    (tmp_path / ".log.jsonl.12345.tmp").touch()
    (tmp_path / ".lock").touch()
    check_out(str(tmp_path), {})
    with Run(tmp_path) as run:
        assert run.set_aside() is None and [one.name for one in tmp_path.iterdir()] == [".lock"]


def test_leftovers_of_a_killed_process_are_swept_up_when_the_next_begins(tmp_path):
    leftover, other = (tmp_path / "checkpoints" / name for name in (".step-000400.12345", ".step-000300.12345.old"))
    for name in ("config.json", ".model.safetensors.12345.tmp", ".unfinished.json", ".unfinished.json.12345.tmp"):
        for directory in (leftover, other):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / name).touch()
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n')
    assert not foreign(tmp_path)  # a run with such leftovers is a run
    with Run(tmp_path, write=False):
        assert leftover.exists()  # only the process that writes sweeps
    beside, plan = tmp_path / ".model.safetensors.12345.tmp", tmp_path / ".unfinished.json"
    beside.touch()
    plan.touch()
    with Run(tmp_path):
        assert not leftover.exists() and not other.exists()
        assert beside.exists()  # a part of a model that is whole, and will be put in place
    plan.unlink()
    with Run(tmp_path):
        assert not beside.exists()


def test_a_checkpoint_that_does_not_fit_is_one_sentence(tmp_path, small):
    run, (model, optimiser) = Run(tmp_path), small
    save(run, 1, small)
    path = run.latest()

    def change(name, edit):
        tensors = load_file(path / name)
        edit(tensors)
        save_file(tensors, path / name)

    change("training.safetensors", lambda tensors: tensors.pop("random.0.cpu"))
    with pytest.raises(UserError, match="lacks the random state"):
        restore_random(path, torch.device("cpu"), 0, 1)
    change("training.safetensors", lambda tensors: tensors.update({"optimiser.weight.exp_avg": torch.zeros(5)}))
    with pytest.raises(UserError, match="the moments of weight"):
        restore(path, model, optimiser)
    change("model.safetensors", lambda tensors: tensors.update(weight=torch.zeros(1, 2)))
    with pytest.raises(UserError, match=r"1 of another shape or kind .weight."):
        restore_weights(path, model)
    change("model.safetensors", lambda tensors: tensors.pop("weight"))
    with pytest.raises(UserError, match=r"1 missing .weight."):
        restore_weights(path, model)


def test_a_directory_without_a_whole_checkpoint_cannot_be_resumed(tmp_path, small):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        Run(tmp_path).latest()
    save(run := Run(tmp_path), 1, small)
    (run.latest() / "training.json").unlink()
    with pytest.raises(UserError, match=r"there is no complete checkpoint in .*training\.json is missing\); leave out"):
        run.latest()
