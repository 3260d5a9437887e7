"""Sizes and times of files, and of members of tar files, by which a change is noticed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from minivlm.datasets.tar_index import member, members_below
from minivlm.errors import UserError


def stamp(path: Path) -> tuple[int, int]:
    """Size and time (ns) of a file; of a member of a tar file, its size and the tar file's time. UserError: it is missing."""
    if (found := member(path)) is not None:
        return found[2:]
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    return status.st_size, status.st_mtime_ns


def stamp_all(root: Path, keys: Sequence[str]) -> np.ndarray:
    """(n, 2): `stamp` of each; a tar file is asked once."""
    below, stamps = cache(members_below), np.empty((len(keys), 2), dtype=np.int64)
    for i, key in enumerate(keys):
        tar, inside, name = key.partition(".tar/")
        known = below(root / f"{tar}.tar") if inside else {}
        stamps[i] = known[name] if name in known else stamp(root / key)
    return stamps
