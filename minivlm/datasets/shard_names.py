"""Which tar files of a folder are meant: shard-{000..099}.tar and the like, and splits in their names.

photos                            all tar files of the folder, and of its sub-folders
photos/shard-{000..099}.tar       a hundred of them, none of which may be missing; also {a,b} and *
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from minivlm.errors import UserError

COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)$", re.IGNORECASE)
MOST = 10**6
SHOWN = 3


def split_directory(directory: str) -> tuple[str, str | None]:
    """`photos/shard-{000..099}.tar` → (`photos`, `shard-{000..099}.tar`); a folder stays one, with None."""
    text = directory.replace(os.sep, "/")
    if not (text.lower().endswith(".tar") or COMPRESSED.search(text)) or os.path.isdir(directory):
        return directory, None
    parts = text.split("/")
    first = next((i for i, part in enumerate(parts) if re.search(r"[{*?\[]", part)), len(parts) - 1)
    return "/".join(parts[:first]) or ("/" if text.startswith("/") else "."), "/".join(parts[first:])


def expand(pattern: str) -> list[str]:
    """`a-{00..02}.tar` → a-00.tar, a-01.tar, a-02.tar, as a shell does."""
    if not (match := re.search(r"\{([^{}]*)\}", pattern)):
        return [pattern]
    inside = match[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = map(int, numbers.groups())
        if abs(last - first) >= MOST:
            raise UserError(f"{pattern} names {abs(last - first) + 1} tar files, more than {MOST}.")
        padded = any(len(one) > 1 and one[0] == "0" for one in numbers.groups())
        width = max(map(len, numbers.groups())) if padded else 0
        step = 1 if last >= first else -1
        choices = [str(number).zfill(width) for number in range(first, last + step, step)]
    elif "," in inside:
        choices = inside.split(",")
    else:
        raise UserError(f"{pattern} is no list of tar files: braces hold {{000..099}} or {{a,b}}.")
    return [one for choice in choices for one in expand(pattern[: match.start()] + choice + pattern[match.end() :])]


def shards_of(directory: Path, pattern: str | None) -> list[str]:
    """The tar files, as paths below the folder, in order. UserError where one that the pattern names is missing."""
    if pattern is None:
        found = sorted(name for name in below(directory) if name.lower().endswith(".tar"))
        packed = sorted(name for name in below(directory) if COMPRESSED.search(name)) if not found else []
        if packed:
            raise UserError(compressed(directory, packed))
        return found
    if "{" not in pattern and re.search(r"[*?\[]", pattern):
        found = sorted(name for name in below(directory) if fnmatch.fnmatch(name, pattern))
        if not found:
            raise UserError(f"{directory} holds no tar file that is called like {pattern}.")
        return found
    named = expand(pattern)
    missing = [name for name in named if not (directory / name).is_file()]
    if missing and len(missing) == len(named):
        raise UserError(f"{directory} holds none of the {len(named)} tar files that {pattern} names.")
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} of the {len(named)} tar files that {pattern} names: {some(missing)}; fetch "
            "them, or name those that are there."
        )
    if packed := [name for name in named if COMPRESSED.search(name)]:
        raise UserError(compressed(directory, packed))
    return named


def compressed(directory: Path, packed: list[str]) -> str:
    ending = COMPRESSED.search(packed[0])[0].lower()
    tool = {"gz": "gzip", "bz": "bzip2", "xz": "xz", "st": "zstd"}.get(ending.replace("tgz", "gz")[-2:], "bzip2")
    return (
        f"{directory} holds tar files that are compressed ({some(packed)}), whose members cannot be read where they lie: "
        f"decompress them ({tool} -d {packed[0]}); the images in them are compressed already."
    )


def below(directory: Path) -> Iterator[str]:
    """Files of the folder and of its sub-folders; hidden ones are left out."""
    for parent in ("", *sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())):
        if not parent.startswith((".", "__")):
            with os.scandir(directory / parent) as entries:
                names = [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
            yield from (f"{parent}/{name}" if parent else name for name in names)


def gaps(names: list[str]) -> list[str]:
    """The tar files that numbered names would have between the first and the last: shards that may be missing."""
    numbered = [(match[1], match[2], match[3]) for name in names if (match := re.fullmatch(r"(.*?)(\d+)(\D*)", name))]
    found = []
    for (front, end), group in itertools.groupby(
        sorted(numbered, key=lambda n: (n[0], n[2], n[1])), lambda n: (n[0], n[2])
    ):
        digits = [one[1] for one in group]
        numbers, width = {int(one) for one in digits}, min(map(len, digits))
        if len(numbers) > 1 and max(numbers) - min(numbers) < 2 * len(numbers):  # otherwise they count something else
            absent = sorted(set(range(min(numbers), max(numbers))) - numbers)
            found += [f"{front}{number:0{width}d}{end}" for number in absent]
    return found


def some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
