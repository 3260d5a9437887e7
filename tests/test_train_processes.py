"""train.py as two processes: what one of them alone does, keeps, or runs into.

The processes are this file, run twice (see the end); they find each other by a port of this machine.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from minivlm import processes
from minivlm import run as run_module
from minivlm.datasets.shapes import make_shapes
from minivlm.errors import UserError, run_command_line
from tests.test_train import arguments, losses

ROOT = Path(__file__).parent.parent
NOT_READ = "the picture of sample 5 cannot be read."


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=64, image_size=32, progress=False)
    return directory


def free_ports(n: int) -> list[str]:
    found = [socket.socket() for _ in range(n)]
    for one in found:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in found]
    for one in found:
        one.close()
    return ports


def two(what: str, *words, script: str = __file__) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of two processes that do `what`, as the script has it."""
    ports = free_ports(3)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0], "PORTS": " ".join(ports)}
    group["OMP_NUM_THREADS"] = "1"
    command, pipes = [sys.executable, script, what, *map(str, words)], {"stdout": -1, "stderr": -1, "text": True}
    running = [
        subprocess.Popen(command, env={**os.environ, **group, "PYTHONPATH": str(ROOT), "RANK": rank}, **pipes)
        for rank in "01"
    ]
    said = [process.communicate(timeout=300) for process in running]
    return [(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """One of four steps, and one of two and, resumed, two; with dropout."""
    out = tmp_path_factory.mktemp("out")
    for returncode, _, errors in two("resume", world, out):
        assert returncode == 0, errors
    return out


def test_they_go_on_with_the_random_state_that_each_had(runs):
    assert losses(runs / "twice") == losses(runs / "once")
    for name in ("model", "training"):
        once, twice = (
            load_file(runs / run / f"checkpoints/step-000004/{name}.safetensors") for run in ("once", "twice")
        )
        assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)
    assert not torch.equal(once["random.0.cpu"], once["random.1.cpu"])


def test_none_waits_in_a_collective_while_another_is_slower_to_validate(runs):
    """It would time out: NCCL's after ten minutes."""
    first, second = (json.loads((runs / f"times-{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert len(first["validations"]) == len(second["validations"]) > 3 and len(second["collectives"]) > 20
    for begun, done in first["validations"]:
        assert not [at for at in second["collectives"] if begun < at < done]


def test_another_number_of_processes_goes_on_and_is_told(runs, world, tmp_path, capsys):
    shutil.copytree(runs / "once", tmp_path / "once")
    record = tmp_path / "once/checkpoints/step-000004"
    assert "saved by 2 processes" in run_module.restore_random(record, torch.device("cpu"), 0, 1)
    first = torch.rand(1)
    assert "saved by 2 processes" in run_module.restore_random(record, torch.device("cpu"), 2, 3)
    assert not torch.equal(first, torch.rand(1))
    assert run_module.restore_random(record, torch.device("cpu"), 1, 2) == ""
    shutil.rmtree(record)
    train.main(["clip", "--resume", "--out", str(tmp_path / "once"), "--device", "cpu", "--precision", "fp32"])
    assert "resumed from" in (said := capsys.readouterr().out) and "dropout draws other numbers" in said


def test_a_mistake_that_one_meets_ends_both_with_one_sentence(world, tmp_path):
    first, second = two("mistake", world, tmp_path)
    assert second[0] == 2 and second[2].splitlines()[-1] == f"error: {NOT_READ}"
    assert first[0] == 2 and "error" not in first[2].lower() and "Traceback" not in first[2]


def test_a_mistake_on_the_command_line_is_told_once():
    first, second = two("clop")
    assert first[0] == second[0] == 2 and second[2] == ""
    assert first[2].startswith("error: unknown recipe 'clop'") and first[2].count("\n") == 1


def test_a_batch_that_they_cannot_share_is_refused_before_the_start():
    with pytest.raises(
        UserError, match=r"the batch of lm, 100 samples, .* by 8 processes; train lm with --batch_size 96"
    ):
        processes.check_batch("lm", 100, 8)
    processes.check_batch("lm", 96, 8)


# ---- the two processes -----------------------------------------------------------------------------------------------


def resume(world: str, out: str) -> None:
    import torch.distributed as dist

    from minivlm.recipes.job import Job

    groups: list[weakref.ref] = []
    times: dict[str, list] = {"collectives": [], "validations": []}

    def noted(collective):
        return lambda *args, **options: (times["collectives"].append(time.monotonic()), collective(*args, **options))[1]

    def validate(self):
        begun = time.monotonic()
        groups.append(weakref.ref(dist.group.WORLD))
        torch.rand(1)  # from the random state of this process alone
        time.sleep(1.0 if os.environ["RANK"] == "0" else 0.0)
        times["validations"].append((begun, time.monotonic()))
        return 0.5

    Job.validate = validate
    dist.all_reduce, dist.all_gather, dist.barrier = map(noted, (dist.all_reduce, dist.all_gather, dist.barrier))
    short, resumed = {"steps": 4, "save_every": 2}, ["--device", "cpu", "--precision", "fp32", "--resume"]
    for port, argv in zip(
        os.environ[
            "PORTS"
        ].split(),  # one each: the faster process would meet the group that the other has not left yet
        (
            arguments(world, f"{out}/once", **short),
            arguments(world, f"{out}/twice", **short, stop_at=2),
            ["clip", "--out", f"{out}/twice", *resumed],
        ),
        strict=True,
    ):
        os.environ["MASTER_PORT"] = port
        train.main(argv)
    assert all(group() is None for group in groups), "what holds a group keeps its threads, which may abort the process"
    Path(f"{out}/times-{os.environ['RANK']}.json").write_text(json.dumps(times), encoding="utf-8")


def mistake(world: str, out: str) -> None:
    from minivlm.recipes.job import Job

    original = Job.batch

    def batch(self, step, rank=0, world=1):
        if step == 2 and rank == 1:
            raise UserError(NOT_READ)
        return original(self, step, rank, world)

    Job.batch = batch
    run_command_line(lambda _: train.main(arguments(world, f"{out}/run", steps=4)))


def clop() -> None:
    run_command_line(lambda _: train.main(["clop"]))


if __name__ == "__main__":
    {"resume": resume, "mistake": mistake, "clop": clop}[sys.argv[1]](*sys.argv[2:])
