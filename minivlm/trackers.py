"""`train.py --log tensorboard,wandb,trackio`: the numbers of log.jsonl, sent elsewhere as well.

What a tracker needs is imported where it is used. log.jsonl is what a run resumes from; a tracker that fails is told of once
and then left alone, since training is worth more than its display.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minivlm.errors import UserError

PROJECT = "minivlm"
NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # name → its package

Send = Callable[[Mapping[str, float], int], None]  # numbers by name, and the step


def named(log: str) -> list[str]:
    """ "tensorboard,wandb" → the names. ValueError for one that is none."""
    names = [name.strip() for name in log.split(",") if name.strip()]
    for name in names:
        if name not in NEEDS:
            raise ValueError(f"{name!r}, but there are {', '.join(NEEDS)}")
    return list(dict.fromkeys(names))


def require(log: str) -> None:
    """UserError, before training, for a tracker that is not installed."""
    for name in named(log):
        if find_spec(NEEDS[name]) is None:
            raise UserError(f"--log {name} needs the package {NEEDS[name]}: pip install {NEEDS[name]}")


class Trackers:
    """The trackers of a run. key: tells it from others in the same place; a run that is resumed keeps it, and goes on there."""

    def __init__(self, log: str, directory: Path, config: Mapping[str, Any], *, first_step: int, key: str):
        about = (directory, config, first_step, key)
        self.open: dict[str, tuple[Send, Callable[[], None]]] = {}
        for name in named(log):
            self.tried(name, lambda name=name: self.open.update({name: STARTS[name](*about)}))

    def send(self, numbers: Mapping[str, Any], step: int) -> None:
        plain = {k: v for k, v in flat(numbers).items() if k != "step"}
        for name, (send, _) in [*self.open.items()]:
            self.tried(name, lambda send=send: send(plain, step))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error) -> None:
        """However training ends, what waits is written."""
        for name, (_, close) in [*self.open.items()]:
            self.tried(name, close)

    def tried(self, name: str, action: Callable[[], Any]) -> None:
        """A network, a server or a full disk may fail in any way."""
        try:
            action()
        except Exception as error:
            self.open.pop(name, None)
            print(
                f"--log {name} failed and is left out from here on ({type(error).__name__}: {error})", file=sys.stderr
            )


def tensorboard(
    directory: Path, config: Mapping[str, Any], first_step: int, key: str
) -> tuple[Send, Callable[[], None]]:
    """Event files in the run's directory; steps that are taken again after a resume replace what was there."""
    writer = import_module("torch.utils.tensorboard").SummaryWriter(
        str(directory / "tensorboard"), purge_step=first_step or None
    )

    def send(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def wandb(directory: Path, config: Mapping[str, Any], first_step: int, key: str) -> tuple[Send, Callable[[], None]]:
    """Its own count of steps never goes back, as a run does that is resumed from its last checkpoint: ours is the axis."""
    how = dict(resume="allow", config=dict(config), dir=str(directory))
    run = import_module("wandb").init(project=PROJECT, name=directory.name, id=key, **how)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return lambda numbers, step: run.log({"step": step, **numbers}), run.finish


def trackio(directory: Path, config: Mapping[str, Any], first_step: int, key: str) -> tuple[Send, Callable[[], None]]:
    name, how = f"{directory.name}-{key}", dict(resume="allow", config=dict(config), embed=False)
    run = import_module("trackio").init(project=PROJECT, name=name, **how)
    return lambda numbers, step: run.log(dict(numbers), step=step), run.finish


def flat(numbers: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """{"learning_rates": {"vision": 0.1}, "validated": "Recall@1"} → {"learning_rates/vision": 0.1}"""
    found = {}
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}/")
        elif isinstance(value, (int, float)):
            found[before + name] = value
    return found


def new_key() -> str:
    return secrets.token_hex(4)


STARTS: Mapping[str, Callable[..., tuple[Send, Callable[[], None]]]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "trackio": trackio,
}
