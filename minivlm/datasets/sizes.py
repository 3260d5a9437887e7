"""Sizes in bytes: as options give them, as sentences tell them, and what a disk has left."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from minivlm.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def most_bytes(cache: str | None) -> int | None:
    """--data.cache → bytes: "20GB", "500 MB", "off"; None: it is not given. UserError: it is no size."""
    if cache is None:
        return None
    text = str(cache).strip().upper()
    if text in ("OFF", "NONE", "0", "FALSE"):
        return 0
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?", text)):
        raise UserError(
            f"--data.cache {cache} is no size: give the most that decoded images may take, as 20GB, or off."
        )
    return int(float(match[1]) * UNITS[match[2]])


def in_bytes(size: int) -> str:
    """ "25.1 GB" """
    unit = next((unit for unit in "TGM" if size >= UNITS[unit]), "K")
    return f"{size / UNITS[unit]:.1f} {unit}B"


def free_bytes(folder: Path) -> int:
    """Of the disk on which the folder lies, or will."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
