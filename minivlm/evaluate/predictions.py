"""What a model generated, as data: evaluation is a model that generates predictions, and a judge that needs none.

model + images ─(generation.py)─→ predictions ─(judge.py, beside references)─→ scores
                                      ⇅
                      a file, of ours or of anyone: COCO's and VQA's results, LLaVA's and POPE's answers, sample.py's
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlm.atomic_writing import write_atomically
from minivlm.datasets.official import as_json
from minivlm.errors import UserError
from minivlm.files import check_text, parse_json, read_bytes

IMAGES = ("image_id", "image", "file_name", "image_path", "path")
QUESTION_IDS = ("question_id", "questionId", "qid")
QUESTIONS = ("question", "prompt", "query")
ANSWERS = ("answer", "text", "prediction", "response", "output")
EXAMPLE = '{"image_id": 9, "caption": "a red kite"} or {"question_id": 1, "answer": "two"}'
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Prediction:
    """text: the caption or answer that a model generated. image: a path below the folder, or an id as text. question: "" of a
    caption. value: how right it is, from 0 to 1, once it was judged beside `references`."""

    text: str
    image: str = ""
    question: str = ""
    question_id: str = ""
    kind: str = ""
    references: tuple[str, ...] = ()
    value: float | None = None

    @property
    def is_caption(self) -> bool:
        return not self.question and not self.question_id

    @property
    def name(self) -> str:
        """In messages."""
        if self.question_id:
            return f"question {self.question_id}"
        return ", ".join([f"image {self.image}"] * bool(self.image) + [repr(self.question)] * bool(self.question))


def read_predictions(path: str | Path) -> list[Prediction]:
    """The captions and answers of a file: JSON, JSON lines, CSV or TSV, also with .gz.

    UserError for a file of another form, a row without a text, and two predictions for one image or question. Rows that say
    why there is none (sample.py's "error") are refused, as many as there are.
    """
    rows, failed, found = rows_of(path), [], []
    for where, row in rows:
        if row.get("error") and not any(row.get(name) for name in ("caption", *ANSWERS)):
            failed.append(f"{row.get('image', where)}: {row['error']}")
        else:
            found.append(prediction_of(row, where))
    if failed:
        raise UserError(
            f"{path}: {len(failed)} rows hold an error in place of a text (first: {failed[0]}): take them out."
        )
    if not found:
        raise UserError(f"{path} holds no prediction; one looks like {EXAMPLE}.")
    # A folder may ask one question twice about an image: whether there are too many answers is for the judge to say.
    names = Counter(p.name for p in found if p.question_id or (p.image and p.is_caption))
    if twice := [name for name, n in names.items() if n > 1]:
        raise UserError(f"{path} has two predictions for {twice[0]} ({len(twice)} such in all): keep one of each.")
    return found


def prediction_of(row: Mapping[str, Any], where: str) -> Prediction:
    image, question_id = (value_of(row, names) for names in (IMAGES, QUESTION_IDS))
    question = value_of(row, QUESTIONS)
    asked = bool(question_id or question)
    text = next((row[name] for name in (*ANSWERS, "caption") if name in row and row[name] is not None), None)
    if not asked or (text is None and "caption" in row):
        text = row.get("caption", text if asked or "caption" not in row else None)
    if is_reference(row):
        raise UserError(f"{where} is a reference, and no prediction: it belongs to --references.")
    if text is None:
        raise UserError(f"{where} has no caption and no answer; a prediction looks like {EXAMPLE}.")
    if not isinstance(text, str):
        raise UserError(f"{where}: its text is {str(text)[:40]!r}, but must be a string in quotes.")
    check(text, where)
    if not image and not asked and "caption" in row:
        raise UserError(f'{where} names no image: "image_id" or "image" says which one its caption is of.')
    kind = "" if row.get("kind") is None else str(row["kind"])
    return Prediction(text, image, question, question_id, kind)


def check(text: str, where: str) -> None:
    try:
        check_text(text)
    except ValueError as error:
        raise UserError(f"{where}: {str(error).rstrip('.')}.") from None


def value_of(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of these that is there, as text; of a list of images the first."""
    value = next((row[name] for name in names if row.get(name) is not None), "")
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as pandas writes ids
    return "" if isinstance(value, (dict, list, bool)) or value != value else str(value)  # NaN is none


def is_reference(row: Mapping[str, Any]) -> bool:
    """VQA's annotations have answers; in POPE's questions `text` is the question, and nothing answers it."""
    said = [name for name in (*ANSWERS, *QUESTIONS, "caption") if row.get(name) is not None]
    return ("answers" in row and not said) or ("label" in row and said == ["text"])


def write_predictions(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """As sample.py writes its rows, in JSON lines (.jsonl) or one list (.json), whole or not at all."""
    rows = []
    for p in predictions:
        about = {"image": p.image, "question_id": p.question_id, "question": p.question, "kind": p.kind}
        rows.append({k: v for k, v in about.items() if v} | {"caption" if p.is_caption else "answer": p.text})
    lines = [as_json(row) for row in rows]
    text = (
        "[\n" + ",\n".join(lines) + "\n]\n" if Path(path).suffix == ".json" else "".join(f"{line}\n" for line in lines)
    )
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


# ---- rows of a file ----------------------------------------------------------------------------------------------------


def values_of(path: str | Path) -> Any:
    """What a JSON file holds, or None where it is no single JSON value; .gz is unpacked."""
    try:
        return parse_json(unpacked(path), texts=False)
    except json.JSONDecodeError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: {str(error).rstrip('.')}.") from None


def unpacked(path: str | Path) -> bytes:
    data = read_bytes(path)
    if data[:2] != GZIP:
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise UserError(f"{path} is no whole gzip file ({error}).") from None


def rows_of(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with its place in words. UserError where it holds no such rows."""
    name = Path(path).name.lower().removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        yield from csv_rows(path, "\t" if name.endswith(".tsv") else None)
        return
    values = values_of(path)
    if values is None:
        yield from json_lines(path)
        return
    if isinstance(values, dict):
        values = next((values[n] for n in ("annotations", "questions", "results") if n in values), [values])
    if not isinstance(values, list):
        raise UserError(f"{path} holds no list of predictions; one looks like {EXAMPLE}.")
    for number, row in enumerate(values, 1):
        yield place(path, "entry", number), as_row(row, place(path, "entry", number))


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(unpacked(path).splitlines(), 1):
        if not line.strip():
            continue
        where = place(path, "line", number)
        try:
            row = parse_json(line, texts=False)
        except ValueError as error:
            raise UserError(f"{where} is no JSON object ({error}).") from None
        yield where, as_row(row, where)


def csv_rows(path: str | Path, delimiter: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = unpacked(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8.") from None
    delimiter = delimiter or max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            where = place(path, "line", reader.line_num)
            if None in row or None in row.values():
                raise UserError(f"{where} has another number of columns than the first line.")
            texts = {name: row[name] for name in row if name in ("caption", *ANSWERS)}
            yield where, {name: value for name, value in row.items() if value} | texts
    except csv.Error as error:
        raise UserError(f"{place(path, 'line', reader.line_num)}: {error}.") from None


def place(path: str | Path, what: str, number: int) -> str:
    return f"{path}, {what} {number}"


def as_row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where} is no object in braces; one looks like {EXAMPLE}.")
    return row


# ---- names of images ---------------------------------------------------------------------------------------------------


class ImageNames:
    """Finds the image that another file calls differently: 391895, "391895", "000000391895.jpg" and
    "val2014/COCO_val2014_000000391895.jpg" are one. What could mean two images means neither."""

    def __init__(self, names: Sequence[str], others: Mapping[str, str] | None = None):
        """others: further names of these images."""
        self.known, self.by_alias = set(names), [defaultdict(list) for _ in ALIASES]
        self.others = {name: image for name, image in (others or {}).items() if image in self.known}
        for name in names:
            for alias_of, found in zip(ALIASES, self.by_alias, strict=True):
                found[alias_of(name)].append(name)

    def find(self, name: str) -> str | None:
        """The name that is known here, or None."""
        if name in self.known or name in self.others:
            return name if name in self.known else self.others[name]
        for alias_of, found in zip(ALIASES, self.by_alias, strict=True):
            alias = alias_of(name)
            same = [known for known in found.get(alias, ()) if alias and in_one_folder(name, known)]
            if len(same) == 1:
                return same[0]
        return None


def in_one_folder(name: str, other: str) -> bool:
    """Whether the folders of the one, as far as they are told, are the last ones of the other."""
    a, b = (one.replace("\\", "/").removeprefix("./").split("/")[:-1] for one in (name, other))
    n = min(len(a), len(b))
    return a[len(a) - n :] == b[len(b) - n :]


def base_name(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def stem(name: str) -> str:
    base, dot, ending = base_name(name).rpartition(".")
    return base if dot and ending.isalnum() and not ending.isdigit() else base_name(name)


def number(name: str) -> str:
    """ "COCO_val2014_000000391895.jpg" → "391895": the digits behind the last underscore, where there is nothing else."""
    digits = stem(name).rpartition("_")[2]
    return str(int(digits)) if digits.isdecimal() and digits.isascii() else ""


ALIASES: tuple[Callable[[str], str], ...] = (base_name, stem, number)
