"""Files of results, written a batch at a time: whole after each batch, and continued where they were cut off.

captions.jsonl             {"image": "a.jpg", "caption": "a red kite"}      a line a row; for an image that cannot be
                           {"image": "b.jpg", "error": "…"}                 read, the reason
answers.csv                image,question,answer,error
answers.json               [{"question_id": 1, "answer": "two"}, …]         a list, as VQA's and COCO's servers take it
.captions.jsonl.made_by    which task and model wrote it, with which options
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minivlm.atomic_writing import write_atomically
from minivlm.datasets.official import as_json
from minivlm.errors import UserError
from minivlm.files import hold, is_own_file, read_json
from minivlm.tasks.index_files import write_all
from minivlm.tasks.result_layouts import LAYOUTS

ERROR = "error"  # the column that says why there is no result
Key = tuple[str, ...]


def check_result_name(path: str, inputs: Iterable[str] = ()) -> None:
    """UserError, before the work, unless rows can be written there. inputs: the tables that are read."""
    place = Path(path)
    if place.suffix.lower() not in LAYOUTS:
        *others, last = LAYOUTS
        raise UserError(f"--save {path}: the name has to end in {', '.join(others)} or {last}.")
    if not place.absolute().parent.is_dir():
        raise UserError(f"--save {path}: the folder {place.parent} does not exist; make it first.")
    if os.path.lexists(path) and not is_own_file(place):
        raise UserError(f"--save {path}: that is no regular file; name another one.")
    if place.exists() and any(os.path.exists(one) and os.path.samefile(one, path) for one in inputs):
        raise UserError(f"--save {path}: that is the file whose rows are read; name another one.")
    if place.exists() and not made_by_path(place).exists():
        raise UserError(f"--save {path}: there is a file of this name that sample.py did not write; name another one.")
    if not os.access(path if place.exists() else place.absolute().parent, os.W_OK):
        raise UserError(f"--save {path}: it cannot be written, because its permissions forbid it.")


def made_by_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.made_by")


def read_made_by(path: Path) -> dict[str, Any]:
    """The task and model that wrote this file, and their options; {} where there is no such file."""
    return read_json(made_by_path(path)) if path.exists() and made_by_path(path).exists() else {}


def check_made_by(path: Path, now: Mapping[str, Any]) -> None:
    """UserError where the file that is to be continued was written by something else than `now`: {"task", "model",
    "options": {…}}. The model is not compared while it is not known."""
    before = read_made_by(path)
    if not before:
        return
    elsewhere = "name another file with --save"
    if before.get("task") != now["task"]:
        raise UserError(f"{path} was written by the task {before.get('task')}, and not by {now['task']}: {elsewhere}.")
    old, new = before.get("options", {}), json.loads(json.dumps(now["options"]))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise UserError(
                f"{path} was written with {option(name, old.get(name))}, and now there is "
                f"{option(name, new.get(name))}: give the same options, or {elsewhere}."
            )
    if "model" in now and before.get("model") != now["model"]:
        raise UserError(f"{path} was written with another model, so this one cannot continue it: {elsewhere}.")


def option(name: str, value: object) -> str:
    return f"no --{name}" if value is None else f"--{name} {value}"


class ResultFile:
    """A file of results, new or to be continued.

    keys: the columns that say which row it is; outputs: those of the result. `done` counts the rows that are there, by their
    keys, and `errors` those without a result. A row that was cut off is removed.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any], keys: Sequence[str], outputs: Sequence[str]):
        self.path, self.keys, self.outputs = path, list(keys), list(outputs)
        self.layout = LAYOUTS[path.suffix.lower()]([*keys, *outputs, ERROR])
        self.made_by = {**made_by, "columns": [*keys, *outputs]}
        self.done: Counter[Key] = Counter()
        self.errors = self.end = 0

    def __enter__(self) -> ResultFile:
        new = not self.path.exists()
        before = read_made_by(self.path).get("columns", self.made_by["columns"])
        if before != self.made_by["columns"]:
            raise UserError(
                f"{self.path} has the columns {', '.join(before)}, and these rows have "
                f"{', '.join(self.made_by['columns'])}: name another file with --save."
            )
        if new:
            record = as_json(self.made_by)
            write_atomically(made_by_path(self.path), lambda path: path.write_text(record, encoding="utf-8"))
        with self.disk_errors():
            self.file = self.path.open("xb" if new else "r+b", buffering=0)
        try:
            if not hold(self.file):
                raise UserError(f"another process is writing {self.path}.")
            if not new:
                self.read()
            self.append([])
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()

    def read(self) -> None:
        data, start = self.file.read(), self.layout.start
        if not data.startswith(start[: len(data)]):
            raise UserError(f"{self.path} does not begin as it was written: name another file with --save.")
        if len(data) < len(start):
            return
        self.end = len(start)
        for number, (record, end) in enumerate(self.layout.records(data[len(start) :]), 1):
            try:
                row = self.layout.load(record)
            except ValueError as error:
                raise UserError(
                    f"{self.path}, row {number}, is not as it was written ({error}): mend or remove it."
                ) from None
            self.done[self.key(row)] += 1
            self.errors += ERROR in row
            self.end = len(start) + end

    def key(self, row: Mapping[str, Any]) -> Key:
        """Which row it is, the same whether it was read from CSV or from JSON."""
        return tuple(value if isinstance(value := row.get(name), str) else as_json(value) for name in self.keys)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """rows: the keys, and the outputs or an error. They are on disk, in a file that is whole, when this returns."""
        layout = self.layout
        head = layout.start if self.end == 0 else b""
        between = layout.between if self.end > len(layout.start) else b""
        data = head + (between + layout.between.join(map(layout.dump, rows)) if rows else b"")
        with self.disk_errors():
            self.file.seek(self.end)
            write_all(self.file, data + layout.tail)
            self.file.truncate()
        self.end += len(data)
        self.errors += sum(ERROR in row for row in rows)
        self.done.update(map(self.key, rows))

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written ({error.strerror or error}); what was written before is kept, and the "
                "same command continues it."
            ) from error
