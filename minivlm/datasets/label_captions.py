"""Labels as captions: a labelled training image stands beside "a photo of a LABEL" for a share of the time.

Labels beside captions are otherwise used to judge alone: a CLIP is asked to find a class that no caption may ever have
named. With these sentences it learns the names, as Radford et al. 2021, §3.1.4, ask for them in a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minivlm.datasets.folder_files import TEMPLATES
from minivlm.datasets.pairs import Pairs
from minivlm.errors import UserError


class LabelCaptions(Pairs):
    """`pairs`, of which each labelled image has a sentence of its class in place of a caption for this share of the time.

    The labels are those of the images in `pairs`, so that the training split knows nothing of what it is judged by.
    UserError where no image has a label, and for a share that is none.
    """

    def __init__(self, pairs: Pairs, share: float, directory: Any):
        if not 0 <= share <= 1:
            raise UserError(f"--data.label_captions is {share}, but a share is between 0 and 1.")
        labelled = 0 if pairs.labels is None else int((pairs.labels >= 0).sum())
        if not labelled:
            raise UserError(
                f"--data.label_captions {share}: no training image in {directory} has a label to make a sentence of; "
                "leave it out, or name the classes of the images."
            )
        self.pairs, self.share = pairs, share
        self.split, self.classes, self.labels = pairs.split, pairs.classes, pairs.labels
        told = f"{labelled} of the {len(pairs)} training images have a label, which is their caption {share:.0%} of the time"
        self.notes = [*pairs.notes, f'{told}: "{TEMPLATES[0].format("…")}"']

    def __len__(self) -> int:
        return len(self.pairs)

    def images(self, indices: Sequence[int]) -> list[np.ndarray]:
        return self.pairs.images(indices)

    def key(self, index: int) -> str:
        return self.pairs.key(index)

    def sentences(self, index: int) -> list[str]:
        """What says the class of an image, in several ways; nothing where it is unknown."""
        label = int(self.labels[index])
        return [] if label < 0 else [template.format(self.classes[label].replace("_", " ")) for template in TEMPLATES]

    def all_captions(self, index: int) -> Sequence[str]:
        return [*self.pairs.all_captions(index), *self.sentences(index)]

    def captions(self, indices: Sequence[int], rng: np.random.Generator) -> list[str]:
        own = self.pairs.captions(indices, rng)
        instead, which = rng.random(len(own)) < self.share, rng.random(len(own))
        sentences = [self.sentences(index) if change else [] for index, change in zip(indices, instead, strict=True)]
        return [
            some[int(pick * len(some))] if some else caption
            for caption, some, pick in zip(own, sentences, which, strict=True)
        ]

    def texts(self) -> Iterator[str]:
        for_labels = (text for i in range(len(self)) for text in self.sentences(i))
        yield from dict.fromkeys([*self.pairs.texts(), *for_labels])
