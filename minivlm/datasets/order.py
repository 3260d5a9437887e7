"""Chooses the samples of a step: each epoch in an order of its own, dealt out to processes, in batches of like length.

Everything is a function of (seed, step), so that runs resume and any number of processes share a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Draw = tuple[int, tuple[int, int, int]]  # a sample, and the seed of its random numbers


class Order:
    """count: how many samples there are now. length(index, rng): about how long the text of a sample is.

    bucket_steps: the samples of so many steps in a row are sorted by length and dealt out to these steps in an order drawn
    anew, so that each batch has samples of like length, and little padding. endless: samples are taken one after the other.
    """

    def __init__(
        self,
        count: Callable[[], int],
        length: Callable[[int, np.random.Generator], int],
        *,
        batch_size: int,
        seed: int = 0,
        bucket_steps: int = 1,
        endless: bool = False,
    ):
        self.count, self.length, self.endless = count, length, endless
        self.batch_size, self.seed, self.bucket_steps = batch_size, seed, bucket_steps
        self.window: tuple[int, list[list[Draw]]] = (-1, [])  # the last one that was sorted
        self.epoch: tuple[tuple[int, int], np.ndarray] = ((-1, 0), np.zeros(0, dtype=np.int64))  # the last one's order

    def indices(self, step: int) -> np.ndarray:
        """The samples of a step before any are sorted by length."""
        B, n = self.batch_size, self.count()
        if self.endless:
            return np.arange(B) + B * step + self.seed * 10**7
        epoch, position = divmod(step, n // B)
        known, order = self.epoch  # taken at once, as the window is
        if known != (epoch, n):
            order = np.random.default_rng((self.seed, epoch)).permutation(n)
            self.epoch = (epoch, n), order
        return order[position * B : (position + 1) * B]

    def share(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, np.random.Generator]]:
        """The samples of process `rank` of `world`, each with its own random numbers."""
        drawn = self.drawn(step) if self.bucket_steps == 1 else self.bucketed(step)
        return [(index, np.random.default_rng(key)) for index, key in drawn[rank::world]]

    def drawn(self, step: int) -> list[Draw]:
        return [(index, (self.seed, step, i)) for i, index in enumerate(self.indices(step).tolist())]

    def bucketed(self, step: int) -> list[Draw]:
        steps, B = self.bucket_steps, self.batch_size
        window, position = divmod(step, steps)
        number, batches = self.window  # taken at once: another thread may be making the next batch
        if number != window:
            drawn = [one for s in range(steps) for one in self.drawn(window * steps + s)]
            lengths = [self.length(index, np.random.default_rng(key)) for index, key in drawn]
            by_length = [drawn[i] for i in np.argsort(lengths, kind="stable")]
            turns = np.random.default_rng((self.seed, window)).permutation(steps)
            batches = [by_length[turn * B : (turn + 1) * B] for turn in turns]
            self.window = window, batches
        return batches[position]
