"""`log.jsonl` and the progress bar of a training run."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor

from minivlm.atomic_writing import write_atomically
from minivlm.errors import UserError
from minivlm.memory import peak
from minivlm.processes import several

BAR_FORMAT = "step {n_fmt}/{total_fmt} |{bar:24}| {elapsed}, {remaining} left{postfix}"

FACTS = (  # what a line holds beside the parts of the loss
    *("step", "loss", "gradient_norm", "learning_rate", "learning_rates", "skipped"),
    *("seconds", "samples_per_second", "peak_memory", "validation", "validated"),
)
MOST_SKIPPED = 20  # steps in a row: the scale of the loss, 65,536 at first, is below one then


def log_every(device: torch.device) -> int:
    """Steps between looks at the loss: each on a CPU, where looking is free; every tenth where it makes the host wait."""
    return 1 if device.type == "cpu" else 10


class Log:
    """`log.jsonl`, one line a step. Numbers stay on the device until `flush`, so that the loop never waits for them.

    `flush` stops the run at the first non-finite loss: the weights before it are in the last checkpoint.
    skips: the loss is scaled, and a step whose gradients overflow was skipped. It is written without their norm, and the
    lines count those steps; only when MOST_SKIPPED follow each other does the run stop.
    rates: part → its learning rate at its highest; where they differ, a line has them all, and "learning_rate" is the highest.
    pace: step → what the last line of a flush tells besides (see `Pace`). send: gets every line as well (see trackers.py).
    """

    def __init__(
        self,
        path: Path,
        first_step: int,
        *,
        write: bool = True,
        skips: bool = False,
        rates: Mapping[str, float] = MappingProxyType({}),
        pace: Callable[[int], dict[str, float]] = lambda step: {},
        send: Callable[[Mapping, int], None] = lambda line, step: None,
    ):
        self.pace, self.send = pace, send
        self.path, self.write, self.waiting, self.skips = path, write, [], skips
        self.skipped, self.in_a_row = 0, 0
        self.last: tuple[int | None, dict] = (None, {})  # where in the file the last line begins, and what it tells
        highest, differ = max(rates.values(), default=0), len(set(rates.values())) > 1
        self.shares = {part: rate / highest for part, rate in rates.items()} if differ else {}
        if write:
            kept = [line for line in read_log(path) if line["step"] < first_step]
            self.skipped = max((line.get("skipped", 0) for line in kept), default=0)
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
            if self.skips:
                self.in_a_row = 0 if (done := math.isfinite(norm)) else self.in_a_row + 1
                self.skipped += not done
                line |= {"gradient_norm": norm if done else None, "skipped": self.skipped}
            overflows = self.skips and self.in_a_row <= MOST_SKIPPED
            if not math.isfinite(line["loss"]) or not (math.isfinite(norm) or overflows):
                samples = ids(step)
                shown = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
                raise UserError(
                    f"the loss is not finite at step {step}: loss {line['loss']}, learning rate {rate:.2e}, gradient norm "
                    f"{norm}, samples {shown}. Lower --optimiser.learning_rate or look at these samples"
                    f"{', or take --precision fp32' if self.skips else ''}; the last checkpoint is from before."
                )
            lines.append(line)
        self.waiting.clear()
        if self.write:
            paces = [*[{}] * (len(lines) - 1), self.pace(lines[-1]["step"])]
            self.append([line | self.by_part(line) | pace for line, pace in zip(lines, paces, strict=True)])
        return lines[-1]

    def validated(self, step: int, name: str, score: float) -> None:
        """Add the score of the validation split after so many steps to the line of the last of them."""
        if self.write:
            at, line = self.last
            told = {"step": step - 1, "validation": score, "validated": name}
            same = line.get("step") == step - 1
            self.write_lines([line | told if same else told], at if same else None)
            self.send(told, step - 1)

    def append(self, lines: Sequence[dict]) -> None:
        self.write_lines(lines, None)
        for line in lines:
            self.send(line, line["step"])

    def write_lines(self, lines: Sequence[dict], at: int | None) -> None:
        """To the end of the file; or, with the last line, in its place."""
        texts = [f"{json.dumps(line)}\n".encode() for line in lines]
        try:
            with self.path.open("rb+" if self.path.exists() else "ab") as file:
                file.seek(*((0, os.SEEK_END) if at is None else (at,)))
                start = file.tell()
                file.write(b"".join(texts))  # what replaces the last line is no shorter
        except OSError as error:
            why = f"{self.path} cannot be written: {error.strerror}"
            raise UserError(f"{why}. Go on from the last checkpoint with --resume.") from error
        self.last = (start + sum(map(len, texts[:-1])), lines[-1])

    def by_part(self, line: dict) -> dict[str, dict[str, float]]:
        rates = {part: share * line["learning_rate"] for part, share in self.shares.items()}
        return {"learning_rates": rates} if rates else {}


class Pace:
    """How fast training goes: its seconds, without validation and those before a resume included (None: not known), samples a
    second since the last look, and the most memory that this process has held, in bytes."""

    def __init__(self, samples: int, device: torch.device, before: float | None, first_step: int):
        self.samples, self.device, self.before = samples, device, before
        self.first_step, self.last = first_step, (first_step, 0.0)
        self.start()

    def start(self) -> None:
        """From here on it counts."""
        self.started = time.perf_counter()

    def pause(self, since: float) -> None:
        """What went by since then is no training."""
        self.started += time.perf_counter() - since

    def seconds(self) -> float:
        """Of training in this process."""
        return time.perf_counter() - self.started

    def whole(self) -> float | None:
        return None if self.before is None else round(self.before + self.seconds(), 3)

    def speed(self, step: int) -> float:
        """Samples a second, on average."""
        return self.samples * (step - self.first_step) / self.seconds()

    def __call__(self, step: int) -> dict[str, float]:
        seconds, (before, at) = self.seconds(), self.last
        self.last = (step + 1, seconds)
        told = {"samples_per_second": round(self.samples * (step + 1 - before) / max(1e-9, seconds - at), 1)}
        if self.before is not None:
            told["seconds"] = self.whole()
        if (held := peak(self.device)) is not None:
            told["peak_memory"] = held
        return told


def read_log(path: Path) -> list[dict]:
    """The steps of a log up to the first line that is none: the last one, where a killed run left it half-written. What a line
    of its own tells of a step, its validation, is put beside it."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        if lines and lines[-1]["step"] == line["step"]:
            lines[-1] |= line
        else:
            lines.append(line)
    return lines
