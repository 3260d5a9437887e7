"""What a report shows of a model besides its scores: classes that it chooses, images that texts find, its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from minivlm.datasets.folder import TEMPLATES, open_pairs
from minivlm.datasets.shapes import ShapesWorld, is_world
from minivlm.errors import UserError
from minivlm.evaluate.compare import AS_EVER, SINGLE, How, encode_split, retrieval_rows
from minivlm.evaluate.expectation import some_of
from minivlm.evaluate.images_of import Images, images_named
from minivlm.evaluate.match import matching_rows
from minivlm.evaluate.predictions import Prediction
from minivlm.evaluate.report.samples import SIDE, chosen, is_right, strips
from minivlm.html import Markup, tag
from minivlm.image_preprocessing import views as views_of
from minivlm.pictures import Row, heat
from minivlm.tasks.abilities import require
from minivlm.tasks.attend import attention_maps
from minivlm.tasks.templates import PLAIN
from minivlm.tasks.zero_shot import class_features

CLASSIFIED = 1000  # images, at most
ATTENDED, TILE = 6, 112  # images with their attention, and pixels of a map


@dataclass
class Shown:
    predictions: dict[str, list[Prediction]] = field(default_factory=dict)  # besides those that scores were made of
    images: Images = field(default_factory=dict)  # of these
    strips: list[Markup] = field(default_factory=list)
    attention: list[Markup] = field(default_factory=list)
    without_attention: str = ""  # why there is none
    without_samples: str = "this model generates no captions and no answers about images, and finds none."


def show(model, processor, data, how: How | None, predictions: Sequence[Prediction], images: Images) -> Shown:
    shown = Shown()
    if "encode" in model.abilities:
        classified = classes(model, processor, data, how or AS_EVER)
        shown.images = images_named([p.image for p in chosen(classified)], data, side=2 * SIDE) if classified else {}
        shown.predictions["Classes"] = classified
        title, rows = retrieval_rows(model, processor, data)
        shown.strips += strips(title, rows)
    if "match" in model.abilities and ("choose" not in model.abilities or is_world(data)):
        shown.strips += strips("How probable a true caption and a false one are", matching_rows(model, processor, data))
    try:
        require(model, processor, "attend")
        known = [*predictions, *shown.predictions.get("Classes", [])]
        asked = of_predictions(known, {**images, **shown.images}) or of_pairs(processor, data)
        shown.attention = attention(model, processor, asked)
    except UserError as error:  # a model that has no attention to an image says why, and so does the report
        shown.without_attention = str(error)
    return shown


def classes(model, processor, data, how: How) -> list[Prediction]:
    """The likeliest class of labelled images, CLASSIFIED of a split at most. None where there are no classes."""
    world, found = is_world(data), []
    for split in SINGLE if world else ("test",):
        pairs = ShapesWorld(Path(data), split) if world else open_pairs(data, split, image_size=processor.image_size)
        labelled = np.flatnonzero(pairs.labels >= 0) if pairs.classes else []
        if not len(labelled):
            continue
        indices = [int(labelled[i]) for i in some_of(len(labelled), CLASSIFIED)]
        names = [name.replace("_", " ") for name in pairs.classes]
        vectors = class_features(names, model, processor, how.templates or (PLAIN if world else TEMPLATES))
        best = (encode_split(model, processor, pairs, indices) @ vectors.T).argmax(dim=1).tolist()
        for i, j in zip(indices, best, strict=True):
            true = names[pairs.labels[i]]
            found.append(
                Prediction(names[j], pairs.key(i), kind=true, references=(true,), value=float(names[j] == true))
            )
    return found


# ---- attention -------------------------------------------------------------------------------------------------------

Asked = list[tuple[Image.Image, str | None]]  # an image, and what the model is asked about it or told of it


def of_predictions(predictions: Sequence[Prediction], images: Images) -> Asked:
    """Of samples with one image: wrong ones and right ones in turn."""
    known = {
        mark: [p for p in chosen(predictions) if is_right(p) is mark and len(images.get(p.image, [])) == 1]
        for mark in (False, True)
    }
    pairs = [
        p
        for both in zip_longest(*(some[:: max(1, len(some) // ATTENDED)] for some in known.values()))
        for p in both
        if p
    ]
    return [(images[p.image][0], p.question or None) for p in pairs[:ATTENDED]]


def of_pairs(processor, data) -> Asked:
    pairs = open_pairs(data, "test", image_size=processor.image_size)
    indices = range(0, len(pairs), max(1, len(pairs) // ATTENDED))[:ATTENDED]
    return [(Image.fromarray(pairs.images([i])[0]), pairs.all_captions(i)[0]) for i in indices]


def attention(model, processor, asked: Asked) -> list[Markup]:
    """Heat maps; see `attention_maps` for what the rows and columns are."""
    if model.image_attention in ("queries", "pooling"):  # whatever is asked
        calls = [([image for image, _ in asked], None)]
    else:
        calls = [([image], prompt) for image, prompt in asked]
    found: list[Markup] = []
    for images, prompt in calls:
        views = [views_of(image.convert("RGB"), processor.config)[0] for image in images]
        rows = attention_maps(images, model, processor, prompt=prompt)
        drawn = [
            Row(
                row.title, [heat(views[i], m, TILE) for i, m in zip(row.images, row.maps, strict=True)], notes=row.notes
            )
            for row in rows
        ]
        if len(images) == 1:
            first = drawn[0]
            notes = first.notes or [""] * len(first.images)
            drawn[0] = replace(first, images=[views[0], *first.images], notes=[prompt or "", *notes])
        else:
            drawn = [Row("the images", views), *drawn]
        found += strips("", drawn, side=TILE)
    return [HEAT, *found]


HEAT = tag(
    "p", "The attention from which each word, query or vector is computed: grey none, yellow the most.", class_="note"
)
