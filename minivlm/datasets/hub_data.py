"""A data set of the Hugging Face hub as tar shards: brought once into the user's cache, and then read as those.

hf:owner/name   hf:owner/name@revision   hf:owner/name/config   hf:./a_folder, which the `datasets` package reads

train  ──→  train-00000.tar   000000000.image.jpg   the bytes as they are, the name of the column in front
validation  val-00000.tar     000000000.json        the other columns, classes by their names
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlm.errors import UserError
from minivlm.files import locked, user_cache

PREFIX = "hf:"
SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}
MOST_BYTES, MOST_SAMPLES = 5 * 10**8, 10_000  # of one tar file
ENDINGS = {"JPEG": "jpg", "MPO": "jpg"}


@dataclass(frozen=True)
class HubName:
    name: str
    revision: str | None = None
    config: str | None = None

    @classmethod
    def read(cls, text: str) -> HubName:
        """`hf:owner/name@revision/config`; what is a path here stays one. UserError: it is no name."""
        rest = text.removeprefix(PREFIX)
        if rest.startswith(("/", ".", "~")) or os.path.isdir(rest):
            return cls(os.path.abspath(os.path.expanduser(rest)))
        match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w.-]+))?(?:/([\w.-]+))?", rest)
        if not match:
            raise UserError(
                f"{text} is no name of a data set: write hf:owner/name, hf:owner/name@revision or hf:owner/name/config."
            )
        return cls(*match.groups())

    @property
    def folder(self) -> str:
        parts = [self.name.strip("/"), *(f"@{one}" for one in (self.revision,) if one), self.config or ""]
        return re.sub(r"[^\w.@-]+", "--", "/".join(filter(None, parts)))

    def __str__(self) -> str:
        return (
            f"{PREFIX}{self.name}"
            + (f"@{self.revision}" if self.revision else "")
            + (f"/{self.config}" if self.config else "")
        )


def bring(text: str) -> str:
    """The folder of tar shards of `hf:NAME`, which are fetched if they are not there. UserError: there is no such data set, it
    is gated, has no images, or the disk is full."""
    name = HubName.read(text)
    folder = user_cache() / "hub" / name.folder
    if folder.is_dir():
        return str(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / "lock"):
            if not folder.is_dir():  # another process has brought it meanwhile
                write(load(name), name, folder)
    except OSError as error:
        raise UserError(
            f"{name} could not be written to {folder}: {error.strerror or error}; nothing is kept of it."
        ) from error
    return str(folder)


def load(name: HubName) -> dict[str, Any]:
    """Split → data set, of the `datasets` package."""
    try:
        from datasets import load_dataset  # a folder that is called datasets is a package too, of nothing
    except ImportError:
        raise UserError(f"{name} is read with the `datasets` package: pip install datasets.") from None
    try:
        found = load_dataset(name.name, name.config, revision=name.revision)
    except Exception as error:  # of a hub, a network, a file format or a script: whatever it is, there are no data
        raise UserError(f"{name} is not to be had: {why(error, name)}") from error
    return dict(found)


def why(error: Exception, name: HubName) -> str:
    said = " ".join(str(error).split())
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "gated" in said.lower() or "GatedRepoError" in kinds:
        return "it is gated: accept its terms on its page, and log in with `hf auth login`."
    if "DatasetNotFoundError" in kinds or "RepositoryNotFoundError" in kinds:
        return (
            "there is no such data set on the hub, or it is private: look at the name, or log in with `hf auth login`."
        )
    if "Config name is missing" in said or "BuilderConfig" in said:
        choices = re.search(r"\[.*?\]", said)
        return f"it has several configurations, {choices[0] if choices else said}: name one, as {PREFIX}{name.name}/CONFIG."
    if isinstance(error, ConnectionError) or "offline" in said.lower():
        return f"the hub cannot be reached ({said[:200].rstrip('.')})."
    return f"{said[:300].rstrip('.')}."


# ------------------------------------------------------------------------------------------------------------- writing


def write(splits: dict[str, Any], name: HubName, folder: Path) -> None:
    """All splits as tar files, under another name first: what is there is whole."""
    from tqdm import tqdm

    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    known = {split: SPLITS.get(split.lower()) for split in splits}
    if len(splits) == 1:
        known = {split: "data" if of is None else of for split, of in known.items()}  # its splits are drawn
    if left := [split for split, of in known.items() if of is None]:
        tqdm.write(f"{name}: the splits {', '.join(left)} are none of train, val and test, and are left out.")
    if not any(known.values()):
        raise UserError(f"{name} has the splits {', '.join(splits)}, of which none is train, validation or test.")
    try:
        temporary.mkdir()
        for split, of in known.items():
            if of is not None:
                total = splits[split].num_rows
                rows = tqdm(samples(splits[split], name), total=total, desc=f"{name} {split}", unit=" samples")
                write_shards(rows, temporary, of)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def samples(rows: Any, name: HubName) -> Iterator[list[tuple[str, bytes]]]:
    """The members of each sample: ending → bytes."""
    import datasets

    kinds = dict(rows.features)
    images = {key: kind for key, kind in kinds.items() if isinstance(inner(kind), datasets.Image)}
    if not images:
        raise UserError(f"{name} has the columns {', '.join(kinds)}, none of which holds images.")
    for key, kind in images.items():
        bare = datasets.Image(decode=False)
        rows = rows.cast_column(key, bare if isinstance(kind, datasets.Image) else type(kind)(bare))
    texts = {key: kind for key, kind in kinds.items() if key not in images and is_plain(inner(kind))}
    for row in rows:
        members = []
        for key in images:
            many = row[key] if isinstance(row[key], list) else [row[key]]
            for number, image in enumerate(image for image in many if image):
                content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
                column = re.sub(r"[^\w-]+", "_", key).lower() + (f".{number}" if number else "")
                members.append((f"{column}.{ending_of(content, image['path'])}", content))
        about = {key: named(row[key], kind) for key, kind in texts.items()}
        yield [
            *members,
            ("json", json.dumps(about, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")),
        ]


def inner(kind: Any) -> Any:
    """What a list is of."""
    return getattr(kind, "feature", kind)


def is_plain(kind: Any) -> bool:
    """Can JSON hold it? Numbers, texts, classes, and objects of those; no bytes, and no sounds."""
    import datasets

    plain = isinstance(kind, (datasets.Value, datasets.ClassLabel, dict))
    return plain and "binary" not in str(getattr(kind, "dtype", ""))


def named(value: Any, kind: Any) -> Any:
    """A class by its name."""
    is_class = hasattr(kind, "int2str") and isinstance(value, int) and value >= 0
    return kind.int2str(value) if is_class else value


def ending_of(content: bytes, path: str | None) -> str:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return ENDINGS.get(image.format, image.format.lower())
    except Exception:  # whoever reads it tells that it is broken
        return os.path.splitext(path or "")[1].lstrip(".").lower() or "jpg"


def write_shards(rows: Iterable[list[tuple[str, bytes]]], folder: Path, split: str) -> None:
    rows, number = iter(rows), 0
    for shard in itertools.count():
        if (first := next(rows, None)) is None:
            return
        size = 0
        with tarfile.open(folder / f"{split}-{shard:05d}.tar", "w", encoding="utf-8") as archive:
            for members in itertools.chain([first], rows):
                for ending, content in members:
                    about = tarfile.TarInfo(f"{number:09d}.{ending}")
                    about.size = len(content)
                    archive.addfile(about, io.BytesIO(content))
                    size += len(content)
                number += 1
                if size > MOST_BYTES or number % MOST_SAMPLES == 0:
                    break
