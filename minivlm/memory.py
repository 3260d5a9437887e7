"""Does a recipe fit? The memory and the time of its first steps, what to lower where it is tight, and the end of it."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from minivlm.errors import UserError
from minivlm.model import batch_norms
from minivlm.processes import on_this_machine
from minivlm.sizes import in_words

STEPS = 10  # that are measured
TIGHT = 0.9  # of the memory that is there
# Where PyTorch raises a RuntimeError in place of an OutOfMemoryError: on a CPU, in libraries of CUDA, on mps.
SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


class FirstSteps:
    """Told of every step; once, after ten of them, it has a report."""

    def __init__(self, device: torch.device):
        self.device, self.times, self.told = device, [], False

    def count(self) -> None:
        """A step is done. While these are measured, a GPU is waited for."""
        if len(self.times) < STEPS:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.times.append(time.perf_counter())

    def report(self, steps: int, advice: str) -> str:
        """ "10 steps: 0.42 s each, 3.1 GB at most of 15.8 GB; 2,000 steps take about 14 min"; else nothing.

        advice: what to lower, told where it is tight.
        """
        if len(self.times) < STEPS or self.told:
            return ""
        self.told = True
        # The median: the first step compiles and warms up, and one may have been followed by a checkpoint.
        seconds = statistics.median(b - a for a, b in itertools.pairwise(self.times))
        used, there, processes = peak(self.device), whole(self.device), sharers(self.device)
        memory = ""
        if used is not None:
            memory = f", {f'{processes} × ' if processes > 1 else ''}{in_words(used)} at most"
            memory += f" of {in_words(there)}" if there else ""
        told = f"{STEPS} steps: {seconds:.2g} s each{memory}; {steps:,} steps take about {duration(seconds * steps)}"
        if used is not None and there and used * processes > TIGHT * there:
            told += f"\nthat is tight: if memory runs out, {advice}"
        return told


def sharers(device: torch.device) -> int:
    """How many of our processes share the memory of a device: each has a GPU of its own."""
    return 1 if device.type == "cuda" else on_this_machine()[1]


def peak(device: torch.device) -> int | None:
    """Bytes of memory that this process has held at most: on its GPU, or of the machine; None where nobody counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def whole(device: torch.device) -> int | None:
    """Bytes of memory that there are, of the GPU or of the machine, or of the container that this runs in; None: not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    found = [path.read_text(encoding="utf-8").strip() for path in limits if path.is_file()]
    return min([machine, *(int(text) for text in found if text.isdigit())])


def duration(seconds: float) -> str:
    """In words: 50 s, 14 min, 3.2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def what_to_lower(recipe, options, model: nn.Module, world: int) -> str:
    """In the order in which it costs least."""
    rows, lora = recipe.batch_size // world, getattr(recipe, "lora", None)
    at_a_time = min(rows, recipe.micro_batch or rows)
    vision = getattr(getattr(recipe, "model", None), "vision", None)
    choices = {
        f"--micro_batch {at_a_time // 2}": at_a_time > 1 and not batch_norms(model),
        "--activation_checkpointing": not options.activation_checkpointing,
        f"--batch_size {recipe.batch_size // 2}": rows > 1,
        f"--lora.rank {lora.rank // 2 if lora else 8}": hasattr(recipe, "lora") and not (lora and lora.rank == 1),
        "--model.vision.image_size": hasattr(vision, "image_size"),
    }
    named = [option for option, helps in choices.items() if helps]
    return f"change, in this order: {', '.join(named)}" if named else "take a smaller model"


@contextmanager
def explained(advice: str, directory: Path) -> Iterator[None]:
    """An error that memory has run out becomes a UserError: what to lower, and what is left in the run's directory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(sign in text for sign in SIGNS):
            raise
        kept = sorted(path.name for path in (directory / "checkpoints").glob("step-*"))
        left = f"{kept[-1]} stays: go on from it with --resume" if kept else "no checkpoint had been saved yet"
        why = text.strip().splitlines()[0].rstrip(".") if text.strip() else "MemoryError"
        raise UserError(f"memory has run out ({why}): {advice}. In {directory}, {left}.") from error
