"""Two processes with half the batch each get the value and the gradients of one process with all of it.

The processes are this file, run twice (see the end); they meet through a file, without a network.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.losses import CLIPLoss, backward_with_gradient_cache, gather
from minivlm.testing import assert_same

WORLD, B, D, WIDTH = 2, 10, 6, 4
CASES = [(kind, chunk, cached) for kind in ("softmax", "sigmoid") for chunk in (None, 2) for cached in (False, True)]
ROOT = Path(__file__).parent.parent


class TwoTowers(nn.Module):
    """The smallest thing with two encoders and a loss."""

    def __init__(self, kind: str, chunk: int | None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(WIDTH, D, generator=generator))
        self.text = nn.Parameter(torch.randn(WIDTH, D, generator=generator))
        self.loss = CLIPLoss(kind, chunk=chunk, bias=-1.0, smoothing=0.1 if kind == "softmax" else 0.0)

    def encode_image(self, x: Tensor) -> Tensor:
        return F.normalize(x @ self.image, dim=-1)

    def encode_text(self, x: Tensor) -> Tensor:
        return F.normalize(x @ self.text, dim=-1)


def value_and_gradients(kind: str, chunk: int | None, cached: bool, rank: int, world: int) -> dict[str, Tensor]:
    """The loss of this process's rows, and the gradients of its parameters, before any averaging."""
    generator = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(B, WIDTH, generator=generator).chunk(world)[rank] for _ in range(2))
    model = TwoTowers(kind, chunk)
    if cached:
        encoders, inputs = (model.encode_image, model.encode_text), ((images,), (texts,))
        value = backward_with_gradient_cache(encoders, inputs, model.loss, chunk=3)
    else:
        value = model.loss(model.encode_image(images), model.encode_text(texts))
        value.backward()
    return {"value": value.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    """What each process found, for every case."""
    directory = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(directory)]
    running = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE) for rank in range(WORLD)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c[0]}-{'chunked' if c[1] else 'plain'}{'-cached' if c[2] else ''}"
)
def test_the_mean_over_processes_is_the_single_process(processes, case):
    """Value and gradients: data parallelism averages the gradients of its processes, so their mean must be right."""
    whole = value_and_gradients(*case, rank=0, world=1)
    for name, expected in whole.items():
        assert_same(torch.stack([found[case][name] for found in processes]).mean(dim=0), expected, name)
        if name == "image":  # neither process has it alone: each sees its own rows
            assert not torch.allclose(processes[0][case][name], expected, rtol=0.01)


def test_gather_keeps_rank_order_and_sums_what_every_process_says(processes):
    for rank, found in enumerate(processes):
        assert found["gathered"].tolist() == [0, 1, 10, 11]
        # process r weighs its copy of row i by (r + 1)·i; together (1 + 2)·i
        assert found["gathered gradient"].tolist() == [3 * (2 * rank), 3 * (2 * rank + 1)]


def main(directory: str, rank: int) -> None:
    import torch._dynamo  # before there is a group, which it would hold: see `processes.start_processes`

    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=WORLD)
    found: dict = {case: value_and_gradients(*case, rank=rank, world=WORLD) for case in CASES}
    x = (torch.arange(2.0) + 10 * rank).requires_grad_()
    found["gathered"] = gather(x)
    (found["gathered"] * torch.arange(4.0) * (rank + 1)).sum().backward()
    found["gathered"], found["gathered gradient"] = found["gathered"].detach(), x.grad
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
