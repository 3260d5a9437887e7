"""What the tasks of sample.py share that are asked about many images: which arguments they take, and where results go.

sample.py caption out/llava photo.png                               printed, as the task prints it
sample.py caption out/llava my_photos --save captions.jsonl         into a file, a batch at a time
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.command_line import argument, check_images, positive, report_passed_over, report_skipped
from minivlm.datasets.tar_index import is_member
from minivlm.errors import UserError
from minivlm.tasks.input_tables import Row, Text, is_table, text_rows
from minivlm.tasks.rows import Inputs, read_inputs

if TYPE_CHECKING:
    from minivlm.tasks.batches_to_files import Written

IMAGES = argument(
    "images",
    metavar="IMAGE",
    nargs="+",
    help="images, folders of them, and lists: .txt, .csv, .jsonl, .json, - (stdin)",
)
ROW_ARGUMENTS = [
    argument(
        "--save", metavar="FILE", help="write a row an image to a .jsonl, .json, .csv or .tsv; again: continue it"
    ),
    argument("--batch", metavar="N", type=positive, default=32, help="images at a time (%(default)s)"),
    argument("--image_folder", metavar="DIR", help="where the images lie that a list names (where the list lies)"),
    argument("--image_key", metavar="NAME", help="the column of a list that names the images (image, filepath, …)"),
    argument("--split", choices=["train", "val", "test"], help="of a folder of data, the images of one split alone"),
]
# Options that change which rows there are, or how fast they come, but not what comes out for one.
WHICH = {"images", "text", "query", "image_folder", "image_key", "split"}
ELSEWHERE = WHICH | {"task", "model", "base", "device", "save", "batch"}

QUESTION = Text("question", ("question", "text", "prompt"))
TEXT = Text("text", ("text", "caption", "title", "captions"))


def split_text(options: argparse.Namespace, text: Text) -> Text:
    """Takes the last word as what is asked about the images before, unless it is itself a table or a folder, in which the
    texts are."""
    *images, last = options.images
    if os.path.isdir(last) or last == "-" or (is_table(last) and os.path.isfile(last)):
        return text
    if not images:
        raise UserError(
            f"the following arguments are required: {text.name.upper()}; see python sample.py {options.task} --help."
        )
    options.images = images
    return Text(text.name, text.columns, last)


def read_rows(options: argparse.Namespace, text: Text | None = None) -> Inputs:
    """The rows that a command names. What can be refused without the model is refused here."""
    inputs = read_inputs(
        options.images,
        text=text,
        image_folder=options.image_folder,
        image_key=options.image_key,
        split=options.split,
    )
    check_rows(inputs, options)
    return inputs


def read_texts(options: argparse.Namespace) -> Inputs:
    """The text that a command gives, or those of a table."""
    inputs = Inputs([Row((), {"text": options.text}, named=True)])
    if is_table(options.text) and os.path.isfile(options.text):
        inputs = Inputs(text_rows(options.text, TEXT), tables=[options.text])
    check_rows(inputs, options)
    return inputs


def check_rows(inputs: Inputs, options: argparse.Namespace) -> None:
    from minivlm.tasks.result_files import check_made_by, check_result_name

    named = [image for row in inputs.rows if row.named for image in row.images]
    if options.save:
        if options.task not in ("embed", "attend"):  # which write no rows
            check_result_name(options.save, inputs.tables)
            check_made_by(Path(options.save), {"task": options.task, "options": relevant(options)})
        if gone := [image for image in named if not (os.path.exists(image) or is_member(image))]:
            raise UserError(f"{gone[0]} is missing" + (f", and so are {len(gone) - 1} others." if gone[1:] else "."))
    else:
        check_images(named)
    for note in inputs.notes:
        report_passed_over(note)


def relevant(options: argparse.Namespace) -> dict[str, Any]:
    """The options that change a result."""
    return {name: value for name, value in vars(options).items() if name not in ELSEWHERE and value is not None}


def run_rows(
    inputs: Inputs,
    task: Callable,
    model,
    processor,
    options: argparse.Namespace,
    outputs: Sequence[str],
    show: Callable[[Row, Mapping[str, Any]], str],
) -> None:
    """Every row through the task, a function of batches (see batches_to_files.py); to the file of --save with the columns
    `outputs`, or printed as `show` has it."""
    if options.save:
        write_rows(inputs, task, model, processor, options, outputs)
    else:
        print_rows(inputs, task, processor, options, show)


def print_rows(inputs: Inputs, task: Callable, processor, options: argparse.Namespace, show: Callable) -> None:
    from minivlm.tasks.batches_to_files import results

    skipped = {}
    for batch in results(inputs.rows, processor, task, batch_size=options.batch):
        for row, outcome in batch:
            if not isinstance(outcome, UserError):
                print(show(row, outcome), flush=True)
            elif row.named:
                raise outcome
            else:
                skipped[row.shown] = str(outcome)
    report_skipped(skipped)


def write_rows(
    inputs: Inputs, task: Callable, model, processor, options: argparse.Namespace, outputs: Sequence[str]
) -> None:
    from minivlm.tasks.batches_to_files import to_file
    from minivlm.tasks.image_index import fingerprint
    from minivlm.tasks.result_files import check_made_by

    path = Path(options.save)
    made_by = {"task": options.task, "model": fingerprint(model, processor), "options": relevant(options)}
    check_made_by(path, made_by)
    done = to_file(
        path,
        inputs.rows,
        processor,
        task,
        made_by=made_by,
        outputs=outputs,
        folders=inputs.folders,
        batch_size=options.batch,
    )
    report_written(path, done)


def report_written(path: Path, done: Written) -> None:
    report_skipped(done.errors)
    before = f", {done.before} of them before" if done.before else ""
    has = "1 has" if done.failed == 1 else f"{done.failed} have"
    errors = f"; {has} an error in place of a result" if done.failed else ""
    print(f"wrote {path}: {done.rows} {'row' if done.rows == 1 else 'rows'}{before}{errors}")
