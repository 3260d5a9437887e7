"""train.py through its real entry point: what a run leaves, how it resumes, what it says when something is wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minivlm
import train
from minivlm import atomic_writing, saving, training_log
from minivlm import run as run_module
from minivlm.datasets.shapes import make_shapes
from minivlm.errors import UserError
from minivlm.recipes.job import Job

ROOT = Path(train.__file__).parent
TINY = {
    "steps": 10,
    "batch_size": 16,
    "save_every": 4,
    "seed": 3,
    "device": "cpu",
    "precision": "fp32",
    "model.vision.image_size": 32,
    "model.vision.width": 16,
    "model.vision.mlp_width": 32,
    "model.vision.depth": 2,
    "model.vision.heads": 2,
    "model.text.width": 16,
    "model.text.mlp_width": 32,
    "model.text.depth": 1,
    "model.text.heads": 2,
    "model.text.dropout": 0.1,
    "model.embed_width": 16,
    "data.vocab_size": 300,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=64, image_size=32, progress=False)
    return directory


def arguments(world, out, *words, **changes):
    options = TINY | {"data": world, "out": out} | {k.replace("__", "."): v for k, v in changes.items()}
    return ["clip", *words, *(str(x) for name, value in options.items() for x in (f"--{name}", value))]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "clip"
    train.main(arguments(world, out))
    return out


def losses(out):
    return [line["loss"] for line in training_log.read_log(out / "log.jsonl")]


def test_a_run_leaves_a_model_its_scores_a_log_and_a_picture(finished, world):
    model, processor = minivlm.load(finished)
    tokens, mask = processor.text(["a red circle", "a large blue star at the top"])
    assert model.encode_text(tokens, mask).norm(dim=1).tolist() == pytest.approx([1, 1])
    metrics = json.loads((finished / "metrics.json").read_text())
    assert {"zero-shot, seen pairs", "zero-shot, never-seen pairs", "text→image R@1", "image→text mAP"} <= set(metrics)
    assert metrics["text→image R@1"]["chance"] == pytest.approx(1 / 500)
    assert [line["step"] for line in training_log.read_log(finished / "log.jsonl")] == list(range(10))
    from PIL import Image

    assert Image.open(finished / "picture.png").size[0] > 300


def test_the_last_checkpoints_and_the_best_are_kept(finished):
    run = run_module.Run(finished)
    kept = [path.name for path in run.all()]
    assert {"step-000008", "step-000010"} <= set(kept) and len(kept) <= 3
    best = max(run_module.read_record(path)["score"] for path in run.all())
    assert run_module.read_record(run.best())["score"] == best


@pytest.mark.parametrize("stop", [4, 5])
def test_ten_steps_are_five_and_resume_and_five_to_the_bit(finished, world, tmp_path, stop, capsys):
    train.main(arguments(world, tmp_path / "clip", stop_at=stop))
    assert f"stopped after step {stop} of 10" in capsys.readouterr().out
    train.main(["clip", "--resume", "--out", str(tmp_path / "clip"), "--device", "cpu", "--precision", "fp32"])
    assert losses(tmp_path / "clip") == losses(finished)
    once, twice = (load_file(d / "checkpoints/step-000010/model.safetensors") for d in (finished, tmp_path / "clip"))
    assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)
    once, twice = (load_file(d / "checkpoints/step-000010/training.safetensors") for d in (finished, tmp_path / "clip"))
    assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(finished, world, tmp_path, capsys, monkeypatch):
    original = Job.batch

    def batch(self, step, *args):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return original(self, step, *args)

    monkeypatch.setattr(Job, "batch", batch)
    out = tmp_path / "clip"
    train.main(arguments(world, out))
    said = capsys.readouterr().out
    assert "stopped after step 7 of 10" in said and f"python train.py clip --out {out}" in said and "--resume" in said
    assert run_module.Run(out).latest().name == "step-000007"
    monkeypatch.undo()
    train.main(["clip", "--resume", "--out", str(out), "--device", "cpu", "--precision", "fp32"])
    assert losses(out) == losses(finished)


def test_micro_batches_give_the_trajectory_of_the_whole_batch(world, tmp_path):
    plain = {"model.text.dropout": 0.0, "steps": 4}
    for name, extra in (("whole", {}), ("parts", {"micro_batch": 6})):
        train.main(arguments(world, tmp_path / name, **plain, **extra))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_a_new_run_sets_the_old_one_aside(world, tmp_path):
    out = tmp_path / "clip"
    for seed in (1, 2):
        train.main(arguments(world, out, steps=2, seed=seed))
    seeds = [run_module.read_record(run_module.Run(d).latest())["recipe"]["seed"] for d in (f"{out}.previous", out)]
    assert seeds == [1, 2]


def test_a_batch_larger_than_the_data_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="batch of 100 cannot be filled from the 64 training images"):
        train.main(arguments(world, tmp_path / "clip", batch_size=100))


def test_sizes_that_do_not_fit_are_refused(world, tmp_path):
    with pytest.raises(UserError, match="cannot be built: width 16 is not a multiple of 3 heads"):
        train.main(arguments(world, tmp_path / "clip", model__vision__heads=3))


@pytest.mark.parametrize(
    ("save_every", "message"),
    [
        (40, r"not finite at step \d+.*learning rate.*gradient norm.*train/"),
        (1, r"after step 1, learning rate 1\.00e\+30: .*NaN or infinite"),  # seen before the next loss is
    ],
)
def test_a_diverging_run_stops_at_the_step_and_keeps_its_checkpoints(world, tmp_path, save_every, message):
    rates = {"optimiser.learning_rate": 1e30, "optimiser.warmup": 1}
    with pytest.raises(UserError, match=message):
        train.main(arguments(world, tmp_path / "clip", save_every=save_every, **rates))
    for path in run_module.Run(tmp_path / "clip").all():
        assert all(t.isfinite().all() for t in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize("name", [".model.safetensors.{}.tmp", "training.safetensors"])
def test_a_full_disk_loses_nothing_that_was_saved(name, world, tmp_path, monkeypatch):
    original, name = atomic_writing.write_tensors, name.format(os.getpid())

    def full(path, tensors):
        if "step-000008" in str(path) and path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, tensors)

    for module in (atomic_writing, saving):
        monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(UserError, match="disk is full"):
        train.main(arguments(world, tmp_path / "clip"))
    assert {path.name for path in (tmp_path / "clip/checkpoints").iterdir()} == {"step-000001", "step-000004"}


def test_two_processes_take_the_steps_of_one(world, tmp_path):
    """The contrastive loss sees the whole batch, so that the weights are those of a single process but for rounding."""
    same = {"model.text.dropout": 0.0, "steps": 3}
    train.main(arguments(world, tmp_path / "one", **same))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
    ]
    subprocess.run(command + arguments(world, tmp_path / "two", **same), check=True, capture_output=True, cwd=ROOT)
    one, two = (load_file(tmp_path / name / "checkpoints/step-000003/model.safetensors") for name in ("one", "two"))
    for name in one:
        if not name.endswith("k_proj.bias"):  # its gradient is zero but for rounding, which Adam makes steps of
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)  # of the whole batch


def test_mistakes_on_the_command_line_are_one_line_and_exit_code_2():
    result = subprocess.run([sys.executable, "train.py", "clpi"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: unknown recipe 'clpi'") and result.stderr.count("\n") == 1


def test_a_checkpoint_of_an_earlier_version_goes_on_with_its_random_state(finished, tmp_path):
    """Which was that of one process, and of all its GPUs."""
    record = run_module.Run(finished).latest()
    tensors = load_file(record / "training.safetensors")
    tensors["random.cpu"] = tensors.pop("random.0.cpu")
    atomic_writing.write_tensors(tmp_path / "training.safetensors", tensors)
    drawn = []
    for path in (record, tmp_path):
        assert run_module.restore_random(path, torch.device("cpu"), 0, 1) == ""
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
