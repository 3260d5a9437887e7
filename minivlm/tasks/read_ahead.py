"""Images that threads read and prepare while the model is busy with those before."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T", bound=Hashable)


def read_ahead(read: Callable[[T], Any], batches: Iterable[Iterable[T]]) -> Iterator[dict[T, Any]]:
    """{item: read(item)} for each batch, an item that it has twice once; threads read the next batch while the caller is busy
    with this one (pillow frees Python's lock)."""
    reading: deque = deque()
    take = lambda items, results: dict(zip(items, results, strict=True))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for batch in batches:
            items = list(dict.fromkeys(batch))
            reading.append((items, pool.map(read, items)))
            if len(reading) > 1:
                yield take(*reading.popleft())
        while reading:
            yield take(*reading.popleft())


def batches_of(items: Sequence[T], batch_size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + batch_size] for start in range(0, len(items), batch_size))


def group_by(key: Callable[[T], Hashable], items: Sequence[T]) -> list[list[T]]:
    """The items of equal keys together, in their order."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
