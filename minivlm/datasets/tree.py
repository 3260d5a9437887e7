"""The files of a folder, of which each sub-folder is listed once: asking the disk about 100,000 images one by one is slow."""

from __future__ import annotations

import os
import unicodedata
from functools import cached_property
from pathlib import Path

from minivlm.datasets.class_folders import Listing, list_folder
from minivlm.datasets.tar_index import is_member
from minivlm.files import readable


class NoImage(ValueError):
    """There is no image that is called so."""


class Tree:
    """Finds images below a folder by what files call them. Paths are relative to it, with slashes."""

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.folders: dict[str, dict[str, bool | None]] = {}
        self.found: dict[tuple[str, tuple[str, ...], bool], str] = {}
        self.shortened: dict[str, str] = {}  # file → the longer path by which a table named it

    def names(self, folder: str = "") -> dict[str, bool | None]:
        """What lies in a folder: name → True: a folder, False: a file, None: neither. Nothing where it cannot be read."""
        if folder not in self.folders:
            try:
                with os.scandir(self.directory / folder) as entries:
                    self.folders[folder] = {entry.name: is_folder(entry) for entry in entries}
            except OSError:
                self.folders[folder] = {}
        return self.folders[folder]

    @cached_property
    def listing(self) -> Listing:
        """All files below the folder, hidden ones left out."""
        return list_folder(self.directory)

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        """The name of an image → the paths that end in it."""
        known: dict[str, list[str]] = {}
        for path in self.listing.images:
            known.setdefault(path.rpartition("/")[2], []).append(path)
        return known

    @cached_property
    def by_stem(self) -> dict[str, list[str]]:
        """The same for names without their ending, as tables of Kaggle's have them."""
        known: dict[str, list[str]] = {}
        for path in self.listing.images:
            known.setdefault(stem(path.rpartition("/")[2]), []).append(path)
        return known

    def file(self, path: str) -> str | None:
        """`path` as the disk spells it, if there is such a file: an accent may be one character or two (NFC, NFD)."""
        *folders, name = path.replace(os.sep, "/").split("/")
        folder = ""
        for part in folders:
            if (there := spelled(part, self.names(folder))) is None:
                return None
            folder = f"{folder}/{there}" if folder else there
        names = self.names(folder)
        if (there := spelled(name, names)) is None or names[there] is not False:
            return None
        return f"{folder}/{there}" if folder else there

    def image(self, name: str, *folders: str, anywhere: bool = False) -> str:
        """The path of the image that a file calls `name`: below one of the `folders`, the folder itself, or its images/.

        anywhere: elsewhere as well, where one path alone ends in it; or without the folders in front of it, which may be
        those of another machine. ValueError: there is none, it lies outside the folder, or there are several.
        """
        key = (name, folders, anywhere)
        if key not in self.found:
            self.found[key] = self.look_for(*key)
        return self.found[key]

    def look_for(self, name: str, folders: tuple[str, ...], anywhere: bool) -> str:
        path = os.path.normpath(name)
        if anywhere and os.path.isabs(path) and path.startswith(f"{self.directory.resolve()}{os.sep}"):
            path = os.path.relpath(path, self.directory.resolve())
        outside = [os.path.normpath(one) for one in (path, path.replace("\\", "/"))]
        if not anywhere and any(os.path.isabs(one) or one.split(os.sep)[0] == os.pardir for one in outside):
            raise ValueError(
                f"the image {readable(name)!r} lies outside the folder; give its path relative to {self.directory}"
            )
        spellings = dict.fromkeys((path, path.replace("\\", "/")))  # "a\\1.jpg": it was written on Windows
        places = [(folder, one) for folder in dict.fromkeys((*folders, "", "images")) for one in spellings]
        inside = (below(folder, one) for folder, one in places)
        if found := next((found for one in inside if one and (found := self.file(one))), None):
            return found
        if anywhere and (found := self.ending_in(outside[-1], name)):
            return found
        asked = (below(folder, one) for folder, one in places)
        if found := next((found for one in asked if one and (found := on_disk(one, self.directory))), None):
            return found
        shown = readable(name if len(name) <= 200 else f"{name[:200]}…")
        where = "nor anywhere below it" if anywhere else "nor in its folder images"
        raise NoImage(f"there is no image {shown!r}, neither in {self.directory} {where}")

    def ending_in(self, path: str, name: str) -> str | None:
        """The one image whose path ends in `path`, of which as many leading folders are left out as have to be."""
        parts = [part for part in Path(path).parts if part not in (os.pardir, os.sep) and not part.endswith(":\\")]
        same_name = (self.by_name.get(parts[-1]) or self.by_stem.get(parts[-1], [])) if parts else []
        for left_out in range(len(parts)):
            ending = "/".join(parts[left_out:])
            found = [
                one for one in same_name if f"/{one}".endswith(f"/{ending}") or f"/{stem(one)}".endswith(f"/{ending}")
            ]
            if len(found) > 1:
                raise ValueError(f"there are several images {readable(ending)!r}: {found[0]} and {found[1]}")
            if found:
                if left_out and self.shortened.setdefault(found[0], name) != name:
                    other = self.shortened[found[0]]
                    raise ValueError(f"{readable(name)!r} and {readable(other)!r} would be the same file {found[0]}")
                return found[0]
        return None


def is_folder(entry: os.DirEntry) -> bool | None:
    """None: a pipe, a device, a link that leads nowhere."""
    try:
        return True if entry.is_dir() else False if entry.is_file() else None
    except OSError:  # a link that leads in a circle
        return None


def stem(path: str) -> str:
    return os.path.splitext(path)[0]


def below(folder: str, path: str) -> str | None:
    """The path in the folder; None: it leads out of the directory."""
    if os.path.isabs(path):
        return None
    inside = os.path.normpath(os.path.join(folder, path)) if folder or os.pardir in path else path
    return None if inside.split(os.sep)[0] == os.pardir else inside


def spelled(name: str, names: dict[str, bool | None]) -> str | None:
    if name in names:
        return name
    if name.isascii():
        return None
    spellings = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((one for one in spellings if one in names), None)


def on_disk(path: str, directory: Path) -> str | None:
    """The same, asked of the disk itself: it may not distinguish capitals, or not let a folder be listed. Or of a tar file."""
    if is_member(directory / path):
        return Path(path).as_posix()
    found = Path()
    for part in Path(path).parts:
        spellings = dict.fromkeys((part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part)))
        there = next((name for name in spellings if os.path.exists(directory / found / name)), None)
        if there is None:
            return None
        found /= there
    return found.as_posix() if os.path.isfile(directory / found) else None
