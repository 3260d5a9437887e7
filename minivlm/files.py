"""Files that others made: only regular ones are opened, what is no text is told, and one process at a time writes."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from minivlm.errors import UserError

KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@contextmanager
def open_regular(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """The file, open for reading. UserError where it is missing or no regular file: a pipe would be waited for without end."""
    try:
        require_regular(path, os.stat(path).st_mode)  # before it is opened, which alone may do something to a device
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError:  # a NUL, or half a surrogate pair
        raise UserError(f"{str(path)!r} is no name that a file can have.") from None
    with open(descriptor, "rb") as file:
        require_regular(path, os.fstat(descriptor).st_mode)
        yield file


def require_regular(path: str | os.PathLike, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder, where a file is wanted.")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is no regular file but {KINDS.get(stat.S_IFMT(mode), 'something else')}.")


def is_own_file(path: Path) -> bool:
    """Is it a regular file that lies here, and no link to one elsewhere?"""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_bytes(path: str | os.PathLike) -> bytes:
    """UserError where it is missing, no regular file, or cannot be read."""
    with open_regular(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


# ----------------------------------------------------------------------------------------------------------------- text


def parse_json(data: bytes, *, texts: bool = True) -> Any:
    """UTF-8 bytes of JSON → values. ValueError says what is wrong, without a full stop.

    texts: all texts in them are valid, as `check_texts` says.
    """
    try:
        values = json.loads(data.decode("utf-8-sig"))
        if texts and re.search(rb"\\u[dD][89a-fA-F]", data):  # half of a pair, or both
            check_texts(values)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None
    return values


def check_texts(values: Any, key: str = "") -> None:
    """ValueError if a string among JSON values is no text. What names an image may be none: file names need not be UTF-8."""
    if isinstance(values, str) and key != "image":
        check_text(values)
    elif isinstance(values, dict):
        for name, value in values.items():
            check_text(name)
            check_texts(value, name)
    elif isinstance(values, list):
        for value in values:
            check_texts(value, key)


def check_text(text: str) -> None:
    """ValueError if it holds half a surrogate pair, which JSON and file names may, but no encoding of Unicode can."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        kind = "a byte that is no UTF-8" if "\udc80" <= half <= "\udcff" else "half a surrogate pair"
        raise ValueError(f"“{readable(text[:40])}” is no valid text: it holds {kind} (\\u{ord(half):04x})") from None


def valid_text(text: str) -> str:
    """The text itself. UserError if it is none, as in `check_text`."""
    try:
        check_text(text)
    except ValueError as error:
        raise UserError(f"{error}.") from None
    return text


def readable(text: str) -> str:
    """The text with \\udce9 for what no terminal, file or font can show."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# ---------------------------------------------------------------------------------------------------------------- locks


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time is in here, the others wait and say so. A process that ends, however it does, lets go."""
    try:
        import fcntl
    except ImportError:  # Windows, where nobody waits; what is written is renamed into place as a whole there too
        fcntl = None
    no_surprise = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)  # a pipe or a link of this name
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | no_surprise, 0o666)
    try:
        if fcntl is not None:
            wait_for(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def wait_for(descriptor: int, path: Path) -> None:
    import fcntl

    from tqdm import tqdm

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with tqdm(desc=f"waiting for another process that writes to {path.parent}", bar_format="{desc}"):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: go on, as there is nothing to wait for
        pass
