"""Scores of the compare pattern: retrieval (does an image find its caption, a caption its image?) and zero-shot
classification (does an image find its class?), every number beside its chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minivlm.datasets.folder import TEMPLATES, open_pairs
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes import ShapesWorld
from minivlm.datasets.shapes.text import parse
from minivlm.evaluate.expectation import some_of
from minivlm.metrics import Score, zero_shot_accuracy
from minivlm.metrics import retrieval as retrieval_scores
from minivlm.pictures import Row, sheet
from minivlm.processes import each
from minivlm.tasks.features import encode_images, encode_texts
from minivlm.tasks.zero_shot import PLAIN, class_features

AT_A_TIME = (
    64  # images in memory, which `encode_images` takes at once: so few that processes find enough parts to share
)


def contrast(model, processor, directory: str | Path) -> dict[str, Score]:
    """All scores of a CLIP on the held-out part of a dataset, by name, in the order of the table."""
    test = open_pairs(directory, "test", image_size=processor.image_size)
    if not isinstance(test, ShapesWorld):
        images = encode_split(model, processor, test, range(len(test)))
        classes = zero_shot(model, processor, test, TEMPLATES, images) if test.classes else {}
        return classes | retrieval(model, processor, test, images=images)
    scores = {}
    for split, name in (("single_seen", "seen pairs"), ("single_unseen", "never-seen pairs")):
        top = zero_shot(model, processor, ShapesWorld(directory, split), PLAIN)
        scores[f"zero-shot, {name}"] = top["zero-shot, mean per class"]
    return scores | retrieval(model, processor, test)


def retrieval(
    model, processor, pairs: Pairs, *, most: int | None = None, images: Tensor | None = None
) -> dict[str, Score]:
    """Both directions between a split's images, or `most` of them, and their distinct captions. images: of `encode_split`."""
    indices = some_of(len(pairs), most or len(pairs))
    texts, relevant = distinct_captions(pairs, indices)
    features = encode_split(model, processor, pairs, indices) if images is None else images
    return retrieval_scores(features, encode_texts(texts, model, processor, cut=True), relevant=relevant)


def distinct_captions(pairs: Pairs, indices: Sequence[int]) -> tuple[list[str], list[list[int]]]:
    """The captions of these images, each once, and which of them are right for each image: one may be for several."""
    captions = [pairs.all_captions(i) for i in indices]
    number = {text: j for j, text in enumerate(dict.fromkeys(text for known in captions for text in known))}
    return list(number), [[number[text] for text in known] for known in captions]


def zero_shot(
    model, processor, pairs: Pairs, templates: Sequence[str], images: Tensor | None = None
) -> dict[str, Score]:
    """Does each labelled image of a split find its class among all classes? images: the features of the whole split."""
    labelled = np.flatnonzero(pairs.labels >= 0)
    classes = class_features([name.replace("_", " ") for name in pairs.classes], model, processor, templates)
    features = encode_split(model, processor, pairs, range(len(pairs))) if images is None else images
    images = features[torch.from_numpy(labelled).to(classes.device)]
    scores = zero_shot_accuracy(images, classes, torch.from_numpy(pairs.labels[labelled]))
    return {f"zero-shot, {name}": score for name, score in scores.items()}


def encode_split(model, processor, pairs: Pairs, indices: Sequence[int]) -> Tensor:
    """(N, D): the features of these images of a split, decoded a few at a time."""
    parts = [np.asarray(indices[i : i + AT_A_TIME]) for i in range(0, len(indices), AT_A_TIME)]
    features = each(lambda part: encode_images(list(pairs.images(part)), model, processor), parts)
    return torch.cat(features).to(model.device)


def retrieval_sheet(model, processor, directory: str | Path, path: Path, *, top: int = 8) -> None:
    """A sheet of queries and the `top` held-out images that each finds, right and wrong ones marked, written to `path`."""
    test = open_pairs(directory, "test", image_size=processor.image_size)
    if isinstance(test, ShapesWorld):
        splits = [test, *(ShapesWorld(directory, split) for split in ("single_seen", "single_unseen"))]
        rows = [(query, detail, shows(query)) for query, detail in SHAPE_QUERIES]
    else:
        splits = [test]
        known = dict.fromkeys(test.all_captions(i)[0] for i in range(len(test)))  # each caption once
        some = list(known)[:: max(1, len(known) // 8)][:8]
        rows = [(caption, "", has_caption(caption)) for caption in some]
    features = torch.cat([encode_split(model, processor, split, range(len(split))) for split in splits])
    queries = encode_texts([query for query, _, _ in rows], model, processor, cut=True)
    where = [(split, i) for split in splits for i in range(len(split))]
    sheet_rows = []
    for (query, detail, right), scores in zip(rows, queries @ features.T, strict=True):
        best = scores.topk(min(top, len(where)))
        found = [where[i] for i in best.indices.tolist()]
        marks = [right(split, i) for split, i in found]
        images = [split.images([i])[0] for split, i in found]
        there = sum(right(split, i) for split, i in where)
        detail = f"{sum(marks)} of {len(marks)} right, {there} exist{detail}"
        sheet_rows.append(Row(query, images, marks, [f"{s:.2f}" for s in best.values.tolist()], detail))
    title = f"What {len(where)} held-out images a query finds, best first"
    sheet(sheet_rows, title=title, tile=96, columns=top).save(path)


SHAPE_QUERIES = [
    ("a red heart", ""),
    ("a small blue star", ""),
    ("a large pink diamond on the left", ""),
    ("a blue star and a yellow heart", ""),
    ("an orange circle", "; never seen in training"),
    ("a green heart", "; never seen in training"),
    ("a purple ring", "; never seen in training"),
]


def shows(query: str):
    """Right: a scene with every object that the query names, in all that it names of them."""
    wanted = parse(query)

    def right(split: ShapesWorld, index: int) -> bool:
        objects = split.scenes[index].objects
        return all(any(agrees(want, thing) for thing in objects) for want in wanted)

    return right


def agrees(want, thing) -> bool:
    return all(named is None or named == fact for named, fact in zip(want[:4], thing[:4], strict=True))


def has_caption(caption: str):
    return lambda split, index: caption in split.all_captions(index)
