"""What a run left in its directory: the record of its last checkpoint, its scores with their samples, its log, and what of
these is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from minivlm.errors import UserError
from minivlm.files import read_json
from minivlm.metrics import Score
from minivlm.metrics.samples import read_samples
from minivlm.run import Run, read_record
from minivlm.training_log import read_log


@dataclass(frozen=True)
class RunResults:
    """A run as its directory tells it. record: of its last checkpoint, empty where there is none. notes: what is missing."""

    name: str
    record: Mapping[str, Any]
    scores: Mapping[str, Score]
    log: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = field(default_factory=list)


def read(path: str) -> RunResults:
    """UserError where no run is."""
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(
            f"{path} {'is a file' if directory.exists() else 'does not exist'}: name the directory of a run."
        )
    checkpoints = Run(directory).all()
    log, notes = read_log(directory / "log.jsonl"), list(told_of_log(directory / "log.jsonl"))
    scored = (directory / "metrics.json").exists()
    if not (checkpoints or log or scored):
        raise UserError(
            f"{path} holds no run: name a directory that train.py wrote, which has checkpoints and log.jsonl."
        )
    record = read_record(checkpoints[-1]) if checkpoints else {}
    if not checkpoints:
        notes.append("it has no checkpoint, which tells its recipe")
    elif record["step"] < record["recipe"].get("steps", 0):
        notes.append(f"it is not finished: step {record['step']} of {record['recipe']['steps']}")
    if not scored:
        notes.append("it has no metrics.json, so no scores")
    scores = with_samples(directory, read_scores(directory), notes) if scored else {}
    return RunResults(str(directory), record, scores, log, [f"{path}: {note}" for note in notes])


def told_of_log(path: Path) -> Iterator[str]:
    """What is wrong with a log, in words."""
    if not path.exists():
        yield "it has no log.jsonl, so no curves"
        return
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not lines:
        yield "its log.jsonl is empty, so it has no curves"
    for i, line in enumerate(lines):
        try:
            whole = isinstance(json.loads(line).get("step"), int)
        except (ValueError, AttributeError):
            whole = False
        if not whole:
            yield f"line {i + 1} of {len(lines)} of its log.jsonl is broken, and what follows is left out"
            return


def read_scores(directory: Path) -> dict[str, Score]:
    try:
        return {name: Score.from_record(score) for name, score in read_json(directory / "metrics.json").items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{directory / 'metrics.json'} does not hold the scores of a run: evaluate it again.") from None


def with_samples(directory: Path, scores: dict[str, Score], notes: list[str]) -> dict[str, Score]:
    """Scores with what they are made of, as far as it is there."""
    if not (directory / "samples.npz").exists():
        notes.append("an earlier version kept no samples: its scores are compared by their intervals, if it has these")
        return scores
    try:
        samples = read_samples(directory / "samples.npz")
    except (UserError, BadZipFile) as error:
        notes.append(
            f"samples.npz cannot be read, so scores are compared by their intervals ({str(error).rstrip('.')})"
        )
        return scores
    return {name: replace(score, samples=samples.get(name)) for name, score in scores.items()}
