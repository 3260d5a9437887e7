"""A recipe is a value: model, data, optimiser, steps. The command line replaces its fields by their dotted names."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from minivlm import config
from minivlm.errors import UserError, nearest
from minivlm.training import OptimiserConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every recipe has; the recipes of a pattern add model and data, and `start`, which opens both."""

    summary: str
    steps: int
    batch_size: int  # of all processes together
    micro_batch: int | None = None  # samples whose activations are held at a time; None: the whole batch
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    seed: int = 0
    save_every: int = 200  # steps between checkpoints, each with its score on the validation split
    keep: int = 2  # checkpoints kept besides the best

    def __post_init__(self):
        for name, least in (("steps", 1), ("batch_size", 1), ("save_every", 1), ("keep", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}, but must be at least 1, or none")

    def is_time_to_save(self, step: int) -> bool:
        """Every save_every steps, at the end, and once early, so that a run that dies young leaves something."""
        return step % self.save_every == 0 or step in (max(1, self.save_every // 4), self.steps)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run a recipe; nothing here changes what is learnt, except where two devices round differently."""

    out: str | None = None  # None: out/<recipe>
    data: str | None = None
    resume: bool = False
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    stop_at: int | None = None  # stop after this step as Ctrl-C does, for machines that are lent by the hour
    list: bool = False
    help: bool = False

    def resume_command(self, name: str) -> str:
        """The command line that goes on with an interrupted run."""
        flags = ["--out " + self.out] if self.out else []
        flags += [f"--{key} {value}" for key in ("device", "precision") if (value := getattr(self, key)) != "auto"]
        flags += ["--compile"] if self.compile else []
        return " ".join(["python train.py", name, *flags, "--resume"])


def split_arguments(argv: list[str]) -> tuple[list[str], dict[str, str | bool]]:
    """["clip", "--steps", "5", "--compile"] → (["clip"], {"steps": "5", "compile": True})"""
    words, options = [], {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if equals:
            options[name] = value
        elif rest and not rest[0].startswith("--"):
            options[name] = rest.pop(0)
        else:
            options[name] = True
    return words, options


def read_value(text: str | bool) -> Any:
    """"8" → 8, "1e-3" → 0.001, "true" → True, "none" → None, anything else stays a string."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def override(value: Any, names: dict[str, str | bool]) -> Any:
    """A copy of a (nested) dataclass with fields replaced: {"model.vision.depth": "8"}. A misspelt name is an error."""
    known = dotted_names(value)
    for name, text in names.items():
        if name not in known:
            raise UserError(f"unknown option --{name}.{nearest(name, [*known, *dotted_names(Options())])}")
        value = set_field(value, name.split("."), text, name)
    return value


def set_field(value: Any, path: list[str], text: str | bool, name: str) -> Any:
    hint = config.field_types(type(value))[path[0]]
    if len(path) > 1:
        new = set_field(getattr(value, path[0]), path[1:], text, name)
    else:
        new = read_value(text)
        if str in config.alternatives(hint) and not isinstance(new, (str, bool, type(None))):
            new = text  # a folder may be called 2024
        new = config.coerce(hint, new, f"--{name}")
    try:
        return replace(value, **{path[0]: new})
    except ValueError as error:
        raise UserError(f"--{name} {text}: {error}.") from None


def dotted_names(value: Any, prefix: str = "") -> list[str]:
    names = []
    for f in dataclasses.fields(value):
        inner = getattr(value, f.name)
        if dataclasses.is_dataclass(inner):
            names += dotted_names(inner, f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
    return names
