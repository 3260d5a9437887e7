"""The directory of a run: checkpoints that resume exactly, and the model that is left in the end.

    out/clip/   config.json model.safetensors tokenizer.json     the best model, for `minivlm.load`
                log.jsonl metrics.json picture.png
                checkpoints/step-000200/                         a model directory as well, plus the training state:
                    training.json                                step, score, recipe
                    training.safetensors                         the optimiser's moments, the random states

A checkpoint is written under another name and renamed, so one that is there is whole. Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from minivlm import checkpoint, config
from minivlm.errors import UserError
from minivlm.losses import random_state, set_random_state
from minivlm.pretrained.names import tied


class Run:
    def __init__(self, directory: str | Path, *, keep: int = 2):
        self.directory, self.keep = Path(directory), keep
        self.checkpoints = self.directory / "checkpoints"

    def save(self, step: int, model: nn.Module, processor, optimiser, recipe, score: float) -> None:
        """A checkpoint after `step` steps; older ones beyond the last `keep` and the best are removed."""
        final = self.checkpoints / f"step-{step:06d}"
        temporary = self.checkpoints / f".step-{step:06d}.{os.getpid()}"
        record = {"step": step, "score": score, "recipe": config.to_dict(recipe)}
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            checkpoint.save(temporary, model, processor)
            checkpoint.write_tensors(temporary / "training.safetensors", training_state(model, optimiser))
            (temporary / "training.json").write_text(json.dumps(record, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise UserError(f"{final} was not written: {why}. Earlier checkpoints are untouched.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.prune()

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step-*"))

    def latest(self) -> Path:
        if not self.all():
            raise UserError(
                f"there is no checkpoint in {self.checkpoints} to resume from; leave out --resume to start."
            )
        return self.all()[-1]

    def best(self) -> Path:
        """The checkpoint with the highest score; of equal ones the latest."""
        return max(self.all(), key=lambda path: (read_record(path)["score"], path.name))

    def prune(self) -> None:
        kept = {*self.all()[-self.keep :], self.best()}
        for path in self.all():
            if path not in kept:
                shutil.rmtree(path)

    def set_aside(self) -> Path | None:
        """Rename an earlier run that stands in the way, so that no slip of the fingers costs a training."""
        if not self.directory.exists() or not any(self.directory.iterdir()):
            return None
        previous = self.directory.with_name(self.directory.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        self.directory.rename(previous)
        return previous


def read_record(path: Path) -> dict:
    return json.loads((path / "training.json").read_text())


def restore_weights(path: Path, model: nn.Module) -> None:
    """A file holds tied weights once, under one of their names."""
    tensors = load_file(path / "model.safetensors")
    for names in tied(model.state_dict(keep_vars=True)):
        [found] = [tensors[name] for name in names if name in tensors]
        tensors.update(dict.fromkeys(names, found))
    model.load_state_dict(tensors)


def restore(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Weights, moments and random states of a checkpoint into model and optimiser; returns the step to go on with."""
    restore_weights(path, model)
    tensors = load_file(path / "training.safetensors")
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimiser.param_groups:
        for p in group["params"]:
            prefix = f"optimiser.{names[p]}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            home = {"step": p.device if group["fused"] else "cpu"}  # where AdamW keeps its counter
            optimiser.state[p] = {k: v.to(home.get(k, p.device)) for k, v in state.items()}
    cuda = [tensors[k] for k in sorted(tensors) if k.startswith("random.cuda.")]
    set_random_state({"cpu": tensors["random.cpu"], **({"cuda": cuda} if cuda else {})})
    return read_record(path)["step"]


def training_state(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What resuming needs besides the weights, as named tensors."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for p, state in optimiser.state.items():
        tensors |= {f"optimiser.{names[p]}.{k}": v.detach().contiguous() for k, v in state.items()}
    random = random_state()
    tensors["random.cpu"] = random["cpu"]
    tensors |= {f"random.cuda.{i}": state for i, state in enumerate(random.get("cuda", []))}
    return tensors
