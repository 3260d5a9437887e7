"""Images that threads read and prepare while the model is busy with those before."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def read_ahead(read: Callable[[T], Any], items: Sequence[T], batch_size: int) -> Iterator[list[tuple[T, Any]]]:
    """Batches of (item, read(item)); threads read the next one while the caller is busy with this one (pillow frees Python's
    lock)."""
    reading: deque = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            reading.append((batch, pool.map(read, batch)))
            if len(reading) > 1:
                batch, results = reading.popleft()
                yield list(zip(batch, results, strict=True))
        for batch, results in reading:
            yield list(zip(batch, results, strict=True))


def group_by(key: Callable[[T], Hashable], items: Sequence[T]) -> list[list[T]]:
    """The items of equal keys together, in their order."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
