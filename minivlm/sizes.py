"""Sizes of memory and files as people write them: "20GB" and 3.1 GB. A GB is 2³⁰ bytes here, as graphics cards count."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def bytes_in(text: str) -> int:
    """ "20GB" → 21474836480, "1.5 GB", "500MB", "off" → 0. ValueError for anything else."""
    if text.strip().lower() in ("off", "none", "false"):
        return 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?", text.strip().upper())
    if match is None:
        raise ValueError(f"{text!r}, which is no size: write it as 20GB or 500MB, or off")
    return int(float(match[1]) * 2 ** UNITS[match[2]])


def in_words(size: float) -> str:
    """3328599654 → "3.1 GB"; below half a GB: "12 MB", below one MB: "9.8 KB"."""
    if size >= 2**29:
        return f"{size / 2**30:.1f} GB"
    return f"{size / 2**20:.0f} MB" if size >= 2**20 else f"{size / 2**10:.1f} KB"


def free_bytes(folder: Path) -> int:
    """Of the disk on which the folder lies, or will."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
