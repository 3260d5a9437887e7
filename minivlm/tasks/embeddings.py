"""Vectors of images and texts as files, in clip-retrieval's layout, in parts of a fixed number of rows.

    embeddings/img_emb/img_emb_0.npy          (n, D) float32 or float16, unit length, as `encode_image` gives them
    embeddings/metadata/metadata_0.parquet    whose row is whose: "image_path"; .jsonl where pyarrow is not installed
    embeddings/text_emb/text_emb_0.npy        the same of texts,
    embeddings/text_metadata/metadata_0.…     with "caption"
    embeddings/errors.jsonl                   the images and texts that have no row, and why
    embeddings/embeddings.json                which model made them

A part is replaced as a whole, when it is full and once a minute: what is killed loses less than a minute.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minivlm.atomic_writing import write_atomically
from minivlm.datasets.official import as_json
from minivlm.errors import UserError
from minivlm.files import hold, open_lock, read_bytes, read_json
from minivlm.tasks.abilities import require_vectors
from minivlm.tasks.batches_to_files import Images, Task, Written, results
from minivlm.tasks.features import encode_pixels, encode_texts, inference
from minivlm.tasks.input_tables import Row

SAVE_EVERY = 60.0  # seconds
RECORD, ERRORS = "embeddings.json", "errors.jsonl"
KINDS = {  # of rows → the folder of their vectors, that of their metadata, and the column that names them
    "images": ("img_emb", "metadata", "image_path"),
    "texts": ("text_emb", "text_metadata", "caption"),
}


def embed_task(kind: str, model, processor) -> Task:
    """The vector of each image, or of each text, for batches_to_files.py."""
    require_vectors(model, processor, texts=kind == "texts")

    def vectors(images: Images, values: Sequence[Mapping[str, Any]]) -> list[dict]:
        if kind == "texts":
            features = encode_texts([one["caption"] for one in values], model, processor)
        else:
            with inference(model):
                features = encode_pixels(torch.cat([image for [image] in images]), model)
        return [{"vector": vector} for vector in features.cpu().numpy()]

    return vectors


def embed(
    directory: Path,
    kind: str,
    rows: Sequence[Row],
    model,
    processor,
    *,
    made_by: Mapping[str, Any],
    batch_size: int = 64,
) -> Written:
    """Write the vectors of the rows that the folder does not have. made_by: see `check_embeddings`."""
    from tqdm import tqdm

    with EmbeddingFolder(directory, kind, made_by) as folder:
        left, before = [], folder.done.copy()
        for row in rows:
            if before[name := name_of(row)]:
                before[name] -= 1
            else:
                left.append(row)
        written, proven = Written(len(rows), len(rows) - len(left)), folder.total > 0
        task = embed_task(kind, model, processor)
        with tqdm(total=len(rows), initial=written.before, desc=f"embedding {kind}", unit=" row") as bar:
            for batch in results(left, processor, task, batch_size=batch_size, proven=proven):
                errors = {name_of(row): str(why) for row, why in batch if isinstance(why, UserError)}
                folder.skip(errors)
                fine = [(row, found["vector"]) for row, found in batch if not isinstance(found, UserError)]
                folder.add([name_of(row) for row, _ in fine], [vector for _, vector in fine])
                written.errors |= errors
                bar.update(len(batch))
        written.failed = len(rows) - folder.total
    return written


def name_of(row: Row) -> str:
    return Path(row.images[0]).absolute().as_posix() if row.images else row.values["caption"]


def check_embeddings(directory: Path, made_by: Mapping[str, Any]) -> None:
    """UserError unless vectors can be written there: made_by {"dtype", "part"} and, once it is known, "model" are those of
    the vectors that are there."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--save {directory}: that is a file, and the vectors need a folder; name another.")
    if not directory.absolute().parent.is_dir():
        raise UserError(f"--save {directory}: the folder {directory.parent} does not exist; make it first.")
    if not (directory / RECORD).exists():
        if there := [name for some in KINDS.values() for name in some[:2] if (directory / name).exists()]:
            raise UserError(
                f"--save {directory}: there is a {there[0]} that sample.py did not write; name another folder."
            )
        return
    before = read_json(directory / RECORD)
    for name, value in made_by.items():
        if before.get(name) != value:
            what = (
                "another model"
                if name == "model"
                else f"--{name} {before.get(name)}, and now there is --{name} {value}"
            )
            raise UserError(f"the vectors in {directory} were made with {what}: name another folder with --save.")


class EmbeddingFolder:
    """The vectors of one kind in a folder, to be continued: `done` counts the names that are there, those of errors
    included; `total` is the number of vectors."""

    def __init__(self, directory: Path, kind: str, made_by: Mapping[str, Any]):
        self.directory, (self.vectors, self.metadata, self.column) = directory, KINDS[kind]
        self.dtype, self.part = np.dtype(made_by["dtype"]), made_by["part"]
        self.made_by, self.done, self.total = dict(made_by), Counter(), 0
        self.names: list[str] = []  # of the part that is being filled
        self.rows: list[np.ndarray] = []

    def __enter__(self) -> EmbeddingFolder:
        directory = self.directory
        try:
            for name in (self.vectors, self.metadata):
                (directory / name).mkdir(parents=True, exist_ok=True)
            self.lock = open_lock(directory / ".lock")
        except OSError as error:
            raise UserError(f"{directory} cannot be written: {error.strerror or error}.") from None
        if not hold(self.lock):
            raise UserError(f"another process is writing to {directory}.")
        known = read_json(directory / RECORD) if (directory / RECORD).exists() else {}
        self.ending = known.get("metadata") or ("parquet" if has_pyarrow() else "jsonl")
        if not known:
            record = as_json({**self.made_by, "metadata": self.ending})
            write_atomically(directory / RECORD, lambda path: path.write_text(record, encoding="utf-8"))
        self.read()
        self.saved = time.monotonic()
        return self

    def __exit__(self, *exception) -> None:
        """Also after Ctrl-C and errors: what was encoded is kept."""
        try:
            self.save()
        finally:
            self.lock.close()

    def read(self) -> None:
        """Parts 0, 1, … as far as they are whole; the last of them is filled up."""
        self.number = 0
        while len(names := self.read_part()) == self.part:
            self.done.update(names)
            self.number, self.names, self.rows = self.number + 1, [], []
        self.done.update(names)
        self.total = self.number * self.part + len(names)
        if (self.directory / ERRORS).exists():
            whole = read_bytes(self.directory / ERRORS).split(b"\n")[:-1]
            self.done.update(row[self.column] for row in map(json.loads, whole) if self.column in row)

    def read_part(self) -> list[str]:
        vectors, metadata = self.paths()
        if not (vectors.exists() and metadata.exists()):
            return []
        rows, names = np.load(vectors), [row[self.column] for row in read_metadata(metadata)]
        n = min(len(rows), len(names))  # killed between the two
        self.names, self.rows = names[:n], list(rows[:n])
        return self.names

    def paths(self) -> tuple[Path, Path]:
        directory, i = self.directory, self.number
        return (
            directory / self.vectors / f"{self.vectors}_{i}.npy",
            directory / self.metadata / f"metadata_{i}.{self.ending}",
        )

    def add(self, names: Sequence[str], rows: Sequence[np.ndarray]) -> None:
        for name, row in zip(names, rows, strict=True):
            self.names.append(name)
            self.rows.append(row.astype(self.dtype))
            if len(self.names) == self.part:
                self.save()
                self.number, self.names, self.rows = self.number + 1, [], []
        self.total += len(names)
        if time.monotonic() - self.saved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        self.saved = time.monotonic()
        if not self.names:
            return
        vectors, metadata = self.paths()
        rows, names = np.stack(self.rows), [{self.column: name} for name in self.names]
        write_atomically(vectors, lambda path: save_array(path, rows))
        write_atomically(metadata, lambda path: write_metadata(path, names, self.ending))

    def skip(self, errors: Mapping[str, str]) -> None:
        if errors:
            with open(self.directory / ERRORS, "a", encoding="utf-8") as file:
                file.writelines(as_json({self.column: name, "error": why}) + "\n" for name, why in errors.items())


def save_array(path: Path, rows: np.ndarray) -> None:
    with open(path, "wb") as file:  # a name would be given another ending
        np.save(file, rows)


# ---- metadata --------------------------------------------------------------------------------------------------------


def has_pyarrow() -> bool:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return False
    return True


def write_metadata(path: Path, rows: Sequence[Mapping[str, str]], ending: str) -> None:
    if ending == "jsonl":
        path.write_text("".join(as_json(row) + "\n" for row in rows), encoding="utf-8")
        return
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def read_metadata(path: Path) -> Iterable[dict[str, Any]]:
    """UserError where it is parquet, and pyarrow is not installed."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in read_bytes(path).splitlines() if line.strip()]
    if not has_pyarrow():
        raise UserError(f"{path} is read with pyarrow, which is not installed: pip install pyarrow.")
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_embeddings(directory: str | Path) -> bool:
    return (Path(directory) / KINDS["images"][0]).is_dir()


def read_embeddings(directory: str | Path, model: str | None = None) -> tuple[list[str], torch.Tensor]:
    """The names of the images and their vectors (n, D) float32, of a folder that `embed` or clip-retrieval wrote.

    model: the fingerprint of the model that is to have made them. UserError: another model, parts that do not fit together.
    """
    directory, (vectors, metadata, column) = Path(directory), KINDS["images"]
    made_by = read_json(directory / RECORD).get("model") if (directory / RECORD).exists() else None
    if None not in (made_by, model) and made_by != model:
        raise UserError(f"the vectors in {directory} were made with another model: give the model they were made with.")
    names, parts = [], []
    for path in sorted((directory / vectors).glob("*.npy"), key=number):
        beside = [p for p in (directory / metadata).glob("metadata_*") if number(p) == number(path)]
        if len(beside) != 1:
            raise UserError(
                f"{path} has {len(beside)} files of metadata in {directory / metadata}, where one is wanted."
            )
        part, rows = np.load(path, mmap_mode="r"), [row.get(column) for row in read_metadata(beside[0])]
        if len(part) != len(rows) or None in rows:
            raise UserError(
                f"{path} has {len(part)} rows, and {beside[0]} names {len(rows) - rows.count(None)} images."
            )
        names += rows
        parts.append(torch.from_numpy(np.array(part, dtype=np.float32)))
    if not parts:
        raise UserError(f"{directory / vectors} holds no .npy files.")
    return names, torch.cat(parts)


def number(path: Path) -> int:
    found = re.search(r"(\d+)$", path.stem)
    return int(found[1]) if found else -1
