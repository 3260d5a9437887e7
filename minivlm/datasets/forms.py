"""The forms that a folder of data may have, and how each is recognised by what the folder contains.

    recognised(Source("photos")) ──→ [Found(form="a table", files=("photos.csv",), keys="image: filepath, …")]

A row of FORMS is a form: a recogniser looks at the folder and gives what it found there, with a function that reads it. Files
of our own names (captions.jsonl, …) say by themselves what a folder is; only where there are none do the other forms count.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from minivlm.datasets import annotations, shards, sidecars, tables
from minivlm.datasets.class_folders import NAMES, SPLIT_NAMES, SPLIT_VALUES, read_names
from minivlm.datasets.entries import Item
from minivlm.datasets.images import extensions
from minivlm.datasets.keys import Keys, NoTable, Several, find_keys, plain
from minivlm.datasets.own_files import FIXED, read_fixed
from minivlm.datasets.source import Source
from minivlm.datasets.tree import Tree, is_folder
from minivlm.errors import UserError

DATA = (*tables.CSV, *tables.LINES, *tables.JSON)
LOOKED_INTO = ("annotations", "questions", "captions", "metadata", *SPLIT_NAMES)  # sub-folders with files of rows
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
        for folder in ["", *(name for name, is_one in sorted(self.tree.names().items()) if is_one)]:
            if folder and folder.lower() not in LOOKED_INTO:
                continue
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


class Form(NamedTuple):
    name: str
    recognise: Callable[[Folder], list[Found]]


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
    if folder.lower() in SPLIT_NAMES:
        return SPLIT_NAMES[folder.lower()]
    splits = {SPLIT_VALUES[word] for word in SPLIT_WORD.findall(os.path.splitext(file)[0].lower())}
    return splits.pop() if len(splits) == 1 else None


# --------------------------------------------------------------------------------------------------------- recognisers


def own_files(folder: Folder) -> list[Found]:
    """Our own files, whose names say what they hold. Where the keys are chosen they are tables like others."""
    found = []
    for name, gives in FIXED.items():
        path = folder.path / name
        if path.exists() and (keys := other_keys(folder, name, gives)) is not None:
            found.append(of_table(folder, name, *keys, None))
        elif path.exists():
            form = "lines of JSON" if ending(name) == ".jsonl" else "LLaVA's JSON"
            found.append(Found(form, gives, (name,), partial(read_fixed, path)))
    return found


def other_keys(folder: Folder, name: str, gives: str) -> tuple[tables.Table, Keys] | None:
    """The keys of one of our own files, if they are chosen or are not our own."""
    source, path = folder.source, folder.path / name
    chosen = source.image_key is not None or source.caption_key is not None
    try:
        table = tables.open_table(path)
        if not chosen and (table.first.keys() & {"image", "conversations"} or not table.first):
            return None
        keys = find_keys(table.columns, table.first, source, folder.is_image(name))
    except (NoTable, UserError) as error:
        if chosen or isinstance(error, Several):
            raise UserError(f"{path}: {str(error).rstrip('.')}.") from None
        return None  # whoever reads it names the line
    return (table, keys) if keys.gives == gives else None


def of_table(folder: Folder, name: str, table: tables.Table, keys: Keys, split: str | None) -> Found:
    def read(problems: list[str] | None, notes: list[str], split: str | None = split) -> list:
        names = read_names(folder.source) if keys.label else {}
        return tables.read_table(table, keys, folder.find(name), problems, notes, split=split, names=names)

    return Found(f"{table}", keys.gives, (name,), read, f"{keys}", split)


def row_files(folder: Folder) -> list[Found]:
    """CSV, TSV, lines of JSON and lists in JSON, whose columns or fields are known or chosen."""
    found = []
    for name in folder.files:
        if annotations.kind_of(folder.lists.get(name, {})) or ending(name) == ".token":
            continue
        try:
            table = tables.open_table(folder.path / name)
            keys = find_keys(table.columns, table.first, folder.source, folder.is_image(name))
        except (NoTable, UserError) as error:
            message = f"{folder.path / name}: {str(error).rstrip('.')}."
            if isinstance(error, Several):
                folder.open.append(message)
            elif ending(name) != ".txt":  # which may be any text
                folder.reasons[name] = message
            continue
        if not says_what_folders_say(table.first, keys):
            found.append(of_table(folder, name, table, keys, split_in(name)))
    return found


def says_what_folders_say(row: dict[str, Any], keys: Keys) -> bool:
    """A table of labels beside class folders: cat/1.jpg, cat."""
    if keys.gives != "captions" or keys.captions or not isinstance(image := row.get(keys.image), str):
        return False
    return plain(str(row.get(keys.label))) in map(plain, image.replace("\\", "/").split("/")[:-1])


def list_files(folder: Folder) -> list[Found]:
    """COCO's captions and Karpathy's files, under any name."""
    found = []
    for name, lists in folder.lists.items():
        kind, path = annotations.kind_of(lists), folder.path / name
        if kind in ("coco", "karpathy"):
            form = "COCO's captions" if kind == "coco" else "Karpathy's JSON"
            split = split_in(name) if kind == "coco" else None  # Karpathy's rows name theirs
            named = annotations.first_images(lists, kind)
            if folder.lacks_images(name, (lambda find, image=image: find(image) for image in named)):
                continue
            found.append(
                Found(form, "captions", (name,), partial(read_lists, folder, name, kind, split=split), split=split)
            )
        elif kind == "instances":
            folder.reasons[name] = f"{path} holds boxes or key points of objects (COCO's instances), and no captions."
    return found


def read_lists(
    folder: Folder, name: str, kind: str, problems: list[str] | None, notes: list[str], split: str | None = None
) -> list[Item]:
    read = annotations.read_coco if kind == "coco" else annotations.read_karpathy
    return read(folder.path / name, folder.find(name, subset_folders(name)), split, problems, notes)


def subset_folders(name: str) -> tuple[str, ...]:
    """train2014/, as the images of such a file lie."""
    subset = annotations.subset_of(Path(name))
    return (subset, f"images/{subset}") if subset else ()


def vqa_pairs(folder: Folder) -> list[Found]:
    """VQA v2: a file with questions and one with their answers, of the same images."""
    kinds = {name: annotations.kind_of(lists) for name, lists in folder.lists.items()}
    part = lambda name: annotations.subset_of(Path(name)) or split_in(name)
    found = []
    for name in (name for name, kind in kinds.items() if kind == "questions"):
        fitting = [other for other, kind in kinds.items() if kind == "answers" and part(name) == part(other)]
        numbers = [one.get("image_id") for one in folder.lists[name]["questions"][:FIRST]]
        subset = annotations.subset_of(Path(name))
        by_number = (lambda find, n=n, subset=subset: annotations.find_numbered(n, subset, find) for n in numbers)
        if len(fitting) == 1 and folder.lacks_images(name, by_number):
            continue
        if len(fitting) == 1:
            read = partial(read_vqa, folder, name, fitting[0], split=split_in(name))
            files = (name, fitting[0])
            found.append(Found("VQA v2's questions and answers", "questions", files, read, split=split_in(name)))
        else:
            folder.reasons[name] = (
                f"{folder.path / name} holds questions, but there {'are several files' if fitting else 'is no file'} with "
                "their answers beside it, as v2_mscoco_train2014_annotations.json is."
            )
    return found


def read_vqa(
    folder: Folder, name: str, other: str, problems: list[str] | None, notes: list[str], split: str | None = None
) -> list:
    find = folder.find(name, subset_folders(name))
    return annotations.read_vqa(folder.path / name, folder.path / other, find, split, problems, notes)


def texts_beside_images(folder: Folder) -> list[Found]:
    """A .txt, .caption or .json beside at least half of the images, where no other file describes them."""
    beside = sidecars.texts_beside(folder.tree.listing)
    if len(beside.texts) < max(1, len(beside.without)):
        return []
    try:
        key = sidecars.check_are_captions(folder.path, beside, folder.source)
    except NoTable as error:
        folder.reasons[next(iter(beside.texts.values()))] = f"{folder.path}: {error}."
        return []

    def read(problems: list[str] | None, notes: list[str]) -> list[Item]:
        now = sidecars.texts_beside(Tree(folder.path).listing)
        return sidecars.read_beside(folder.path, now, key, problems, notes)

    first = tuple(beside.texts.values())
    keys = f"caption: {key}" if key else ""
    return [Found(f"a text beside each image, {beside.endings}", "captions", first, read, keys)]


def tar_shards(folder: Folder) -> list[Found]:
    """WebDataset's: named, or all where no image lies beside them. A tar file beside images is what they came from."""
    source = folder.source
    if source.shards is None and folder.tree.listing.images:
        return []
    try:
        if (found := shards.find(source)) is None:
            return []
    except NoTable as error:
        message = f"{source}: {str(error).rstrip('.')}."
        if isinstance(error, Several) or source.shards is not None:
            raise UserError(message) from None
        folder.reasons["tar files"] = message
        return []
    return [Found("WebDataset tar shards", found.keys.gives, found.files, found.read, f"{found.keys}")]


FORMS = (
    Form("a table (CSV, TSV, JSON)", row_files),
    Form("COCO's or Karpathy's JSON", list_files),
    Form("VQA v2's pair of files", vqa_pairs),
)
WHERE_NOTHING_ELSE = (Form("a text beside each image (.txt, .caption, .json)", texts_beside_images),)


# ---------------------------------------------------------------------------------------------------------- the folder


def recognised(source: str | os.PathLike) -> list[Found]:
    """All that describes the images of a folder; nothing for class folders, the shapes world, documents, or what is unknown.

    UserError: several files that do not go together, or keys that are not there.
    """
    source = Source.of(source)
    return list(look(source, stamps(source.path))[0]) if source.path.is_dir() else []


def why_not(source: str | os.PathLike) -> list[str]:
    """Sentences on files that might have been meant to describe the images, and are not read."""
    source = Source.of(source)
    return list(look(source, stamps(source.path))[1].values())


@lru_cache(maxsize=8)
def look(source: Source, _: tuple) -> tuple[list[Found], dict[str, str]]:
    folder = Folder(source, Tree(source.path))
    names = folder.tree.names()
    if source.shards is not None:
        found = tar_shards(folder)
        check_options(source, found, folder.reasons)
        return found, {}
    if (found := own_files(folder)) or names.keys() & {"world.json", "interleaved.jsonl"}:
        check_options(source, found, {})
        return found, {}
    found = [one for form in FORMS for one in form.recognise(folder)]
    if not found and folder.open:
        raise UserError(folder.open[0])
    found = found or tar_shards(folder)
    if not found and source.class_names is None and NAMES not in names:
        found = [one for form in WHERE_NOTHING_ELSE for one in form.recognise(folder)]
    if parquet := sorted(name for name in names if ending(name) == ".parquet"):
        count = parquet[0] if len(parquet) == 1 else f"{parquet[0]} and {len(parquet) - 1} other parquet files"
        folder.without.append(f"{count} {'is' if len(parquet) == 1 else 'are'} not read.")
        if folder.reasons:
            folder.reasons["parquet"] = (
                f"{folder.without[-1][:-1]} either: write the columns to a CSV (pandas: to_csv)."
            )
    found = going_together(folder, found)
    found = [replace(one, notes=tuple(folder.without)) for one in found]
    check_options(source, found, folder.reasons)
    for parsed in ("lists", "files"):  # the readers hold on to the folder
        folder.__dict__.pop(parsed, None)
    folder.tree = Tree(source.path)
    return found, folder.reasons


def check_options(source: Source, found: list[Found], reasons: dict[str, str]) -> None:
    """UserError for options of which nothing in the folder makes use."""
    given = [name for name in ("image_key", "caption_key") if getattr(source, name) is not None]
    if given and not any(one.keys for one in found):
        what = f"{found[0].form} ({found[0].files[0]})" if found else "no table of images"
        why = " ".join(reasons.values()) or f"{source} holds {what}, and so no column to choose: leave it out."
        raise UserError(f"--data.{given[0]} {getattr(source, given[0])}: {why}")
    if source.class_names is not None and found and not any("label: " in one.keys for one in found):
        raise UserError(
            f"--data.class_names {source.class_names}: {source} has no classes, but {found[0]}: leave it out."
        )


def going_together(folder: Folder, found: list[Found]) -> list[Found]:
    """Files that give the same kind of thing are of one form, and each of another split."""
    result = []
    for gives in dict.fromkeys(one.gives for one in found):
        same = [one for one in found if one.gives == gives]
        splits = [one.split for one in same]
        if len(same) > 1 and (len(set(splits)) < len(splits) or None in splits or len({one.form for one in same}) > 1):
            raise UserError(
                f"{folder.path} has several files with {gives}, {listed([one.files[0] for one in same])}: keep one of them "
                "there, or one for each split (train, val, test in their names)."
            )
        if splits and "train" not in splits and None not in splits:  # a part of a dataset, of which splits are drawn
            same = [Found(one.form, one.gives, one.files, partial(one.read, split=None), one.keys) for one in same]
        result += same
    return result


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {names[-1]}" if len(names) == 4 else ", …" if len(names) > 4 else "")


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
