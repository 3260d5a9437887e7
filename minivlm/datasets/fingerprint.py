"""Summarises a folder of data in a few numbers, to decide whether a resumed run still finds the data that it started with."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from minivlm.datasets.class_names import names_file
from minivlm.datasets.forms import recognised
from minivlm.datasets.source import Source
from minivlm.datasets.tar_index import open_tar
from minivlm.errors import UserError
from minivlm.files import open_regular

TEXT = (".json", ".jsonl", ".csv", ".tsv", ".txt")
ENDS = 4096  # bytes at either end of any other file
WINDOWS = ("thumbs.db", "desktop.ini")  # what Windows writes into a folder that it shows


def fingerprint(directory: str | os.PathLike) -> dict[str, list[int]]:
    """{"cat/*.png": [files, bytes, checksum], "*.jsonl": [1, 7310, …]}, by sub-folder and ending.

    Texts count whole, of other files the name, the size and both ends. Hidden files are no data, nor is a README.md.
    A file with the names of classes counts wherever it lies.
    """
    source = Source.of(directory)
    root, groups = source.path, {}
    if source.class_names is not None and (content := ends_of(names_file(source))) is not None:
        groups["the names of classes"] = [1, content[0], zlib.crc32(content[1])]
    shards = shards_that_count(source)
    meant = None if source.shards is None else shards
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if (
                is_data(path)
                and (meant is None or path in meant)
                and (content := ends_of(path, path in shards)) is not None
            ):
                inside = path.relative_to(root)
                kind = f"{inside.parts[0]}/*{path.suffix}" if len(inside.parts) > 1 else f"*{path.suffix}"
                size, content = content
                count, total, crc = groups.get(kind, (0, 0, 0))
                crc = zlib.crc32(content, zlib.crc32(os.fsencode(inside), zlib.crc32(str(size).encode(), crc)))
                groups[kind] = [count + 1, total + size, crc]
    return groups


def is_data(path: Path) -> bool:
    return not path.name.startswith(".") and path.suffix != ".md" and path.name.lower() not in WINDOWS


def shards_that_count(source: Source) -> set[Path]:
    """The tar files of which the folder is made."""
    try:
        found = recognised(source)
    except UserError:  # whoever reads it reports it
        return set()
    return {source / name for one in found for name in one.files if name.lower().endswith(".tar")}


def ends_of(path: Path, shard: bool = False) -> tuple[int, bytes] | None:
    """Size, and what of the content counts: of a shard the names, places and sizes of its members, and its texts.

    None: it is gone, or no file that can be read (whoever reads it reports it).
    """
    try:
        if shard:
            return path.stat().st_size, open_tar(path).summary()
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if path.suffix in TEXT or size <= 2 * ENDS:
                return size, file.read()
            start = file.read(ENDS)
            file.seek(-ENDS, os.SEEK_END)
            return size, start + file.read()
    except (UserError, OSError):
        return None


def changes(before: dict[str, list[int]], now: dict[str, list[int]]) -> list[str]:
    """The differences, in words: ["dog/*.png: 30 files then, none now", …]"""
    lines, number = [], lambda entry: entry[0] if entry else 0
    for kind in sorted(before.keys() | now.keys()):
        then, there = before.get(kind), now.get(kind)
        if number(then) != number(there):
            lines.append(f"{kind}: {number(then) or 'no'} files then, {number(there) or 'none'} now")
        elif then != there:
            lines.append(f"{kind}: the names or the contents of its {number(then)} files")
    return lines
