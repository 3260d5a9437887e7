"""Which of two outputs stands on the left, and what a sheet and its ratings have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

WORDS = {"left", "right", "tie"}  # what a rater says of two outputs
LOWEST, HIGHEST = 1, 5  # of one


@dataclass(frozen=True)
class SheetRecord:
    """What the ratings of a sheet carry with them, by which they are told from those of another.

    systems: one, which is rated from 1 to 5, or two, which are compared. ids: of the samples in the order that they are shown.
    same: ids of samples for which both systems generated the same text; nobody is asked about them, and they are ties.
    fingerprint: of the texts and images.
    """

    systems: tuple[str, ...]
    seed: int
    ids: tuple[str, ...]
    same: tuple[str, ...]
    fingerprint: str

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def compared(self) -> bool:
        return len(self.systems) == 2


def swapped(ids: Sequence[str], seed: int) -> set[str]:
    """The samples for which the second system stands on the left: a random half of them, which follows from ids and seed alone.
    The sheet need not hold it, therefore."""
    order = sorted(ids, key=lambda name: digest(seed, name))
    return set(order[: len(order) // 2 + (len(order) % 2 and seed % 2)])


def digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, ensure_ascii=True).encode()).hexdigest()
