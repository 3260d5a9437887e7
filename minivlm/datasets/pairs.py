"""The interface of datasets for the compare pattern: images with captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


class Pairs:
    """One split of images with captions. A dataset sets these attributes, and defines the methods that raise here.

    split    "train", "val" or "test"
    classes  label names, the same list in every split, or None where the data have no labels
    labels   (n,) int64, an index into `classes`, −1 where unknown; or None
    notes    sentences that the user should read: what was skipped, which split stands in for a missing one
    """

    split: str
    classes: list[str] | None = None
    labels: np.ndarray | None = None
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def images(self, indices: Sequence[int]) -> list[np.ndarray]:
        """One (H, W, 3) uint8 RGB array for each index; sizes may differ."""
        raise NotImplementedError

    def all_captions(self, index: int) -> Sequence[str]:
        """Every caption known for one image."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """The image's name in messages: a file name, or "train/123"."""
        raise NotImplementedError

    def check_images(self) -> None:
        """UserError where an image cannot be decoded."""

    def captions(self, indices: Sequence[int], rng: np.random.Generator) -> list[str]:
        """One caption for each index; where several are known, `rng` picks."""
        choices = [self.all_captions(i) for i in indices]
        picks = rng.random(len(choices))  # one draw an image, however many captions it has
        return [known[int(pick * len(known))] for known, pick in zip(choices, picks, strict=True)]

    def false_caption(self, index: int, rng: np.random.Generator) -> str | None:
        """The first of `all_captions` with a single thing changed that makes it false; None where the data have none."""
        return None

    def texts(self) -> Iterator[str]:
        """Every caption of the split once, in order: what a tokeniser is trained on."""
        captions = (caption for i in range(len(self)) for caption in self.all_captions(i))
        yield from dict.fromkeys(captions)
