"""Files of rows: CSV and TSV, JSON lines, and JSON that is a list of objects, or one object from images to captions.

captions.csv ──open_table──> columns, first rows ──find_keys──> image: filepath, caption: title ──read_table──> samples
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlm.datasets.class_folders import look_like
from minivlm.datasets.keys import Keys, NoTable
from minivlm.datasets.rows import (
    Find,
    has_failed,
    passed_over,
)
from minivlm.datasets.table_rows import CaptionRows, ConversationRows, QuestionRows
from minivlm.errors import UserError
from minivlm.files import check_texts, open_regular, parse_json, read_bytes

CSV, LINES, JSON = (".csv", ".tsv", ".txt"), (".jsonl", ".ndjson"), (".json",)
DELIMITERS = (",", "\t", ";", "|")
HEAD = 1 << 16  # bytes by which a file of lines is recognised
FIRST = 20  # rows that say which fields there are


@dataclass(frozen=True)
class Table:
    """Columns and the first row of a file; `rows` reads all of it. delimiter: of CSV; "": it is JSON, in lines or a list."""

    path: Path
    columns: tuple[str, ...]
    first: dict[str, Any]
    delimiter: str = ""
    lines: bool = False

    def rows(self) -> Iterator[tuple[str, Any]]:
        """(where, row); where a line is broken, the ValueError that says how."""
        if self.delimiter:
            return read_csv(self)
        return read_json_lines(self.path) if self.lines else read_json_list(self.path)

    def __str__(self) -> str:
        kinds = {",": "CSV", "\t": "TSV", ";": "CSV with semicolons", "|": "CSV with bars"}
        return kinds.get(self.delimiter) or ("JSON lines" if self.lines else "JSON")


def open_table(path: Path) -> Table:
    """The table in a file. NoTable: it is none, and why."""
    ending = path.suffix.lower()
    with open_regular(path) as file:
        head = file.read(HEAD)
    if ending in CSV:
        return open_csv(path, head)
    if ending in LINES or are_objects(head.splitlines()[:2]):
        return open_lines(path, head)
    first = first_of_list(head) or [row for _, (_, row) in zip(range(FIRST), read_json_list(path), strict=False)]
    return Table(path, columns_of(first), next((row for row in first if isinstance(row, dict)), {}))


def first_byte(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def first_of_list(head: bytes) -> list[Any]:
    """The first elements of a JSON list, of which `head` is the beginning; none where it holds no whole one."""
    text, found = head.decode("utf-8-sig", "ignore").lstrip(), []
    decoder = json.JSONDecoder()
    while text[:1] in ("[", ",") and len(found) < FIRST:
        try:
            value, end = decoder.raw_decode(text := text[1:].lstrip())
        except (ValueError, RecursionError):
            break
        found.append(value)
        text = text[end:].lstrip()
    return found


def columns_of(rows: Sequence[Any]) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
    if not found:
        raise NoTable("it holds no objects with named fields")
    return found


# ----------------------------------------------------------------------------------------------------------------- CSV


def open_csv(path: Path, head: bytes) -> Table:
    text = decoded(head if len(head) < HEAD else head[: head.rfind(b"\n") + 1])
    best: list[list[str]] = []
    delimiter = ""
    for one in DELIMITERS:
        try:
            rows = [
                row for _, row in zip(range(2), csv.reader(io.StringIO(text, newline=""), delimiter=one), strict=False)
            ]
        except csv.Error as error:
            raise NoTable(f"it is no table: {error}") from None
        if rows and len(rows[0]) > max(1, len(best[0]) if best else 1):
            best, delimiter = rows, one
    if not best:
        raise NoTable("its first line has one column only, not one for the image and one for its caption")
    columns = [name.strip() for name in best[0]]
    if twice := [name for name in columns if name and columns.count(name) > 1]:
        raise NoTable(f"two of its columns are called {twice[0]!r}")
    if looks_like_data(best[0]):
        line, names = delimiter.join(best[0])[:80], f"filepath{delimiter}title"
        raise NoTable(f"its first line, {line!r}, is no line of names: put {names!r} above it")
    first = dict(zip(columns, best[1], strict=False)) if len(best) > 1 else {}
    return Table(path, tuple(columns), first, delimiter)


def looks_like_data(cells: Sequence[str]) -> bool:
    """A name of a file where the names of columns should be."""
    from minivlm.datasets.images import extensions

    return any(Path(cell.strip()).suffix.lower().partition("#")[0] in extensions() for cell in cells)


def decoded(data: bytes) -> str:
    """NoTable where it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        kind = "UTF-16" if wide else "Latin-1 or Windows-1252, as Excel writes it"
        raise NoTable(f"it is not UTF-8 text (it may be {kind}): save it as 'CSV UTF-8'") from None


def read_csv(table: Table) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(decoded(read_bytes(table.path)), newline=""), delimiter=table.delimiter)
    start = 1
    try:
        for number, cells in enumerate(reader):
            where, start = f"line {start}", reader.line_num + 1
            if number == 0 or not any(cell.strip() for cell in cells):
                continue
            width = len(table.columns)
            if len(cells) < width or any(cell.strip() for cell in cells[width:]):
                yield (
                    where,
                    ValueError(
                        f"it has {len(cells)} columns, but the first line names {width}: a text that holds a "
                        f'{table.delimiter!r} stands in "quotes"'
                    ),
                )
                continue
            yield where, {name: cell.strip() for name, cell in zip(table.columns, cells, strict=False) if cell.strip()}
    except csv.Error as error:
        yield f"line {reader.line_num}", ValueError(f"it is no line of a table ({error})")


# ---------------------------------------------------------------------------------------------------------------- JSON


def are_objects(lines: Sequence[bytes]) -> bool:
    """Two lines, of which the first is an object of JSON: lines of JSON in a file of another ending."""
    try:
        return len(lines) == 2 and isinstance(parse_json(lines[0], texts=False), dict)
    except ValueError:
        return False


def open_lines(path: Path, head: bytes) -> Table:
    first = []
    for line in head.splitlines()[: FIRST + 1][: None if len(head) < HEAD else -1] or head.splitlines()[:1]:
        try:
            first.append(parse_json(line, texts=False))
        except ValueError:
            continue
    return Table(path, columns_of(first), next(row for row in first if isinstance(row, dict)), lines=True)


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", parse_json(line)
        except json.JSONDecodeError as error:
            yield f"line {number}", ValueError(f"it is not JSON ({error.msg} at character {error.pos + 1})")
        except ValueError as error:
            yield f"line {number}", error


def read_json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a list; of an object, those of its only list; or its names as images, each with what it says."""
    values = json_values(path)
    if isinstance(values, dict):
        lists = [value for value in values.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        values = lists[0] if len(lists) == 1 else as_rows(values) or [values]
    if not isinstance(values, list) or not values:
        raise NoTable("it holds no list of objects")
    for number, value in enumerate(values, 1):
        yield f"entry {number}", value


def json_values(path: Path) -> Any:
    try:
        return parse_json(read_bytes(path), texts=False)
    except ValueError as error:
        raise NoTable(f"it is not JSON ({error})") from None


def as_rows(values: dict[str, Any]) -> list[dict]:
    """{"a.jpg": "a red kite"} or {"a.jpg": {"caption": …}} as rows; none where its names are those of no images."""
    if not values or not looks_like_data(list(values)[:FIRST]):
        return []
    return [
        {"image": name, **(value if isinstance(value, dict) else {"caption": value})} for name, value in values.items()
    ]


# ------------------------------------------------------------------------------------------------------------- reading


def read_table(
    table: Table,
    keys: Keys,
    find: Find,
    problems: list[str] | None,
    notes: list[str],
    *,
    split: str | None = None,
    names: dict[str, str] | None = None,
) -> list:
    """The samples: Items, Quizzes or Conversations, as the keys say. What is wrong raises, or goes to `problems`.

    split: of rows that name none. names: label → the name of its class.
    """
    kinds = {"captions": CaptionRows, "questions": QuestionRows, "conversations": ConversationRows}
    reader, failed = kinds[keys.gives](keys, find, split, names or {}), 0
    for where, row in rows_of(table):
        try:
            if isinstance(row, ValueError):
                raise row
            if has_failed(row):
                failed += 1
                continue
            if not (table.delimiter or table.lines):  # of a list each entry is judged by itself
                check_texts(row)
            reader.add(row, where)
        except (ValueError, UserError) as error:
            message = f"{table.path}, {reader.name(row, where)}: {str(error).rstrip('.')}."
            if problems is None:
                raise UserError(message) from error
            problems.append(message)
    samples = reader.samples()
    if keys.gives == "captions" and not keys.captions:
        refuse_labels(table.path, [item.label for item in samples])
    if not samples and not problems:
        raise UserError(f"{table.path} is empty: it needs one row a sample, with {keys}.")
    notes += [*reader.notes(table.path.name), *([passed_over(failed, table.path)] if failed else [])]
    return samples


def refuse_labels(path: Path, labels: Sequence[str]) -> None:
    """UserError for labels of which sentences would say nothing, as of folders that are no classes."""
    if found := look_like(labels):
        kind, like = found
        raise UserError(
            f"the labels of {path} look like {kind} ({', '.join(map(repr, like[:3]))}), so they would be learned as classes: "
            f"give each a name in a file of --data.class_names (a line: {like[0]} NAME)."
        )


def rows_of(table: Table) -> Iterator[tuple[str, Any]]:
    try:
        yield from table.rows()
    except NoTable as error:  # what its beginning did not show
        raise UserError(f"{table.path}: {error}.") from None
