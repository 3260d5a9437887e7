"""Scores of a trained model on held-out images and texts: `python -m minivlm.evaluate MODEL [--data DIR]`;
its accuracy after examples in its prompt: `… --shots 0 1 2 4 8 [--ways 2]`; and, of what was fine-tuned, the scores of
averages with what it started from (WiSE-FT): `… --wise 0 0.25 0.5 0.75 1`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from minivlm.command_line import Parser, check_sheet_name, share, whole
from minivlm.convert import check_new
from minivlm.datasets.contents import contents, split_notes, summary
from minivlm.datasets.shapes import is_world
from minivlm.datasets.source import add_options, source_of
from minivlm.errors import UserError
from minivlm.evaluate.averaged import Averaged, averaged_scores, start_of
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
from minivlm.evaluate.table import side_by_side, table
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
    from minivlm.checkpoint import load, save
    from minivlm.training import choose_device

    options = command_line(argv)
    data, device = source_of(options.data, options), choose_device(options.device)
    start = None if options.wise is None else options.start or start_of(options.model)
    model, processor = load(options.model, device=device)
    for note in split_notes(data, "test", few_shot=options.shots is not None):
        print(note, file=sys.stderr)
    if start is not None:
        averaged = Averaged(model, load(start, device=device)[0], names=(options.model, start))
        columns = averaged_scores(averaged, options.wise, lambda model: evaluate(model, processor, data))
        print(side_by_side(columns))
        if options.save_model:
            save(options.save_model, model, processor)
            print(f"wrote {options.save_model}")
    elif options.shots is not None:
        columns = {"": few_shot(model, processor, data, shots=options.shots, ways=options.ways)}
        few_shot_picture(columns[""], Path(options.picture))
        print(f"wrote {options.picture}\n\n{table(columns[''])}")
    else:
        columns = {"": evaluate(model, processor, data)}
        print(table(columns[""]))
    if options.save:
        values = {head: {name: asdict(score) for name, score in scores.items()} for head, scores in columns.items()}
        text = json.dumps(values.get("", values), indent=1, ensure_ascii=False)
        Path(options.save).write_text(f"{text}\n", encoding="utf-8")


def command_line(argv: list[str]) -> Namespace:
    """The options. UserError, before a model is loaded, for what does not go together."""
    parser = Parser(prog="python -m minivlm.evaluate", description=__doc__)
    parser.add_argument("model", help="a directory of ours, a published one, or a hub id")
    parser.add_argument("--data", default="data/shapes", help="the shapes world, or a folder of your own (data/shapes)")
    add_options(parser, "image_key", "caption_key", "class_names")
    parser.add_argument("--device", default="auto")
    shots = dict(type=whole, nargs="+", metavar="K")
    parser.add_argument("--shots", **shots, help="judge by new words instead, after so many examples in all: 0 1 2 4 8")
    parser.add_argument("--ways", type=whole, default=2, help="--shots: words to choose from (2)")
    parser.add_argument("--picture", default="few-shot.png", help="--shots: where the curves are drawn (%(default)s)")
    shares = dict(type=share, nargs="+", metavar="SHARE")
    parser.add_argument("--wise", **shares, help="average the weights with the start's, so much of the model's own")
    parser.add_argument("--start", help="--wise: what the model was fine-tuned from (as its run records it)")
    parser.add_argument("--save_model", metavar="DIR", help="--wise: leave the average in this new directory")
    parser.add_argument("--save", help="write the scores to this JSON file as well")
    options = parser.parse_args(argv)
    check_sheet_name(options.picture, option="--picture")
    if options.wise is None and (given := [name for name in ("start", "save_model") if getattr(options, name)]):
        parser.error(f"--{given[0]} belongs to --wise")
    if options.wise is not None and options.shots is not None:
        parser.error("--wise and --shots are two tables: give one of them")
    if options.save_model:
        if len(options.wise) > 1:
            parser.error(f"--save_model leaves one average, and --wise names {len(options.wise)}: choose one of them")
        check_new(options.save_model, "--save_model")
    return options
