"""Several contestants, each in a process of its own, take turns, and their times stand side by side."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minivlm.training import keep_freed_memory

STATUS = Path("/proc/self/status")


def compare(peers: dict[str, tuple[Callable, tuple]], rounds: int, seconds: float = 0.5) -> dict[str, dict]:
    """Each peer's seconds a call (quartiles), peak memory beyond what building took, and the last value of each turn.

    A turn lasts `seconds`, and one call at least.
    """
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, (build, arguments) in peers.items():
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, build, arguments), daemon=True)
        process.start()
        problem = here.recv()
        if problem:
            print(f"{name:14} {problem}")
            process.join()
        else:
            workers[name] = (process, here)
    turns: dict[str, list[tuple]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, (_, pipe) in workers.items():
            pipe.send(seconds)
            turns[name].append(pipe.recv())
    for process, pipe in workers.values():
        pipe.send(None)
        process.join()
    return {name: summary(*zip(*turns[name], strict=True)) for name in workers}


def summary(times: tuple[float, ...], memories: tuple[float, ...], values: tuple) -> dict:
    low, median, high = quartiles(times)
    return dict(low=low, median=median, high=high, memory=memories[-1], value=values[-1], values=values)


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(times, n=4)) if len(times) > 1 else tuple(times) * 3


def serve(pipe, build: Callable, arguments: tuple) -> None:
    """One contestant: builds itself, then runs for as many seconds as it receives, again and again."""
    keep_freed_memory()  # as train.py does; it helps every contestant
    try:
        step = build(*arguments)
    except ImportError as error:
        pipe.send(f"not installed ({error.name}); most peers come with pip install -r tests/requirements.txt")
        return
    forget_peak()
    base = memory("VmRSS")
    step()
    pipe.send(None)
    while (seconds := pipe.recv()) is not None:
        calls, start = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - start < seconds:
            value = step()
            calls += 1
        pipe.send(((time.perf_counter() - start) / calls, memory("VmHWM") - base, value))


def memory(field: str) -> float:
    """Bytes of this process in memory, VmRSS now, VmHWM at most, by /proc; NaN where there is no /proc."""
    if not STATUS.exists():
        return math.nan
    return 1024.0 * next(
        int(line.split()[1]) for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(field)
    )


def forget_peak() -> None:
    """VmHWM begins anew: what imports and building took does not count."""
    if STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5", encoding="utf-8")


def matrix_ceiling(precision: str) -> float:
    """FLOP/s of the best of several large matrix products: what no program on this machine can pass."""
    a = torch.randn(2048, 2048).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def import_peer(name: str) -> None:
    """Import a peer; torchvision, which it brings along, needs the declarations of `minivlm._torchvision` first."""
    import importlib

    import minivlm._torchvision  # noqa: F401

    importlib.import_module(name)


def precisions(name: str) -> list[tuple[str, torch.dtype]]:
    """What --precision asks for."""
    both = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return list(both.items()) if name == "both" else [(name, both[name])]


def print_ratios(seconds: dict[str, float], what: str = "") -> None:
    """Who takes how long, by name → how many times as fast minivlm is as the fastest of the others."""
    others = {name: value for name, value in seconds.items() if name != "minivlm"}
    if others and "minivlm" in seconds:
        fastest = min(others, key=others.get)
        ratio = others[fastest] / seconds["minivlm"]
        print(f"{what and what + ': '}minivlm takes 1/{ratio:.2f} of the time of the fastest other, {fastest}")


def training_step(model: nn.Module, loss: Callable[[], Tensor], precision: str) -> Callable[[], float]:
    """Forward, backward and AdamW of what is trained → the loss."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return value.item()

    return step
