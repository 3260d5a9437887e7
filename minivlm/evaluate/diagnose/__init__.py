"""Why does a model fail? `python -m minivlm.evaluate MODEL --diagnose` shows four pitfalls of vision-language models, each as a
symptom, the figures that show it, a remedy, and what the remedy does to these figures, where it can be tried without training.

Each pitfall has a module of its own, with two functions:

    left_out(model, processor, data) → str        why this model, or this folder, cannot show it; "" if it can
    diagnose(model, processor, data) → Pitfall    measures it, and tries the remedy
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from minivlm.atomic_writing import write_atomically
from minivlm.command_line import names_among
from minivlm.errors import UserError
from minivlm.evaluate.diagnose.matcher import check_matcher
from minivlm.evaluate.diagnose.pitfall import Pitfall

__all__ = ["PITFALLS", "Pitfall", "add_options", "diagnose", "run"]

PITFALLS = {  # name → its module
    "modality-gap": "modality_gap",
    "hallucination": "hallucination",
    "language-bias": "language_bias",
    "resolution": "resolution",
}


def diagnose(model, processor, data, names: Sequence[str] = tuple(PITFALLS), **more) -> list[Pitfall]:
    """The pitfalls of a model on the held-out part of a folder. UserError where it can have none of those that are named.
    more: of hallucination, matcher (a `Judge`) and objects (a file)."""
    return [*diagnoses(model, processor, data, names, **more)]


def diagnoses(model, processor, data, names: Sequence[str], **more) -> Iterator[Pitfall]:
    """The same one by one, since each takes its time."""
    more = {"hallucination": more}
    modules = {name: import_module(f"{__name__}.{PITFALLS[name]}") for name in names}
    reasons = {name: module.left_out(model, processor, data, **more.get(name, {})) for name, module in modules.items()}
    if all(reasons.values()):
        why = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in reasons.items())
        raise UserError(f"there is no pitfall to diagnose in this {type(model).__name__} on {data} ({why}).")
    for name, module in modules.items():
        why = reasons[name]
        yield Pitfall(name, left_out=why) if why else module.diagnose(model, processor, data, **more.get(name, {}))


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--diagnose",
        type=names_among(PITFALLS, option="--diagnose", what="pitfall"),
        nargs="?",
        const=tuple(PITFALLS),
        metavar="PITFALL,…",
        help=f"pitfalls with their remedies, all or some: {','.join(PITFALLS)}",
    )
    parser.add_argument("--matcher", metavar="MODEL", help="--diagnose: a BLIP or CLIP that chooses among captions")
    parser.add_argument(
        "--objects",
        metavar="FILE",
        help="for CHAIR and --diagnose: what counts as an object, a name and its synonyms a line",
    )
    parser.add_argument("--images", default="diagnosis", help="--diagnose: the folder for its images (%(default)s)")


def check(options: Namespace) -> None:
    """UserError, before a model is loaded, for options of a pitfall that is not asked for, and for a place that images cannot
    be written to."""
    judged = options.predictions and options.diagnose is None  # for CHAIR
    for name in ("matcher",) if judged else ("matcher", "objects"):
        if getattr(options, name) is not None and "hallucination" not in (options.diagnose or ()):
            raise UserError(f"--{name} belongs to --diagnose hallucination: add it, or leave --{name} out.")
    if options.diagnose is not None:
        check_images(options.images)


def check_images(images: str) -> None:
    """UserError, before the work, where the images cannot be written."""
    directory = Path(images)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--images {images}: images cannot be written there ({error.strerror or error}).") from None
    if not os.access(directory, os.W_OK):
        raise UserError(f"--images {images}: images cannot be written there; choose another folder.")


def run(options: Namespace, model, processor, data) -> list[Pitfall]:
    """Print the pitfalls, write their images to options.images and, with --save, their numbers to a file."""
    from minivlm.checkpoint import load

    directory, found, matcher = Path(options.images), [], None
    if options.matcher is not None:
        matcher = check_matcher(*load(options.matcher, device=str(model.device)), options.matcher)
    for pitfall in diagnoses(model, processor, data, options.diagnose, matcher=matcher, objects=options.objects):
        print(f"{pitfall.text()}\n")
        found.append(pitfall)
        if pitfall.image is not None:
            path = directory / f"{pitfall.name}.png"
            write_atomically(path, lambda file, image=pitfall.image: image.save(file, format="png"))
            print(f"wrote {path}\n")
    if options.save:
        values = {pitfall.name: pitfall.record() for pitfall in found}
        text = json.dumps(values, indent=1, ensure_ascii=False)
        write_atomically(Path(options.save), lambda file: file.write_text(f"{text}\n", encoding="utf-8"))
    return found
