"""Lists and tables of images: a path a line, CSV, lines of JSON, VQA's questions, COCO's images, as rows to be asked about."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from minivlm.datasets.class_folders import list_folder
from minivlm.datasets.keys import IMAGE, matching, plain
from minivlm.datasets.tables import DELIMITERS
from minivlm.datasets.tar_index import is_member
from minivlm.datasets.tree import on_disk
from minivlm.errors import UserError
from minivlm.files import parse_json, read_bytes, read_text, readable

TABLES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
KEPT = ("question_id", "image_id")  # are repeated in the result
SHOWN = 5


@dataclass(frozen=True)
class Row:
    """Images (paths), and what the result repeats: the question, its id and that of the image."""

    images: tuple[str, ...]
    values: dict[str, Any] = field(default_factory=dict)
    named: bool = False  # by the command itself, rather than by a folder or a list
    missing: bool = False
    identity: dict[str, Any] = field(default_factory=dict)  # what it is called in a file of results

    @property
    def shown(self) -> str:
        return " ".join(self.images)


@dataclass(frozen=True)
class Text:
    """What is asked about each image: the name that it has in the result, the columns that may hold it, and the one text
    that the command gives for all."""

    name: str
    columns: tuple[str, ...]
    given: str | None = None


def is_table(word: str) -> bool:
    return word == "-" or (word.lower().endswith(TABLES) and not os.path.isdir(word))


def values_of(text: Text | None) -> dict[str, str]:
    return {} if text is None or text.given is None else {text.name: text.given}


def table_rows(
    word: str, text: Text | None, image_folder: str | None, image_key: str | None, notes: list[str]
) -> list[Row]:
    lines = list(read_table(word))
    if not lines:
        raise UserError(f"{shown(word)} is empty: it needs a line for each image.")
    columns = list(dict.fromkeys(name for line in lines for name in line))
    image = image_column(word, columns, image_key)
    column = None
    if text is not None and text.given is None:
        column = next((name for name in text.columns if name in columns), None)
        if column is None:
            wanted = " or ".join(text.columns)
            raise UserError(f"{shown(word)} has no column {wanted} with the {text.name}; it has {', '.join(columns)}.")
    roots = [image_folder] if image_folder else table_roots(word)
    numbers = cache(lambda: by_number(roots)) if image == "image_id" else None
    rows, missing = [], []
    for number, line in enumerate(lines, 1):
        names = line.get(image)
        names = names if isinstance(names, list) else [names]
        if not names or any(name in (None, "") for name in names):
            raise UserError(f"{shown(word)}, row {number}: its {image} is empty.")
        found = [numbers().get(whole(name)) if numbers else place(str(name), roots) for name in names]
        missing += [str(name) for name, path in zip(names, found, strict=True) if path is None]
        paths = tuple(path or os.path.join(roots[0], str(name)) for name, path in zip(names, found, strict=True))
        values = {name: line[name] for name in KEPT if line.get(name) not in (None, "")} | values_of(text)
        if column is not None:
            values[text.name] = asked(line.get(column), column, word, number)
        rows.append(Row(paths, values, missing=None in found))
    report_missing(word, missing, sum(len(row.images) for row in rows), roots, notes)
    return rows


def text_rows(word: str, text: Text) -> list[Row]:
    """The rows of a table of texts without images; of a .txt each line is one."""
    column = text.columns[0]
    lines = (
        [{column: line["image"]} for line in read_table(word)]
        if word[-4:].lower() == ".txt"
        else list(read_table(word))
    )
    columns = list(dict.fromkeys(name for line in lines for name in line))
    found = next((name for name in text.columns if name in columns), None)
    if found is None:
        wanted = " or ".join(text.columns)
        raise UserError(f"{shown(word)} has no column {wanted} of texts; it has {', '.join(columns) or 'none'}.")
    return [Row((), {text.name: asked(line.get(found), found, word, i)}) for i, line in enumerate(lines, 1)]


def image_column(word: str, columns: list[str], image_key: str | None) -> str:
    if image_key is not None:
        if image_key not in columns:
            raise UserError(f"{shown(word)} has no column {image_key}; it has {', '.join(columns)}.")
        return image_key
    known = IMAGE[0].split()
    found = sorted(matching(columns, IMAGE[:1]), key=lambda name: known.index(plain(name)))  # the surest name first
    if not found and "image_id" not in columns:
        raise UserError(
            f"{shown(word)} has no column of images that is known by its name (image, filepath, file_name, …); it has "
            f"{', '.join(columns)}: choose it with --image_key."
        )
    return found[0] if found else "image_id"


def asked(value: Any, column: str, word: str, number: int) -> str:
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise UserError(f"{shown(word)}, row {number}: its {column} is empty.")
    return str(value)


def report_missing(word: str, missing: list[str], total: int, roots: list[str], notes: list[str]) -> None:
    """A note; UserError where it is half of them, so that the images lie elsewhere."""
    if not missing:
        return
    some = ", ".join(map(readable, missing[:SHOWN])) + (", …" if len(missing) > SHOWN else "")
    what = f"{shown(word)} names {len(missing)} of {total} images that are not there ({some})"
    if 2 * len(missing) >= total:
        raise UserError(f"{what}, looked for in {', '.join(roots)}: say where they lie with --image_folder DIR.")
    notes.append(f"{what}.")


def shown(word: str) -> str:
    return "the standard input" if word == "-" else word


def table_roots(word: str) -> list[str]:
    """Where the images lie that a table names. A list that `ls` or `find` wrote names them from the working directory."""
    here = os.path.dirname(word) if word != "-" else ""
    return list(dict.fromkeys([here or ".", os.path.join(here, "images"), "."]))


def place(name: str, roots: list[str]) -> str | None:
    """The path of an image, or member of a tar file, that a table names, if it is there."""
    for root in roots:
        for path in dict.fromkeys((os.path.join(root, name), os.path.join(root, name.replace("\\", "/")))):
            if os.path.isfile(path) or is_member(path):
                return os.path.normpath(path)
        if not os.path.isabs(name) and (
            found := on_disk(os.path.normpath(name), Path(root))
        ):  # an accent, as it is spelt
            return os.path.normpath(os.path.join(root, found))
    return None


def by_number(roots: list[str]) -> dict[int, str]:
    """Images by the number at the end of their names, as COCO's are called; None for one that several have."""
    found: dict[int, str] = {}
    root = next((root for root in roots if os.path.isdir(root)), None)
    if root is None:
        raise UserError(f"there is no folder {roots[0]} with the images: say where they lie with --image_folder DIR.")
    for name in list_folder(Path(root), tars=True).images:
        if (number := number_of(name)) is not None:
            if number in found:
                raise UserError(
                    f"{found[number]} and {os.path.join(root, name)} both have the number {number}, so that an image_id "
                    "does not say which is meant: name the folder of one with --image_folder DIR."
                )
            found[number] = os.path.join(root, name)
    return found


def number_of(name: str) -> int | None:
    """The number that a file is called by: 42 of COCO_val2014_000000000042.jpg, and of 42.png."""
    match = re.fullmatch(r"(?:.*[_-])?(\d{12})|(\d+)", os.path.splitext(os.path.basename(name))[0])
    return int(match[1] or match[2]) if match else None


def whole(value: Any) -> int | None:
    return int(value) if str(value).strip().isdecimal() else None


def read_table(word: str) -> Iterator[dict[str, Any]]:
    """The lines of a list or table, by the ending of its name. UserError where it is not what its ending says."""
    if word == "-":
        yield from ({"image": line} for line in sys.stdin.read().splitlines() if line.strip())
    elif word.lower().endswith(".txt"):
        yield from ({"image": line.strip()} for line in read_text(word).splitlines() if line.strip())
    elif word.lower().endswith((".csv", ".tsv")):
        yield from read_csv(word)
    elif word.lower().endswith(".jsonl"):
        for number, line in enumerate(read_bytes(word).splitlines(), 1):
            if line.strip():
                yield as_object(from_json(line, f"{word}, line {number}"), f"{word}, line {number}")
    else:
        values = from_json(read_bytes(word), word)
        for number, value in enumerate(rows_of_json(values, word), 1):
            yield as_object(value, f"{word}, entry {number}")


def read_csv(word: str) -> Iterator[dict[str, str]]:
    text = read_text(word)
    delimiter = max(DELIMITERS, key=text.partition("\n")[0].count)  # as Excel writes it, that is a semicolon in places
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for line in reader:
            if None in line or None in line.values():
                raise UserError(
                    f"{word}, line {reader.line_num}: it has another number of columns than the first line."
                )
            yield line
    except csv.Error as error:
        raise UserError(f"{word}, line {reader.line_num}: {error}.") from None


def rows_of_json(values: Any, word: str) -> list[Any]:
    """A list; or VQA's {"questions": […]}, or COCO's {"images": [{"id", "file_name"}, …]}."""
    if isinstance(values, dict) and isinstance(values.get("questions"), list):
        return values["questions"]
    if isinstance(values, dict) and isinstance(values.get("images"), list):
        return [{**one, "image_id": one.get("id")} if isinstance(one, dict) else one for one in values["images"]]
    if not isinstance(values, list):
        raise UserError(f'{word} holds no list of images, no "questions" and no "images".')
    return values


def from_json(data: bytes, where: str) -> Any:
    try:
        return parse_json(data)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg} at character {error.pos + 1}).") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from None


def as_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{where} is no object in braces, such as {{"image": "a.jpg"}}.')
    return value
