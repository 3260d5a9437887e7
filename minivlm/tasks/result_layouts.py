"""Rows of results as lines of JSON, as one list of JSON, as CSV and as TSV: to bytes, and back as far as they are whole.

A file is start + row + between + row + … + tail.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minivlm.datasets.official import as_json
from minivlm.files import parse_json


class Lines:
    """{"image": "a.jpg", "caption": "a red kite"}, a line a row."""

    start = between = tail = b""

    def __init__(self, columns: Sequence[str]):
        self.columns = list(columns)

    def dump(self, row: Mapping[str, Any]) -> bytes:
        return as_json(row).encode() + b"\n"

    def load(self, record: bytes) -> dict[str, Any]:
        """ValueError where it is no row."""
        row = parse_json(record, texts=False)
        if not isinstance(row, dict):
            raise ValueError("it is no object in braces")
        return row

    def records(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """Each row that is whole, and where it ends."""
        end = 0
        for line in data.split(b"\n")[:-1]:
            end += len(line) + 1
            yield line, end


class Array(Lines):
    """[{"question_id": 1, "answer": "two"}, …], a line a row."""

    start, between, tail = b"[\n", b",\n", b"\n]\n"

    def dump(self, row: Mapping[str, Any]) -> bytes:
        return as_json(row).encode()

    def records(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        end = 0
        for line in data.split(b"\n"):
            record = line.removesuffix(b",")
            if not record.endswith(b"}"):
                return
            try:
                json.loads(record)
            except ValueError:  # it was cut off behind a brace within a text
                return
            yield record, end + len(record)
            end += len(line) + 1


class Table(Lines):
    """image,question,answer,error: what holds a comma, a quote or a line break is quoted. A list is written as JSON."""

    delimiter = ","

    def __init__(self, columns: Sequence[str]):
        super().__init__(columns)
        self.start = self.line(columns)

    def dump(self, row: Mapping[str, Any]) -> bytes:
        return self.line([self.cell(row.get(name)) for name in self.columns])

    def cell(self, value: Any) -> Any:
        return as_json(value) if isinstance(value, (list, dict)) else value

    def line(self, values: Sequence[Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, delimiter=self.delimiter).writerow(
            values
        )  # which quotes both characters of its line end, \r\n
        line = text.getvalue().removesuffix("\r\n") + "\n"
        return line.encode("utf-8", "surrogateescape")  # names of files need not be UTF-8

    def load(self, record: bytes) -> dict[str, Any]:
        text = io.StringIO(record.decode("utf-8", "surrogateescape"), newline="")
        try:
            [values] = csv.reader(text, delimiter=self.delimiter)
        except csv.Error as error:
            raise ValueError(str(error)) from None
        if len(values) != len(self.columns):
            raise ValueError(f"it has {len(values)} columns, and the first line {len(self.columns)}")
        return {name: value for name, value in zip(self.columns, values, strict=True) if value}

    def records(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        start = 0
        for _, end in super().records(data):  # a line break within quotes ends no row
            if data.count(b'"', start, end) % 2 == 0:
                yield data[start:end], end
                start = end


class TabTable(Table):
    delimiter = "\t"


LAYOUTS = {".jsonl": Lines, ".json": Array, ".csv": Table, ".tsv": TabTable}
