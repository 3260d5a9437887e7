"""A folder as the recognisers of forms.py look at it: the files that may hold rows, and what is found in them."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from minivlm.datasets import annotations, tables
from minivlm.datasets.class_folders import SPLIT_NAMES, SPLIT_VALUES
from minivlm.datasets.class_names import NAMES
from minivlm.datasets.images import extensions
from minivlm.datasets.source import Source
from minivlm.datasets.tree import Tree, is_folder
from minivlm.errors import UserError

DATA = (*tables.CSV, *tables.LINES, *tables.JSON)
LOOKED_INTO = (
    "annotations",
    "questions",
    "captions",
    "metadata",
    "data",
    *SPLIT_NAMES,
)  # sub-folders with files of rows
PER_IMAGE = (".txt", ".json")  # beside an image of the same name
FIRST = 8  # images of a file that are looked for before it is read
MANY = 64  # files of one ending in a folder are of an image each, and no tables
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_VALUES)})(?![a-z])")

Read = Callable[[list[str] | None, list[str]], list]  # problems (None: raise), notes → Items or entries


@dataclass(frozen=True)
class Found:
    """Something that a folder was recognised by.

    gives  "captions" (Items), "questions" (Quizzes) or "conversations"
    files  below the folder; of many, the first
    read   problems, notes → the samples. problems: gets what is wrong, or None: it raises UserError
    keys   which column or field is what, in words
    split  that the name of the file, or of its folder, gives
    notes  sentences on what is passed over beside it
    """

    form: str
    gives: str
    files: tuple[str, ...]
    read: Read
    keys: str = ""
    split: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        files = ", ".join(self.files[:4]) + (", …" if len(self.files) > 4 else "")
        return f"{self.gives}: {self.form} ({files})" + (f"; {self.keys}" if self.keys else "")


@dataclass
class Folder:
    """What the recognisers look at.

    reasons  file → why it is of no form, where it might have been meant to be
    open     what is to be chosen before a file can be read
    without  sentences on files that are of a form, but whose images are not there
    """

    source: Source
    tree: Tree
    reasons: dict[str, str] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.tree.directory

    @cached_property
    def files(self) -> list[str]:
        """The files at the top and in some sub-folders that may hold rows: no hidden ones, none beside an image."""
        found = []
        within = lambda folder: [name for name, is_one in sorted(self.tree.names(folder).items()) if is_one]
        looked_into = [name for name in within("") if name.lower() in LOOKED_INTO]
        looked_into += [f"data/{name}" for name in within("data") if name.lower() in SPLIT_NAMES]  # of Hugging Face's
        for folder in ["", *looked_into]:
            names = self.tree.names(folder)
            images = {
                one for name in names if ending(name) in extensions() for one in (name, os.path.splitext(name)[0])
            }
            counts = Counter(map(ending, names))
            found += [
                f"{folder}/{name}" if folder else name
                for name, is_one in sorted(names.items())
                if is_one is False and ending(name) in DATA and not expected(name)
                if counts[ending(name)] <= MANY
                if ending(name) not in PER_IMAGE or os.path.splitext(name)[0] not in images
            ]
        return found

    @cached_property
    def lists(self) -> dict[str, annotations.Lists]:
        """The lists in the JSON files that are one object: these are parsed once."""
        read = {}
        for name in self.files:
            if name.endswith(".json") and tables.first_byte(self.path / name) == b"{":
                try:
                    read[name] = annotations.lists_in(self.path / name)
                except ValueError:
                    continue  # it may be lines of JSON; what else it may be is told where it is opened as a table
        return read

    def find(self, name: str, folders: tuple[str, ...] = ()) -> Callable[[str], str]:
        """Looks for the images of a file. A new tree each time: what is read later may have changed."""
        tree, beside = Tree(self.path), (os.path.dirname(name),)
        return lambda image: tree.image(image, *folders, *beside, anywhere=True)

    def lacks_images(self, name: str, images: Iterable[Callable[[Callable[[str], str]], str]]) -> bool:
        """Whether none of the first images of a file is there: a split that was not downloaded. images: find → its path."""
        find = self.find(name, subset_folders(name))
        for look_up in images:
            try:
                look_up(find)
            except (ValueError, KeyError, TypeError):
                continue
            return False
        self.without.append(f"{self.path / name} is left out: none of its images is there.")
        self.reasons[name] = self.without[-1]
        return True

    def is_image(self, name: str) -> Callable[[str], bool]:
        def there(image: str) -> bool:
            try:
                return bool(self.tree.image(image, os.path.dirname(name), anywhere=True))
            except ValueError:
                return False

        return there


def ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def expected(name: str) -> bool:
    """Files of rows that lie in folders without being data."""
    return (
        name.startswith((".", "README", "LICENSE", "requirements"))
        or name in (NAMES, "dataset_info.json", "state.json")
        or (
            name.endswith("_stats.json")  # img2dataset's
        )
    )


def split_in(name: str) -> str | None:
    """The split that a file's folder or its own name gives: train/metadata.csv, captions_val2017.json."""
    folder, _, file = name.rpartition("/")
    if (parent := folder.rpartition("/")[2].lower()) in SPLIT_NAMES:
        return SPLIT_NAMES[parent]
    splits = {SPLIT_VALUES[word] for word in SPLIT_WORD.findall(os.path.splitext(file)[0].lower())}
    return splits.pop() if len(splits) == 1 else None


def subset_folders(name: str) -> tuple[str, ...]:
    """train2014/, as the images of such a file lie."""
    subset = annotations.subset_of(Path(name))
    return (subset, f"images/{subset}") if subset else ()


def stamps(directory: Path) -> tuple:
    """Times that change when a folder does: a command asks several times about one folder."""
    try:
        entries = [(entry, is_folder(entry)) for entry in os.scandir(directory) if not entry.name.startswith(".")]
        folders = [entry for entry, is_one in entries if is_one]
        within = [one for folder in folders if folder.name.lower() in LOOKED_INTO for one in data_files(folder.path)]
        files = [*data_files(directory), *within]
        times = [(one.path, one.stat().st_mtime_ns, one.stat().st_size) for one in (*folders, *files)]
        return (*sorted(times), directory.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror or error}.") from None


def is_settled(times: tuple) -> bool:
    """Whether the last change is old enough for another to show in the times. Many files of an image each are not looked at."""
    last = max((when for _, when, _ in times[:-1]), default=0)
    return len(times) < MANY and time.time_ns() - max(last, times[-1]) > 2 * 10**9


def data_files(folder: str | os.PathLike) -> list[os.DirEntry]:
    """Those that may hold rows; of a great many, which are of an image each, the first."""
    files = [one for one in os.scandir(folder) if ending(one.name) in DATA and is_folder(one) is False]
    return sorted(files, key=lambda one: one.name)[:MANY]
