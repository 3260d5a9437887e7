"""--precision fp16: losses are scaled for the backward pass, alone, in parts and by two processes; on a CPU, where CI is.

The processes are this file, run twice (see the end).
"""

import math
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from minivlm import training, training_log
from minivlm.datasets.shapes import make_shapes
from minivlm.errors import UserError, run_command_line
from minivlm.layers import TransformerConfig
from minivlm.layers.transformer import Transformer
from minivlm.losses import backward, next_token_loss, scaled
from minivlm.run import Run, read_record
from tests.small_recipes import small_job, small_world
from tests.test_train import arguments
from tests.test_train_processes import two

CPU = torch.device("cpu")
HALF = {"precision": "fp16", "model.text.dropout": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=64, image_size=32, progress=False)
    return directory


def gentle(device, dtype):
    """A scale at which no step of these small models overflows."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)


def log_of(directory) -> list[dict]:
    """Without what another machine does faster."""
    costs = {"seconds", "samples_per_second", "peak_memory"}
    return [{k: line[k] for k in line.keys() - costs} for line in training_log.read_log(directory / "log.jsonl")]


@pytest.fixture(scope="module")
def once(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "once"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "loss_scaler", gentle)
        train.main(arguments(world, out, **HALF, steps=8))
    return out


def test_the_loss_of_the_log_is_that_of_fp32(once, world, tmp_path):
    train.main(arguments(world, tmp_path / "fp32", **HALF | {"precision": "fp32"}, steps=8))
    half, full = log_of(once), log_of(tmp_path / "fp32")
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in full], rel=2e-2)
    norms = zip(half, full, strict=True)
    assert all(a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=0.1) for a, b in norms)
    assert half[-1]["skipped"] == 0 and "skipped" not in full[-1]


def test_the_scale_is_saved_and_a_resumed_run_is_the_same_to_the_bit(once, world, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "loss_scaler", gentle)
    train.main(arguments(world, tmp_path / "twice", **HALF, steps=8, stop_at=4))
    monkeypatch.undo()  # the scale is that of the checkpoint
    train.main(["clip", "--resume", "--out", str(tmp_path / "twice"), "--device", "cpu", "--precision", "fp16"])
    assert log_of(tmp_path / "twice") == log_of(once)
    scales = [read_record(Run(out).latest())["loss_scale"] for out in (once, tmp_path / "twice")]
    assert scales[0] == scales[1] and scales[0]["_growth_tracker"] == 8


def test_steps_that_overflow_are_skipped_counted_and_told(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "loss_scaler", lambda device, dtype: torch.amp.GradScaler("cpu", init_scale=2.0**24))
    train.main(arguments(world, tmp_path / "run", **HALF, steps=14, save_every=14))
    lines = log_of(tmp_path / "run")
    skipped = [line for line in lines if line["gradient_norm"] is None]
    assert 1 < len(skipped) < 12 and lines[-1]["skipped"] == len(skipped)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert f"{len(skipped)} of 14 steps were skipped" in capsys.readouterr().out
    scale = read_record(Run(tmp_path / "run").latest())["loss_scale"]["scale"]
    assert scale == 2.0 ** (24 - len(skipped))


def test_gradients_that_never_become_finite_end_the_run(tmp_path):
    log = training_log.Log(tmp_path / "log.jsonl", 0, skips=True)
    for step in range(30):
        log.add(step, {"a": torch.tensor(1.0)}, torch.tensor(math.inf), 0.1)
    with pytest.raises(UserError, match=r"not finite at step 20: .* or take --precision fp32; the last checkpoint"):
        log.flush(lambda step: ["a.png"])


def test_gradients_are_unscaled_before_they_are_clipped():
    model = nn.Linear(3, 1, bias=False)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    before = model.weight.detach().clone()
    scaler.scale((model.weight * torch.tensor([[3.0, 0.0, 4.0]])).sum()).backward()
    assert training.optimise(model, optimiser, 1.0, 1.0, scaler).item() == pytest.approx(5.0)
    torch.testing.assert_close(before - model.weight.detach(), torch.tensor([[0.6, 0.0, 0.8]]))


@pytest.mark.parametrize("name", ["clip", "coca", "lm"])
def test_in_parts_gradients_are_scaled_alike(name, tmp_path):
    work = small_job(name, small_world(tmp_path, train=64))
    model, batch = work.model, work.batch(0)

    def gradients(scale):
        model.zero_grad()
        with scaled(lambda loss: loss * scale):
            losses = model.backward_in_parts(batch, 2)
        return losses, {k: p.grad / scale for k, p in model.named_parameters() if p.grad is not None}

    (plain, one), (same, other) = gradients(1.0), gradients(1024.0)
    assert plain == same
    torch.testing.assert_close(one, other)


def test_the_chunked_loss_keeps_the_gradients_of_rare_words():
    torch.manual_seed(0)
    x, weight = torch.randn(300, 8), torch.randn(5000, 8) / 10
    labels = torch.randint(0, 10, (1, 300))

    def gradients(dtype, **options):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with training.autocast(CPU, dtype), scaled(lambda loss: loss * 65536):
            backward({"loss": next_token_loss(leaves[0][None], labels, leaves[1], **options)})
        return [leaf.grad / 65536 for leaf in leaves]

    for half, full in zip(gradients(torch.float16, chunk=64), gradients(torch.float32), strict=True):
        assert F.cosine_similarity(half[10:].flatten(), full[10:].flatten(), dim=0) > 0.999
        assert torch.allclose(half.norm(), full.norm(), rtol=1e-2)


def test_a_model_that_fp16_cannot_hold_is_refused_or_left_in_fp32():
    model = nn.Module()
    model.fp32_in_fp16 = "mlp.down_proj.weight"
    model.stack = Transformer(TransformerConfig(width=8, depth=1, heads=2))
    with pytest.raises(UserError, match=r"--precision fp16: activations of this Module, .*; take bf16 or fp32"):
        training.suited(torch.float16, model, asked="fp16")
    assert training.suited(torch.float16, model, asked="auto")[0] == torch.float32
    assert training.suited(torch.bfloat16, model, asked="auto") == (torch.bfloat16, "")
    with pytest.raises(UserError, match="fp16 trains on cuda and cpu, not on mps"):
        training.choose_precision(torch.device("mps"), "fp16")


def test_two_processes_scale_as_one_does_with_checkpointed_activations_in_parts_or_whole(once, world, tmp_path):
    for returncode, _, errors in two("train_two", world, tmp_path, script=__file__):
        assert returncode == 0, errors
    expected = [line["loss"] for line in log_of(once)]
    for name in ("whole", "parts"):
        found = log_of(tmp_path / name)
        assert [line["loss"] for line in found] == pytest.approx(expected, rel=2e-2) and found[-1]["skipped"] == 0


# ---- the two processes -----------------------------------------------------------------------------------------------


def train_two(world: str, out: str) -> None:
    training.loss_scaler = gentle
    ports = os.environ["PORTS"].split()
    for port, name, options in zip(ports, ("whole", "parts"), ({}, {"micro_batch": 4}), strict=False):
        os.environ["MASTER_PORT"] = port
        argv = arguments(world, f"{out}/{name}", **HALF, **options, steps=8)
        run_command_line(lambda _, argv=argv: train.main([*argv, "--activation_checkpointing"]))


if __name__ == "__main__":
    {"train_two": train_two}[sys.argv[1]](*sys.argv[2:])
