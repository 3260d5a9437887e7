"""What the tasks of sample.py do whose results are no rows: search, embed (vectors as files) and attend (sheets)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from minivlm.command_line import (
    check_images,
    check_sheet_name,
    load_model,
    report_passed_over,
    report_skipped,
    save_sheet,
    write_sheet,
)
from minivlm.command_line_rows import read_rows, report_written
from minivlm.errors import UserError
from minivlm.tasks.input_tables import Row, Text, text_rows
from minivlm.tasks.rows import Inputs

MOST = 64  # images of one sheet of attention maps


def run_search(options: argparse.Namespace) -> None:
    from minivlm.tasks.abilities import require, require_vectors
    from minivlm.tasks.embeddings import is_embeddings
    from minivlm.tasks.match import rerank

    if options.save:
        check_sheet_name(options.save)
    ready = is_embeddings(options.directory)
    if not ready:
        check_folder(options.directory)
    named = os.path.exists(options.query) and not os.path.isdir(options.query)
    query = Path(options.query) if named else options.query
    if options.rerank and isinstance(query, Path):
        raise UserError("--rerank matches texts with images, but the query is an image: leave it out.")
    model, processor = load_model(options)
    require_vectors(model, processor, texts=not named)
    if options.rerank:
        require(model, processor, "match")
    top_k = max(options.top, options.rerank or 0)
    found = (search_vectors if ready else search_folder)(options, query, model, processor, top_k)
    shown = [(path, f"{score:6.3f}") for path, score in found]
    if options.rerank:
        ordered = rerank(query, found, model, processor)
        shown = [(path, f"{probability:6.1%}  {score:6.3f}") for path, score, probability in ordered]
    for rank, (path, scores) in enumerate(shown[: options.top], start=1):
        print(f"{rank:3}  {scores}  {path}")
    if options.save:
        save_sheet(options.save, options.query, shown[: options.top])


def check_folder(directory: str) -> None:
    from minivlm.datasets.class_folders import passed_over
    from minivlm.tasks.image_index import list_files

    report_passed_over(passed_over([list_files(Path(directory))], irregular=False))


def search_folder(options: argparse.Namespace, query: str | Path, model, processor, top_k: int) -> list:
    """By the index of the folder, which belongs to the model's folder; a hub id, or a folder that is read-only, has it in the
    user's cache."""
    from minivlm import tasks

    writable = Path(options.model).is_dir() and os.access(options.model, os.W_OK)
    place = tasks.index_path(options.directory, options.model) if writable else None
    index = tasks.build_image_index(options.directory, model, processor, path=place)
    report_skipped({name: why for name, (_, why) in index.skipped.items()})
    found = tasks.search_images(query, index, model, processor, top_k=top_k)
    return [(Path(options.directory) / path.relative_to(index.directory), score) for path, score in found]


def search_vectors(options: argparse.Namespace, query: str | Path, model, processor, top_k: int) -> list:
    """By the vectors that `embed` wrote."""
    from minivlm import tasks
    from minivlm.tasks.embeddings import read_embeddings
    from minivlm.tasks.image_index import fingerprint

    names, vectors = read_embeddings(options.directory, fingerprint(model, processor))
    found = tasks.search_images(query, vectors, model, processor, top_k=top_k)
    return [(Path(names[row]), score) for row, score in found]


def run_attend(options: argparse.Namespace) -> None:
    """One sheet of all images; or, where --save is a folder, a sheet for each, in which those that are there are left out."""
    from minivlm import tasks

    place, single = Path(options.save), Path(options.save).suffix != ""
    if single:
        check_sheet_name(options.save)
    elif not place.absolute().parent.is_dir() or (place.exists() and not place.is_dir()):
        raise UserError(f"--save {place} is no folder, and none can be made there.")
    inputs = read_rows(options)
    if not single and any(place.absolute().is_relative_to(os.path.abspath(folder)) for folder in inputs.folders):
        raise UserError(
            f"--save {place} lies in the folder that is read, so its sheets would be images of it: name another."
        )
    images = [row.images[0] for row in inputs.rows]
    if single and len(images) > MOST:
        raise UserError(
            f"{len(images)} images are too many for one sheet: with --save DIR each has a sheet of its own."
        )
    check_images(images if single else [])
    model, processor = load_model(options)
    if single:
        write_sheet(tasks.attention_sheet(images, model, processor, prompt=options.prompt), options.save)
        return
    skipped = {}
    for image in images:
        sheet = place / f"{below(inputs.folders, image)}.png"
        if not sheet.exists():
            try:
                page = tasks.attention_sheet([image], model, processor, prompt=options.prompt)
            except UserError as error:
                skipped[image] = str(error)
            else:
                sheet.parent.mkdir(parents=True, exist_ok=True)
                write_sheet(page, str(sheet))
    report_skipped(skipped)


def below(folders: list[str], image: str) -> Path:
    """The path of an image below the one folder that is read, or below all of them: no two images have the same."""
    path = Path(os.path.abspath(image))
    start = Path(os.path.abspath(folders[0])) if len(folders) == 1 else Path(path.anchor)
    return path.relative_to(start if path.is_relative_to(start) else path.anchor)


def run_embed(options: argparse.Namespace) -> None:
    from minivlm.tasks.abilities import require_vectors
    from minivlm.tasks.embeddings import check_embeddings, embed, has_pyarrow
    from minivlm.tasks.image_index import fingerprint

    if not options.images and not options.texts:
        raise UserError("there is nothing to embed: name images, a folder or a list of them, or --texts FILE.")
    directory, made_by = Path(options.save), {"dtype": options.dtype, "part": options.part}
    check_embeddings(directory, made_by)
    kinds = {"images": read_rows(options) if options.images else Inputs(), "texts": Inputs()}
    if options.texts:
        kinds["texts"].rows = text_rows(options.texts, Text("caption", ("caption", "text", "title")))
    model, processor = load_model(options)
    require_vectors(model, processor, texts=bool(kinds["texts"].rows))
    made_by["model"] = fingerprint(model, processor)
    check_embeddings(directory, made_by)
    if not has_pyarrow():
        report_passed_over("pyarrow is not installed, so the metadata are lines of JSON in place of parquet.")
    for kind, inputs in kinds.items():
        rows: list[Row] = inputs.rows
        if rows:
            report_written(
                directory, embed(directory, kind, rows, model, processor, made_by=made_by, batch_size=options.batch)
            )
