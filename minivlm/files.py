"""Files that others made: only regular ones are opened, invalid text is refused, and one process at a time writes."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from minivlm.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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


def cache_folder(directory: Path) -> Path:
    """Where the cache of `directory` belongs: inside it, or under the user's cache folder if it is marked read-only, or
    brings along a link that leads elsewhere."""
    directory = directory.resolve()
    inside = directory / ".minivlm_cache"
    anyone_may_write = directory.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    if anyone_may_write and os.access(directory, os.W_OK) and not inside.is_symlink():  # os.access alone: root may all
        return inside
    return user_cache() / f"{directory.name}-{zlib.crc32(os.fsencode(directory)):08x}"


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minivlm"


# ----------------------------------------------------------------------------------------------------------------- text


def read_text(path: str | os.PathLike) -> str:
    """The text of a file. UserError as of `read_bytes`, and where it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.") from None


def parse_json(data: bytes, *, texts: bool = True, strict: bool = False) -> Any:
    """UTF-8 bytes of JSON → values. ValueError says what is wrong, without a full stop.

    texts: all texts in them are valid, as `check_texts` says. strict: so are all numbers, and no object gives a name two
    different values.
    """
    rules = {"parse_constant": no_number, "parse_float": finite, "object_pairs_hook": once} if strict else {}
    try:
        values = json.loads(data.decode("utf-8-sig"), **rules)
        if texts and re.search(rb"\\u[dD][89a-fA-F]", data):  # half of a pair, or both
            check_texts(values)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError where the file is missing, broken or holds something else."""
    data = read_bytes(path)
    try:
        values = parse_json(data, strict=True)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.") from None
    except ValueError as error:  # also of a number of more digits than Python converts
        raise UserError(f"{path} is not JSON that can be read: {str(error).partition(';')[0]}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, but must hold an object in braces.")
    return values


def no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def finite(word: str) -> float:
    return value if math.isfinite(value := float(word)) else no_number(word)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs) and (twice := [name for name, value in pairs if value != values[name]]):
        raise ValueError(f"{twice[0]!r} is there twice, with different values")
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
    """The text itself. UserError if it is none, as in `check_text`.

    Where the locale is ASCII a command line comes with UTF-8 by the byte, which is put together.
    """
    if not text.isascii():
        with suppress(UnicodeError):
            text = text.encode("utf-8", "surrogateescape").decode("utf-8")
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
    from tqdm import tqdm

    with open_lock(path) as file:
        if not hold(file):
            with tqdm(desc=f"waiting for another process that writes to {path.parent}", bar_format="{desc}"):
                hold(file, wait=True)
        yield


def open_lock(path: Path) -> IO[str]:
    """The file, made if it is missing, open for `hold`. A pipe or a link of this name is an OSError."""
    no_surprise = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    return open(os.open(path, os.O_RDWR | os.O_CREAT | no_surprise, 0o666), "r+", encoding="utf-8")


def hold(file: IO[str], *, wait: bool = False) -> bool:
    """Keep other processes from holding the file until it is closed. False: another holds it.

    Where there are no locks, as on Windows and on some network disks, nobody waits and all hold it.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True
