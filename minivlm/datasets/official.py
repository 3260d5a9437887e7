"""Helpers that the scripts data/*/prepare.py share: reading a dataset's official files, and writing a folder of ours."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minivlm.errors import UserError
from minivlm.files import locked, parse_json, read_bytes


def command_line(doc: str, out: Path) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help=f"the folder to make (default: data/{out.name})")
    parser.add_argument("--copy", action="store_true", help="copy the images instead of linking to their folder")
    return parser


def read_official(path: Path, *lists: str) -> Any:
    """A JSON file that holds a list; or an object with these lists of objects, of which it gives the lists."""
    try:
        values = parse_json(read_bytes(path), texts=bool(lists))  # a list alone is judged entry by entry
    except ValueError as error:  # no text, or no JSON
        raise UserError(f"{path} is not JSON ({error}): was it downloaded completely?") from None
    if not lists:
        return as_list(values, f"{path} is another file than expected: it holds no list.")
    named = values if isinstance(values, dict) else {}
    return [
        as_list(named.get(name), f'{path} is another file than expected: it has no list "{name}".') for name in lists
    ]


def as_list(values: Any, message: str) -> list[dict]:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise UserError(message)
    return values


def place(source: Path, target: Path, *, copy: bool = False) -> None:
    """`target` becomes a link to the folder `source`, or a copy of it. A link that is there already is replaced."""
    try:
        if target.is_symlink():
            target.unlink()
        if copy:
            shutil.copytree(source, target, copy_function=copy_whole, dirs_exist_ok=True)
        elif not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source.resolve(), target_is_directory=True)
        elif not target.samefile(source):
            raise UserError(f"{target} is there already: remove it, or choose another folder with --out.")
    except OSError as error:  # shutil.Error is one
        hint = "" if copy else "; try --copy"
        raise UserError(f"{target} could not be made from {source} ({error.strerror or error}){hint}.") from error


def copy_whole(source: str, target: str) -> None:
    """A copy that is there is there as a whole, whenever the script is killed."""
    partial = f"{target}.partial"
    shutil.copy2(source, partial)
    os.replace(partial, target)


def require_images(names: Iterable[str], folder: Path) -> None:
    """UserError if the folder, or one of these images in it, is missing."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} with the images.")
    names = set(names)
    missing = names.difference(os.listdir(folder))
    if missing:
        raise UserError(f"{len(missing)} of {len(names)} images are missing in {folder}; the first is {min(missing)}.")


@contextmanager
def written_whole(out: Path, folders: tuple[str, ...]) -> Iterator[Path]:
    """A folder beside them to write `folders` of `out` into; they are moved there when all is written.

    UserError where one of them is there already: another choice of files would be mixed with it.
    """
    for name in folders:
        if (out / name).exists():
            raise UserError(f"{out / name} is there already: remove it, or choose another folder with --out.")
    partial = out / ".partial"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / ".making"):
            shutil.rmtree(partial, ignore_errors=True)  # of a script that was killed
            try:
                yield partial
                for name in folders:
                    os.rename(partial / name, out / name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{out} could not be written ({error.strerror or error}).") from error


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """One line of JSON a row, the whole file or none of it."""
    from minivlm.atomic_writing import write_atomically

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(as_json(row) + "\n" for row in rows)

    write_atomically(path, write)


def as_json(values: Any) -> str:
    """Readable in every script; with \\udce9 where the name of an image is no UTF-8."""
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(values)
    return text
