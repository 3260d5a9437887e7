"""Classification without training: the classes are sentences, and an image is of the class whose sentence is closest.

    labels ──template──> "a photo of a dog." ──encode_text──> class features (C, D) ┐
                                        images ──encode_image──> (N, D)             ┴──> softmax(scale · cos) → (N, C)

Radford et al. 2021, §3.1.2 and §3.1.4: prompts, and the mean over several of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from minivlm.errors import UserError
from minivlm.files import read_text
from minivlm.image_preprocessing import Picture, as_list
from minivlm.tasks.abilities import require
from minivlm.tasks.features import encode_images, encode_texts
from minivlm.tasks.templates import PLAIN, check, fill


def zero_shot_classify(
    images: Picture | Sequence[Picture],
    labels: Sequence[str],
    model,
    processor,
    *,
    templates: Sequence[str] = PLAIN,
    top_k: int = 5,
) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
    """The `top_k` likeliest of `labels` for an image, as (label, probability), likeliest first.

    images: one image (a PIL image, a path or an (H, W, 3) uint8 array), or a list of images, which gives a list of such
    lists. Probabilities are a softmax over the labels; of a model trained with the sigmoid loss each stands for itself,
    and they need not add up to one. UserError: fewer than two labels, an empty or repeated one, a template without a
    place for it, an image that cannot be read.
    """
    if top_k < 1:
        raise UserError(f"top_k is {top_k}, but at least one label has to be shown.")
    if not len(several := as_list(images)):
        return []
    require(model, processor, "encode")
    classes = class_features(labels, model, processor, templates)
    features = encode_images(several, model, processor)
    answers = likeliest_labels(features, classes, labels, model, top_k)
    return answers if several is images else answers[0]


def read_labels(words: Sequence[str]) -> list[str]:
    """The labels themselves, or the lines of the one .txt file that they name."""
    if len(words) == 1 and words[0].lower().endswith(".txt"):
        return [line.strip() for line in read_text(words[0]).splitlines() if line.strip()]
    return list(words)


def likeliest_labels(
    features: Tensor, classes: Tensor, labels: Sequence[str], model, top_k: int
) -> list[list[tuple[str, float]]]:
    """features (N, D) of images, classes (C, D) → the `top_k` likeliest labels of each, as (label, probability)."""
    probabilities = model.probabilities(features, classes).detach()  # (N, C)
    best = probabilities.cpu().sort(dim=1, descending=True, stable=True)
    return [
        [(labels[c], p) for c, p in zip(order[:top_k], values[:top_k], strict=True)]
        for order, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def class_features(labels: Sequence[str], model, processor, templates: Sequence[str] = PLAIN) -> Tensor:
    """(C, D) float32, unit length: each label in every template, encoded, averaged, and made unit length again."""
    check_labels(labels)
    templates = [templates] if isinstance(templates, str) else templates
    total = sum(
        encode_texts([fill(template, label) for label in labels], model, processor) for template in check(templates)
    )
    return F.normalize(total, dim=1)


def check_labels(labels: Sequence[str]) -> None:
    if isinstance(labels, str) or len(labels) < 2:
        raise UserError(f"zero-shot classification needs at least two labels to choose from, but was given {labels!r}.")
    for i, label in enumerate(labels):
        if not label.strip():
            raise UserError(f"label {i + 1} of {len(labels)} is empty; leave it out or give it a name.")
        if label in labels[:i]:
            raise UserError(f"the label {label!r} is given twice; each may occur once.")
