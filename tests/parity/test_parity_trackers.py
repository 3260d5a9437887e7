"""What --log sends arrives: event files, wandb's and trackio's own files, read back by their packages, without a network."""

import sqlite3

import pytest

from minivlm.trackers import Trackers


def train_and_resume(name, directory):
    """Five steps; then, from a checkpoint after three of them, five more."""
    for first in (0, 3):
        with Trackers(name, directory, {"recipe": "clip", "seed": 1}, first_step=first, key="0a1b2c3d") as tracked:
            for step in range(first, first + 5):
                tracked.send({"step": step, "loss": float(first), "learning_rates": {"vision": 0.5}}, step)
            tracked.send({"step": step, "validation": 0.25, "validated": "Recall@1"}, step)
        assert list(tracked.open) == [name]  # nothing failed


def test_tensorboard_shows_one_curve_of_a_run_that_was_resumed(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_and_resume("tensorboard", tmp_path)
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "learning_rates/vision", "validation"}
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        *((step, 0.0) for step in range(3)),
        *((step, 3.0) for step in range(3, 8)),
    ]


def test_wandb_keeps_the_id_of_a_run_that_was_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_and_resume("wandb", tmp_path)
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}) == 1


def test_trackio_goes_on_with_a_run_that_was_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    train_and_resume("trackio", tmp_path / "clip")
    with sqlite3.connect(tmp_path / "trackio/minivlm.db") as kept:
        rows = kept.execute("SELECT run_name, step FROM metrics").fetchall()
    assert {name for name, _ in rows} == {"clip-0a1b2c3d"} and {step for _, step in rows} == set(range(8))
