"""The probability that a text describes an image, from a model in which one attends to the other.

    image ─ image_features ─→ features ┐
    text  ─ tokens ────────────────────┴─ match ─→ (2,) logits ─ softmax ─→ probability

Comparing vectors (`encode_image`, `encode_text`) is cheap and coarse: each is computed without the other. Matching runs
for every pair: so a search compares with all images and matches with the best few (Li et al. 2021 (ALBEF), §3.4; Li et
al. 2023 (BLIP-2), §4.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.image_preprocessing import Picture
from minivlm.layers.tower import ImageFeatures
from minivlm.processes import each
from minivlm.tasks.abilities import require
from minivlm.tasks.features import finite, inference, to_tokens

RERANK = 16  # how many of the closest images are matched


def match(image: Picture, text: str, model, processor) -> float:
    """The probability that the text describes the image. UserError: see `match_all`."""
    return match_all([image], [text], model, processor).item()


def match_all(
    images: Sequence[Any], texts: Sequence[str], model, processor, *, batch_size: int = 64, cut: bool = False
) -> Tensor:
    """(N, M): the probability that each of the M texts describes each of the N images. cut: texts beyond the context are.

    UserError: a model that does not match, an empty text or one beyond its context, an image that cannot be read.
    """
    check_texts(texts, model, processor)
    N, M = len(images), len(texts)
    tokens, mask = to_tokens(texts, processor, cut=cut)
    features = features_of_all(images, model, processor, batch_size=batch_size)
    pairs = torch.cartesian_prod(torch.arange(N), torch.arange(M)).view(-1, 2)
    return match_pairs(pairs, features, tokens, mask, model, batch_size=batch_size).sigmoid().view(N, M)


def match_each(images: Sequence[Any], texts: Sequence[str], model, processor, *, batch_size: int = 64) -> list[float]:
    """The probability that each text describes the image of the same index. UserError: see `match_all`."""
    check_texts(texts, model, processor)
    tokens, mask = to_tokens(texts, processor)
    distinct = list({id(image): image for image in images}.values())
    place = {id(image): i for i, image in enumerate(distinct)}
    features = features_of_all(distinct, model, processor, batch_size=batch_size)
    pairs = torch.tensor([(place[id(image)], i) for i, image in enumerate(images)])
    return match_pairs(pairs, features, tokens, mask, model, batch_size=batch_size).sigmoid().tolist()


def check_texts(texts: Sequence[str], model, processor) -> None:
    require(model, processor, "match")
    if not all(text.strip() for text in texts):
        raise UserError("a text to match is empty; say what may be in the image.")


def rerank(
    query: str, found: Sequence[tuple[Path, float]], model, processor, *, batch_size: int = 64
) -> list[tuple[Path, float, float]]:
    """What `search_images` found for a text, in the order of its match: (path, cosine, probability)."""
    if not isinstance(query, str):
        raise UserError("matching needs a text: search with a text, or without re-ranking.")
    probabilities = match_all([path for path, _ in found], [query], model, processor, batch_size=batch_size)[:, 0]
    best = probabilities.sort(descending=True, stable=True)
    return [(*found[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def features_of_all(images: Sequence[Any], model, processor, *, batch_size: int = 64) -> Tensor:
    """N images → (N, L, C), the features of each, computed once, however often it is matched."""

    def features(i: int) -> Tensor:
        pixels = processor.images(images[i : i + batch_size])
        return model.image_features(pixels.to(model.device, model.dtype))

    with inference(model):
        return torch.cat(each(features, range(0, len(images), batch_size))).to(model.device)


def match_pairs(
    pairs: Tensor, features: Tensor, tokens: Tensor, mask: Tensor, model, *, batch_size: int = 64
) -> Tensor:
    """The log-odds of (image, text) pairs (P, 2), indices into features (N, L, C) and into tokens, mask (M, T) → (P,).

    Texts of a length are matched together, so that there is hardly any padding.
    """
    lengths = mask.sum(dim=1)
    order = lengths[pairs[:, 1]].sort(stable=True).indices

    def odds_of(some: Tensor) -> Tensor:
        image, text = pairs[some].T
        T = int(lengths[text].max())
        inputs = (tokens[text, :T].to(model.device), mask[text, :T].to(model.device))
        logits = model.match(ImageFeatures(features[image.to(features.device)]), *inputs).float()  # (b, 2)
        return (logits[:, 1] - logits[:, 0]).cpu()

    odds = torch.empty(len(pairs))
    with inference(model):
        odds[order] = torch.cat(each(odds_of, order.split(batch_size)))
    return finite(odds, model)
