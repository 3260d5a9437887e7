"""The command line of train.py: options by the dotted names of a recipe's fields, and how a recipe is run."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

from minivlm import config, trackers
from minivlm.errors import UserError, as_started, nearest
from minivlm.files import parse_json
from minivlm.recipes.older_options import GONE, current_option
from minivlm.sizes import bytes_in


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run a recipe; nothing here changes what is learnt, except where two devices round differently."""

    out: str | None = None  # None: out/<recipe>
    data: str | None = None
    resume: bool = False
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False  # what lies inside the blocks is computed again in the backward pass
    feature_cache: str = "4GB"  # how much of a frozen vision tower's features may be kept; off: none
    log: str = ""  # where else the numbers of log.jsonl go: tensorboard, wandb, trackio, separated by commas
    stop_at: int | None = None  # stop after this step as Ctrl-C does, for machines that are lent by the hour
    list: bool = False
    help: bool = False

    def __post_init__(self):
        if self.data == "":
            raise ValueError("data is empty, but must name a folder")
        if self.stop_at is not None and self.stop_at < 1:
            raise ValueError(f"stop_at is {self.stop_at}, but must be at least 1")

        try:
            trackers.named(self.log)
        except ValueError as error:
            raise ValueError(f"log is {error}") from None
        try:
            bytes_in(self.feature_cache)
        except ValueError as error:
            raise ValueError(f"feature_cache is {error}") from None

    def directory(self, name: str) -> str:
        """Where the run of this recipe goes."""
        return f"out/{name}" if self.out is None else self.out

    def resume_command(self, name: str) -> str:
        """The command line that resumes an interrupted run; the recipe, with its data, is in the checkpoint."""
        flags = [] if self.out is None else ["--out", self.out]
        for key in ("device", "precision", "feature_cache", "log"):
            flags += [f"--{key}", value] if (value := getattr(self, key)) != getattr(Options, key) else []
        flags += [f"--{key}" for key in ("compile", "activation_checkpointing") if getattr(self, key)]
        return shlex.join([*launcher(), name, *flags, "--resume"])


def processes() -> int:
    """How many torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launcher() -> list[str]:
    """How this program was started, by python or by torchrun."""
    if processes() == 1:
        return as_started("python train.py").split()
    return as_started(f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)} train.py").split()


def split_arguments(argv: list[str]) -> tuple[list[str], dict[str, str | bool]]:
    """["clip", "--steps", "5", "--compile"] → (["clip"], {"steps": "5", "compile": True})"""
    words, options = [], {}
    rest = ["--help" if word == "-h" else word for word in argv]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = re.sub(r"(?<!\d)-|-(?!\d)", "_", name)  # not in rates.text.blocks.0-5
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else True
        if options.setdefault(name, value) != value:
            raise UserError(f"--{name} is given twice, as {options[name]} and as {value}: which one is meant?")
    return words, options


def read_value(text: str | bool) -> Any:
    """ "8" → 8, "1e-3" → 0.001, "true" → True, "none" → None, anything else stays a string."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return parse_json(os.fsencode(text))
    except ValueError:  # a word, or a number of more digits than Python converts
        return text


def override(value: Any, names: dict[str, str | bool]) -> Any:
    """A copy of a (nested) dataclass with fields replaced: {"model.vision.depth": "8"}. A misspelt name is an error."""
    known = dotted_names(value)
    tables = tuple(f"{name}." for name in known if isinstance(config.value_at(value, name), dict))
    for name in names:
        if name not in known and not name.startswith(tables or " "):
            if (now := current_option(name)) in known:
                raise UserError(f"--{name} is called --{now} now.")
            if name in GONE:
                raise UserError(f"--{name} no longer exists: it {GONE[name][1]}. Leave it out.")
            raise UserError(f"unknown option --{name}.{nearest(name, [*known, *dotted_names(Options())])}")
    return set_fields(value, {tuple(name.split(".")): text for name, text in names.items()})


def set_fields(value: Any, changes: dict[tuple[str, ...], str | bool], prefix: str = "") -> Any:
    """All changes of one dataclass at once, so that values which only fit together can be given together."""
    hints = config.field_types(type(value))
    new = {}
    for field_name in dict.fromkeys(path[0] for path in changes):
        inner = {path[1:]: text for path, text in changes.items() if path[0] == field_name}
        name = prefix + field_name
        if () in inner:
            typed = as_typed(inner[()], hints[field_name])
            if typed is True and bool not in config.alternatives(hints[field_name]):
                raise UserError(f"--{name} has no value behind it: give it one, or leave it out.")
            new[field_name] = config.read_field(field_name, hints[field_name], typed, f"--{name}")
        elif isinstance(entries := getattr(value, field_name), dict):
            read = {".".join(path): as_typed(text, float) for path, text in inner.items()}
            new[field_name] = entries | config.coerce(hints[field_name], read, f"--{name}")
        else:
            new[field_name] = set_fields(part_of(value, field_name), inner, f"{name}.")
    try:
        return replace(value, **new)
    except ValueError as error:
        named = {path: text for path, text in changes.items() if path[0] in re.findall(r"\w+", str(error))} or changes
        given = " ".join(f"--{prefix}{'.'.join(path)} {text}" for path, text in named.items())
        what = given if len(named) == 1 else f"{given} does not go together"
        raise UserError(f"{what}: {error}.") from None


def as_typed(text: str | bool, hint: Any) -> Any:
    choices = [word for kind in config.alternatives(hint) for word in get_args(kind) if get_origin(kind) is Literal]
    if text in choices:
        return text  # one of the words may be "none"
    value, kinds = read_value(text), config.alternatives(hint)
    if isinstance(text, str) and (tuples := [kind for kind in kinds if get_origin(kind) is tuple]):
        if get_args(tuples[0])[0] is str and not isinstance(value, list) and (value is not None or len(kinds) == 1):
            return [part.strip() for part in text.split(",")]  # one of the words may be "none"
        whole = isinstance(value, (list, dict, type(None)))
        return value if whole else [read_value(part) for part in text.split(",")]  # caption,search
    if str in kinds and not isinstance(value, (str, bool, type(None))):
        return text  # a folder may be called 2024
    return value


def part_of(value: Any, name: str) -> Any:
    """A field's value; of an optional part that is left out, what it would be by default."""
    inner = getattr(value, name)
    if inner is not None:
        return inner
    for kind in config.alternatives(config.field_types(type(value))[name]):
        if dataclasses.is_dataclass(kind) and all(
            f.default is not dataclasses.MISSING for f in dataclasses.fields(kind)
        ):
            return kind()
    return None


def dotted_names(value: Any, prefix: str = "") -> list[str]:
    names, hints = [], config.field_types(type(value))
    for f in dataclasses.fields(value):
        if not f.metadata.get("option", True):
            continue
        inner = part_of(value, f.name)
        if dataclasses.is_dataclass(inner):
            names += dotted_names(inner, f"{prefix}{f.name}.")
        if not dataclasses.is_dataclass(inner) or type(None) in config.alternatives(hints[f.name]):
            names.append(prefix + f.name)  # a part that may be left out can be set to none as a whole
    return names
