"""Workers that decode images side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def workers() -> ThreadPoolExecutor:
    """Threads that decode side by side: pillow frees Python's lock, and processes would have to hand over the pixels."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decoding")


def in_parallel(function: Callable, arguments: Sequence, title: str) -> Iterator:
    """function(argument) for each, in order, on all cores. Shows a progress bar."""
    from tqdm import tqdm

    with tqdm(total=len(arguments), desc=title) as bar:
        for start in range(0, len(arguments), 256):  # a few at a time: bounded memory, and Ctrl-C takes effect soon
            for result in workers().map(function, arguments[start : start + 256]):
                yield result
                bar.update()
