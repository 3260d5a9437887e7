"""What a training loop needs and a reader need not see twice: device, precision, optimiser, processes, log."""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minivlm.atomic_writing import write_atomically
from minivlm.errors import UserError
from minivlm.layers.attention import Attention
from minivlm.layers.efficientnet import EfficientNet
from minivlm.layers.perceiver import PerceiverResampler
from minivlm.layers.qformer import QFormer
from minivlm.layers.resnet import ResNet
from minivlm.layers.tower import ImageFeatures, Images
from minivlm.layers.transformer import Transformer
from minivlm.model import Model, batch_norms
from minivlm.models.vilbert import ViLBERT

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    warmup: int = 100  # steps of linear warm-up, then a cosine to zero
    clip_norm: float = 1.0  # a large number, such as 1e9: not clipped

    def __post_init__(self):
        for name in ("learning_rate", "weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be a finite number from 0 upwards")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 0 and below 1")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}, but must be above 0")


def choose_device(name: str = "auto") -> torch.device:
    """ "auto": cuda where there is one, else mps, else cpu. Under torchrun each process takes the GPU of its local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or mps.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but PyTorch sees no CUDA device; use --device cpu or auto.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


def choose_precision(device: torch.device, name: str = "auto") -> tuple[torch.dtype, str]:
    """ "auto": bf16 where the hardware multiplies it, else fp32; with the reason, in words."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name], "as asked for"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor}"
        return torch.float32, f"compute capability {major}.{minor} has no bf16"
    if device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        if torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "this CPU has AMX"
        if torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16, "this CPU has AVX512-bf16"
    return torch.float32, f"no fast bf16 on this {device.type}"


def autocast(device: torch.device, dtype: torch.dtype):
    """Matrix products in `dtype`, weights and sums in fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free, instead of returning it to the system and asking for it again.

    glibc unmaps large blocks at once, and every activation of every step then costs page faults: on a CPU up to a tenth
    of the time. Other C libraries have no such switch, and nothing is changed there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that it accepts


def make_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) on what is trainable; matrices decay, vectors and scalars do not. The queries of a T5
    learn at a rate of their own, see `query_rates`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rates = query_rates(model)
    matrices = [p for p in trained if p.ndim >= 2 and p not in rates]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "share": 1.0},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "share": 1.0},
    ]
    for share in sorted(set(rates.values())):
        queries = [p for p in trained if rates.get(p) == share]
        groups += [{"params": queries, "weight_decay": config.weight_decay, "share": share}] if queries else []
    fused = trained[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


def query_rates(model: nn.Module) -> dict[nn.Parameter, float]:
    """The weights of queries whose scores are not divided by √K (T5) → their share of the learning rate, 1/√K.

    Such weights are that much smaller, and Adam's steps are not: at the full rate scores change √K times as fast as those
    of other models, and attention soon is all or nothing. (T5 itself had Adafactor, whose steps are in proportion.)
    """
    unscaled = [m for m in model.modules() if isinstance(m, Attention) and m.scale == 1.0]
    return {attention.q_proj.weight: attention.head_width**-0.5 for attention in unscaled}


def learning_rate(config: OptimiserConfig, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017)."""
    warmup = min(config.warmup, max(1, steps // 2))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def optimise(model: nn.Module, optimiser: torch.optim.Optimizer, rate: float, clip_norm: float) -> Tensor:
    """One update from the gradients that are there; they are cleared. Returns their norm before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("share", 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm


def compile_parts(model: nn.Module, **options) -> None:
    """torch.compile on what all models are made of, stacks of blocks and stages of convolutions, by whatever method of the
    model they are reached. In place: names of parameters and checkpoints stay as they are."""
    for module in list(model.modules()):
        if isinstance(module, (Transformer, PerceiverResampler)):
            module.compile(**options)
        elif isinstance(module, (QFormer, ViLBERT)):  # more than one way leads through these, or another than `forward`
            for name in ("forward", "look", "tell") if isinstance(module, QFormer) else ("fuse",):
                setattr(module, name, torch.compile(getattr(module, name), **options))
        elif isinstance(module, (ResNet, EfficientNet)):
            for stage in module.stages:
                stage.compile(**options)


# ---- several processes -----------------------------------------------------------------------------------------------


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


ENDED = "a process has ended"


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


# ---- data, log -------------------------------------------------------------------------------------------------------


def pinned(value: Images) -> Images:
    """In memory from which a GPU copies while the program goes on."""
    return value.pin_memory() if torch.is_tensor(value) else ImageFeatures(value.tensor.pin_memory())


def batches(make: Callable[[int], dict], start: int, stop: int, device: torch.device) -> Iterator[dict]:
    """make(step) for each step, on the device. With a GPU the next batch is made and sent while this one is computed."""

    def ready(step: int) -> dict:
        batch = make(step)
        if device.type == "cuda":
            batch = {name: pinned(value) for name, value in batch.items()}
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()}

    if device.type != "cuda":  # the cores are busy with the step itself: a second thread would only stall it
        yield from map(ready, range(start, stop))
        return
    with ThreadPoolExecutor(1) as worker:
        upcoming = worker.submit(ready, start) if start < stop else None
        for step in range(start, stop):
            batch = upcoming.result()
            if step + 1 < stop:
                upcoming = worker.submit(ready, step + 1)
            yield batch


BAR_FORMAT = "step {n_fmt}/{total_fmt} |{bar:24}| {elapsed}, {remaining} left{postfix}"


def log_every(device: torch.device) -> int:
    """Steps between looks at the loss: each on a CPU, where looking is free; every tenth where it makes the host wait."""
    return 1 if device.type == "cpu" else 10


class Log:
    """`log.jsonl`, one line a step. Numbers stay on the device until `flush`, so that the loop never waits for them.

    `flush` stops the run at the first non-finite loss: the weights before it are in the last checkpoint.
    """

    def __init__(self, path: Path, first_step: int, *, write: bool = True):
        self.path, self.write, self.waiting = path, write, []
        if write:
            kept = [line for line in read_log(path) if line["step"] < first_step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))

    def add(self, step: int, losses: dict[str, Tensor], norm: Tensor, rate: float) -> None:
        self.waiting.append((step, losses, norm, rate))

    def flush(self, ids: Callable[[int], list[str]]) -> dict | None:
        """Write what waits; returns the last line. ids(step) names the samples of a step, for the error message."""
        if not self.waiting:
            return None
        # One transfer for all; steps may have different losses, where a recipe alternates between tasks.
        found = torch.stack([x.detach() for _, losses, norm, _ in self.waiting for x in (*losses.values(), norm)])
        if several():  # the mean over processes is the loss of the whole batch; the norm is the same in all
            dist.all_reduce(found)
            found /= dist.get_world_size()
        values = iter(found.tolist())
        lines = []
        for step, losses, _, rate in self.waiting:
            *numbers, norm = (next(values) for _ in range(len(losses) + 1))
            named = dict(zip(losses, numbers, strict=True))
            line = {"step": step, "loss": sum(numbers), **named, "gradient_norm": norm, "learning_rate": rate}
            if not math.isfinite(line["loss"]) or not math.isfinite(norm):
                samples = ids(step)
                shown = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
                raise UserError(
                    f"the loss is not finite at step {step}: loss {line['loss']}, learning rate {rate:.2e}, gradient norm "
                    f"{norm}, samples {shown}. Lower --optimiser.learning_rate or look at these samples; "
                    "the last checkpoint is from before."
                )
            lines.append(line)
        self.waiting.clear()
        if self.write:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
            except OSError as error:
                why = f"{self.path} cannot be written: {error.strerror}"
                raise UserError(f"{why}. Go on from the last checkpoint with --resume.") from error
        return lines[-1]


def read_log(path: Path) -> list[dict]:
    """The lines of a log up to the first that is none: the last one, where a killed run left it half-written."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines
