"""How good a trained model is, on pictures and texts it has not seen: `python -m minivlm.evaluate MODEL [--data DIR]`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from minivlm.errors import UserError
from minivlm.evaluate.compare import contrast, picture, retrieval, shows, zero_shot
from minivlm.evaluate.language import language
from minivlm.evaluate.match import matching, matching_accuracy, matching_picture
from minivlm.evaluate.speak import ask, captions, speech, speech_picture
from minivlm.evaluate.table import table
from minivlm.metrics import Score

__all__ = [
    "ask",
    "captions",
    "contrast",
    "evaluate",
    "language",
    "main",
    "matching",
    "matching_accuracy",
    "matching_picture",
    "picture",
    "retrieval",
    "shows",
    "speech",
    "speech_picture",
    "table",
    "zero_shot",
]


def evaluate(model, processor, directory: str | Path) -> dict[str, Score]:
    """All scores of a model of any kind on the held-out part of a dataset."""
    if hasattr(model, "match"):
        return matching(model, processor, directory)
    if hasattr(model, "encode_image"):
        return contrast(model, processor, directory)
    if hasattr(model, "vision"):
        return speech(model, processor, directory)
    if hasattr(model, "generate"):
        return language(model, processor, directory)
    raise UserError(f"a {type(model).__name__} neither compares nor speaks, so there is nothing to evaluate.")


def main(argv: list[str]) -> None:
    from minivlm.checkpoint import load
    from minivlm.training import choose_device

    parser = argparse.ArgumentParser(prog="python -m minivlm.evaluate", description=__doc__)
    parser.add_argument("model", help="a directory of ours, a published one, or a hub id")
    parser.add_argument("--data", default="data/shapes", help="the shapes world, or a folder of your own (data/shapes)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--save", help="write the scores to this JSON file as well")
    options = parser.parse_args(argv)
    model, processor = load(options.model, device=choose_device(options.device))
    scores = evaluate(model, processor, options.data)
    print(table(scores))
    if options.save:
        named = {name: asdict(score) for name, score in scores.items()}
        Path(options.save).write_text(json.dumps(named, indent=1, ensure_ascii=False) + "\n")
