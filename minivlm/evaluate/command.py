"""`python -m minivlm.evaluate MODEL [--data DIR]`: scores of a trained model on held-out images and texts;
its accuracy after examples in its prompt: `… --shots 0 1 2 4 8 [--ways 2]`; of what was fine-tuned, the scores of
averages with what it started from (WiSE-FT): `… --wise 0 0.25 0.5 0.75 1`; two models on the same samples:
`… --against MODEL2`; what its image vectors hold: `… --probe knn,linear`; and why it fails: `… --diagnose`. Without a
model, predictions that are there are judged: `--predictions FILE --references FILE_OR_DIR`. All that on one page for a
browser: `… --report report.html`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from minivlm.atomic_writing import write_atomically
from minivlm.command_line import Parser, check_place, check_sheet_name, share, whole
from minivlm.convert import check_new
from minivlm.datasets.contents import split_notes
from minivlm.datasets.source import add_options, source_of
from minivlm.errors import UserError
from minivlm.evaluate import diagnose, evaluate, judge, probe, report
from minivlm.evaluate.averaged import Averaged, averaged_scores, start_of
from minivlm.evaluate.few_shot import few_shot, few_shot_picture
from minivlm.evaluate.predictions import Prediction, write_predictions
from minivlm.evaluate.table import Scores, side_by_side, table


def main(argv: list[str]) -> None:
    from minivlm.checkpoint import load
    from minivlm.training import choose_device

    options = command_line(argv)
    kept: list[Prediction] = []
    columns: dict[str, Scores] = {}
    how = model = processor = pitfalls = None
    if judge.needs_no_model(options):
        scores, kept = judge.run(options)
        columns = {"": scores}
    if options.model and (not columns or options.report):
        how, device = probe.how_of(options), choose_device(options.device)
        data = source_of(options.data, options)
        probe.check_split(data, options)
        start = options.wise and (options.start or start_of(options.model))
        model, processor = load(options.model, device=device)
        for note in split_notes(data, "test", few_shot=options.shots is not None):
            print(note, file=sys.stderr)
        if not columns and (options.diagnose is None or options.report):
            columns = columns_of(options, model, processor, data, how, start, kept)
        if options.diagnose is not None:
            pitfalls = diagnose.run(options, model, processor, data)
    if options.report:
        report.run(options, argv, columns, kept, pitfalls, model, processor, how)


def columns_of(options: Namespace, model, processor, data, how, start: str | None, kept: list[Prediction]):
    """Scores by what a model is called, printed and saved. kept: gets what the model generates."""
    from minivlm.checkpoint import load, save

    if options.predictions:
        judge.require_texts(model)
    if start:
        averaged = Averaged(model, load(start, device=str(model.device))[0], names=(options.model, start))
        columns = averaged_scores(averaged, options.wise, lambda model: evaluate(model, processor, data, how=how))
        print(side_by_side(columns))
        if options.save_model:
            save(options.save_model, model, processor)
            print(f"wrote {options.save_model}")
    elif options.against is not None:
        other = evaluate(*load(options.against, device=str(model.device)), data, [], how=how)
        columns = {options.against: other, options.model: evaluate(model, processor, data, kept, how=how)}
        print(side_by_side(columns))
    elif options.shots is not None:
        columns = {"": few_shot(model, processor, data, shots=options.shots, ways=options.ways)}
        few_shot_picture(columns[""], Path(options.picture))
        print(f"wrote {options.picture}\n\n{table(columns[''])}")
    else:
        columns = {"": evaluate(model, processor, data, kept, how=how)}
        print(table(columns[""]))
        if options.predictions:
            if not kept:
                raise UserError(
                    f"--predictions: {data} has no captions and no questions that a {type(model).__name__} could be judged by."
                )
            write_predictions(options.predictions[0], kept)
            print(f"wrote {len(kept)} predictions to {options.predictions[0]}")
    if options.save and options.diagnose is None:
        save_scores(Path(options.save), columns)
    return columns


def save_scores(path: Path, columns: dict[str, Scores]) -> None:
    """As JSON: of one model its scores by name, of several those of each by what the model is called."""
    values = {head: {name: score.record() for name, score in scores.items()} for head, scores in columns.items()}
    text = json.dumps(values.get("", values), indent=1, ensure_ascii=False)
    write_atomically(path, lambda file: file.write_text(f"{text}\n", encoding="utf-8"))


def command_line(argv: list[str]) -> Namespace:
    """The options. UserError, before a model is loaded, for what does not go together."""
    parser = Parser(prog="python -m minivlm.evaluate", description=__doc__)
    parser.add_argument("model", nargs="?", help="a directory of ours, a published one, or a hub id")
    judge.add_options(parser)
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
    parser.add_argument("--against", metavar="MODEL2", help="judge this one on the same samples, and the difference")
    probe.add_options(parser)
    diagnose.add_options(parser)
    report.add_options(parser)
    parser.add_argument("--save", help="write the scores to this JSON file as well")
    options = parser.parse_args(argv)
    check_sheet_name(options.picture, option="--picture")
    diagnose.check(options)
    report.check(options)
    if options.wise is None and (given := [name for name in ("start", "save_model") if getattr(options, name)]):
        parser.error(f"--{given[0]} belongs to --wise")
    judge.check(options, parser.error)
    if options.save:
        check_place(options.save, "--save")
    both = options.report and options.diagnose is not None  # a report has the predictions beside the diagnosis
    modes = ("wise", "shots", "diagnose", *([*(() if both else ("predictions",)), "against"] if options.model else []))
    tables = [f"--{name}" for name in modes if getattr(options, name) is not None]
    if len(tables) > 1:
        parser.error(f"{' and '.join(tables)} are tables of their own: give one of them")
    probe.check_alone(options)
    if options.save_model:
        if len(options.wise) > 1:
            parser.error(f"--save_model leaves one average, and --wise names {len(options.wise)}: choose one of them")
        check_new(options.save_model, "--save_model")
    return options
