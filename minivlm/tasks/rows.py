"""What a task is asked about, as rows that are known before a model is loaded.

    photo.jpg   my_photos/   list.txt   table.csv   questions.json   -   ──read_inputs──→ [Row(images, values), …]

Tables are read in input_tables.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from minivlm.datasets.class_folders import Listing, list_folder, passed_over
from minivlm.datasets.folder_files import choose_split
from minivlm.datasets.images import extensions
from minivlm.datasets.source import Source
from minivlm.datasets.tar_index import open_tar
from minivlm.errors import UserError
from minivlm.tasks.input_tables import Row, Text, is_table, table_rows, values_of


@dataclass
class Inputs:
    """The rows of a command in their order, the folders and tables that it names, and what is told about them."""

    rows: list[Row] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_inputs(
    words: Sequence[str],
    *,
    text: Text | None = None,
    image_folder: str | None = None,
    image_key: str | None = None,
    split: str | None = None,
) -> Inputs:
    """The rows that `words` name, each an image, a folder, a list of images, a table with a column of images, or "-".

    text: what is asked about each; where the command gives none, tables and folders of data have to. image_folder: where
    the images lie that tables name; else in the table's own folder, in images/ below it, or in the working directory.
    UserError: what holds no image, a table without a column that is needed, or of whose images half are missing.
    """
    inputs = Inputs()
    for word in words:
        if is_table(word):
            inputs.tables.append(word)
            inputs.rows += table_rows(word, text, image_folder, image_key, inputs.notes)
        elif os.path.isdir(word) or word.lower().endswith(".tar"):
            inputs.folders.append(word)
            inputs.rows += folder_rows(Source(word, image_key=image_key), text, split, inputs.notes)
        elif text is not None and text.given is None:
            raise UserError(f"{word} is an image, and no {text.name} is given: write the {text.name} behind it.")
        else:
            inputs.rows.append(Row((word,), values_of(text), named=True))
    return inputs


# ---- folders ---------------------------------------------------------------------------------------------------------


def folder_rows(source: Source, text: Text | None, split: str | None, notes: list[str]) -> list[Row]:
    """All images below a folder, or in a tar file; of a folder of data those of a split, or its questions where none is
    given."""
    if not source.path.is_dir():
        members = open_tar(source.path).all_names()
        found = Listing(sorted(name for name in members if os.path.splitext(name)[1].lower() in extensions()))
    elif split is not None or (text is not None and text.given is None):
        return data_rows(source, text, split, notes)
    else:
        found = list_folder(source.path, tars=True)
    others = passed_over([found])
    if not found.images:
        raise UserError(f"{source} holds no images, nor do its sub-folders" + (f": {others}" if others else "."))
    if others:
        notes.append(f"{source}: {others}")
    return [Row((os.path.join(source, name),), values_of(text)) for name in found.images]


def data_rows(source: Source, text: Text | None, split: str | None, notes: list[str]) -> list[Row]:
    from minivlm.datasets.folder_entries import read_entries
    from minivlm.datasets.forms import recognised

    if text is not None and text.given is None and not recognised(source):
        raise UserError(f"{source} holds no {text.name} about an image: write one behind it.")
    entries = read_entries(source, notes=notes)
    if split is not None:
        entries, drawn = choose_split(entries, split, source)
        notes += drawn
    places = lambda entry: tuple(os.path.join(source, name) for name in entry.images)
    if text is None or text.given is not None:
        images = dict.fromkeys(place for entry in entries for place in places(entry))
        return [Row((place,), values_of(text)) for place in images]
    asks = (lambda e: [q.text for q in e.questions()]) if text.name == "question" else (lambda e: e.captions)
    rows = [Row(places(entry), {text.name: str(asked)}) for entry in entries if entry.images for asked in asks(entry)]
    if not rows:
        raise UserError(f"{source} holds no {text.name} about an image: write one behind it.")
    return rows
