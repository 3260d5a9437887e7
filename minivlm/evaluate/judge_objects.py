"""CHAIR of captions in a file: which objects they name, and which are there by COCO's instances and the reference captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minivlm.errors import UserError
from minivlm.evaluate.diagnose.objects import mentions, read_synonyms
from minivlm.evaluate.predictions import ImageNames, Prediction, value_of
from minivlm.metrics import Score
from minivlm.metrics.chair import chair_scores


def is_instances(values: Any) -> bool:
    """Is it COCO's {"images", "annotations": [{"image_id", "category_id"}], "categories": [{"id", "name"}]}?"""
    rows = values.get("annotations") if isinstance(values, dict) else None
    return (
        bool(values.get("categories")) and bool(rows) and "category_id" in rows[0] if isinstance(rows, list) else False
    )


def objects_in(values: Mapping[str, Any], path: Any) -> tuple[dict[str, set[str]], dict[str, str], tuple[str, ...]]:
    """The objects of each image, by its id; the ids of images by their files' names; and all categories."""
    try:
        category = {one["id"]: str(one["name"]).lower() for one in values["categories"]}
        objects: dict[str, set[str]] = {value_of(one, ("id",)): set() for one in values.get("images", ())}
        for one in values["annotations"]:
            objects.setdefault(value_of(one, ("image_id",)), set()).add(category[one["category_id"]])
        names = {one["file_name"]: value_of(one, ("id",)) for one in values.get("images", ()) if "file_name" in one}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has categories, but not as COCO's instances have them ({error}).") from None
    return objects, names, tuple(category.values())


def object_scores(
    predictions: Sequence[Prediction],
    captions: Mapping[str, Sequence[str]],
    objects: Mapping[str, set[str]],
    names: Mapping[str, str],
    file: str | None,
    categories: Sequence[str],
) -> tuple[dict[str, Score], list[Prediction]]:
    """CHAIR of those predictions whose images are known, and these. captions, objects: of an image, by its name or id. file:
    --objects; without one the objects are the categories, also those that are in no image here."""
    known = ImageNames([*dict.fromkeys([*captions, *objects])], names)
    found = [(p, image) for p in predictions if (image := known.find(p.image)) is not None]
    if not found:
        return {}, []
    named = mentions(read_synonyms(file) if file else {name: name for name in categories})
    there = [
        {name for text in [*captions.get(image, ()), *objects.get(image, ())] for name in named(text)}
        for _, image in found
    ]
    scores = chair_scores([named(p.text) for p, _ in found], there, [image for _, image in found])
    return scores, [p for p, _ in found]
