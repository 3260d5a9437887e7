"""The same batch gives the same gradient: of every recipe, as a whole = in parts = over two processes = in parts over two.

All recipes are built once, by this file run as a program (see the end), which then becomes three processes: one takes the
whole batch, and the batch in parts; the other two share it, and meet through a file, without a network.
"""

import copy
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minivlm import checkpoint, processes
from minivlm.errors import UserError
from minivlm.models import image_text_matching
from minivlm.recipes import RECIPES
from tests import speakers
from tests.small_recipes import small_job, small_world

ROOT = Path(__file__).parent.parent
WORLD, B, PART = 2, 8, 3
# what the batch is of: the recipe, the step (each fourth of the fusion recipes is of captions), and changes of the recipe
CASES: dict[str, tuple[str, int, dict]] = {
    **{name: (name, 0, {}) for name in RECIPES},
    **{f"{name}, captions": (name, 3, {}) for name in ("visualbert", "uniter", "vilbert")},
    "uniter, other captions": ("uniter", 7, {}),
    "clip, sigmoid": ("clip", 0, {"model.loss": "sigmoid", "model.loss_chunk": 2}),
    "blip, momentum": ("blip", 0, {"model.momentum.queue": 16}),
    "blip2, t5": ("blip2", 0, {"lm": "t5", "language_from": "t5"}),
    "llava, tiles": ("llava-stage1", 0, {"model.tiles": 2}),
    "flamingo, no lessons": ("flamingo", 0, {"data.lessons": 0}),
    "multitask, search alone": ("multitask", 0, {"model.tasks": "search"}),
}
ONE_SIDED = "llava, one picture"  # of a batch of two: one process has no use for the projector
REFUSED = ("clip-resnet", "align")  # batch norm is trained
WAYS = ("parts", "processes", "processes and parts")


def likeliest(logits: Tensor, same: Tensor, *, draw: bool) -> tuple[Tensor, Tensor]:
    """`hard_negatives` without chance."""
    found = ~same.all(dim=1)
    return logits.float().masked_fill(same & found[:, None], -torch.inf).argmax(dim=1), found


def step(work, number: int, parts: int | None, rank: int = 0, world: int = 1, device: str = "cpu") -> dict[str, Tensor]:
    """Losses, gradients and buffers after a step without the optimiser's part, by name."""
    model, batch = copy.deepcopy(work.model).to(device), work.batch(number, rank, world)
    model = processes.whole_batch_norm(model, torch.device(device), world)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    if parts is None:
        forward = processes.losses_of(model)
        found = forward(batch)
        sum(found.values()).backward()
    else:
        found = model.backward_in_parts(batch, parts)
        processes.average_gradients(model)
    found = {name: loss.detach().clone() for name, loss in found.items()}
    if world > 1:
        for loss in found.values():
            dist.all_reduce(loss)
            loss /= world
    grads = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | grads | dict(model.named_buffers())


# ---- the comparison --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Of every case what each way found."""
    directory = tmp_path_factory.mktemp("ways")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, str(directory)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    read = lambda name: torch.load(directory / f"{name}.pt", weights_only=True)
    held = [ONE_SIDED, *(case for case in CASES if case not in REFUSED)]
    shared = {f"{case}, {rank}": read(f"{case}-{rank}") for case in held for rank in range(WORLD)}
    return {case: read(case) for case in held} | shared | {"what learns": read("learns")}


@pytest.mark.parametrize("case", [ONE_SIDED, *(case for case in CASES if case not in REFUSED)])
def test_every_way_gives_the_losses_and_gradients_of_the_whole_batch(found, case):
    whole = found[case]["whole"]
    ways = {"parts": found[case]["parts"]}
    for rank in range(WORLD):
        ways |= {f"{way}, {rank}": result for way, result in found[f"{case}, {rank}"].items()}
    assert len(ways) == 1 + 2 * WORLD
    scale = torch.cat([t.flatten() for name, t in whole.items() if name.startswith("gradient")]).norm()
    assert scale > 0
    for way, result in ways.items():
        assert result.keys() == whole.keys(), way  # a parameter that nothing reaches has no gradient anywhere
        apart = torch.cat([(result[n] - t).flatten() for n, t in whole.items() if n.startswith("gradient")]).norm()
        assert apart < 1e-4 * scale, f"{way}: {apart / scale:.1e}"
        for name, tensor in whole.items():
            if not name.startswith("gradient"):
                seen, known = (unordered(t) if name in QUEUES else t for t in (result[name], tensor))
                torch.testing.assert_close(seen, known, rtol=1e-4, atol=1e-6, msg=f"{way}: {name}")


QUEUES = ("momentum.images", "momentum.texts")


def unordered(rows: Tensor) -> Tensor:
    """What is the same whatever the order of rows (N, D) is: processes take turns in dealing out samples."""
    return rows.T @ rows


@pytest.mark.parametrize("name", REFUSED)
def test_batch_norm_that_would_see_less_than_the_whole_batch_is_refused(tmp_path, name):
    work = small_job(name, small_world(tmp_path, train=8), batch_size=8)
    model, on = work.model, lambda device, world: processes.whole_batch_norm(model, torch.device(device), world)
    with pytest.raises(
        UserError, match=r"batch norm \(vision\..* and \d+ more\) .*sees a part of it with --micro_batch 3"
    ):
        model.backward_in_parts(work.batch(0), 3)
    with pytest.raises(UserError, match=r"batch norm .* 2 processes share on CUDA alone .*not on cpu"):
        on("cpu", 2)
    assert on("cpu", 1) is model and model.backward_in_parts(work.batch(0), 8)
    synced = on("cuda", 2)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in synced.modules())
    model.freeze("vision")
    assert on("cpu", 2) is model.train()


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in REFUSED])
def test_a_run_that_is_resumed_trains_what_it_trained(found, name):
    fresh, resumed = found["what learns"][name]
    assert fresh == resumed and fresh["parameters"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="SyncBatchNorm is for CUDA")
def test_batch_norm_over_processes_counts_the_whole_batch(tmp_path):
    small_world(tmp_path, train=64)
    work = small_job("clip-resnet", tmp_path, batch_size=B)
    whole = step(work, 0, None, device="cuda")
    fork = multiprocessing.get_context("spawn")
    both = [fork.Process(target=share_batch_norm, args=(tmp_path, rank)) for rank in range(WORLD)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    for rank in range(WORLD):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert result.keys() == whole.keys()
        for key, tensor in whole.items():
            torch.testing.assert_close(result[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


def share_batch_norm(directory: Path, rank: int) -> None:
    """gloo, so that the two can share one GPU."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=WORLD)
    work = small_job("clip-resnet", directory, batch_size=B)
    torch.save(step(work, 0, None, rank, WORLD, device="cuda"), directory / f"{rank}.pt")
    dist.destroy_process_group()


# ---- the three processes ---------------------------------------------------------------------------------------------


def main(directory: Path) -> None:
    import torch._dynamo

    torch.set_num_threads(1)
    image_text_matching.hard_negatives = likeliest
    small_world(directory)
    works = {
        case: small_job(recipe, directory, batch_size=B, **changes)
        for case, (recipe, _, changes) in CASES.items()
        if case not in REFUSED
    }
    works[ONE_SIDED] = OneSided()
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=share, args=(directory, works, rank)) for rank in range(WORLD)]
    for process in both:
        process.start()
    for case, work in works.items():
        number, part = (CASES[case][1], PART) if case in CASES else (0, 1)
        ways = {"whole": step(work, number, None), "parts": step(work, number, part)}
        torch.save(ways, directory / f"{case}.pt")
    torch.save(
        {case: learns_resumed(works[case], directory) for case in works if case in RECIPES}, directory / "learns.pt"
    )
    for process in both:
        process.join()
    sys.exit(max(process.exitcode for process in both))


def learns_resumed(work, directory: Path) -> tuple[dict, dict]:
    """What learns, in a run that begins and in one that is resumed."""
    path = directory / f"checkpoint of {type(work).__name__}-{id(work)}"
    checkpoint.save(path, work.model, work.processor)
    models = work.model, work.recipe.start(path, quiet=True).model.train()
    return tuple(
        {
            "parameters": [name for name, p in model.named_parameters() if p.requires_grad],
            "training": [name for name, module in model.named_modules() if module.training],
        }
        for model in models
    )


class OneSided:
    """Two conversations about one picture: the second is about none."""

    def __init__(self):
        self.model = speakers.llava().train()
        c = self.model.config
        tokens = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
        tokens[0, 1 : 1 + c.image_tokens] = c.image_token
        self.whole = {"tokens": tokens, "labels": tokens.masked_fill(tokens == c.image_token, -100)}
        self.whole["images"] = torch.randn(1, 3, c.vision.image_size, c.vision.image_size)

    def batch(self, step: int, rank: int, world: int) -> dict[str, Tensor]:
        return self.whole if world == 1 else [*self.model.cut(self.whole, 1)][rank]


def share(directory: Path, works: dict, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=WORLD)
    for case, work in works.items():
        number = CASES[case][1] if case in CASES else 0
        ways = {way: step(work, number, parts, rank, WORLD) for way, parts in zip(WAYS[1:], (None, PART), strict=True)}
        torch.save(ways, directory / f"{case}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
