"""Identical images on both sides of a split: what is judged by has been trained on, though under another name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from minivlm.datasets.stamps import stamp_all
from minivlm.datasets.tar_index import open_anywhere
from minivlm.errors import UserError
from minivlm.files import readable

MOST = 4000  # files that are read before training; `datasets.check` reads all that have to be


def shared_images(
    directory: str | os.PathLike, splits: Mapping[str, Collection[str]], *, most: int | None = MOST
) -> list[str]:
    """A sentence for each held-out split that has images of the training split, byte by byte, with the first pair.

    splits: "train", "val", "test" → paths of images. Only files of one size are read, and no more of them than `most`.
    """
    told = []
    root, train = Path(directory), list(dict.fromkeys(splits.get("train", ())))
    for split in ("val", "test"):
        held_out = list(dict.fromkeys(splits.get(split, ())))
        try:
            pairs = same_pairs(root, train, held_out, most)
        except (UserError, OSError):
            continue  # a file that is missing, which whoever reads it reports
        if pairs:
            one, other = map(readable, pairs[0])
            count = f"{len(pairs)} of the {len(held_out)} {split} images"
            told.append(f"{count} are training images as well, byte by byte: {other} is {one}, for example.")
    return told


def same_pairs(root: Path, train: list[str], held_out: list[str], most: int | None) -> list[tuple[str, str]]:
    """(training image, held-out image) of the same bytes, one pair for each held-out image."""
    if not train or not held_out:
        return []
    sizes = [stamp_all(root, names)[:, 0] for names in (train, held_out)]
    common = np.intersect1d(*sizes)
    alike = [
        [names[i] for i in np.flatnonzero(np.isin(of, common))]
        for names, of in zip((train, held_out), sizes, strict=True)
    ]
    known: dict[bytes, str] = {}
    half = None if most is None else most // 2
    for name, digest in digests(root, alike[0][:half]):
        known.setdefault(digest, name)
    return [(known[digest], name) for name, digest in digests(root, alike[1][:half]) if digest in known]


def digests(root: Path, names: Iterable[str]) -> Iterable[tuple[str, bytes]]:
    for name in names:
        with open_anywhere(root / name) as file:
            yield name, hashlib.blake2b(file.read(), digest_size=16).digest()
