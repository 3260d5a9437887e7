"""Which of the samples of a folder are in which split, and what is left out because it cannot be read.

Splits that the files do not give are drawn by a hash of the file's name, so that adding or removing other files never
moves an image from training to test.
"""

from __future__ import annotations

import os
import zlib

from minivlm.datasets.source import judged
from minivlm.errors import UserError

# Radford et al. 2021, §3.1.4, use "a photo of a {label}."; several wordings teach more than one phrase.
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "this is a {}.", "a {}.")
SPLITS = ("train", "val", "test")


def skip_broken(items: list, errors: dict[str, str], notes: list[str]) -> list:
    """The training items of which every image can be read; `notes` gets a sentence on the others. errors: image → sentence."""
    kept = [item for item in items if not errors.keys() & set(item.images)]
    total = len({image for item in items for image in item.images})
    if not kept:
        first = next(iter(errors.values()))
        raise UserError(f"None of the {total} training images can be read; the first: {first}")
    if errors:
        shown = " ".join(list(errors.values())[:5]) + (" …" if len(errors) > 5 else "")
        notes.append(f"{len(errors)} of {total} training images are skipped. {shown}")
    return kept


# --------------------------------------------------------------------------------------------------------------- splits


def hashed_split(name: str) -> str:
    """ "test" for a tenth of all file names, "val" for another, "train" for the rest."""
    return {0: "test", 1: "val"}.get(zlib.crc32(name.encode("utf-8", "surrogatepass")) % 10, "train")


def choose_split(items: list, split: str, directory: str | os.PathLike) -> tuple[list, list[str]]:
    """The items of `split` (each has an `image` and a `split`), and notes on what the files left to be chosen.

    No split or only "train" given: val and test are a tenth each, by hash. "val" missing: a tenth of train. "test"
    missing: val stands in. A split that stays empty because there are so few images: another one stands in. A line
    without a split, where others have one, counts as train. An evaluation may judge another split than test, or all.
    """
    own, split = split, judged(directory, split)
    if split == "all":
        return items, [
            f"All {len(items)} samples are judged, of every split: a model that was trained here has seen most of them."
        ]
    if split not in SPLITS:
        raise UserError(f"There is no split {split!r}: it is one of train, val, test.")
    given = {item.split for item in items}
    given = {name or "train" for name in given} if given != {None} else set()
    if given and "train" not in given and split == "train":
        raise UserError(
            f"{directory} names the splits {', '.join(sorted(given))} but has nothing to train on ('train')."
        )
    notes = []
    drawn = {"train"}  # what a hash may draw out of the training images
    if given <= {"train"}:
        drawn |= {"val", "test"}
        notes.append("No val and test split are given: a tenth of the images each, by a hash of the file name.")
    elif "val" not in given and "train" in given:
        drawn |= {"val"}
        notes.append("No val split is given: a tenth of the training images, by a hash of the file name.")
    groups: dict[str, list] = {name: [] for name in SPLITS}
    for item in items:
        given, hashed = item.split or "train", hashed_split(item.image)
        groups[hashed if given == "train" and hashed in drawn else given].append(item)
    for stand_in in (split, *{"train": ("val", "test"), "val": ("test", "train"), "test": ("val", "train")}[split]):
        if groups[stand_in]:
            break
    if stand_in != split:
        warning = " What is judged has been trained on." if stand_in == "train" and own == "test" else ""
        notes.append(f"There are no {split} images: the {stand_in} images stand in for them.{warning}")
    elif split != own:
        seen = ", which have been trained on" if split == "train" else ""
        notes.append(f"The {len(groups[split])} samples of the {split} split are judged{seen}.")
    return groups[stand_in], notes
