"""Scores of the compare pattern: retrieval (does an image find its caption, a caption its image?) and zero-shot
classification (does an image find its class?), every number beside its chance.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minivlm.datasets.folder import TEMPLATES, open_pairs
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes import ShapesWorld
from minivlm.datasets.shapes.text import parse
from minivlm.errors import Note, UserError
from minivlm.evaluate.expectation import some_of
from minivlm.metrics import Score, zero_shot_accuracy
from minivlm.metrics import retrieval as retrieval_scores
from minivlm.metrics.caption_retrieval import caption_retrieval
from minivlm.pictures import Row, sheet
from minivlm.processes import each
from minivlm.tasks.features import encode_images, encode_texts
from minivlm.tasks.templates import PLAIN
from minivlm.tasks.zero_shot import class_features

# Images in memory, which `encode_images` takes at once: so few that processes find enough parts to share.
AT_A_TIME = 64
SINGLE = {"single_seen": "seen pairs", "single_unseen": "never-seen pairs"}  # splits of the shapes world with labels
CAPTIONS = 5  # of an image, in COCO's protocol
FOLDS = {
    "distinct": None,
    "coco": None,
    "coco-1k": 1000,
}  # ways to count in retrieval → images that are candidates at a time


@dataclass(frozen=True)
class How:
    """How vectors of images and texts are judged.

    templates   sentences for the labels; None: those of the training captions, on the shapes world the label alone
    retrieval   "distinct": captions that are equal are one, and right for all their images; "coco", "coco-1k": see
                `caption_retrieval`
    probes      "knn", "linear": classifiers on the image vectors (probe.py), with these numbers of neighbours
    """

    templates: Sequence[str] | None = None
    retrieval: str = "distinct"
    probes: Sequence[str] = ()
    neighbours: Sequence[int] | None = None


AS_EVER = How()


def contrast(model, processor, directory: str | Path, how: How = AS_EVER, encode=None) -> dict[str, Score]:
    """All scores of a CLIP on the held-out part of a dataset, by name, in the order of the table. encode: pairs → their image
    vectors, where these are known already."""
    encode = encode or (lambda pairs: encode_split(model, processor, pairs, range(len(pairs))))
    test = open_pairs(directory, "test", image_size=processor.image_size)
    images, scores = encode(test), {}
    if isinstance(test, ShapesWorld):
        for split, name in SINGLE.items():
            single = ShapesWorld(Path(directory), split)
            top = zero_shot(model, processor, single, how.templates or PLAIN, encode(single))
            scores[f"zero-shot, {name}"] = top["zero-shot, mean per class"]
    elif test.classes:
        scores = zero_shot(model, processor, test, how.templates or TEMPLATES, images)
        if "zero-shot, top-5" not in scores:
            tell(f"There is no top-5: of {len(test.classes)} classes it could hardly be wrong.")
    elif how.templates is not None:
        raise UserError(f"--templates: the images of {directory} have no classes to put into them; leave it out.")
    if how.retrieval == "distinct":
        return scores | retrieval(model, processor, test, images=images)
    return scores | five_captions(model, processor, test, images, FOLDS[how.retrieval])


def retrieval(
    model, processor, pairs: Pairs, *, most: int | None = None, images: Tensor | None = None
) -> dict[str, Score]:
    """Both directions between a split's images, or `most` of them, and their distinct captions. images: of `encode_split`."""
    indices = some_of(len(pairs), most or len(pairs))
    texts, relevant = distinct_captions(pairs, indices)
    features = encode_split(model, processor, pairs, indices) if images is None else images
    names = [pairs.key(i) for i in indices]
    return retrieval_scores(features, encode_texts(texts, model, processor, cut=True), relevant=relevant, names=names)


def five_captions(model, processor, pairs: Pairs, images: Tensor, fold: int | None = None) -> dict[str, Score]:
    """Retrieval by the protocol of COCO and Flickr30k, see `caption_retrieval`. images: of `encode_split`."""
    captions = [pairs.all_captions(i)[:CAPTIONS] for i in range(len(pairs))]
    more = sum(len(pairs.all_captions(i)) > CAPTIONS for i in range(len(pairs)))
    fewer = sum(len(known) < CAPTIONS for known in captions)
    if bare := [pairs.key(i) for i, known in enumerate(captions) if not known]:
        raise UserError(f"--retrieval: {len(bare)} of {len(pairs)} images have no caption, {bare[0]} the first.")
    if fold and len(pairs) % fold:
        raise UserError(
            f"--retrieval coco-1k judges {fold:,} images at a time, but there are {len(pairs):,}, which is no multiple: "
            "take --retrieval coco."
        )
    if more or fewer:
        counts = [f"{have(more)} more, of which the first five count"] * (more > 0)
        counts += [f"{have(fewer)} fewer"] * (fewer > 0)
        tell(f"COCO's protocol has {CAPTIONS} captions an image: {', '.join(counts)}.")
    number = {text: j for j, text in enumerate(dict.fromkeys(text for known in captions for text in known))}
    texts = encode_texts(list(number), model, processor, cut=True)  # equal ones once
    flat = [(i, number[text]) for i, known in enumerate(captions) for text in known]
    owners, rows = zip(*flat, strict=True)
    names = [pairs.key(i) for i in range(len(pairs))]
    return caption_retrieval(images, texts[list(rows)], owners, names=names, fold=fold)


def have(n: int) -> str:
    return "1 image has" if n == 1 else f"{n:,} images have"


def tell(text: str) -> None:
    warnings.warn(Note(text), stacklevel=3)


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
    names = [pairs.key(i) for i in labelled]
    scores = zero_shot_accuracy(images, classes, torch.from_numpy(pairs.labels[labelled]), names=names)
    return {f"zero-shot, {name}": score for name, score in scores.items()}


def encode_split(model, processor, pairs: Pairs, indices: Sequence[int]) -> Tensor:
    """(N, D): the features of these images of a split, decoded a few at a time."""
    parts = [np.asarray(indices[i : i + AT_A_TIME]) for i in range(0, len(indices), AT_A_TIME)]
    features = each(lambda part: encode_images(list(pairs.images(part)), model, processor), parts)
    return torch.cat(features).to(model.device)


def retrieval_sheet(model, processor, directory: str | Path, path: Path, *, top: int = 8) -> None:
    """A sheet of `retrieval_rows`, written to `path`."""
    title, rows = retrieval_rows(model, processor, directory, top=top)
    sheet(rows, title=title, tile=96, columns=top).save(path)


def retrieval_rows(model, processor, directory: str | Path, *, top: int = 8) -> tuple[str, list[Row]]:
    """A title, and queries with the `top` held-out images that each finds, right and wrong ones marked."""
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
    return f"What {len(where)} held-out images a query finds, best first", sheet_rows


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
