"""The modality gap: the vectors of images and those of texts fill two separate regions of the space that they share.

    images ─→ x (N, D) ─┐  distance of the centroids  ‖mean x − mean y‖
    texts  ─→ y (N, D) ─┘  mean-shift                 x ← (x − mean x) / ‖…‖,  y ← (y − mean y) / ‖…‖

Liang et al. 2022, "Mind the Gap: Understanding the Modality Gap in Multi-modal Contrastive Representation Learning": the two
cones are there at initialisation, and the contrastive loss at a low temperature keeps them apart. Rankings across the two
hardly mind; whatever compares a cosine with a threshold, or searches images and texts in one index, does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.datasets.folder import open_pairs
from minivlm.datasets.pairs import Pairs
from minivlm.evaluate.compare import distinct_captions, encode_split
from minivlm.evaluate.diagnose.clouds import clouds
from minivlm.evaluate.diagnose.pitfall import Pitfall
from minivlm.evaluate.expectation import some_of
from minivlm.metrics import Samples, Score
from minivlm.metrics.retrieval import rank_block, recall_at_k
from minivlm.tasks.features import encode_texts

MOST = 1000  # pairs
FOUND = 0.2  # of what sets the two of a pair apart: where the gap makes up more of it, it is found
DISTANCE, PAIRS, IMAGES = "distance of the centroids", "cosine of pairs", "cosine of two images"
SHARE = "of what sets a pair apart, the gap"
MIXED = "in one index, its text before other images"
SYMPTOM = (
    "images and texts may lie apart, each in a region of its own, so that a text is less like its image than two unrelated "
    "images are like each other."
)
REMEDY = (
    "mean-shift, tried here: the mean of each modality, estimated on {split}, is subtracted from its vectors, which are made "
    "unit length again. The temperature is no remedy at evaluation: it multiplies all cosines by one number, and no ranking "
    "changes. In training both it and the loss decide: a higher temperature, and the softmax in place of the sigmoid, leave a "
    "smaller gap (docs/pitfalls.md): python train.py clip --model.initial_temperature 0.5 --freeze loss."
)


class Vectors(NamedTuple):
    """Unit vectors of N images (N, Q, D), of one image several with a Q-Former, and of M texts (M, D); relevant: the texts
    of each image, the first of which is its pair. keys: of the images."""

    images: Tensor
    texts: Tensor
    relevant: list[list[int]]
    keys: tuple[str, ...]

    @property
    def paired(self) -> tuple[Tensor, Tensor]:
        """(N, D) each: images and their texts. Of several vectors of an image it is the one closest to the text."""
        y = self.texts[[known[0] for known in self.relevant]]
        best = torch.einsum("nqd,nd->nq", self.images, y).argmax(dim=1)
        return self.images[torch.arange(len(y)), best], y


@dataclass(frozen=True)
class Means:
    """(D,) each: what mean-shift subtracts."""

    image: Tensor
    text: Tensor

    @classmethod
    def of(cls, vectors: Vectors) -> Means:
        x, y = vectors.paired
        return cls(x.mean(dim=0), y.mean(dim=0))

    def shift(self, vectors: Vectors) -> Vectors:
        moved = (
            F.normalize(x - mean, dim=-1) for x, mean in ((vectors.images, self.image), (vectors.texts, self.text))
        )
        return Vectors(*moved, *vectors[2:])


def left_out(model, processor, data) -> str:
    if "encode" not in model.abilities:
        return f"this {type(model).__name__} has no vectors of texts beside those of images."
    if len(open_pairs(data, "test", image_size=processor.image_size)) < 2:
        return f"{data} has one image to judge by, but the distance of two clouds needs at least two of them."
    return ""


def diagnose(model, processor, data) -> Pitfall:
    test, val = (open_pairs(data, split, image_size=processor.image_size) for split in ("test", "val"))
    own = vectors_of(model, processor, test)
    other = vectors_of(model, processor, val)
    apart = len(other.keys) > 1 and set(own.keys).isdisjoint(other.keys)
    shifted = Means.of(other).shift(own) if apart else cross_fitted(own)
    before, after = figures(own), figures(shifted)
    return Pitfall(
        name="modality-gap",
        symptom=SYMPTOM,
        verdict=verdict(before),
        figures=before,
        remedy=REMEDY.format(split="the val split" if apart else "the other half of the same images"),
        effect={f"mean-shift: {name}": (before[name], after[name]) for name in before},
        image=clouds({"as they are": own.paired, "after mean-shift": shifted.paired}, data=str(data)),
    )


def vectors_of(model, processor, pairs: Pairs) -> Vectors:
    indices = [i for i in range(len(pairs)) if pairs.all_captions(i)]
    indices = [indices[i] for i in some_of(len(indices), MOST)]
    texts, relevant = distinct_captions(pairs, indices)
    images = encode_split(model, processor, pairs, indices).cpu().double()
    texts = encode_texts(texts, model, processor, cut=True).cpu().double()
    images = images[:, None] if images.ndim == 2 else images
    return Vectors(images, texts, relevant, tuple(map(pairs.key, indices)))


def cross_fitted(vectors: Vectors) -> Vectors:
    """Mean-shift where there are no other images: each half gets the means of the other half."""
    images, texts = vectors.images.clone(), vectors.texts.clone()
    halves = [range(start, len(vectors.keys), 2) for start in (0, 1)]
    for half, other in (halves, halves[::-1]):
        means = Means.of(Vectors(vectors.images[other], vectors.texts, [vectors.relevant[i] for i in other], ()))
        own_texts = sorted({text for i in half for text in vectors.relevant[i]})
        images[half] = F.normalize(vectors.images[half] - means.image, dim=-1)
        texts[own_texts] = F.normalize(vectors.texts[own_texts] - means.text, dim=-1)
    return Vectors(images, texts, *vectors[2:])


def figures(vectors: Vectors) -> dict[str, Score]:
    """How far apart the clouds are, and whether images and texts find each other all the same."""
    x, y = vectors.paired
    keys, n = vectors.keys, len(x)
    apart = (x - y).mean(dim=0)
    # Along the line between the centroids: the mean is their distance, and its bootstrap the distance's to first order.
    distances = ((x - y) @ F.normalize(apart, dim=0)).numpy()
    squares = (x - y).square().sum(dim=1).numpy()
    swapped = float(squares.sum() ** 0.5 / n)  # expected where each pair is swapped or not by a coin
    similar = torch.einsum("nqd,md->nqm", vectors.images, vectors.texts).amax(dim=1)  # (N, M)
    right = torch.zeros_like(similar, dtype=torch.bool)
    for row, known in zip(right, vectors.relevant, strict=True):
        row[known] = True
    others = (similar.masked_fill(right, 0).sum(dim=1) / (~right).sum(dim=1).clamp(min=1)).numpy()
    of_pairs = (x * y).sum(dim=1).numpy()
    images_alike = x @ x.T - torch.eye(n, dtype=x.dtype) * 2  # (N, N), not with itself
    best_image = images_alike.amax(dim=1)
    mixed = (similar.masked_fill(~right, -torch.inf).amax(dim=1) > best_image).numpy()
    alike = ((x @ x.sum(dim=0)) - 1) / (n - 1)  # mean cosine with the other images
    mean = lambda values: Samples(kind="mean", statistics=np.stack([values, np.ones(n)], axis=1), ids=keys)
    return {
        DISTANCE: Score.of(mean(distances), swapped, share=False),
        SHARE: Score.of(Samples("explained", np.stack([distances, np.ones(n), squares], axis=1), keys), 1 / n),
        PAIRS: Score.of(mean(of_pairs), float(others.mean()), share=False),
        IMAGES: Score.of(mean(alike.numpy()), None, share=False),
        MIXED: Score.of(mean(mixed), 1 / n),
        **recall(similar, right),
    }


def verdict(scores: dict[str, Score]) -> str:
    distance, share, pairs, images = (scores[name] for name in (DISTANCE, SHARE, PAIRS, IMAGES))
    found = "found" if share.interval[0] > FOUND else "not found"
    return (
        f"{found}: the centroids are {distance.value:.2f} apart, which is {share.value:.0%} of what sets the two of a pair "
        f"apart (the cosine of pairs is {pairs.value:.2f}, that of two images {images.value:.2f})."
    )


def recall(similar: Tensor, right: Tensor) -> dict[str, Score]:
    scores = {}
    for direction, scored, wanted in (("image→text", similar, right), ("text→image", similar.T, right.T)):
        ranks, _, counts = rank_block(scored.float().contiguous(), wanted.contiguous())
        chance = recall_at_k(ranks, counts, scored.shape[1], 1).chance
        scores[f"{direction} R@1"] = Score.of(Samples.mean(ranks == 1), chance)
    return scores
