"""A folder of data and how it is read: which keys of its tables, which names of its classes, how much cache on disk.

--data photos --data.caption_key title ──→ Source("photos", caption_key="title") ──→ whatever reads a folder
"""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from minivlm.datasets.shard_names import split_directory
from minivlm.errors import UserError
from minivlm.sizes import bytes_in

HELP = {
    "image_key": "the column or field of a table that names the image, where it is not found by its name",
    "caption_key": "the column or field that holds the caption (several: separated by commas)",
    "class_names": "a file that gives the folders of classes their names, a line each (n01440764 tench, or names in order)",
    "shards": "the tar files of the folder that are meant, as 'shard-{000..099}.tar'; all where it is not given",
    "cache": "the most that decoded images may take on disk (20GB), or off",
}


@dataclass(frozen=True)
class Source(os.PathLike):
    """A folder with the options of `--data`; where a path is wanted it is the folder's, and so in a message.

    Everything that takes a folder of data takes one of these, and asks `Source.of(directory)` for the options.
    """

    directory: str
    image_key: str | None = None
    caption_key: str | None = None
    class_names: str | None = None
    cache: str | None = None
    shards: str | None = None
    judged_split: str | None = None  # what is judged where an evaluation asks for "test": another split, or "all"

    def __post_init__(self):
        directory, shards = os.fspath(self.directory), None
        if directory.startswith("hf:"):
            from minivlm.datasets.hub_data import bring

            directory = bring(directory)
        else:
            directory, shards = split_directory(directory)
        object.__setattr__(self, "directory", directory)
        object.__setattr__(self, "shards", shards or self.shards)
        most_bytes(self.cache)

    @classmethod
    def of(cls, source: str | os.PathLike) -> Source:
        """The source itself, or a folder without any option."""
        return source if isinstance(source, cls) else cls(os.fspath(source))

    @property
    def path(self) -> Path:
        return Path(self.directory)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __fspath__(self) -> str:
        return self.directory

    def __str__(self) -> str:
        return self.directory

    def flags(self, prefix: str = "--data.") -> str:
        """The options as they are written behind a command: " --data.caption_key title"; nothing where there are none."""
        given = {name: getattr(self, name) for name in HELP}
        return "".join(f" {prefix}{name} {shlex.quote(value)}" for name, value in given.items() if value is not None)


def judged(source: str | os.PathLike, split: str) -> str:
    """The split that is meant where one is asked for: of an evaluation the one that its --split names."""
    return Source.of(source).judged_split or split if split == "test" else split


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """The options of a source, with and without "data." in front, for commands that read a folder. names: of which; all."""
    for name in names or HELP:
        parser.add_argument(f"--{name}", f"--data.{name}", dest=name, help=HELP[name])


def source_of(directory: str | os.PathLike, args: argparse.Namespace) -> Source:
    """The folder with those of its options that a command line gives."""
    return Source(directory, **{f.name: getattr(args, f.name) for f in fields(Source)[1:] if hasattr(args, f.name)})


def most_bytes(cache: str | None) -> int | None:
    """--data.cache → bytes: "20GB", "500 MB", "off"; None: it is not given. UserError: it is no size."""
    try:
        return None if cache is None else bytes_in(str(cache))
    except ValueError:
        raise UserError(
            f"--data.cache {cache} is no size: give the most that decoded images may take, as 20GB, or off."
        ) from None
