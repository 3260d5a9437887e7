"""Several processes that train one model together, as torchrun starts them: what they share, wait for, and end by."""

from __future__ import annotations

import gc
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minivlm.errors import UserError
from minivlm.model import Model, batch_norms

ENDED = "a process has ended"
T, U = TypeVar("T"), TypeVar("U")
_together: ContextVar[bool] = ContextVar("together", default=False)


def start_processes(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes). Joins the group that torchrun describes in the environment; alone without it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        # Every optimiser imports this. Imported while there is a group, it holds the group for ever: its threads then
        # outlive destroy_process_group, and now and then abort the process when Python ends (torch 2.13).
        import torch._dynamo  # noqa: F401

        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def is_first_process() -> bool:
    """Of those that torchrun started, or the only one; known before they have joined a group."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Inside, the other processes wait until the first is done: it makes what is missing, they find it there."""
    if not is_first_process():
        meet()
    yield
    if is_first_process():
        meet()


def meet() -> None:
    """All processes wait here for each other, for as long as it takes.

    Not in a collective, which would time out (NCCL's after ten minutes) while one opens, or the first validates, a large
    folder.
    """
    if not several():
        return
    store, world = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    turn = store.add(f"turns of {dist.get_rank()}", 1)
    arrived = store.add("arrived", 1)
    while arrived < turn * world:
        if store.check([ENDED]):
            sys.exit(2)
        time.sleep(0.05)
        arrived = store.add("arrived", 0)


def on_this_machine() -> tuple[int, int]:
    """(rank, number) among the processes of this machine."""
    if not several():
        return 0, 1
    rank, world = os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE")
    return (int(rank), int(world)) if rank and world else (dist.get_rank(), dist.get_world_size())


def from_first_here(value: T) -> T:
    """The value that the first process of this machine gives. All call it."""
    return gather([value])[(dist.get_rank() if several() else 0) - on_this_machine()[0]]


@contextmanager
def together() -> Iterator[None]:
    """Inside, all processes run the same lines, so that `each` may share its work among them."""
    token = _together.set(True)
    try:
        yield
    finally:
        _together.reset(token)


def each(function: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """[function(item) for item in items], of which each process computes its share, if they work `together`.

    All get all results; tensors among them are on the CPU then.
    """
    if not (several() and _together.get()):
        return [function(item) for item in items]
    token = _together.set(False)  # what an item takes is not shared again
    try:
        mine = [function(item) for item in share(items)]
    finally:
        _together.reset(token)
    return gather(mine)


def share(items: Sequence[T]) -> Sequence[T]:
    """Those of this process: every so many-th. Alone: all."""
    return items[dist.get_rank() :: dist.get_world_size()] if several() else items


def gather(mine: list[T]) -> list[T]:
    """What all processes made of their `share`, in the order of the whole. All of them call it; tensors come on the CPU."""
    if not several():
        return mine
    meet()  # for as long as it takes; the collective would time out
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [one.cpu() if torch.is_tensor(one) else one for one in mine])
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


@contextmanager
def ending_together() -> Iterator[None]:
    """An error in one process ends all of them; only that process reports it."""
    try:
        yield
    except Exception:
        if several() and dist.distributed_c10d._get_default_store().add(ENDED, 1) > 1:
            sys.exit(2)  # of the same mistake, or of the silence of the one that made it
        raise


@contextmanager
def told_by_first() -> Iterator[None]:
    """For errors that all processes make alike, such as a mistake in the command line: the first process reports it."""
    try:
        yield
    except UserError:
        if is_first_process():
            raise
        sys.exit(2)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The random state of this process: of the CPU, and of its GPU if it has one."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def random_states(device: torch.device) -> list[dict[str, Tensor]]:
    """The random states of all processes, in rank order. A collective: all processes call it."""
    own = random_state(device)
    if not several():
        return [own]
    sizes = [len(state) for state in own.values()]
    flat = torch.cat([*own.values()]).to(device)
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return [dict(zip(own, one.cpu().split(sizes), strict=True)) for one in everyone]


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def several() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def stop_processes() -> None:
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # DDP and its hooks hold each other, and the group
        dist.destroy_process_group()


def check_batch(name: str, batch_size: int, world: int) -> None:
    """UserError for a batch of a recipe that so many processes cannot share evenly."""
    if batch_size % world:
        fitting = max(1, batch_size // world) * world
        raise UserError(
            f"the batch of {name}, {batch_size} samples, cannot be shared evenly by {world} processes; train {name} with "
            f"--batch_size {fitting}."
        )


def whole_batch_norm(model: Model, device: torch.device, world: int) -> Model:
    """The model, with PyTorch's SyncBatchNorm in place of batch norm that is trained: it normalises over all processes.

    UserError on devices other than CUDA, for which there is none.
    """
    if world == 1 or not (norms := batch_norms(model)):
        return model
    if device.type != "cuda":
        raise UserError(
            f"{norms} normalises over the whole batch, which {world} processes share on CUDA alone (SyncBatchNorm), not "
            f"on {device.type}: start one process, or take a model without batch norm, such as clip."
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


class Losses(nn.Module):
    """A model whose forward is its losses, as DistributedDataParallel wants it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        # DDP looks for parameters without a gradient (pictures that only one process has, heads of another task), and warns
        # where there are none; this one never has any.
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.losses(**batch)


def losses_of(model: Model) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """batch → `model.losses`. With several processes PyTorch's DistributedDataParallel calls it, which averages gradients
    while the rest are still computed: losses are such that their mean over processes is that of the whole batch."""
    if not several():
        return lambda batch: model.losses(**batch)
    known = inspect.signature(DistributedDataParallel).parameters
    # Until torch 2.12 it was called otherwise.
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    device = next(model.parameters()).device
    return DistributedDataParallel(Losses(model).to(device), find_unused_parameters=True, **{sync_buffers: False})


def average_gradients(model: nn.Module) -> None:
    """The mean over processes of every gradient, sent as one flat tensor. Alone: nothing to do.

    For batches in parts: each has a backward pass of its own, where DDP's hooks want one for each forward. A parameter that
    has a gradient in some processes is sent as zeros by the others; one that has none anywhere keeps none.
    """
    if not several():
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.tensor([p.grad is not None for p in trained], dtype=torch.float32, device=trained[0].device)
    dist.all_reduce(found)
    for p, by in zip(trained, found.tolist(), strict=True):
        if by and p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in trained if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


@contextmanager
def polite_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C (or SIGTERM) does not break a step in two: interrupted() turns true. A second Ctrl-C stops at once."""
    seen = []

    def handler(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    def interrupted() -> bool:
        if not several():
            return bool(seen)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor(float(bool(seen)), device=device)
        dist.all_reduce(flag)  # all processes stop at the same step or none does
        return flag.item() > 0

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, old in before.items():
            signal.signal(number, old)
