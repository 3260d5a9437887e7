"""An index of a folder: one unit vector for each image (or one for each query of a Q-Former, side by side), kept on disk
and brought up to date rather than made again.

    index/index.json       {"model": fingerprint, "features": "features-1.npy", "rows": [[name, bytes, modified], …]}
    index/features-1.npy  (n, D) float32; row i belongs to rows[i]

Rows are appended, and index.json is replaced whenever some are safe on disk: what it lists is there, whenever the
build is killed. Each build begins a new features file with the rows that still hold, so that images that vanished
leave no holes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minivlm.atomic_writing import write_atomically
from minivlm.datasets.class_folders import Listing, list_folder, passed_over
from minivlm.datasets.images import VERSION, extensions
from minivlm.errors import UserError
from minivlm.files import is_own_file, locked, parse_json, read_bytes
from minivlm.image_preprocessing import Picture
from minivlm.tasks.abilities import require
from minivlm.tasks.features import encode_images, encode_pixels, inference

Stamp = tuple[int, int]  # a file's size in bytes and time of change in ns: where both are the same, so is the file
HEADER = 128  # bytes before the first row of our .npy files


@dataclass(frozen=True)
class ImageIndex:
    """What `build_image_index` leaves behind, opened for reading."""

    path: Path  # where the index lies
    directory: Path  # the folder it describes
    model: str  # fingerprint of the model that made it
    features: np.ndarray  # (n, D) or (n, Q · D) float32, memory-mapped
    rows: dict[str, Stamp]  # name below the directory → stamp, in the order of the rows
    skipped: dict[str, tuple[Stamp, str]]  # name → stamp, and why it cannot be read
    file: str | None = None  # the features' file

    def __len__(self) -> int:
        return len(self.rows)


def build_image_index(
    images: str | Path | Sequence[Picture],
    model,
    processor,
    *,
    path: str | Path | None = None,
    batch_size: int = 64,
    save_every: float = 10.0,
    progress: bool = True,
) -> ImageIndex | Tensor:
    """The index of every image below a folder, kept on disk; or of a list of images, a tensor (N, D) in memory.

    A folder's index is made, completed or brought up to date, behind a progress bar. path: a folder of its own for the
    index; None: one in the user's cache (`index_path` gives one in a model's folder). Only new and changed images are
    encoded, those that vanished are dropped, and an index of another model or folder is replaced. Killed at any moment it
    loses the last `save_every` seconds; interrupted with Ctrl-C, nothing. Images that cannot be read are in `.skipped`,
    with the reason. UserError: no folder, no images, none readable; of a list, any that cannot be read.
    """
    require(model, processor, "encode")
    if not isinstance(images, (str, os.PathLike)):
        return index_of_list(images, model, processor, path, batch_size)
    directory = Path(images)
    files = list_images(directory)
    made_by = fingerprint(model, processor)
    path = cached_path(directory, made_by) if path is None else Path(path)
    index = usable(path, directory, made_by)
    if not up_to_date(index, files):
        with disk_errors(path), alone(path):
            index = usable(path, directory, made_by)  # what another process has done meanwhile
            if not up_to_date(index, files):
                update(index, files, model, processor, batch_size, save_every, progress)
    index = open_image_index(path)
    if not index.rows:
        name, (_, why) = next(iter(index.skipped.items()))
        raise UserError(f"no image in {directory} can be read ({len(files)} tried); the first is {name}: {why}")
    return index


def index_of_list(images: Sequence[Picture], model, processor, path: object, batch_size: int) -> Tensor:
    if path is not None:
        raise UserError("only the index of a folder is kept on disk; the index of a list is returned: leave out path.")
    if not len(images):
        raise UserError("the list of images is empty; name at least one.")
    return encode_images(images, model, processor, batch_size=batch_size)


def usable(path: Path, directory: Path, made_by: str) -> ImageIndex:
    """What lies in `path`, if this model made it of this folder; otherwise an index of nothing, to begin with."""
    found = open_if_valid(path)
    if found is None or found.model != made_by or found.directory != directory.resolve():
        return ImageIndex(
            path, directory.resolve(), made_by, np.empty((0, 0), np.float32), {}, {}, found and found.file
        )
    return found


def up_to_date(index: ImageIndex, files: dict[str, Stamp]) -> bool:
    return files == index.rows | {name: stamp for name, (stamp, _) in index.skipped.items()}


def update(
    old: ImageIndex, files: dict[str, Stamp], model, processor, batch_size: int, save_every: float, progress: bool
) -> None:
    kept = {name: row for row, (name, stamp) in enumerate(old.rows.items()) if files.get(name) == stamp}
    skipped = {name: entry for name, entry in old.skipped.items() if files.get(name) == entry[0]}
    new = [name for name in files if name not in kept and name not in skipped]
    with IndexWriter(old, kept, skipped, files, save_every) as writer:
        encode_files(new, writer, model, processor, batch_size=batch_size, progress=progress)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time writes there. An index.json that is none of ours is put aside rather than written over."""
    path.mkdir(parents=True, exist_ok=True)
    with locked(path / "lock"):
        if open_if_valid(path) is None and os.path.lexists(path / "index.json"):
            os.replace(path / "index.json", path / "index.json.unreadable")
        yield


def encode_files(names: list[str], writer: IndexWriter, model, processor, *, batch_size: int, progress: bool) -> None:
    """Every named file through the image tower into the index."""
    from tqdm import tqdm

    def read(name: str) -> Tensor | UserError:
        try:
            return processor.images([writer.directory / name])
        except UserError as error:
            return error

    total = len(writer.stamps)
    bar = tqdm(total=total, initial=total - len(names), desc="indexing", unit=" img", disable=not progress)
    with inference(model), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar:
        for batch in read_ahead(pool, read, names, batch_size):
            pixels = {name: image for name, image in batch if not isinstance(image, UserError)}
            writer.skip({name: str(error) for name, error in batch if isinstance(error, UserError)})
            for names in by_shape(pixels):
                try:
                    features = encode_pixels(torch.cat([pixels[name] for name in names]), model).flatten(1)
                except UserError as error:  # no size that the model can read
                    writer.skip({name: f"{writer.directory / name}: {error}" for name in names})
                else:
                    writer.add(names, features.cpu().numpy())  # (B, D), or (B, Q · D)
            bar.update(len(batch))


def by_shape(pixels: dict[str, Tensor]) -> list[list[str]]:
    """The names of images that can be one batch: without a crop, they differ in size."""
    groups: dict[tuple, list[str]] = {}
    for name, image in pixels.items():
        groups.setdefault(image.shape, []).append(name)
    return list(groups.values())


def read_ahead(pool: ThreadPoolExecutor, read: Callable, names: list[str], batch_size: int) -> Iterator[list[tuple]]:
    """Batches of (name, read(name)); threads read the next one while the caller is busy with this one."""
    reading = deque()
    for start in range(0, len(names), batch_size):
        batch = names[start : start + batch_size]
        reading.append((batch, pool.map(read, batch)))
        if len(reading) > 1:
            batch, results = reading.popleft()
            yield list(zip(batch, results, strict=True))
    for batch, results in reading:
        yield list(zip(batch, results, strict=True))


class IndexWriter:
    """Writes a new features file, row by row; `commit` makes what was added so far the index, in one step."""

    def __init__(
        self, old: ImageIndex, kept: dict[str, int], skipped: dict, stamps: dict[str, Stamp], save_every: float
    ):
        self.old, self.kept, self.skipped, self.stamps, self.save_every = old, kept, skipped, stamps, save_every
        self.path, self.directory = old.path, old.directory
        self.names: list[str] = []
        self.width = old.features.shape[1]
        self.file_name = f"features-{time.time_ns():x}-{os.getpid()}.npy"

    def __enter__(self) -> IndexWriter:
        with disk_errors(self.path):
            self.file = open(self.path / self.file_name, "xb", buffering=0)
        try:
            self.start()
        except BaseException:  # the old index still stands; leave nothing beside it
            self.file.close()
            (self.path / self.file_name).unlink()
            raise
        if self.old.file:
            with suppress(PermissionError):  # Windows keeps a file that is mapped; it stays as a leftover
                (self.path / self.old.file).unlink(missing_ok=True)
        return self

    def start(self) -> None:
        """The header and the rows that still hold."""
        names, rows = list(self.kept), list(self.kept.values())
        with disk_errors(self.path):
            write_all(self.file, npy_header(0, 0))
        for start in range(0, len(rows), 65_536):
            some = slice(start, start + 65_536)
            self.write(names[some], self.old.features[rows[some]])
        self.commit()

    def __exit__(self, *exception) -> None:
        """Also after Ctrl-C and errors: what was encoded is kept."""
        try:
            self.commit()
        finally:
            self.file.close()

    def add(self, names: Iterable[str], features: np.ndarray) -> None:
        """features (B, D), a row for each name; safe on disk at the next commit, within `save_every` seconds."""
        self.write(names, features)
        if time.monotonic() - self.saved >= self.save_every:
            self.commit()

    def write(self, names: Iterable[str], features: np.ndarray) -> None:
        with disk_errors(self.path):
            write_all(self.file, np.ascontiguousarray(features, dtype="<f4").tobytes())
        self.names += names
        self.width = features.shape[1]

    def skip(self, reasons: dict[str, str]) -> None:
        self.skipped |= {name: (self.stamps[name], why) for name, why in reasons.items()}

    def commit(self) -> None:
        record = {
            "directory": str(self.directory),
            "model": self.old.model,
            "features": self.file_name,
            "width": self.width,
            "rows": [[name, *self.stamps[name]] for name in self.names],
            "skipped": [[name, *stamp, why] for name, (stamp, why) in self.skipped.items()],
        }
        with disk_errors(self.path):
            self.file.seek(0)
            write_all(self.file, npy_header(len(self.names), self.width))
            self.file.seek(0, os.SEEK_END)
            os.fsync(self.file.fileno())
        write_atomically(self.path / "index.json", lambda path: path.write_text(json.dumps(record), encoding="utf-8"))
        self.saved = time.monotonic()


def write_all(file: FileIO, data: bytes) -> None:
    """An unbuffered file may take less than it is given, and has nothing left to fail on when it is closed."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def npy_header(rows: int, width: int) -> bytes:
    """A .npy header of fixed length, so that it can be rewritten as rows arrive. numpy.lib.format, version 1.0."""
    shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + shape.ljust(HEADER - 11).encode() + b"\n"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the index in {path} could not be written ({error.strerror or error}); what was saved before is kept. "
            "Free some space there, or name another place for it."
        ) from error


def open_image_index(path: str | Path) -> ImageIndex:
    """The index that lies in `path`. UserError if there is none, or its files do not fit together."""
    index = open_if_valid(Path(path))
    if index is None:
        raise UserError(f"{path} holds no image index that can be read; make one with build_image_index.")
    return index


def open_if_valid(path: Path) -> ImageIndex | None:
    """None where there is none, or one that is cut short or not of our making: its content cannot be relied on."""
    try:
        record = parse_json(read_bytes(path / "index.json"), texts=False)
        rows = {inside(name): (whole(size), whole(modified)) for name, size, modified in record["rows"]}
        skipped = {
            inside(name): ((whole(size), whole(modified)), as_text(why))
            for name, size, modified, why in record["skipped"]
        }
        shape, file = (len(rows), whole(record["width"])), as_text(record["features"])
        place = path / file
        ours = re.fullmatch(r"features-[0-9a-f]+-\d+\.npy", file) and is_own_file(place)
        if not ours or len(rows) != len(record["rows"]) or shape[1] < bool(rows):
            return None
        features = np.memmap(place, "<f4", "r", HEADER, shape) if rows else np.empty(shape, np.float32)
        directory, model = Path(as_text(record["directory"])), as_text(record["model"])
    except (UserError, OSError, ValueError, LookupError, TypeError, OverflowError):
        return None
    return ImageIndex(path, directory, model, features, rows, skipped, file)


def whole(value: object) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        raise ValueError(f"{value!r} is no size or time")
    return value


def as_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def inside(name: object) -> str:
    """The name of an image below the folder."""
    parts = as_text(name).split("/")
    if not all(parts) or ".." in parts or "\0" in name:
        raise ValueError(f"{name!r} leads out of the folder")
    return name


def list_images(directory: Path) -> dict[str, Stamp]:
    """Every image file below `directory`, sorted by name; hidden files and folders are left out."""
    return stamps(directory, list_files(directory))


def list_files(directory: Path) -> Listing:
    """All that is below `directory`. UserError where there are no images among it."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder; name the folder that holds the images.")
    found = list_folder(directory)
    if not found.images and not found.irregular:
        others = passed_over([found])
        raise UserError(
            f"{directory} holds no images ({', '.join(sorted(extensions()))}), nor do its sub-folders"
            + (f": {others}" if others else ".")
        )
    return found


def stamps(directory: Path, found: Listing) -> dict[str, Stamp]:
    stamped = {}
    for name in sorted(found.images + found.irregular):
        file = directory / name
        status = file.stat() if file.exists() else file.lstat()  # a link that leads nowhere is skipped later
        stamped[name] = (status.st_size, status.st_mtime_ns)
    return stamped


def fingerprint(model, processor) -> str:
    """A hash of the architecture, the preprocessing and some weights of every tensor, to tell models apart.

    The weights are rounded to bfloat16 first: one checkpoint has one fingerprint at any precision and on any device.
    """
    digest = hashlib.sha256(f"{VERSION} {model.config!r} {processor.config!r}".encode())
    for name, tensor in model.state_dict().items():
        some = tensor.flatten()[:16].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(tensor.shape)} {some.tolist()}".encode())
    return digest.hexdigest()


def index_path(directory: str | Path, model_directory: str | Path) -> Path:
    """Where the index of the images in `directory` belongs within a model's directory."""
    return Path(model_directory) / "index" / short_hash(str(Path(directory).resolve()))


def cached_path(directory: Path, made_by: str) -> Path:
    """Where it belongs if the model has no directory to write to: the user's cache folder, one place a model."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "minivlm" / "index" / short_hash(f"{directory.resolve()} {made_by}")


def short_hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
