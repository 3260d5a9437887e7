"""The memory and the time of the first steps, what to lower where it is tight, and what is said when memory has run out."""

import re
from types import SimpleNamespace

import pytest
import torch

import train
from minivlm import memory
from minivlm.datasets.shapes import make_shapes
from minivlm.errors import UserError
from minivlm.models.clip import CLIP
from minivlm.recipes import plan
from minivlm.sizes import in_words
from tests.small_recipes import small_recipe, small_world
from tests.test_train import arguments

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=64, image_size=32, progress=False)
    return directory


def lines_about(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("10 steps:")]


def test_after_ten_steps_one_line_tells_time_and_memory(world, tmp_path, capsys):
    train.main(arguments(world, tmp_path / "run", steps=25))
    (line,) = lines_about(capsys.readouterr().out)
    number, memory_of = r"[\d.e-]+", r"[\d.]+ [GM]B"
    assert re.fullmatch(
        rf"10 steps: {number} s each, {memory_of} at most of {memory_of}; 25 steps take about \d+ s", line
    )


@pytest.mark.parametrize("there, tight", [(2**33, False), (2**20, True)])
def test_what_to_lower_is_told_where_it_is_tight(monkeypatch, there, tight):
    monkeypatch.setattr(memory, "whole", lambda device: there)
    ten, told = memory.FirstSteps(CPU), []
    for _ in range(25):
        ten.count()
        told += [line] if (line := ten.report(100, "lower it")) else []
    (line,) = told
    assert line.endswith("that is tight: if memory runs out, lower it") == tight


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: int(3.1 * 2**30))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(15.8 * 2**30))
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = iter(range(1000))
    monkeypatch.setattr(memory.time, "perf_counter", lambda: next(clock) * 0.42)
    ten = memory.FirstSteps(torch.device("cuda"))
    for _ in range(10):
        ten.count()
    expected = "10 steps: 0.42 s each, 3.1 GB at most of 15.8 GB; 2,000 steps take about 14 min"
    assert ten.report(2000, "") == expected and ten.report(2000, "") == ""
    assert [memory.duration(s) for s in (50, 840, 11520)] == ["50 s", "14 min", "3.2 h"]


def advice(name: str, directory, *words: str, **changes) -> str:
    recipe = small_recipe(name, directory, **changes)
    job = recipe.start(quiet=True)
    return memory.what_to_lower(recipe, plan.command_line([name, *words])[2], job.model.train(), 1)


def test_only_what_helps_is_proposed(tmp_path):
    small_world(tmp_path, train=64)
    told = advice("clip", tmp_path)
    assert told.startswith("change, in this order: --micro_batch 2, --activation_checkpointing, --batch_size 2")
    assert told.endswith("--model.vision.image_size")
    assert "--micro_batch" not in advice("clip-resnet", tmp_path)  # whose batch norm wants the whole batch
    told = advice("clip", tmp_path, "--activation_checkpointing", micro_batch=1)
    assert told.startswith("change, in this order: --batch_size 2")
    assert "--lora.rank 8" in advice("llava", tmp_path)
    assert "--lora.rank 2" in advice("llava", tmp_path, **{"lora.rank": 4})


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."
    ),
    RuntimeError("MPS backend out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_that_means_it_is_known(error, tmp_path):
    with pytest.raises(UserError, match=r"memory has run out \(.*\): lower it"), memory.explained("lower it", tmp_path):
        raise error


def test_memory_that_runs_out_is_one_sentence_and_the_last_checkpoint_stays(world, tmp_path, monkeypatch):
    original = CLIP.losses
    calls = iter(range(100))

    def losses(self, **batch):
        if next(calls) == 6:
            raise ERRORS[0]
        return original(self, **batch)

    monkeypatch.setattr(CLIP, "losses", losses)
    with pytest.raises(
        UserError, match=r"memory has run out .*--micro_batch 8, .*step-000004 stays: go on .* --resume"
    ):
        train.main(arguments(world, tmp_path / "run"))
    monkeypatch.undo()
    train.main(["clip", "--resume", "--out", str(tmp_path / "run"), "--device", "cpu", "--micro_batch", "8"])
    assert (tmp_path / "run" / "metrics.json").exists()


def test_a_tensor_that_no_machine_can_hold_is_told_and_other_errors_are_not_touched(tmp_path):
    refused = pytest.raises(UserError, match=r"memory has run out .*: lower it\. .* no checkpoint had been saved yet")
    with refused, memory.explained("lower it", tmp_path):
        torch.empty(2**50, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="a shape"), memory.explained("lower it", tmp_path):
        raise RuntimeError("a shape")


def test_the_memory_of_this_machine_is_known():
    assert 0 < memory.peak(CPU) < memory.whole(CPU) and in_words(memory.whole(CPU)).endswith("B")
