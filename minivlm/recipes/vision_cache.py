"""The images of training samples or, where the vision tower is frozen, what it computed of each of them once.

Processes on one machine compute a share each, and read all from one file, which is mapped into the memory of each of them.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from minivlm.datasets.conversations import Conversations
from minivlm.errors import UserError
from minivlm.layers.tower import ImageFeatures
from minivlm.models.vision_features import measure
from minivlm.processes import from_first_here, meet, on_this_machine, several
from minivlm.processor import Processor
from minivlm.sizes import in_words
from minivlm.tasks.features import inference
from minivlm.training import autocast

LIMIT = 4 * 2**30  # bytes that one process holds in memory, and that are kept if nobody says otherwise
AT_A_TIME = 250  # images
MEASURED = 1000  # images that tell how large features are


@dataclass(frozen=True)
class Room:
    """What may be kept: limit, in bytes; the directory of a file for it (None: where temporary files go); who tells of it."""

    limit: int = LIMIT
    directory: Path | None = None
    say: Callable[[str], None] = lambda line: None


ROOM = Room()


class VisionCache:
    """indices of samples → {"images": …}, as batches want them.

    read: indices of samples → their images, in a row. single: each sample has one, so that their features can be kept.
    keep_pixels: where the tower learns, the pixels are kept, if they fit into memory.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Processor,
        n: int,
        read: Callable[[Sequence[int]], list],
        *,
        single: bool = True,
        keep_pixels: bool = False,
    ):
        self.model, self.processor, self.n, self.read = model, processor, n, read
        self.single, self.keep_pixels = single, keep_pixels
        self.features: ImageFeatures | None = None
        self.pixels: Tensor | None = None

    @classmethod
    def of_conversations(cls, model: nn.Module, processor: Processor, conversations: Conversations) -> VisionCache:
        flat = lambda indices: [image for images in conversations.images(indices) for image in images]
        return cls(model, processor, len(conversations), flat, single=conversations.one_image_each)

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor | ImageFeatures]:
        """Nothing for samples without images."""
        for kept in (self.features, self.pixels):
            if kept is not None:
                return {"images": kept[torch.tensor(indices)]}
        images = self.read(indices)
        return {"images": self.processor.images(list(images))} if len(images) else {}

    @property
    def frozen(self) -> bool:
        """Whether the tower computes the same of an image in every step."""
        return not any(p.requires_grad for p in self.model.vision.parameters())

    def prepare(self, device: torch.device, dtype: torch.dtype, room: Room = ROOM) -> None:
        """Standardise what the tower computes, where the model wants that; then compute or read what is to be kept."""
        self.measure(device, dtype)
        if self.single and self.frozen:
            self.compute(device, dtype, room)
        elif self.keep_pixels and 4 * 3 * self.n * self.processor.image_size**2 <= room.limit:
            self.pixels = self.processor.images(self.read(range(self.n)))

    def measure(self, device: torch.device, dtype: torch.dtype) -> None:
        """A new model measures the first images, of which it standardises the features."""
        standardise = getattr(self.model, "standardise", None)
        if standardise is None or standardise.measured:
            return
        first = list(islice((image for i in range(self.n) for image in self.read([i])), MEASURED))
        if first:
            with inference(self.model), autocast(device, dtype):
                measure(self.model, self.processor.images(first).to(device))

    def compute(self, device: torch.device, dtype: torch.dtype, room: Room) -> None:
        """(n, N, C) on the CPU, unless that is more than the room for it. Each process computes every so many-th batch."""
        from tqdm import tqdm

        if not room.limit:
            return
        with inference(self.model), autocast(device, dtype):
            shape = (self.n, *self.features_of([0], device)[0].shape)
            size = math.prod(shape) * dtype.itemsize
            what = f"the features of {self.n:,} images take {in_words(size)}"
            if size > room.limit:
                room.say(
                    f"{what}, more than --feature_cache {in_words(room.limit).replace(' ', '')} lets it keep: the vision "
                    "tower computes them anew in each step."
                )
                return
            in_memory = size <= LIMIT and not several()
            where = "memory" if in_memory else "one file, mapped into memory"
            room.say(f"{what}, and are kept in {where}: the frozen vision tower runs once an image.")
            kept = torch.empty(shape, dtype=dtype) if in_memory else shared_empty(shape, dtype, room, what)
            rank, world = on_this_machine()
            starts = range(0, self.n, AT_A_TIME)[rank::world]
            for i in tqdm(starts, desc="image features", unit=" batches", leave=False, disable=rank > 0):
                kept[i : i + AT_A_TIME] = self.features_of(range(i, min(i + AT_A_TIME, self.n)), device)
        meet()
        self.features = ImageFeatures(kept)

    def features_of(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """(b, N of all its views, C)"""
        images = self.processor.images(list(self.read(indices))).to(device)
        found = self.model.image_features(images)  # (b · views, N, C)
        return found.reshape(len(indices), -1, found.shape[-1])


def shared_empty(shape: Sequence[int], dtype: torch.dtype, room: Room, what: str) -> Tensor:
    """A tensor in a file that all processes of this machine map. The file has no name from then on: the system frees it when
    the last of them ends, however it ends. UserError for a full disk."""
    rank, _ = on_this_machine()
    directory = room.directory or Path(tempfile.gettempdir())
    path = directory / f".features.{from_first_here(time.time_ns())}.tmp"
    if rank == 0:
        make_room(path, math.prod(shape) * dtype.itemsize, what)
    meet()
    tensor = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(*shape)
    meet()
    if rank == 0:
        with suppress(PermissionError):  # Windows has no files without a name: the next run here sweeps it away
            path.unlink()
    return tensor


def make_room(path: Path, size: int, what: str) -> None:
    """A file of so many bytes, which the disk is sure to have: a mapped file that it has no room for ends the process."""
    free = shutil.disk_usage(path.parent).free
    try:
        if free < size:
            raise OSError(errno.ENOSPC, "")
        with path.open("wb") as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        why = f"has {in_words(free)} left" if error.errno == errno.ENOSPC else f"refuses them: {error.strerror}"
        raise UserError(
            f"{what}, and the disk of {path.parent} {why}. Free some, choose an --out on another disk, or let the tower "
            "compute them anew in each step: --feature_cache off."
        ) from None
