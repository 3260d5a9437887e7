"""The forms that a folder of data may have, and how each is recognised by what the folder contains.

    recognised(Source("photos")) ──→ [Found(form="a table", files=("photos.csv",), keys="image: filepath, …")]

A row of FORMS is a form: a recogniser looks at the folder and gives what it found there, with a function that reads it. Files
of our own names (captions.jsonl, …) say by themselves what a folder is; only where there are none do the other forms count.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from minivlm.datasets import annotations, shards, sidecars, tables
from minivlm.datasets.class_names import NAMES, read_names
from minivlm.datasets.entries import Item
from minivlm.datasets.folder_view import FIRST, Folder, Found, ending, split_in, stamps, subset_folders
from minivlm.datasets.keys import Keys, NoTable, Several, find_keys, plain
from minivlm.datasets.own_files import FIXED, read_fixed
from minivlm.datasets.source import Source
from minivlm.datasets.tree import Tree
from minivlm.errors import UserError


class Form(NamedTuple):
    name: str
    recognise: Callable[[Folder], list[Found]]


# --------------------------------------------------------------------------------------------------------- recognisers


def own_files(folder: Folder) -> list[Found]:
    """Our own files, whose names say what they hold. Where the keys are chosen they are tables like others."""
    found = []
    for name, gives in FIXED.items():
        path = folder.path / name
        if path.exists() and (keys := other_keys(folder, name, gives)) is not None:
            found.append(of_table(folder, name, *keys, None))
        elif path.exists():
            form = "lines of JSON" if ending(name) == ".jsonl" else "LLaVA's JSON"
            found.append(Found(form, gives, (name,), partial(read_fixed, path)))
    return found


def other_keys(folder: Folder, name: str, gives: str) -> tuple[tables.Table, Keys] | None:
    """The keys of one of our own files, if they are chosen or are not our own."""
    source, path = folder.source, folder.path / name
    chosen = source.image_key is not None or source.caption_key is not None
    try:
        table = tables.open_table(path)
        if not chosen and (table.first.keys() & {"image", "conversations"} or not table.first):
            return None
        keys = find_keys(table.columns, table.first, source, folder.is_image(name))
    except (NoTable, UserError) as error:
        if chosen or isinstance(error, Several):
            raise UserError(f"{path}: {str(error).rstrip('.')}.") from None
        return None  # whoever reads it names the line
    return (table, keys) if keys.gives == gives else None


def of_table(folder: Folder, name: str, table: tables.Table, keys: Keys, split: str | None) -> Found:
    def read(problems: list[str] | None, notes: list[str], split: str | None = split) -> list:
        names = read_names(folder.source) if keys.label else {}
        return tables.read_table(table, keys, folder.find(name), problems, notes, split=split, names=names)

    return Found(f"{table}", keys.gives, (name,), read, f"{keys}", split)


def row_files(folder: Folder) -> list[Found]:
    """CSV, TSV, lines of JSON and lists in JSON, whose columns or fields are known or chosen."""
    found = []
    for name in folder.files:
        if annotations.kind_of(folder.lists.get(name, {})) or ending(name) == ".token":
            continue
        try:
            table = tables.open_table(folder.path / name)
            keys = find_keys(table.columns, table.first, folder.source, folder.is_image(name))
        except (NoTable, UserError) as error:
            message = f"{folder.path / name}: {str(error).rstrip('.')}."
            if isinstance(error, Several):
                folder.open.append(message)
            elif ending(name) != ".txt":  # which may be any text
                folder.reasons[name] = message
            continue
        if not says_what_folders_say(table.first, keys):
            found.append(of_table(folder, name, table, keys, split_in(name)))
    return found


def says_what_folders_say(row: dict[str, Any], keys: Keys) -> bool:
    """A table of labels beside class folders: cat/1.jpg, cat."""
    if keys.gives != "captions" or keys.captions or not isinstance(image := row.get(keys.image), str):
        return False
    return plain(str(row.get(keys.label))) in map(plain, image.replace("\\", "/").split("/")[:-1])


def list_files(folder: Folder) -> list[Found]:
    """COCO's captions and Karpathy's files, under any name."""
    found = []
    for name, lists in folder.lists.items():
        kind, path = annotations.kind_of(lists), folder.path / name
        if kind in ("coco", "karpathy"):
            form = "COCO's captions" if kind == "coco" else "Karpathy's JSON"
            split = split_in(name) if kind == "coco" else None  # Karpathy's rows name theirs
            named = annotations.first_images(lists, kind)
            if folder.lacks_images(name, (lambda find, image=image: find(image) for image in named)):
                continue
            found.append(
                Found(form, "captions", (name,), partial(read_lists, folder, name, kind, split=split), split=split)
            )
        elif kind == "instances":
            folder.reasons[name] = f"{path} holds boxes or key points of objects (COCO's instances), and no captions."
    return found


def read_lists(
    folder: Folder, name: str, kind: str, problems: list[str] | None, notes: list[str], split: str | None = None
) -> list[Item]:
    read = annotations.read_coco if kind == "coco" else annotations.read_karpathy
    return read(folder.path / name, folder.find(name, subset_folders(name)), split, problems, notes)


def vqa_pairs(folder: Folder) -> list[Found]:
    """VQA v2: a file with questions and one with their answers, of the same images."""
    kinds = {name: annotations.kind_of(lists) for name, lists in folder.lists.items()}
    part = lambda name: annotations.subset_of(Path(name)) or split_in(name)
    found = []
    for name in (name for name, kind in kinds.items() if kind == "questions"):
        fitting = [other for other, kind in kinds.items() if kind == "answers" and part(name) == part(other)]
        numbers = [one.get("image_id") for one in folder.lists[name]["questions"][:FIRST]]
        subset = annotations.subset_of(Path(name))
        by_number = (lambda find, n=n, subset=subset: annotations.find_numbered(n, subset, find) for n in numbers)
        if len(fitting) == 1 and folder.lacks_images(name, by_number):
            continue
        if len(fitting) == 1:
            read = partial(read_vqa, folder, name, fitting[0], split=split_in(name))
            files = (name, fitting[0])
            found.append(Found("VQA v2's questions and answers", "questions", files, read, split=split_in(name)))
        else:
            folder.reasons[name] = (
                f"{folder.path / name} holds questions, but there {'are several files' if fitting else 'is no file'} with "
                "their answers beside it, as v2_mscoco_train2014_annotations.json is."
            )
    return found


def read_vqa(
    folder: Folder, name: str, other: str, problems: list[str] | None, notes: list[str], split: str | None = None
) -> list:
    find = folder.find(name, subset_folders(name))
    return annotations.read_vqa(folder.path / name, folder.path / other, find, split, problems, notes)


def texts_beside_images(folder: Folder) -> list[Found]:
    """A .txt, .caption or .json beside at least half of the images, where no other file describes them."""
    beside = sidecars.texts_beside(folder.tree.listing)
    if len(beside.texts) < max(1, len(beside.without)):
        return []
    try:
        key = sidecars.check_are_captions(folder.path, beside, folder.source)
    except NoTable as error:
        folder.reasons[next(iter(beside.texts.values()))] = f"{folder.path}: {error}."
        return []

    def read(problems: list[str] | None, notes: list[str]) -> list[Item]:
        now = sidecars.texts_beside(Tree(folder.path).listing)
        return sidecars.read_beside(folder.path, now, key, problems, notes)

    first = tuple(beside.texts.values())
    keys = f"caption: {key}" if key else ""
    return [Found(f"a text beside each image, {beside.endings}", "captions", first, read, keys)]


def tar_shards(folder: Folder) -> list[Found]:
    """WebDataset's: named, or all where no image lies beside them. A tar file beside images is what they came from."""
    source = folder.source
    if source.shards is None and folder.tree.listing.images:
        return []
    try:
        if (found := shards.find(source)) is None:
            return []
    except NoTable as error:
        message = f"{source}: {str(error).rstrip('.')}."
        if isinstance(error, Several) or source.shards is not None:
            raise UserError(message) from None
        folder.reasons["tar files"] = message
        return []
    return [Found("WebDataset tar shards", found.keys.gives, found.files, found.read, f"{found.keys}")]


FORMS = (
    Form("a table (CSV, TSV, JSON)", row_files),
    Form("COCO's or Karpathy's JSON", list_files),
    Form("VQA v2's pair of files", vqa_pairs),
)
WHERE_NOTHING_ELSE = (Form("a text beside each image (.txt, .caption, .json)", texts_beside_images),)


# ---------------------------------------------------------------------------------------------------------- the folder


def recognised(source: str | os.PathLike) -> list[Found]:
    """All that describes the images of a folder; nothing for class folders, the shapes world, documents, or what is unknown.

    UserError: several files that do not go together, or keys that are not there.
    """
    source = Source.of(source)
    return list(look(source, stamps(source.path))[0]) if source.path.is_dir() else []


def why_not(source: str | os.PathLike) -> list[str]:
    """Sentences on files that might have been meant to describe the images, and are not read."""
    source = Source.of(source)
    return list(look(source, stamps(source.path))[1].values())


@lru_cache(maxsize=8)
def look(source: Source, _: tuple) -> tuple[list[Found], dict[str, str]]:
    folder = Folder(source, Tree(source.path))
    names = folder.tree.names()
    if source.shards is not None:
        found = tar_shards(folder)
        check_options(source, found, folder.reasons)
        return found, {}
    if (found := own_files(folder)) or names.keys() & {"world.json", "interleaved.jsonl"}:
        check_options(source, found, {})
        return found, {}
    found = [one for form in FORMS for one in form.recognise(folder)]
    if not found and folder.open:
        raise UserError(folder.open[0])
    found = found or tar_shards(folder)
    if source.class_names is None and NAMES not in names:
        beside = [one for form in WHERE_NOTHING_ELSE for one in form.recognise(folder)] if not has_shards(found) else []
        if found and beside and any(one.gives == "captions" for one in found):
            refuse_both(folder, found, beside[0])
        elif found and beside:
            folder.without.append(f"{beside[0].files[0]} and the texts like it are not read: {found[0].files[0]} is.")
        found = found or beside
    if parquet := sorted(name for name in names if ending(name) == ".parquet"):
        count = parquet[0] if len(parquet) == 1 else f"{parquet[0]} and {len(parquet) - 1} other parquet files"
        folder.without.append(f"{count} {'is' if len(parquet) == 1 else 'are'} not read.")
        if folder.reasons:
            folder.reasons["parquet"] = (
                f"{folder.without[-1][:-1]} either: write the columns to a CSV (pandas: to_csv)."
            )
    found = going_together(folder, found)
    found = [replace(one, notes=tuple(folder.without)) for one in found]
    check_options(source, found, folder.reasons)
    for parsed in ("lists", "files"):  # the readers hold on to the folder
        folder.__dict__.pop(parsed, None)
    folder.tree = Tree(source.path)
    return found, folder.reasons


def has_shards(found: list[Found]) -> bool:
    return any(name.endswith(".tar") for one in found for name in one.files)


def refuse_both(folder: Folder, found: list[Found], beside: Found) -> None:
    """UserError for captions in a file and in texts beside the images. A .json there may tell other things."""
    table = next(one for one in found if one.gives == "captions")
    if not beside.keys:
        raise UserError(
            f"{folder.path} has captions in {table.files[0]} and in a text beside each image ({beside.files[0]}): keep one of "
            "the two there."
        )


def check_options(source: Source, found: list[Found], reasons: dict[str, str]) -> None:
    """UserError for options of which nothing in the folder makes use."""
    given = [name for name in ("image_key", "caption_key") if getattr(source, name) is not None]
    if given and not any(one.keys for one in found):
        what = f"{found[0].form} ({found[0].files[0]})" if found else "no table of images"
        why = " ".join(reasons.values()) or f"{source} holds {what}, and so no column to choose: leave it out."
        raise UserError(f"--data.{given[0]} {getattr(source, given[0])}: {why}")
    if source.class_names is not None and found and not any("label: " in one.keys for one in found):
        raise UserError(
            f"--data.class_names {source.class_names}: {source} has no classes, but {found[0]}: leave it out."
        )


def going_together(folder: Folder, found: list[Found]) -> list[Found]:
    """Files that give the same kind of thing are of one form, and each of another split."""
    result = []
    for gives in dict.fromkeys(one.gives for one in found):
        same = [one for one in found if one.gives == gives]
        splits = [one.split for one in same]
        if len(same) > 1 and (len(set(splits)) < len(splits) or None in splits or len({one.form for one in same}) > 1):
            raise UserError(
                f"{folder.path} has several files with {gives}, {listed([one.files[0] for one in same])}: keep one of them "
                "there, or one for each split (train, val, test in their names)."
            )
        if splits and "train" not in splits and None not in splits:  # a part of a dataset, of which splits are drawn
            same = [Found(one.form, one.gives, one.files, partial(one.read, split=None), one.keys) for one in same]
        result += same
    return result


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {names[-1]}" if len(names) == 4 else ", …" if len(names) > 4 else "")
