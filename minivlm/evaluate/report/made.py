"""How a report was made: with which command, model, data and versions, and when."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

import minivlm
from minivlm.errors import UserError
from minivlm.html import Markup, definitions, tag
from minivlm.run import Run, read_record


def made(argv: Sequence[str], name: str, data: str | os.PathLike, model) -> Markup:
    facts = {"command": tag("code", f"python -m minivlm.evaluate {shlex.join(argv)}"), "model": name, "data": str(data)}
    if model is not None:
        parameters = sum(p.numel() for p in model.parameters())
        facts["model"] = f"{name}: {type(model).__name__}, {parameters:,} parameters, on {model.device}, {model.dtype}"
    facts |= trained(name)
    versions = {"minivlm": minivlm.__version__, "torch": torch.__version__, "Python": platform.python_version()}
    facts["versions"] = ", ".join(f"{what} {version}" for what, version in versions.items())
    facts["date"] = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    facts["evaluated"] = "by seed 0: draws of samples and of the bootstrap are the same each time"
    return definitions(facts)


def trained(directory: str) -> dict[str, str]:
    """What the newest checkpoint of a run records of its training; nothing of other models."""
    found = Run(directory).all() if Path(directory).is_dir() else []
    if not found:
        return {}
    try:
        record = read_record(found[-1])
    except UserError as error:  # the scores are as right without it
        return {"trained": f"not known: {error}"}
    recipe = record["recipe"]
    known = [f"{key.replace('_', ' ')} {recipe[key]}" for key in ("steps", "batch_size", "seed") if key in recipe]
    start = [f"from {recipe['starts_from']}"] if recipe.get("starts_from") else []
    return {"trained": ", ".join([str(recipe.get("summary", "")), *known, *start]).removeprefix(", ")}
