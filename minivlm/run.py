"""The directory of a run: checkpoints that resume exactly, and the model that is left in the end.

    out/clip/   config.json model.safetensors tokenizer.json     the best model, for `minivlm.load`
                log.jsonl curves.png metrics.json samples.npz picture.png
                checkpoints/step-000200/                         a model directory as well, plus the training state:
                    training.json                                step, score, recipe
                    training.safetensors                         the optimiser's moments, the random states

A checkpoint is written under another name and renamed, and renamed before it is deleted: one that is there is whole, and
one that is not (a copy that broke off, a file that went) is passed over. Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from minivlm import atomic_writing, config
from minivlm.checkpoint import save
from minivlm.errors import UserError
from minivlm.files import open_regular, read_json
from minivlm.older_names import current_name, current_names
from minivlm.pretrained.names import refuse_misfits, tied
from minivlm.processes import set_random_state
from minivlm.run_directory import LOCK, OWN, is_at, set_aside, take_lock

WEIGHTS = ("model.safetensors", "training.safetensors")


class Run:
    """Inside `with`, no other process writes to the directory.

    write: this is the process that does; the others of a run read. about: what every checkpoint records beside its step,
    score and recipe.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, write: bool = True):
        self.directory, self.keep, self.write = Path(directory), keep, write
        self.checkpoints = self.directory / "checkpoints"
        self.about: dict[str, Any] = {}
        self.locks: list[IO[str]] = []

    def __enter__(self) -> Run:
        if not self.write:
            return self
        self.was_there = self.directory.is_dir()
        self.locks.append(take_lock(self.directory))
        self.sweep()
        return self

    def sweep(self) -> None:
        """Remove what a process that was killed had begun to write."""
        for path in [*self.checkpoints.glob(".step-*")]:
            if not foreign_files(path):
                shutil.rmtree(path)
        if not (self.directory / atomic_writing.UNFINISHED).exists():  # else it is put in place when the model is read
            for path in [*self.directory.glob(".*.tmp")]:
                if OWN.fullmatch(path.name):
                    path.unlink()

    def __exit__(self, *error) -> None:
        if not self.locks:
            return
        if any(is_at(file, self.directory / LOCK) for file in self.locks):  # else another process has begun here
            (self.directory / LOCK).unlink(missing_ok=True)
        for file in self.locks:
            file.close()
        if not self.was_there and self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()  # it was refused before it began

    def set_aside(self) -> Path | None:
        """Moves an earlier run out of the way; returns where to, or None if there was none."""
        if (previous := set_aside(self.directory)) is not None:
            (previous / LOCK).unlink(missing_ok=True)
            self.locks.append(take_lock(self.directory))
        return previous

    def save(
        self, step: int, model: nn.Module, processor, optimiser, recipe, score: float, random: list[dict[str, Tensor]]
    ) -> None:
        """A checkpoint after `step` steps; older ones beyond the last `keep` and the best are removed. random: the random state
        of every process, see `processes.random_states`."""
        final = self.checkpoints / f"step-{step:06d}"
        temporary = self.checkpoints / f".step-{step:06d}.{os.getpid()}"
        record = {"step": step, "score": score, "recipe": config.to_dict(recipe), **self.about}
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save(temporary, model, processor)
            atomic_writing.write_tensors(temporary / "training.safetensors", training_state(model, optimiser, random))
            (temporary / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            for name in ("training.safetensors", "training.json"):
                atomic_writing.flush_to_disk(temporary / name)
            self.remove(final)
            temporary.rename(final)
            atomic_writing.flush_to_disk(self.checkpoints)
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise UserError(f"{final} was not written: {why}. Earlier checkpoints are untouched.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.prune()

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return [path for path, problem in self.examined() if not problem]

    def examined(self) -> list[tuple[Path, str]]:
        """Every checkpoint, oldest first, with what is wrong with it, or nothing."""
        steps = {path: re.fullmatch(r"step-(\d{6,})", path.name) for path in self.checkpoints.glob("step-*")}
        found = sorted((int(match[1]), path) for path, match in steps.items() if match and path.is_dir())
        return [(path, problem(path, step)) for step, path in found]

    def latest(self) -> Path:
        if found := self.all():
            return found[-1]
        broken = [why for _, why in self.examined()]
        told = f" ({broken[-1]})" if broken else ""
        raise UserError(
            f"there is no {'complete ' if broken else ''}checkpoint in {self.checkpoints} to resume from{told}; leave out "
            "--resume to start."
        )

    def best(self) -> Path:
        """The checkpoint with the highest score; of equal ones the latest."""
        records = [(read_record(path), path) for path in self.all()]
        if not records:
            raise UserError(f"there is no complete checkpoint in {self.checkpoints}.")
        rank = lambda record: (-math.inf if math.isnan(record["score"]) else record["score"], record["step"])
        return max(records, key=lambda pair: rank(pair[0]))[1]

    def prune(self) -> None:
        found = self.all()
        kept = {*found[-self.keep :], self.best()}
        for path in found:
            if path not in kept:
                self.remove(path)

    def remove(self, path: Path) -> None:
        """Renamed first: whenever this is broken off, a checkpoint is whole or does not go by the name of one."""
        if path.exists() and not foreign_files(path):
            doomed = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(doomed)
            shutil.rmtree(doomed)


def foreign_files(path: Path) -> list[str]:
    """Files in a checkpoint that no run writes. A checkpoint that holds some is never deleted."""
    return [one.name for one in path.iterdir() if not OWN.fullmatch(f"checkpoints/step-1/{one.name}")]


def problem(path: Path, step: int) -> str:
    """What a checkpoint lacks, or an empty string."""
    try:
        if read_record(path)["step"] != step:
            return f"{path / 'training.json'} is of another step"
        read_json(path / "config.json")
        for name in WEIGHTS:
            open_tensors(path / name)
    except UserError as error:
        return str(error).rstrip(".")
    return ""


def read_record(path: Path) -> dict:
    """training.json of a checkpoint: step, score, recipe, and what `Run.about` held; UserError if it is no such record."""
    record = read_json(path / "training.json")
    kinds = {"step": int, "score": (int, float), "recipe": dict}
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind) or isinstance(record[name], bool):
            raise UserError(
                f"{path / 'training.json'} has {name} = {record.get(name)!r}: it is no record of a checkpoint."
            )
    return record


def open_tensors(path: Path):
    """The safetensors file, its header read and held against its size."""
    with open_regular(path):  # a pipe would be waited for without end
        pass
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}).") from None


def restore_weights(path: Path, model: nn.Module) -> None:
    """A file holds tied weights once, under one of their names. UserError, by name, for what does not fit the model."""
    state = model.state_dict(keep_vars=True)
    tensors = dict(current_names(load_tensors(path / "model.safetensors"), state))
    groups = tied(state)
    for names in groups:
        for found in [tensors[name] for name in names if name in tensors]:
            tensors.update(dict.fromkeys(names, found))
    missing = [names[0] for names in groups if names[0] not in tensors]
    misshapen = [name for name in state if name in tensors and tensors[name].shape != state[name].shape]
    refuse_misfits(str(path / "model.safetensors"), missing, sorted(tensors.keys() - state.keys()), misshapen)
    model.load_state_dict(tensors)


def restore(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Weights and moments of a checkpoint into model and optimiser; returns the step to go on with."""
    restore_weights(path, model)
    where, tensors = path / "training.safetensors", load_tensors(path / "training.safetensors")
    names = {parameter: name for name, parameter in model.named_parameters()}
    known, states = set(names.values()), defaultdict(dict)  # parameter → kind of moment → tensor
    for key in (key for key in tensors if key.startswith("optimiser.")):
        name, _, kind = key.removeprefix("optimiser.").rpartition(".")
        states[current_name(name, known)][kind] = tensors[key]
    for group in optimiser.param_groups:
        for p in group["params"]:
            state = states[names[p]]
            home = {"step": p.device if group["fused"] else "cpu"}  # where AdamW keeps its counter
            if any(k != "step" and v.shape != p.shape for k, v in state.items()) or (state and "step" not in state):
                raise UserError(f"{where} does not fit the model: the moments of {names[p]} are of another shape.")
            optimiser.state[p] = {k: v.to(home.get(k, p.device)) for k, v in state.items()}
    return read_record(path)["step"]


def restore_random(path: Path, device: torch.device, rank: int, world: int) -> str:
    """Gives each of `world` processes the random state that it had. If their number or kind of device is another one, seeds
    them all from the step instead, and returns a note that says so."""
    where = path / "training.safetensors"
    file = open_tensors(where)
    older = {"random.cpu": "random.0.cpu", "random.cuda.0": "random.0.cuda"}  # as earlier versions wrote them
    names = {older.get(name, name): name for name in file.keys() if name.startswith("random.")}  # noqa: SIM118
    before = len([name for name in names if name.endswith(".cpu")])
    if not before:
        raise UserError(f"{where} lacks the random state: remove {path} to go on from the checkpoint before it.")
    if before != world or ("random.0.cuda" in names) != (device.type == "cuda"):
        torch.manual_seed(read_record(path)["step"] * world + rank)
        told = f"{before} process{'es' if before > 1 else ''}"
        told += " with a GPU each" if "random.0.cuda" in names else ""
        return f", which was saved by {told}: dropout draws other numbers than it would have"
    mine = {kind: names[key] for kind in ("cpu", "cuda") if (key := f"random.{rank}.{kind}") in names}
    set_random_state({kind: file.get_tensor(name) for kind, name in mine.items()}, device)
    return ""


def load_tensors(path: Path) -> dict[str, Tensor]:
    open_tensors(path)  # which says in a sentence what is wrong
    return load_file(path)


def training_state(
    model: nn.Module, optimiser: torch.optim.Optimizer, random: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What resuming needs besides the weights, as named tensors. random: of every process."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for p, state in optimiser.state.items():
        tensors |= {f"optimiser.{names[p]}.{k}": v.detach().contiguous() for k, v in state.items()}
    for rank, states in enumerate(random):
        tensors |= {f"random.{rank}.{kind}": state for kind, state in states.items()}
    return tensors
