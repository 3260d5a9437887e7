"""What the vectors of images hold, before and after the projection: `… --probe knn,linear`, and how vectors are judged:
`--split`, `--templates`, `--retrieval`.

    training split ─→ vectors ─→ nearest neighbours, linear probe ─→ classes of the judged split
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minivlm.command_line import names_among, positive
from minivlm.datasets.contents import available
from minivlm.datasets.folder import open_pairs
from minivlm.datasets.folder_files import choose_split
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes import ShapesWorld, is_world
from minivlm.datasets.source import Source
from minivlm.errors import UserError
from minivlm.evaluate.compare import FOLDS, SINGLE, How, contrast, tell
from minivlm.evaluate.vectors import SHARED, ImageVectors
from minivlm.metrics import Samples, Score
from minivlm.metrics.probes import choose_strength, fit_linear_probe, hold_out, nearest_neighbours
from minivlm.metrics.retrieval import mean_per_class
from minivlm.tasks.templates import HELP as TEMPLATES
from minivlm.tasks.templates import read_templates

PROBES = ("knn", "linear")
NEIGHBOURS = (1, 10, 20)  # 20 is DINO's
HELD = 0.2  # of each class, where there is no split to judge by, or to choose the L2 strength by

# ---- the command -----------------------------------------------------------------------------------------------------


def add_options(parser: ArgumentParser) -> None:
    splits = ("train", "val", "test", "all")
    parser.add_argument(
        "--split", dest="judged_split", choices=splits, help="what is judged (test, or what stands in for it)"
    )
    parser.add_argument("--templates", nargs="+", help=f"zero-shot: {TEMPLATES} (those of the training captions)")
    parser.add_argument(
        "--retrieval",
        choices=[*FOLDS],
        default="distinct",
        help="equal captions are one (distinct), or five an image as published for COCO and Flickr30k, which adds median "
        "rank and rsum (coco), also in folds of 1,000 images (coco-1k) (%(default)s)",
    )
    chosen = names_among(PROBES, option="--probe", what="probe")
    told = "classifiers on the vectors of images, as well"
    parser.add_argument("--probe", type=chosen, metavar="knn,linear", help=told)
    parser.add_argument(
        "--neighbours", type=positive, nargs="+", metavar="K", help="--probe knn: so many vote (1 10 20)"
    )


def how_of(options: Namespace) -> How:
    """UserError, before a model is loaded, for templates that are none, and for neighbours without their probe."""
    if options.neighbours and "knn" not in (options.probe or ()):
        raise UserError("--neighbours belongs to --probe knn.")
    templates = None if options.templates is None else read_templates(options.templates)
    neighbours = None if options.neighbours is None else tuple(dict.fromkeys(options.neighbours))
    return How(templates, options.retrieval, options.probe or (), neighbours)


def check_alone(options: Namespace) -> None:
    """UserError beside tables in which they would say nothing."""
    given = {"templates": options.templates, "probe": options.probe, "retrieval": options.retrieval != "distinct"}
    alone = ("shots", "predictions", *([] if options.report else ["diagnose"]))  # a report has room for both
    for other in alone:
        if getattr(options, other) is not None and any(given.values()):
            first = next(name for name, value in given.items() if value)
            raise UserError(f"--{first} and --{other} are tables of their own: give one of them.")


def check_split(data: Source, options: Namespace) -> None:
    """UserError for what the shapes world has not."""
    split = data.judged_split
    if split in (None, "test") or not is_world(data):
        return
    if split == "all":
        raise UserError(f"--split all: the splits of {data}, the shapes world, are judged one by one.")
    if options.shots is not None:
        raise UserError(f"--split {split}: episodes of the shapes world are of no split; leave it out.")


# ---- scores ----------------------------------------------------------------------------------------------------------


def by_vectors(model, processor, directory, how: How) -> dict[str, Score]:
    """Zero-shot and retrieval of a model that compares, then probes, with each image encoded once. UserError for options that
    the model cannot be judged by."""
    compares = "encode" in model.abilities
    for option, given in (("--templates", how.templates is not None), ("--retrieval", how.retrieval != "distinct")):
        if given and not compares:
            raise UserError(f"{option}: a {type(model).__name__} does not compare images with texts; leave it out.")
    vectors = ImageVectors(model, processor)
    parts = parts_of(directory, processor) if how.probes else None  # refused before the work
    scores = contrast(model, processor, directory, how, lambda pairs: vectors.of(pairs)[SHARED]) if compares else {}
    return scores | (probe(vectors, parts, how) if parts else {})


@dataclass(frozen=True)
class Parts:
    """Labelled images: rows of `pairs` to fit on, to choose the L2 strength by, and to judge by. labels (len(pairs),): −1 where
    there is none."""

    pairs: Sequence[tuple[Pairs, int]]  # a row: an index into a split
    labels: np.ndarray
    classes: Sequence[str]
    train: np.ndarray
    val: np.ndarray
    judged: np.ndarray

    def vectors(self, vectors: ImageVectors, rows: np.ndarray) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {space: [] for space in vectors.spaces}
        for pairs in dict.fromkeys(self.pairs[row][0] for row in rows):  # rows are sorted: split after split
            of = vectors.of(pairs, [self.pairs[row][1] for row in rows if self.pairs[row][0] is pairs])
            for space, part in of.items():
                found[space].append(part)
        return {space: torch.cat(part) for space, part in found.items()}

    def keys(self, rows: np.ndarray) -> list[str]:
        return [self.pairs[row][0].key(self.pairs[row][1]) for row in rows]


def parts_of(directory, processor) -> Parts:
    """The training split fits, another judges. UserError where there is nothing to fit, or to tell apart."""
    source = Source.of(directory)
    if is_world(source):
        rows = [(pairs, i) for pairs in (ShapesWorld(source.path, name) for name in SINGLE) for i in range(len(pairs))]
        labels = np.concatenate([pairs.labels for pairs in dict.fromkeys(pairs for pairs, _ in rows)])
        classes, groups, judged = rows[0][0].classes, {}, ""
    else:
        whole = open_pairs(replace(source, judged_split="all"), "test", image_size=processor.image_size)
        if whole.labels is None or not (whole.labels >= 0).any():
            raise UserError(
                f"--probe: the images of {source} have no classes: give class folders, or a column of labels."
            )
        rows, labels, classes = [(whole, i) for i in range(len(whole))], whole.labels, whole.classes
        judged = {None: "test", "all": "test"}.get(source.judged_split, source.judged_split)
        place = {id(item): i for i, item in enumerate(whole.items)}
        groups = {
            split: np.array([place[id(item)] for item in choose_split(whole.items, split, source.path)[0]])
            for split in available(whole.items)
        }
        groups = {split: found[labels[found] >= 0] for split, found in groups.items()}
    if judged == "train":
        raise UserError("--probe fits on the training split, and so cannot be judged by it: take --split val or test.")
    train, val, test = divided(groups, labels, judged, source)
    if len(np.unique(labels[train])) < 2:
        names = ", ".join(repr(classes[label]) for label in np.unique(labels[train]))
        raise UserError(
            f"--probe: the training images of {source} are all of one class, {names}: nothing is to be told apart."
        )
    unknown = [classes[label] for label in np.setdiff1d(labels[test], labels[train])]
    if unknown:
        tell(f"{len(unknown)} judged classes have no image to fit on, and count as wrong: {', '.join(unknown[:5])}.")
    return Parts(rows, labels, classes, train, val, test)


def divided(groups: dict[str, np.ndarray], labels: np.ndarray, judged: str, source: Source) -> tuple[np.ndarray, ...]:
    """Rows to fit on, to choose by, and to judge by: those of the splits, or where one stands in for another a share of each
    class by a seed."""
    none = np.array([], dtype=int)
    train, test, val = (groups.get(split, none) for split in ("train", judged, "val"))
    if not len(train) or not len(test) or len(np.intersect1d(train, test)):
        known = np.flatnonzero(labels >= 0)
        train, test = (known[rows] for rows in hold_out(labels[known], HELD))
        where = (
            "the splits with labels are put together" if is_world(source) else "there is one split alone with labels"
        )
        tell(
            f"--probe: in {source} {where}, so a fifth of each class ({len(test)} images, by seed 0) is judged, and not fitted."
        )
        if not len(test):
            raise UserError(f"--probe: each class of {source} has one image, and none is left to judge by.")
        val = none
    if not len(val) or len(np.intersect1d(val, np.concatenate([train, test]))):
        rest, held = hold_out(labels[train], HELD)
        train, val = (train[rest], train[held]) if held else (train, none)
    return train, val, test


def probe(vectors: ImageVectors, parts: Parts, how: How) -> dict[str, Score]:
    """{"vision tower, kNN (k = 20), top-1": Score, …}. Once the strength is chosen, the validation part is fitted as well, and
    neighbours are among both."""
    fit = np.sort(np.concatenate([parts.train, parts.val]))
    train, val, known, judged = (parts.vectors(vectors, rows) for rows in (parts.train, parts.val, fit, parts.judged))
    of = {
        name: torch.from_numpy(parts.labels[rows])
        for name, rows in (("train", parts.train), ("val", parts.val), ("fit", fit))
    }
    score = judge_of(parts, fit)
    C, scores = len(parts.classes), {}
    for space in vectors.spaces:
        if "knn" in how.probes:
            for k in numbers_of(how, len(fit)):
                votes = nearest_neighbours(known[space], of["fit"], judged[space], k=k, classes=C)
                scores |= score(f"{space}, kNN (k = {k})", votes, top_5=False)
        if "linear" in how.probes:
            strength = 1.0
            if len(parts.val):
                strength = choose_strength(train[space], of["train"], val[space], of["val"], classes=C)
            tell(f"linear probe, {space}: L2 strength {strength:.3g}, {chosen(len(parts.val))}.")
            fitted = fit_linear_probe(known[space], of["fit"], classes=C, strength=strength)
            scores |= score(f"{space}, linear probe", fitted(judged[space]), top_5=C > 5)
    return scores


def chosen(n: int) -> str:
    return f"chosen on {n} images" if n else "since no image is left to choose it by"


def numbers_of(how: How, n: int) -> Sequence[int]:
    """The numbers of neighbours, of n training images."""
    if how.neighbours is not None:
        return how.neighbours
    if fewer := [k for k in NEIGHBOURS if k > n]:
        tell(f"kNN with k = {' and '.join(map(str, fewer))} is left out: there are {n} training images.")
    return [k for k in NEIGHBOURS if k <= n]


def judge_of(parts: Parts, fit: np.ndarray) -> Callable[..., dict[str, Score]]:
    """(name, class scores (M, C), top_5) → its rows of the table."""
    labels, names = parts.labels[parts.judged], parts.keys(parts.judged)
    usual = np.bincount(parts.labels[fit], minlength=len(parts.classes)).argsort(kind="stable")[
        ::-1
    ]  # most frequent first
    shares = np.bincount(labels, minlength=len(parts.classes))[usual] / len(labels)
    tell(
        f"Chance of a probe's top-1 is the share of the class that training has most of, {parts.classes[usual[0]]!r}; of its "
        "mean per class, one by the number of classes."
    )

    def score(name: str, values: Tensor, *, top_5: bool) -> dict[str, Score]:
        best = values.cpu().sort(dim=1, descending=True, stable=True).indices.numpy()
        hits = best == labels[:, None]  # (M, C)
        found = {f"{name}, top-1": Score.of(Samples.mean(hits[:, 0], names), float(shares[0]))}
        if top_5:
            found[f"{name}, top-5"] = Score.of(Samples.mean(hits[:, :5].any(axis=1), names), float(shares[:5].sum()))
        per_class = mean_per_class(hits[:, 0], labels, names)
        return found | {f"{name}, mean per class": Score.of(per_class, 1 / len(np.unique(labels)))}

    return score
