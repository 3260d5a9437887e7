"""An index of a folder: one unit vector for each image (or one for each query of a Q-Former, side by side), kept on disk
and brought up to date rather than made again (index_files.py)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minivlm.datasets.class_folders import Listing, list_folder, list_tar, passed_over
from minivlm.datasets.images import VERSION, extensions
from minivlm.datasets.tar_index import member
from minivlm.errors import UserError
from minivlm.files import locked
from minivlm.image_preprocessing import Picture
from minivlm.tasks.abilities import require_vectors
from minivlm.tasks.features import encode_images, encode_pixels, inference
from minivlm.tasks.index_files import (
    ImageIndex,
    IndexWriter,
    Stamp,
    disk_errors,
    open_if_valid,
    open_image_index,
)
from minivlm.tasks.read_ahead import batches_of, group_by, read_ahead


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
    require_vectors(model, processor)
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
    with inference(model), bar:
        for batch in read_ahead(read, batches_of(names, batch_size)):
            pixels = {name: image for name, image in batch.items() if not isinstance(image, UserError)}
            shapes = {name: image.shape for name, image in pixels.items()}
            writer.skip({name: str(error) for name, error in batch.items() if isinstance(error, UserError)})
            for names in group_by(shapes.get, list(pixels)):  # without a crop they differ in size
                try:
                    features = encode_pixels(torch.cat([pixels[name] for name in names]), model).flatten(1)
                except UserError as error:  # no size that the model can read
                    writer.skip({name: f"{writer.directory / name}: {error}" for name in names})
                else:
                    writer.add(names, features.cpu().numpy())  # (B, D), or (B, Q · D)
            bar.update(len(batch))


def list_images(directory: Path) -> dict[str, Stamp]:
    """Every image file below `directory`, sorted by name; hidden files and folders are left out."""
    return stamps(directory, list_files(directory))


def list_files(directory: Path) -> Listing:
    """All that is below `directory`. UserError where there are no images among it."""
    is_tar = directory.suffix.lower() == ".tar" and directory.is_file()
    if not directory.is_dir() and not is_tar:
        raise UserError(f"{directory} is not a folder; name the folder that holds the images.")
    found = list_tar(directory, Listing()) if is_tar else list_folder(directory, tars=True)
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
        if (inside := member(file)) is not None:
            stamped[name] = inside[2:]
            continue
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
