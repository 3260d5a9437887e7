"""What the folders, or the labels, of classes are called: DIR/class_names.txt, or the file of --data.class_names.

n01440764 tench                         a line each: a folder, a tab or a space, and its name
n01440764 tench, Tinca tinca            LOC_synset_mapping.txt: of several names the first, where no other class has it
{"n01440764": "tench"}                  or JSON; also ImageNet's {"0": ["n01440764", "tench"]}
golden retriever                        or names alone, a line each or as a list in JSON, in the order of the folders
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minivlm.datasets.source import Source
from minivlm.errors import UserError
from minivlm.files import parse_json, read_bytes

NAMES = "class_names.txt"
SYNSET = re.compile(r"n\d{8}")
LINE = "a line is a folder and the name of its class, as in 'n01440764 tench'"


def names_file(source: str | os.PathLike) -> Path:
    """Where the names are, if there are some. The option may name a file from here, or one in the folder."""
    source = Source.of(source)
    if source.class_names is None:
        return source.path / NAMES
    own = Path(source.class_names)
    return own if own.is_absolute() or own.exists() else source.path / own if (source.path / own).exists() else own


def read_names(source: str | os.PathLike) -> dict[str, str]:
    """Folder → class; empty if there is no file. UserError where it cannot be read, or one that was named is missing."""
    source, path = Source.of(source), names_file(source)
    if source.class_names is None and not os.path.lexists(path):
        return {}
    if not os.path.lexists(path):
        raise UserError(f"--data.class_names {path}: there is no such file, neither here nor in {source}.")
    if path.suffix == ".json":
        names = from_json(path)
    else:
        names = from_lines(path)
        names = first_names(names) if source.class_names is not None else names
    return {unicodedata.normalize("NFC", folder): name for folder, name in names.items()}


def names_of(folders: Iterable[str], source: str | os.PathLike) -> dict[str, str]:
    """Folder → class, for these folders, or for more; a list without any of them names them in their order. Empty if there is
    no file. UserError as `read_names`, and for a list of another length."""
    path, folders = names_file(source), sorted({*folders})
    alone = names_alone(path) if os.path.lexists(path) else []
    firsts = {part for line in alone for part in (line, line.partition(" ")[0], line.partition("\t")[0])}
    if not alone or not firsts.isdisjoint(folders):
        return read_names(source)
    if len(alone) != len(folders):
        raise UserError(
            f"{path} has {len(alone)} name{'s' * (len(alone) > 1)}, but {source} has {len(folders)} folders of classes, none "
            f"of which starts a line: {LINE}; or give a name for each folder, in their order."
        )
    return dict(zip(folders, alone, strict=True))


def names_alone(path: Path) -> list[str]:
    """The lines of a text, or the texts of a list in JSON, or of an object whose keys count from 0; else nothing."""
    try:
        data = read_bytes(path)
        if path.suffix != ".json":
            return [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
        values = parse_json(data)
    except ValueError:  # which whoever reads it reports
        return []
    if isinstance(values, dict) and [*values] == [str(i) for i in range(len(values))]:
        values = [*values.values()]
    whole = isinstance(values, list) and all(isinstance(name, str) and name.strip() for name in values)
    return [name.replace("_", " ").strip() for name in values] if whole else []


def from_lines(path: Path) -> dict[str, str]:
    try:
        lines = [line.strip() for line in read_bytes(path).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.") from None
    names = {}
    for number, line in enumerate(lines, 1):
        folder, _, name = line.partition("\t" if "\t" in line else " ")
        if line and not name.strip():
            raise UserError(f"{path}, line {number}: {LINE}.")
        names[folder.strip()] = name.strip()
    names.pop("", None)
    if not names:
        raise UserError(f"{path} is empty: {LINE}.")
    return names


def first_names(names: dict[str, str]) -> dict[str, str]:
    """ "tench, Tinca tinca" of a synset is "tench"; where two would be the same ("crane"), they keep all their names."""
    if not all(SYNSET.fullmatch(folder) for folder in names):
        return names
    short = {folder: name.split(",")[0].strip() for folder, name in names.items()}
    counts = Counter(short.values())
    return {folder: name if counts[name] == 1 else names[folder] for folder, name in short.items()}


def from_json(path: Path) -> dict[str, str]:
    try:
        values = parse_json(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}).") from None
    values = dict(enumerate(values)) if isinstance(values, list) else values
    pairs = [named(str(key), value) for key, value in values.items()] if isinstance(values, dict) else []
    if not pairs or not all(pairs):
        raise UserError(f'{path} is no object from folders to the names of their classes, {{"n01440764": "tench"}}.')
    return first_names(dict(pairs))


def named(key: str, value: Any) -> tuple[str, str] | None:
    """A folder and its name; None where they are none."""
    if isinstance(value, list) and len(value) == 2 and SYNSET.fullmatch(str(value[0])):
        key, value = value
    value = value[0] if isinstance(value, list) and value else value
    return (key, value.replace("_", " ").strip()) if isinstance(value, str) and value.strip() else None
