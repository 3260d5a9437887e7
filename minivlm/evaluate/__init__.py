"""Scores of a trained model on held-out images and texts: `python -m minivlm.evaluate MODEL [--data DIR]`;
and its accuracy after examples in its prompt: `… --shots 0 1 2 4 8 [--ways 2]`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from minivlm.command_line import Parser, check_sheet_name, whole
from minivlm.datasets.contents import contents, split_notes, summary
from minivlm.datasets.shapes import is_world
from minivlm.datasets.source import add_options, source_of
from minivlm.errors import UserError
from minivlm.evaluate.compare import contrast, retrieval, retrieval_sheet, shows, zero_shot
from minivlm.evaluate.expectation import text_perplexity
from minivlm.evaluate.few_shot import few_shot, few_shot_accuracy, few_shot_picture
from minivlm.evaluate.generation import (
    FREE_ANSWERS,
    answers_and_captions,
    answers_sheet,
    ask,
    captions,
    check_questions,
    words_right,
)
from minivlm.evaluate.language import language
from minivlm.evaluate.match import matching, matching_accuracy, matching_sheet
from minivlm.evaluate.table import table
from minivlm.metrics import Score

__all__ = [
    "FREE_ANSWERS",
    "answers_and_captions",
    "answers_sheet",
    "ask",
    "captions",
    "check_questions",
    "contrast",
    "evaluate",
    "few_shot",
    "few_shot_accuracy",
    "few_shot_picture",
    "language",
    "main",
    "matching",
    "matching_accuracy",
    "matching_sheet",
    "retrieval",
    "retrieval_sheet",
    "shows",
    "table",
    "text_perplexity",
    "words_right",
    "zero_shot",
]


def evaluate(model, processor, directory: str | Path) -> dict[str, Score]:
    """All scores of a model of any kind on the held-out part of a dataset. UserError where it has nothing to judge by."""
    if scores := scores_of(model, processor, directory):
        return scores
    held_out = summary(contents(directory)["test"])
    raise UserError(
        f"{directory} holds {held_out} to judge by, but a {type(model).__name__} is judged by none of these."
    )


def scores_of(model, processor, directory: str | Path) -> dict[str, Score]:
    can = model.abilities
    if "choose" in can:
        scores = answers_and_captions(model, processor, directory)
        if "match" in can and is_world(directory):
            scores |= matching(model, processor, directory)
        return scores | (contrast(model, processor, directory) if "encode" in can else {})
    if "match" in can:
        scores = matching(model, processor, directory)
        return scores | (answers_and_captions(model, processor, directory) if "answer" in can else {})
    if "encode" in can:
        return contrast(model, processor, directory)
    if can & {"caption", "answer"}:
        return (answers_and_captions if model.takes_images else language)(model, processor, directory)
    raise UserError(f"a {type(model).__name__} has no ability that can be evaluated.")


def main(argv: list[str]) -> None:
    from minivlm.checkpoint import load
    from minivlm.training import choose_device

    parser = Parser(prog="python -m minivlm.evaluate", description=__doc__)
    parser.add_argument("model", help="a directory of ours, a published one, or a hub id")
    parser.add_argument("--data", default="data/shapes", help="the shapes world, or a folder of your own (data/shapes)")
    add_options(parser, "image_key", "caption_key", "class_names")
    parser.add_argument("--device", default="auto")
    shots = dict(type=whole, nargs="+", metavar="K")
    parser.add_argument("--shots", **shots, help="judge by new words instead, after so many examples in all: 0 1 2 4 8")
    parser.add_argument("--ways", type=whole, default=2, help="--shots: words to choose from (2)")
    parser.add_argument("--picture", default="few-shot.png", help="--shots: where the curves are drawn (%(default)s)")
    parser.add_argument("--save", help="write the scores to this JSON file as well")
    options = parser.parse_args(argv)
    data = source_of(options.data, options)
    check_sheet_name(options.picture, option="--picture")
    model, processor = load(options.model, device=choose_device(options.device))
    for note in split_notes(data, "test", few_shot=options.shots is not None):
        print(note, file=sys.stderr)
    if options.shots is None:
        scores = evaluate(model, processor, data)
    else:
        scores = few_shot(model, processor, data, shots=options.shots, ways=options.ways)
        few_shot_picture(scores, Path(options.picture))
        print(f"wrote {options.picture}\n")
    print(table(scores))
    if options.save:
        named = {name: asdict(score) for name, score in scores.items()}
        Path(options.save).write_text(json.dumps(named, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
