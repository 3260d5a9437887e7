"""What a run leaves behind after its last step: the best model, its scores, a figure, and what to try next."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from minivlm.atomic_writing import write_atomically
from minivlm.checkpoint import save
from minivlm.errors import UserError, as_started
from minivlm.evaluate import table
from minivlm.metrics import Score
from minivlm.metrics.samples import write_samples
from minivlm.precision import as_stored, cast
from minivlm.processes import random_state, set_random_state, together
from minivlm.recipes.job import Job
from minivlm.recipes.trained_parts import leave_adapter
from minivlm.run import Run, read_record, restore_weights


def finish(run: Run, job: Job) -> None:
    """The best checkpoint becomes the run's model, which is saved before it is evaluated on held-out data and pictured.

    All processes evaluate together; the first writes.
    """
    best, left = run.best(), run.directory
    metrics, samples, figure = left / "metrics.json", left / "samples.npz", left / "picture.png"
    step = read_record(best)["step"]
    restore_weights(best, job.model)
    for path in (metrics, samples, figure) if run.write else ():  # of what the run had come to before it was resumed
        path.unlink(missing_ok=True)
    with TemporaryDirectory() as nowhere:  # the models of all processes change, the files of the first stay
        out = run.directory if run.write else Path(nowhere)
        job.finish(out)
        told = leave_adapter(out, job.model, job.recipe)
    if told and run.write:
        print(told)
    cast(job.model, job.model.stored)  # so that what is evaluated is what is left
    if run.write:
        save(run.directory, job.model, job.processor, base=job.recipe.external_weights())
    try:
        with together():
            scores = job.evaluate()
        if not run.write:
            return
        before = {name: Score.from_record(score) for name, score in read_record(best).get("before", {}).items()}
        shown = table(scores, before or None)
        print(f"\nthe best checkpoint (step {step}) on {job.judged_on()}\n\n{shown}\n")
        text = json.dumps(as_values(scores), indent=1, ensure_ascii=False) + "\n"
        job.figure(figure)
        write_samples(samples, {name: score.samples for name, score in scores.items() if score.samples})
        write_atomically(metrics, lambda path: path.write_text(text, encoding="utf-8"))
    except UserError as error:
        raise UserError(
            f"{error} The model, of step {step}, is in {run.directory} all the same: only its evaluation ended here."
        ) from error
    print(f"{run.directory}/ holds the model, metrics.json and picture.png. Try next:")
    out = f" {run.directory} "
    for command in job.next_commands(run.directory):
        print(f"  {as_started(no_options(command.replace(out, f' {shlex.quote(str(run.directory))} ')))}")


def judged_before(job: Job, resumed: Path | None, device: torch.device) -> dict[str, dict]:
    """The scores of what a job starts from, as JSON values; those of a run that is resumed are in its record. Empty where the
    start is not judged."""
    if resumed is not None:
        return read_record(resumed).get("before", {})
    if not job.judges_start:
        return {}
    random = random_state(device)  # judging may draw from it
    with as_stored(job.model):
        scores = job.evaluate()
    set_random_state(random, device)
    print(f"\nbefore the first step on {job.judged_on()}\n\n{table(scores)}\n")
    return as_values(scores)


def as_values(scores: dict[str, Score]) -> dict[str, dict]:
    return {name: score.record() for name, score in scores.items()}


def no_options(command: str) -> str:
    """The command, in which a file that is called like an option, such as -o, is called ./-o."""
    words = shlex.split(command)
    files = [f"./{word}" if word.startswith("-") and os.path.exists(word) else word for word in words]
    return command if files == words else shlex.join(files)
