"""Schedule, parameter groups, precision, log: the parts under the loop."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from minivlm import training, training_log
from minivlm.errors import UserError
from minivlm.layers import TextConfig
from minivlm.layers.attention import Attention
from minivlm.models.clip import CLIP, CLIPConfig
from tests import speakers
from tests.speakers import VISION


def test_learning_rate_warms_up_linearly_and_ends_near_zero():
    config = training.OptimiserConfig(learning_rate=1.0, warmup=10)
    rates = [training.learning_rate(config, step, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_a_run_shorter_than_its_warm_up_still_decays():
    config = training.OptimiserConfig(learning_rate=1.0, warmup=100)
    rates = [training.learning_rate(config, step, 10) for step in range(10)]
    assert max(rates) == 1.0 and rates[-1] < 0.2


def test_matrices_decay_and_vectors_do_not_and_frozen_parts_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model[2].requires_grad_(False)
    decayed, plain = training.make_optimiser(model, training.OptimiserConfig(weight_decay=0.3)).param_groups
    assert decayed["params"] == [model[0].weight] and decayed["weight_decay"] == 0.3
    assert plain["params"] == [model[0].bias, model[1].weight, model[1].bias] and plain["weight_decay"] == 0.0


def test_queries_whose_scores_are_not_scaled_learn_as_much_slower_as_they_are_smaller():
    """A step of AdamW changes the scores of a T5's attention as much as those of one that divides by √K: both start alike."""
    torch.manual_seed(0)
    plain, scaled = (Attention(8, 2, scale=scale, bias=False) for scale in (1.0, None))
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.q_proj.weight *= 4**-0.5
    x = torch.randn(3, 5, 8)
    for attention in (plain, scaled):
        attention.backend = "reference"
        optimiser = training.make_optimiser(attention, training.OptimiserConfig(weight_decay=0.0))
        for _ in range(3):
            attention(x).square().sum().backward()
            training.optimise(attention, optimiser, rate=0.05, clip_norm=1e9)
    torch.testing.assert_close(plain(x), scaled(x), rtol=1e-4, atol=1e-5)
    groups = training.make_optimiser(plain, training.OptimiserConfig(weight_decay=0.3)).param_groups
    assert [(g["share"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1, 0.3, 3),
        (1, 0, 1),
        (0.5, 0.3, 1),
    ]


def test_optimise_returns_the_norm_before_clipping_and_clears_the_gradients():
    model = nn.Linear(3, 1, bias=False)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
    norm = training.optimise(model, optimiser, rate=1.0, clip_norm=1.0)
    assert norm.item() == pytest.approx(5.0) and model.weight.grad is None
    torch.testing.assert_close(before - model.weight.detach(), torch.tensor([[0.6, 0.0, 0.8]]))


def test_precision_follows_the_hardware_and_says_why(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(training.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert training.choose_precision(cpu) == (torch.bfloat16, "this CPU has AVX512-bf16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert training.choose_precision(cpu)[0] == torch.float32
    assert training.choose_precision(cpu, "bf16")[0] == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert training.choose_precision(torch.device("cuda"))[0] == torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert training.choose_precision(torch.device("cuda"))[0] == torch.bfloat16


def test_unknown_and_missing_devices_are_one_sentence():
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        training.choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            training.choose_device("cuda")


def test_the_log_keeps_what_came_before_a_resume_and_drops_what_came_after(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(5)) + '{"step": 5, "lo')
    log = training_log.Log(path, first_step=3)
    log.add(3, {"contrast": torch.tensor(0.5)}, torch.tensor(2.0), 1e-3)
    assert log.flush(lambda step: [])["loss"] == 0.5
    assert [line["step"] for line in training_log.read_log(path)] == [0, 1, 2, 3]


def test_a_loss_that_is_not_finite_stops_with_step_rate_norm_and_samples(tmp_path):
    log = training_log.Log(tmp_path / "log.jsonl", first_step=0)
    log.add(7, {"contrast": torch.tensor(1.0)}, torch.tensor(1.0), 1e-3)
    log.add(8, {"contrast": torch.tensor(math.nan)}, torch.tensor(3.0), 2e-3)
    with pytest.raises(UserError, match=r"step 8.*2\.00e-03.*norm 3\.0.*cat\.jpg-8, dog\.jpg"):
        log.flush(lambda step: [f"cat.jpg-{step}", "dog.jpg"])


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_stops_beside_a_loss_that_is(norm, tmp_path):
    log = training_log.Log(tmp_path / "log.jsonl", first_step=0)
    log.add(3, {"contrast": torch.tensor(1.0)}, torch.tensor(norm), 1e-3)
    with pytest.raises(UserError, match=rf"not finite at step 3: loss 1\.0, .* gradient norm {norm}"):
        log.flush(lambda step: ["cat.jpg"])


@pytest.mark.parametrize(
    ("field", "bad", "good"),
    [
        ("learning_rate", [math.nan, math.inf, -1.0], [0.0, 1e30]),
        ("weight_decay", [math.nan, math.inf, -0.1], [0.0, 2.0]),
        ("warmup", [-1], [0]),
        ("beta1", [1.0, 1.5, -0.1, math.nan], [0.0, 0.999]),
        ("beta2", [1.0, -0.1, math.nan], [0.0]),
        ("clip_norm", [0.0, -1.0, math.nan], [math.inf, 1e-3]),
    ],
)
def test_a_number_that_no_optimiser_can_use_is_refused_by_name(field, bad, good):
    for value in bad:
        with pytest.raises(ValueError, match=f"^{field} is {value}, but must be"):
            training.OptimiserConfig(**{field: value})
    for value in good:
        training.OptimiserConfig(**{field: value})


def test_a_log_is_read_up_to_what_is_none(tmp_path):
    path = tmp_path / "log.jsonl"
    for text in ("[]\n", "7\n", '{"stop": 1}\n', '{"step": null}\n', '{"step', "\x00"):
        path.write_text('{"step": 0, "loss": 1.0}\n' + text + '{"step": 1, "loss": 1.0}\n')
        assert [line["step"] for line in training_log.read_log(path)] == [0]


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path):
    log = training_log.Log(tmp_path / "log.jsonl", first_step=0)
    log.path = tmp_path / "gone/log.jsonl"
    log.add(0, {"contrast": torch.tensor(1.0)}, torch.tensor(1.0), 1e-3)
    with pytest.raises(UserError, match=r"gone/log\.jsonl cannot be written: No such file or directory\. Go on from"):
        log.flush(lambda step: [])


def test_batches_come_in_order_for_the_steps_asked_for():
    made = list(training.batches(lambda step: {"x": torch.tensor(step)}, 3, 6, torch.device("cpu")))
    assert [batch["x"].item() for batch in made] == [3, 4, 5]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_batches_that_threads_make_ahead_come_in_order_and_the_same(threads):
    made = []

    def make(step):
        time.sleep(0.002 * (step % 3))  # the later ones may be ready first
        made.append(step)
        return {"x": torch.tensor(step)}

    ahead = training.made_ahead(make, range(3, 10), threads=threads)
    assert next(ahead)["x"].item() == 3 and len(made) <= threads + 1
    assert [batch["x"].item() for batch in ahead] == [4, 5, 6, 7, 8, 9] and sorted(made) == list(range(3, 10))
    assert list(training.made_ahead(make, range(5, 5), threads=threads)) == []


def test_nothing_holds_the_process_group_when_it_has_been_left(tmp_path):
    """What holds it keeps its threads alive, and these may abort the process when Python ends."""
    script = tmp_path / "leave.py"
    script.write_text(
        "import weakref, torch, torch.distributed as dist\n"
        "from minivlm import processes, training\n"
        "processes.start_processes(torch.device('cpu'))\n"
        "group = weakref.ref(dist.group.WORLD)\n"
        "model = torch.nn.Linear(2, 2)\n"
        "optimiser = training.make_optimiser(model, training.OptimiserConfig())\n"
        "model(torch.ones(1, 2)).sum().backward()\n"
        "training.optimise(model, optimiser, 1e-3, 1.0)\n"
        "processes.stop_processes()\n"
        "print('released' if group() is None else 'still held')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(training.__file__).parent.parent)}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert said.strip() == "released"


def losses_of(kind):
    """A small model and its losses as a function."""
    tokens = torch.randint(4, 60, (2, 9))
    images = torch.randn(2, 3, 16, 16)
    if kind == "clip":
        text = TextConfig(width=16, depth=2, heads=2, vocab_size=64, context=9, end_token=3)
        model = CLIP(CLIPConfig(vision=VISION, text=text, embed_width=8))
        return model, lambda: model.losses(images, tokens)
    if kind == "lm":
        model = speakers.language_model()
        return model, lambda: model.losses(tokens, tokens)
    if kind == "captioner":
        model = speakers.captioner()
        return model, lambda: model.losses(images, tokens, tokens)
    model = speakers.llava()
    tokens[:, 1:5] = model.config.image_token
    return model, lambda: model.losses(tokens, tokens, images)


@pytest.mark.parametrize(("kind", "stacks"), [("clip", 2), ("lm", 1), ("captioner", 2), ("llava", 2)])
def test_what_is_compiled_is_what_training_runs_and_gives_the_same_losses(kind, stacks):
    """Models reach their parts by other methods than forward, too; a compiled module that nobody calls is worth nothing."""
    model, losses = losses_of(kind)
    plain = {name: loss.item() for name, loss in losses().items()}
    training.compile_parts(model, backend="eager")
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    called = []

    def noted(module):
        call = module._compiled_call_impl
        return lambda *args, **options: (called.append(module), call(*args, **options))[1]

    for module in compiled:
        module._compiled_call_impl = noted(module)
    assert {name: loss.item() for name, loss in losses().items()} == pytest.approx(plain, rel=1e-5)
    assert len(compiled) == stacks and {*map(id, called)} == {*map(id, compiled)}
    assert list(model.state_dict()) == list(losses_of(kind)[0].state_dict())
