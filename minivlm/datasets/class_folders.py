"""Folders with one sub-folder a class: which images they hold, and whether their names are names of classes at all.

    DIR/<class>/…/*.jpg                   "_" in a class name reads as a space
    DIR/train/<class>/…, DIR/test/…       the same with the split given; val (or valid, validation) beside them
    DIR/class_names.txt                   optional: a folder and its class a line, "n01440764 tench", or names alone in the
                                          order of the folders (class_names.py)

Images also lie in folders that are no classes: a year of photographs, a shard of a download. To learn "an image of
a 2023" helps nobody, so those are refused unless class_names.txt names their classes.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from minivlm.datasets.class_names import NAMES, names_file, names_of
from minivlm.datasets.images import extensions
from minivlm.datasets.source import Source
from minivlm.datasets.tar_index import open_tar
from minivlm.errors import UserError
from minivlm.files import check_text, readable

SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# What rows and files call the splits beside that; Karpathy's "restval" is trained on.
SPLIT_VALUES = SPLIT_NAMES | {"dev": "val", "restval": "train", "testing": "test"}
SIDECARS = (".txt", ".json", ".caption", ".xml")  # beside an image and called like it: its text

# ------------------------------------------------------------------------------------------------- what a folder holds


@dataclass
class Listing:
    """The files below a folder, hidden files and folders left out; names are paths below it, with slashes."""

    images: list[str] = field(default_factory=list)  # sorted, by their endings
    irregular: list[str] = field(default_factory=list)  # called like images, but pipes, devices, links to nowhere
    others: list[str] = field(default_factory=list)
    linked: int = 0  # links to folders, which are not followed
    closed: int = 0  # folders that may not be read


def list_folder(directory: Path, *, tars: bool = False) -> Listing:
    """tars: where there are no images but tar files, their members are listed as if they lay in folders."""
    found, waiting = Listing(), [""]
    while waiting:
        parent = waiting.pop()
        try:
            entries = list(os.scandir(directory / parent))
        except OSError:  # no permission, or a path that is too long: counted
            found.closed += 1
            continue
        for entry in entries:
            name = f"{parent}/{entry.name}" if parent else entry.name
            # A link may be circular or lead to what may not be read: os.path gives False, where DirEntry raises.
            link = entry.is_symlink()
            is_folder = os.path.isdir(entry.path) if link else entry.is_dir()
            if entry.name.startswith(".") or (is_folder and entry.name.startswith("__")):
                continue
            if is_folder and link:
                found.linked += 1
            elif is_folder:
                waiting.append(name)
            elif os.path.splitext(name)[1].lower() not in extensions():
                found.others.append(name)
            else:
                regular = os.path.isfile(entry.path) if link else entry.is_file()
                (found.images if regular else found.irregular).append(name)
    for tar in [] if found.images or not tars else [name for name in found.others if name.lower().endswith(".tar")]:
        found.others.remove(tar)
        list_tar(directory / tar, found, f"{tar}/")
    for names in (found.images, found.irregular, found.others):
        names.sort()
    return found


def list_tar(tar: Path, found: Listing, parent: str = "") -> Listing:
    """Adds the members of a tar file to `found`."""
    for name in open_tar(tar).all_names():
        is_image = os.path.splitext(name)[1].lower() in extensions()
        (found.images if is_image else found.others).append(f"{parent}{name}")
    return found


NO_FILE, LINK, CLOSED = "that is no regular file", "link to a folder", "folder that cannot be read"
MANY = {NO_FILE: "that are no regular files", LINK: "links to folders", CLOSED: "folders that cannot be read"}


def passed_over(listings: Iterable[Listing], *, irregular: bool = True) -> str | None:
    """A sentence on what is not read, "3 files are passed over: 2 .txt, 1 .mp4."; None if there is nothing."""
    counts: Counter[str] = Counter()
    for found in listings:
        counts.update(os.path.splitext(name)[1].lower() or "without an ending" for name in found.others)
        special = {NO_FILE: len(found.irregular) * irregular, LINK: found.linked, CLOSED: found.closed}
        counts += Counter(special)  # of 0, none
    if not counts:
        return None
    total, most = sum(counts.values()), counts.most_common(6)
    parts = [f"{count} {readable(kind if count == 1 else MANY.get(kind, kind))}" for kind, count in most] + (
        ["…"] if len(counts) > len(most) else []
    )
    return f"{total} {'file is' if total == 1 else 'files are'} passed over: {', '.join(parts)}."


# -------------------------------------------------------------------------------------------------------------- classes


@dataclass
class ClassFolder:
    path: str  # below the directory
    name: str
    split: str | None
    found: Listing

    def images(self) -> list[str]:
        """Their paths below the directory."""
        return [f"{self.path}/{name}" for name in self.found.images]


def read_class_folders(source: str | os.PathLike) -> tuple[list[ClassFolder], list[str]]:
    """The classes that have images, in the order of their names, and notes on what is passed over.

    UserError where the folders hold something else than the images of a class each.
    """
    directory = Source.of(source).path
    folders = subfolders(directory)
    splits = {folder: SPLIT_NAMES[folder.name.lower()] for folder in folders if folder.name.lower() in SPLIT_NAMES}
    if len(splits) == len(folders) or any(split == "train" and subfolders(f) for f, split in splits.items()):
        candidates = [(split, folder) for parent, split in splits.items() for folder in subfolders(parent)]
    else:
        splits, candidates = {}, [(None, folder) for folder in folders]
    holds = [(split, folder, list_folder(folder)) for split, folder in candidates]
    named = names_of((normal(folder) for _, folder, found in holds if found.images), source)
    classes, empty = [], []
    for split, folder, found in holds:
        path = folder.relative_to(directory).as_posix()
        if found.images:
            name = named.get(normal(folder), "") if named else normal(folder).replace("_", " ")
            classes.append(ClassFolder(path, name, split, found))
        else:
            empty.append(path)
    if not named:
        refuse_other_layouts(directory, {one.path: one.found for one in classes})
    for one in classes:
        check_name(one, source)
    read = {*splits, *(folder for _, folder in candidates)}
    beside = [path for parent in (directory, *splits) for path in sorted(parent.iterdir()) if path not in read]
    names = [path.relative_to(directory).as_posix() for path in beside if not expected(path.name)]
    notes = [
        passed_over(one.found for one in classes),
        some(empty, "sub-folder has no images", "sub-folders have no images"),
        some(names, "file or folder is not a class, and not read", "files and folders are no classes, and not read"),
    ]
    return classes, [note for note in notes if note]


def normal(folder: Path) -> str:
    """Its name; train/ and test/ may come from different systems."""
    return unicodedata.normalize("NFC", folder.name)


def check_name(one: ClassFolder, source: str | os.PathLike) -> None:
    if not one.name:
        raise UserError(f"{names_file(source)} does not name the class of the folder {os.path.basename(one.path)!r}.")
    try:
        check_text(one.name)
    except ValueError as error:
        raise UserError(f"a class in {source} cannot be called so: {error}. Rename its folder.") from None


def expected(name: str) -> bool:
    """Hidden files, and what people read."""
    return name == NAMES or name.startswith((".", "__", "README", "LICENSE"))


def some(names: list[str], one: str, many: str) -> str | None:
    """ "3 files are …: a, b, c."; None if there are none."""
    shown = ", ".join(map(readable, names[:5])) + (", …" if len(names) > 5 else "")
    return f"{len(names)} {one if len(names) == 1 else many}: {shown}." if names else None


def subfolders(directory: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror or error}.") from None
    return [directory / name for name in names if not name.startswith((".", "__")) and os.path.isdir(directory / name)]


# ------------------------------------------------------------------------------------------------------ other layouts

YEAR = r"(19|20)\d\d"
MONTH = "jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?|oct(ober)?|nov(ember)?|dec(ember)?"
PREFIXES = r"(?=.*\d)(?=.*[a-f]|0)[0-9a-f]{2}"
COUNTED = (r"[a-f]\d", r"\d[a-f]")  # c0, c1, c2 or 1a, 1b: of hashes some would be the other way round
NO_CLASSES = {  # what folders are called → what that looks like
    rf"{YEAR}([-_. ]?(0[1-9]|1[0-2])([-_. ]?[0-3]\d)?([-_ ].*)?)?": "years or days",
    rf"(?i)(photos|pictures|images|bilder|fotos)( from)? {YEAR}": "years or days",
    rf"(?i)(\d\d?[-_. ]*)?({MONTH})([-_. ]*\d*)": "months",
    r"\d{3}([A-Z_]{5}|_\d{4})|DCIM": "the folders of a camera",
    r"(?i)(part|shard|chunk|batch|fold|folder|dir)[-_ ]?\d+|0\d{2,}|\d{5,}": "the numbered parts of a download",
    PREFIXES: "months, or the first digits of hashes",
    r"(?=.*\d)[0-9a-f]{8,}(-[0-9a-f]{4,})*": "hashes",
    r"(train|training|val|valid|validation|test)[-_]?\d+": "the splits of a dataset without classes",
    r"(?i)(jpeg|png)?images?|imgs?|annotations?|segmentation\w*": "parts of a dataset, not classes",
}
SYNSETS = {r"n\d{8}": "WordNet's numbers, as ImageNet's folders are called"}


def look_like(names: Iterable[str], *, named: bool = True) -> tuple[str, list[str]] | None:
    """What at least half of the names look like, if not like classes, and those names. named: they are to be learned."""
    names = sorted(set(names))
    for pattern, kind in (NO_CLASSES | (SYNSETS if named else {})).items():
        like = [name for name in names if re.fullmatch(pattern, name)]
        if pattern == PREFIXES and any(all(re.fullmatch(one, name) for name in names) for one in COUNTED):
            continue
        if like and 2 * len(like) >= len(names):
            return kind, like
    return None


def refuse_other_layouts(directory: Path, folders: dict[str, Listing], *, named: bool = True) -> None:
    """UserError if the folders (path → what they hold) are not one a class. named: their names are to be learned."""
    remedy = f"give each a class in {directory / NAMES} (a line: {{}} NAME) or in a file of --data.class_names"
    if found := look_like(map(os.path.basename, folders), named=named):
        kind, like = found
        shown = ", ".join(map(repr, like[:3])) + (", …" if len(like) > 3 else "")
        raise UserError(
            f"the sub-folders of {directory} look like {kind} ({shown}), so their names would be learned as "
            f"classes: rename them, describe each image in a captions.jsonl, or {remedy.format(like[0])}."
        )
    for path, found in folders.items():
        stems = {os.path.splitext(name)[0] for name in found.images}
        stems |= {*found.images}  # a.txt beside a.jpg, or a.jpg.txt
        beside = [n for n in found.others if os.path.splitext(n)[1] in SIDECARS and os.path.splitext(n)[0] in stems]
        if beside and 2 * len({os.path.splitext(name)[0] for name in beside}) >= len(found.images):
            raise UserError(
                f"{directory / path} holds texts beside its images ({beside[0]}), as img2dataset and annotation tools "
                "leave them, and not the images of a class alone: write them to captions.jsonl; or, if the "
                f"folder is a class, {remedy.format(os.path.basename(path))}."
            )
