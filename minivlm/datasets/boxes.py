"""The boxes of objects that a folder holds beside its images: how large is what a text is about?

COCO's instances    *.json with "images", "annotations" (bbox) and "categories", anywhere in the folder or in annotations/
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from minivlm.datasets.annotations import kind_of, lists_in
from minivlm.datasets.source import Source


class Box(NamedTuple):
    name: str  # of the category, in lower case
    area: float  # as a fraction of the square of the image's shorter side


Boxes = dict[str, list[Box]]  # by the name of the image's file, without its folder


def boxes_in(data) -> Boxes:
    """Those of all COCO files of instances in a folder; none where there is no such file."""
    folder, boxes = Source.of(data).path, defaultdict(list)
    for path in [*sorted(folder.glob("*.json")), *sorted(folder.glob("annotations/*.json"))]:
        try:
            lists = lists_in(path)
        except ValueError:  # no JSON: whoever reads the folder has said so, if it is needed
            continue
        if kind_of(lists) != "instances":
            continue
        names = {row["id"]: str(row["name"]).lower() for row in lists.get("categories", [])}
        images = {row["id"]: row for row in lists["images"]}
        for row in lists["annotations"]:
            image = images.get(row["image_id"])
            if image is not None and "bbox" in row and row.get("category_id") in names:
                short = min(image["width"], image["height"])
                area = row["bbox"][2] * row["bbox"][3] / short**2
                boxes[Path(image["file_name"]).name].append(Box(names[row["category_id"]], area))
    return dict(boxes)


def named_size(boxes: Boxes, key: str, text: str, size: int) -> float:
    """The side of the smallest object that a text names, in pixels of an image with a shorter side of `size`; of several of
    one name the largest counts. NaN where it names none that the image has a box of."""
    largest: dict[str, float] = {}
    for box in boxes.get(Path(key).name, []):
        if re.search(rf"\b{re.escape(box.name)}(s|es)?\b", text.lower()):
            largest[box.name] = max(largest.get(box.name, 0.0), box.area)
    return size * math.sqrt(min(largest.values())) if largest else math.nan
