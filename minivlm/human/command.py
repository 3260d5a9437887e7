"""`python -m minivlm.human sheet`: a sheet on which people compare the outputs of two systems, or rate those of one;
`python -m minivlm.human results`: what they say, and how far they agree."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from minivlm.atomic_writing import write_atomically
from minivlm.command_line import Parser, check_place, positive, whole
from minivlm.errors import UserError, nearest
from minivlm.evaluate.images_of import images_named
from minivlm.evaluate.judge import judge
from minivlm.evaluate.predictions import Prediction, read_predictions
from minivlm.evaluate.references import read_references
from minivlm.evaluate.table import table
from minivlm.html import check_page, write_page
from minivlm.human.results import agreement, read_ratings, record, scores, told, write_record
from minivlm.human.sheet import SIDE, choose, samples_of, sheet

COMPARE, RATE = "Which text describes the image better?", "How well does the text describe the image?"
WHICH, HOW = "Which answer is better?", "How good is the answer?"


def main(argv: list[str]) -> None:
    commands = {"sheet": make_sheet, "results": show_results}
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: python -m minivlm.human {{{','.join(commands)}}} …      … --help\n\n{__doc__}")
    elif argv[0] not in commands:
        raise UserError(f"minivlm.human has no command {argv[0]!r}.{nearest(argv[0], commands)}")
    else:
        commands[argv[0]](argv[1:])


def make_sheet(argv: list[str]) -> None:
    options = sheet_options(argv)
    names = [options.a] + ([options.b] if options.b else [])
    files = {name: predictions_of(name, options.references) for name in names}
    samples = samples_of(files)
    if lone := sum(map(len, files.values())) - len(files) * len(samples):
        print(f"note: {lone:,} outputs have no counterpart of the other system, and are left out", file=sys.stderr)
    chosen = choose(samples, options.n, options.seed)
    if len(samples) < options.n:
        print(f"note: there are {len(samples):,} samples, not {options.n:,}", file=sys.stderr)
    images = images_named([sample.image for sample in chosen], options.images, side=SIDE)
    if missing := [sample.image or "no image is named" for sample in chosen if sample.image not in images]:
        raise UserError(
            f"{len(missing)} of {len(chosen)} images are not in {options.images}, or could be several there (first: "
            f"{missing[0]}): name the folder that the predictions are about{hint(options)}."
        )
    questions = any(sample.question for sample in chosen)
    ask = options.ask or ((WHICH if questions else COMPARE) if options.b else (HOW if questions else RATE))
    text = sheet(chosen, images, systems=names, seed=options.seed, ask=ask)
    write_page(options.out, text)
    print(f"wrote {options.out}: {len(chosen):,} samples, {len(text) / 1e6:.1f} MB. Each rater opens it in a browser.")


def predictions_of(name: str, references: str | None) -> list[Prediction]:
    """With the images and questions that the references have, where the file has ids alone."""
    predictions = read_predictions(name)
    if references is None:
        return predictions
    return judge(predictions, read_references(references), of=name, beside=references, partial=True)[1]


def hint(options: Namespace) -> str:
    return "" if options.references else ", or with --references what says which question is about which image"


def sheet_options(argv: list[str]) -> Namespace:
    parser = Parser(prog="python -m minivlm.human sheet", description="Write a sheet for raters: one HTML file.")
    parser.add_argument("--a", required=True, metavar="FILE", help="predictions of a system, as evaluate writes them")
    parser.add_argument(
        "--b", metavar="FILE", help="those of another, to be compared; else those of --a are rated 1 to 5"
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder with the images")
    parser.add_argument(
        "--references", metavar="FILE_OR_DIR", help="where questions and images stand, if not in --a and --b"
    )
    parser.add_argument("--out", required=True, metavar="FILE.html", help="where the sheet is written")
    parser.add_argument("--n", type=positive, default=100, help="samples, at most (%(default)s)")
    parser.add_argument("--seed", type=whole, default=0, help="chooses the samples, their order and their sides (0)")
    parser.add_argument("--ask", metavar="TEXT", help=f'what raters are asked ("{COMPARE}" or the like)')
    options = parser.parse_args(argv)
    check_page(options.out, "--out")
    if options.b and Path(options.a).resolve() == Path(options.b).resolve():
        raise UserError(f"--a and --b are both {options.b}: name two systems, or --a alone to have it rated.")
    return options


def show_results(argv: list[str]) -> None:
    parser = Parser(prog="python -m minivlm.human results", description="What the ratings of a sheet say.")
    parser.add_argument("ratings", nargs="+", metavar="RATINGS.json", help="a file of each rater, saved from the sheet")
    parser.add_argument("--save", metavar="FILE", help="write the results to this JSON file as well")
    options = parser.parse_args(argv)
    if options.save:
        check_place(options.save, "--save")
    if options.save and Path(options.save).resolve() in [Path(name).resolve() for name in options.ratings]:
        raise UserError(f"--save {options.save} would be written over ratings: choose another place.")
    known, raters = read_ratings([Path(name) for name in options.ratings])
    print(table(scores(known, raters)))
    agreed = agreement(known, raters)
    lone = "with one rater" if len(raters) == 1 else "where no sample has two ratings"
    print(f"\nagreement: {agreed.text() if agreed else f'cannot be told {lone}'}")
    for note in told(known, raters):
        print(f"note: {note}")
    if options.save:
        text = write_record(record(known, raters))
        write_atomically(options.save, lambda file: file.write_text(text, encoding="utf-8"))
        print(f"wrote {options.save}")
