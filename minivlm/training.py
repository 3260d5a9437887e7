"""What a training loop needs and a reader need not see twice: device, precision, optimiser, schedule, batches ahead."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from minivlm.errors import UserError
from minivlm.layers.attention import Attention
from minivlm.layers.efficientnet import EfficientNet
from minivlm.layers.perceiver import PerceiverResampler
from minivlm.layers.qformer import QFormer
from minivlm.layers.resnet import ResNet
from minivlm.layers.tower import ImageFeatures, Images
from minivlm.layers.transformer import Transformer
from minivlm.models.vilbert import ViLBERT
from minivlm.precision import kept_in_fp32

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
    """ "auto": bf16 where the hardware multiplies it, fp16 on older GPUs (T4, V100), else fp32; with the reason, in words."""
    if name == "fp16" and device.type not in ("cpu", "cuda"):
        raise UserError(f"--precision fp16 trains on cuda and cpu, not on {device.type}: take fp32 or auto.")
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name], "as asked for"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor}"
        return torch.float16, f"compute capability {major}.{minor} has no bf16; losses are scaled"
    if device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        if torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "this CPU has AMX"
        if torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16, "this CPU has AVX512-bf16"
    return torch.float32, f"no fast bf16 on this {device.type}"


def suited(precision: torch.dtype, model: nn.Module, *, asked: str) -> tuple[torch.dtype, str]:
    """The precision, and nothing to say; fp32 in place of fp16, and why, for a model that fp16 has too little room for.
    UserError where fp16 was asked for."""
    if precision != torch.float16 or not kept_in_fp32(model):
        return precision, ""
    why = f"activations of this {type(model).__name__}, with the MLPs of a T5, are larger than float16 can hold"
    if asked == "fp16":
        raise UserError(f"--precision fp16: {why}; take bf16 or fp32.")
    return torch.float32, f"float32 after all: {why}"


def loss_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """In fp16 losses are multiplied before the backward pass, so that small gradients do not become zero, and gradients are
    divided afterwards; a step whose gradients overflow is skipped, and the scale halved. In other precisions it does nothing.

    Micikevicius et al. 2018, "Mixed Precision Training", §3.2. Tested on a CPU; not yet measured on a GPU without bf16.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


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


def make_optimiser(
    model: nn.Module, config: OptimiserConfig, rates: Mapping[nn.Parameter, float] = MappingProxyType({})
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) on what is trainable; matrices decay, vectors and scalars do not. The queries of a T5
    learn at a rate of their own, see `query_rates`.

    rates: of parameters that do not learn at config.learning_rate, which is the highest.
    """
    trained, whole = [p for p in model.parameters() if p.requires_grad], config.learning_rate
    queries = query_rates(model)
    shares = {p: (rates.get(p, whole) / whole if whole else 1.0) * queries.get(p, 1.0) for p in trained}
    kinds: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for p in trained:
        kinds.setdefault((shares[p], p.ndim >= 2), []).append(p)
    groups = [
        {"params": params, "weight_decay": config.weight_decay if decays else 0.0, "share": share}
        for (share, decays), params in kinds.items()
    ]
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


def optimise(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    rate: float,
    clip_norm: float,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """One update from the gradients that are there; they are cleared. Returns their norm before clipping. scaler: of the
    losses; it skips an update whose gradients are not finite."""
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    scaler.unscale_(optimiser)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("share", 1.0)
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)
    return norm


def compile_parts(model: nn.Module, **options) -> None:
    """torch.compile on what all models are made of, stacks of blocks and stages of convolutions, by whatever method of the
    model they are reached. In place: names of parameters and checkpoints stay as they are."""
    for module in list(model.modules()):
        if isinstance(module, (Transformer, PerceiverResampler)):
            module.compile(**options)
        elif isinstance(module, (QFormer, ViLBERT)):  # more than one way leads through these, or another than `forward`
            for name in ("forward", "query", "continue_text") if isinstance(module, QFormer) else ("fuse",):
                setattr(module, name, torch.compile(getattr(module, name), **options))
        elif isinstance(module, (ResNet, EfficientNet)):
            for stage in module.stages:
                stage.compile(**options)


def pinned(value: Images) -> Images:
    """In memory from which a GPU copies while the program goes on."""
    return value.pin_memory() if torch.is_tensor(value) else ImageFeatures(value.tensor.pin_memory())


def batches(make: Callable[[int], dict], start: int, stop: int, device: torch.device) -> Iterator[dict]:
    """make(step) for each step, on the device. With a GPU the next batches are made and sent while this one is computed."""

    def ready(step: int) -> dict:
        batch = make(step)
        if device.type == "cuda":
            batch = {name: pinned(value) for name, value in batch.items()}
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()}

    if device.type != "cuda":  # the cores are busy with the step itself: a second thread would only stall it
        yield from map(ready, range(start, stop))
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share the cores
    yield from made_ahead(ready, range(start, stop), threads=max(1, min(4, (os.cpu_count() or 1) // (4 * here))))


def made_ahead(make: Callable[[int], dict], steps: range, *, threads: int) -> Iterator[dict]:
    """make(step) of each, in order, by threads that are as many steps ahead."""
    with ThreadPoolExecutor(threads) as workers:
        upcoming = deque(workers.submit(make, step) for step in steps[:threads])
        for step in steps:
            batch = upcoming.popleft().result()
            if step + threads * steps.step in steps:
                upcoming.append(workers.submit(make, step + threads * steps.step))
            yield batch
