"""What a run may be resumed with: the trajectory it began stays, and what may change is reported."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import nn

from minivlm.datasets.fingerprint import changes, fingerprint
from minivlm.errors import UserError
from minivlm.pretrained.names import listed
from minivlm.recipes.older_options import read_recipe
from minivlm.recipes.recipe import Recipe
from minivlm.run import Run, read_record

MAY_CHANGE = ("steps", "save_every", "keep", "micro_batch", "optimiser.", "data.cache")  # and are reported
DATA = ("data.directory", "data.class_names")  # judged by what is in them
WORDS = ("summary", "measured", "given")


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{"optimiser.learning_rate": (0.003, 1e-05)}, for all fields, of the parts as well."""
    found = {}
    for field in dataclasses.fields(old):
        name, a, b = prefix + field.name, getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            found |= differences(a, b, f"{name}.")
        elif a != b:
            found[name] = (a, b)
    return found


def refuse_changes(record: dict, old: Recipe, new: Recipe) -> None:
    """UserError for what would make another run of it."""
    for name, (before, now) in differences(old, new).items():
        if not name.startswith(MAY_CHANGE) and name not in (*DATA, *WORDS):
            raise UserError(
                f"--{name} is {shown(before)} in the run that is resumed, and {shown(now)} is asked for: leave it out, or "
                "start anew, without --resume."
            )
    if new.steps < record["step"]:
        raise UserError(f"--steps {new.steps}: the run has done {record['step']} steps already.")


def shown(value: Any) -> str:
    return "a part with fields of its own" if dataclasses.is_dataclass(value) else f"{value}"


def facts(name: str, recipe: Recipe, device: torch.device, precision: torch.dtype, model: nn.Module) -> dict[str, Any]:
    """What a checkpoint records, so that resuming can tell what is different, and the sizes that `minivlm.zoo` shows."""
    on = {"device": device.type, "precision": str(precision).removeprefix("torch.")}
    on |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    sizes = {"parameters": parameters(model), "trained": parameters(model, trained=True)}
    return {"name": name, "data": fingerprint(recipe.data.source), "on": on, **sizes}


def parameters(model: nn.Module, *, trained: bool = False) -> int:
    """How many numbers the model holds, or learns; a shared one counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def is_finished(run: Run, recipe: Recipe) -> bool:
    """Whether all steps are done and the model, its scores and its picture are there."""
    left = all((run.directory / name).exists() for name in ("config.json", "model.safetensors", "metrics.json"))
    return left and read_record(run.latest())["step"] >= recipe.steps


def report(run: Run, recipe: Recipe) -> list[str]:
    """What the user should know about a run that is resumed, a line each. UserError for other data."""
    latest = run.latest()
    passed_over = [f"{path} is passed over: {problem}" for path, problem in run.examined() if problem]
    return [*passed_over, *compare(read_record(latest), recipe, run.about)]


def compare(record: dict, recipe: Recipe, about: dict[str, Any]) -> list[str]:
    """What the resumed run does otherwise than the one that wrote `record`, a line each. UserError for other data."""
    old = read_recipe(recipe, record["recipe"], "recipe")
    directory, lines = recipe.data.directory, []
    if not isinstance(record.get("data"), dict) or not isinstance(record.get("on"), dict):
        lines.append("the checkpoint is of an earlier version, which did not record its data: they cannot be compared")
    elif found := changes(record["data"], about["data"]):
        raise UserError(
            f"the data in {directory} are not those that the run began with, in {old.data.directory} ({listed(found, 3)}): put "
            "them back, or start anew, without --resume (the earlier run is kept)."
        )
    else:
        differ = [
            f"{name} {was} → {about['on'][name]}" for name, was in record["on"].items() if was != about["on"].get(name)
        ]
        if differ:
            lines.append(f"not to the bit what it would have been: {', '.join(differ)}")
    if os.path.realpath(directory) != os.path.realpath(old.data.directory):
        lines.append(f"the data are read from {directory} in place of {old.data.directory}")
    for name, (before, now) in differences(old, recipe).items():
        if name.startswith(MAY_CHANGE):
            lines.append(f"{name}: {before} → {now}, as asked for")
    return lines
