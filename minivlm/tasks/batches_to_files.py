"""Many rows through a task, a batch at a time, into a file that grows with each batch; or to whoever prints them.

    rows ──threads: read, resize──→ pixels ──the task, a batch at a time──→ results ──→ captions.jsonl

A task gives one function: images and values of a batch → a result for each row. A row that it cannot do is an error of its
own, recorded in its place, and ends nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.tasks.input_tables import KEPT, Row
from minivlm.tasks.read_ahead import batches_of, group_by, read_ahead
from minivlm.tasks.result_files import ERROR, ResultFile, read_made_by

Images = Sequence[Sequence[Tensor]]  # of each row, as `processor.images` prepares them, (1, …) each
Task = Callable[[Images, Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]]
Outcome = tuple[Row, Mapping[str, Any] | UserError]


def results(
    rows: Sequence[Row], processor, task: Task, *, batch_size: int, proven: bool = False
) -> Iterator[list[Outcome]]:
    """The result of each row, or why there is none, in batches. Rows about one image share its tensor.

    proven: the task has given a result before. Until it has, an error of all rows of a batch is one of the task: UserError.
    """

    def read(image: str) -> Tensor | UserError:
        try:
            return processor.images([image])
        except UserError as error:
            return error

    batches = list(batches_of(rows, batch_size))
    for batch, images in zip(batches, read_ahead(read, map(images_of, batches)), strict=True):
        outcomes = {i: why for i, row in enumerate(batch) if (why := refusal(row, images)) is not None}
        readable = [(i, row, [images[one] for one in row.images]) for i, row in enumerate(batch) if i not in outcomes]
        for group in group_by(size, readable):
            numbers, *asked = zip(*group, strict=True)
            outcomes.update(zip(numbers, ask(*asked, task), strict=True))
        failed = [outcomes[i] for i, *_ in readable if isinstance(outcomes[i], UserError)]
        if failed and len(failed) == len(readable) and not proven:
            raise failed[0]
        proven = proven or bool(readable)
        yield [(row, outcomes[i]) for i, row in enumerate(batch)]


def images_of(rows: Sequence[Row]) -> list[str]:
    return [image for row in rows if not row.missing for image in row.images]


def refusal(row: Row, images: Mapping[str, Tensor | UserError]) -> UserError | None:
    """Why its images cannot be read."""
    if row.missing:
        return UserError(f"{row.shown} is missing.")
    return next((images[one] for one in row.images if isinstance(images[one], UserError)), None)


def size(one: tuple[int, Row, list[Tensor]]) -> Hashable:
    """Images of equal size can be one batch: without a crop, they differ. A row with several of its own is one by itself."""
    sizes = {tuple(image.shape) for image in one[2]}
    return one[0] if len(sizes) > 1 else tuple(sizes)


def ask(rows: Sequence[Row], images: Images, task: Task) -> list[Mapping[str, Any] | UserError]:
    """One result a row; where the task refuses them together, each by itself."""
    try:
        return list(task(images, [row.values for row in rows]))
    except UserError as error:
        if len(rows) == 1:
            return [error]
        return [ask([row], [some], task)[0] for row, some in zip(rows, images, strict=True)]
    except torch.OutOfMemoryError:
        raise UserError(f"{len(rows)} rows at once do not fit the memory of the GPU: give a smaller --batch.") from None


@dataclass
class Written:
    rows: int  # of the command
    before: int  # were in the file already
    failed: int = 0  # have an error in place of a result, those before included
    errors: dict[str, str] = field(default_factory=dict)  # image → the error, of this run


def to_file(
    path: Path,
    rows: Sequence[Row],
    processor,
    task: Task,
    *,
    made_by: Mapping[str, Any],
    outputs: Sequence[str],
    folders: Sequence[str] = (),
    batch_size: int,
) -> Written:
    """Write the results of the rows that the file does not have. UserError: see `ResultFile`, and `results`."""
    from tqdm import tqdm

    base = read_made_by(path).get("images_in", images_in(path, rows, folders))
    keys, identities = columns(path, rows, outputs, os.path.join(path.absolute().parent, base))
    with ResultFile(path, {**made_by, "images_in": base}, keys, outputs) as file:
        left, before = [], file.done.copy()
        for row, identity in zip(rows, identities, strict=True):
            if before[key := file.key(identity)]:
                before[key] -= 1
            else:
                left.append(replace(row, identity=identity))
        written, proven = Written(len(rows), len(rows) - len(left)), file.done.total() > file.errors
        with tqdm(total=len(rows), initial=written.before, desc=made_by["task"], unit=" row") as bar:
            for batch in results(left, processor, task, batch_size=batch_size, proven=proven):
                file.append([entry(row, outcome, outputs, path) for row, outcome in batch])
                written.errors |= {row.shown: str(why) for row, why in batch if isinstance(why, UserError)}
                bar.update(len(batch))
        written.failed = file.errors
    return written


def entry(row: Row, outcome: Mapping[str, Any] | UserError, outputs: Sequence[str], path: Path) -> dict[str, Any]:
    if not isinstance(outcome, UserError):
        return {**row.identity, **outcome}
    # What takes a list of results wants one for each row, even if it is empty.
    empty = dict.fromkeys(outputs, "") if path.suffix.lower() == ".json" else {}
    return {**row.identity, **empty, ERROR: str(outcome)}


# ---- what a row is called --------------------------------------------------------------------------------------------


def columns(
    path: Path, rows: Sequence[Row], outputs: Sequence[str], base: str
) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns that say which row it is, and their values for each row.

    In a .json file it is question_id for answers and image_id for captions, if all rows have one of their own: the form in
    which VQA and COCO take results. An image that is called as COCO's are has the id that is in its name.
    """
    identities = []
    for row in rows:
        names = [name_below(base, image) for image in row.images]
        identities.append({"image": names[0] if len(names) == 1 else names} if names else {})
        identities[-1] |= {name: as_number(value) if name in KEPT else value for name, value in row.values.items()}
    if path.suffix.lower() == ".json":
        if list(outputs) == ["caption"]:
            identities = [{**coco_id(str(one["image"])), **one} for one in identities]
        official = {("answer",): "question_id", ("caption",): "image_id"}.get(tuple(outputs))
        if len({one[official] for one in identities if official in one}) == len(identities):
            return [official], [{official: one[official]} for one in identities]
    return list(dict.fromkeys(name for one in identities for name in one)), identities


def coco_id(name: str) -> dict[str, int]:
    """{"image_id": 42} of COCO_val2014_000000000042.jpg and 000000000042.jpg; {} of 42.jpg, which anything may be called."""
    match = re.search(r"(?:^|_|/)(\d{12})$", os.path.splitext(name)[0])
    return {"image_id": int(match[1])} if match else {}


def as_number(value: Any) -> Any:
    """An id that a CSV file has as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() and str(int(value)) == value else value


def images_in(path: Path, rows: Sequence[Row], folders: Sequence[str]) -> str:
    """The folder, seen from that of the file, below which images are named: that of the file itself, so that it can be read
    as data there; else the one folder that is read, into which the file can be moved; else none, and names are absolute."""
    here = str(path.absolute().parent)
    for folder in (here, *(folders if len(folders) == 1 else ())):
        if all(is_below(os.path.abspath(folder), image) for row in rows for image in row.images):
            return relative(folder, here)
    return os.path.abspath(os.sep)


def relative(folder: str, start: str) -> str:
    try:
        return Path(os.path.relpath(folder, start)).as_posix()
    except ValueError:  # another drive, on Windows
        return os.path.abspath(folder)


def is_below(folder: str, image: str) -> bool:
    return os.path.abspath(image).startswith(os.path.join(folder, ""))


def name_below(folder: str, image: str) -> str:
    folder, image = os.path.normpath(folder), os.path.abspath(image)
    inside = is_below(folder, image) and folder != os.path.abspath(os.sep)
    return Path(os.path.relpath(image, folder) if inside else image).as_posix()
