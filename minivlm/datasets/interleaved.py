"""Images between texts, as they stand on a page: a folder with interleaved.jsonl.

DIR/interleaved.jsonl   a document a line, its segments in their order (images are found as in folder.py):
                        [{"image": "a.jpg"}, {"text": "a red kite"}, {"image": "b.jpg"}, {"text": "its owner"}]

A model that is shown an image in the middle of a text learns from what follows: Alayrac et al. 2022, "Flamingo", §3.2.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minivlm.conversation import IGNORED, PLACEHOLDER, Sample
from minivlm.datasets.entries import Entry
from minivlm.datasets.folder_conversations import FolderEntries
from minivlm.datasets.judge import leave_out
from minivlm.datasets.own_files import read_lines
from minivlm.datasets.tree import Tree
from minivlm.errors import UserError
from minivlm.processor import Processor

FILE = "interleaved.jsonl"
EXAMPLE = '[{"image": "a.jpg"}, {"text": "a red kite"}]'


@dataclass
class Document(Entry):
    pieces: list[str]  # texts, and an <image> placeholder for each image


class Interleaved(FolderEntries):
    """A split of a folder's documents; how it is drawn, and broken images, as in `FolderEntries`.

    Documents without an image are left out, and counted in `notes`. UserError: a line that is no document, and where
    none has an image.
    """

    entries: list[Document]

    def __init__(self, directory: str | os.PathLike, split: str, *, image_size: int | None):
        documents, without = read_documents(Path(directory))
        super().__init__(directory, split, documents, image_size=image_size)
        if without:
            of = len(documents) + without
            self.notes = [*self.notes, f"{without} of {of} documents are skipped because they have no image."]

    def leave_out(self, processor: Processor) -> None:
        """Leave out the documents of which nothing fits the context, and list them in `notes` (judge.py)."""
        problem = document_problem(processor)

        def judge(entry: Document) -> tuple[Document | None, list[str]]:
            texts = "".join(entry.pieces), "".join(ahead(entry.pieces))
            why = [w for w in map(problem, texts) if w][:1]
            return (None if why else entry), why

        self.entries = leave_out(self.entries, judge, self.notes)

    def text(self, index: int, rng: np.random.Generator | None = None) -> str:
        """The document with a placeholder for each image.

        rng: half of the time each image stands in front of the text that it follows, since it may belong to either
        (the paper's p_next).
        """
        pieces = self.entries[index].pieces
        return "".join(ahead(pieces) if rng is not None and rng.random() < 0.5 else pieces)

    def texts(self) -> Iterator[str]:
        """All words of the split, each text once: what a tokeniser and a language model are trained on."""
        yield from dict.fromkeys(piece for entry in self.entries for piece in entry.pieces if piece != PLACEHOLDER)


def ahead(pieces: list[str]) -> list[str]:
    """[text, image, other text] → [image, text, other text]: each image before the text that it stood behind."""
    moved, text = [], []
    for piece in pieces:
        if piece == PLACEHOLDER:
            moved.append(PLACEHOLDER)
        else:
            moved, text = moved + text, [piece]
    return moved + text


def encode_document(text: str, processor: Processor, *, context: int | None = None) -> Sample:
    """Start token, text with its placeholders, end token; labels on what follows the first image, but not on images.

    context: no more tokens than this. What the first image cannot explain is left out first, then the end, images
    and all: the sample has as many of the document's images as it has placeholders. ValueError for a text without one.
    """
    placeholder = processor.image_token_id
    fence = processor.config.image_fence
    image_tokens = {placeholder} if fence is None else {placeholder, processor.tokenizer.token_to_id(fence)}
    start, end = ([] if token is None else [token] for token in processor.frame)
    body = [*processor.ids(text), *end]
    if placeholder not in body:
        raise ValueError(
            f"a document has an {PLACEHOLDER} placeholder for each of its images, but here is none: {text[:40]!r}"
        )
    first = next(i for i, token in enumerate(body) if token in image_tokens)
    surplus = 0 if context is None else max(0, len(start) + len(body) - context)
    tokens = [*start, *body[min(surplus, first) :]][:context]
    labels = [t if i > tokens.index(placeholder) and t not in image_tokens else IGNORED for i, t in enumerate(tokens)]
    return Sample(tokens, labels, [], surplus)


def document_problem(processor) -> Callable[[str], str | None]:
    """A document → why nothing can be learned from it (as in judge.py): a token has to fit behind its first image."""

    def problem(text: str) -> str | None:
        labels = encode_document(text, processor, context=processor.context).labels
        if all(label == IGNORED for label in labels):
            return f"no text behind the first image lies within the context of {processor.context} tokens."
        return None

    return problem


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_interleaved(directory: str | os.PathLike) -> bool:
    return (Path(directory) / FILE).is_file()


def read_documents(directory: Path) -> tuple[list[Document], int]:
    """The documents with images, and how many have none."""
    if not is_interleaved(directory):
        raise UserError(f"{directory} holds no documents of images and texts: looked for {FILE}.")
    find = Tree(directory).image
    read: list[Document] = []
    read_lines(directory / FILE, lambda values: read.append(read_document(values, find)), EXAMPLE)
    shown = [document for document in read if document.images]
    if not shown:
        raise UserError(
            f"none of the {len(read)} documents in {directory / FILE} has an image: a line looks like {EXAMPLE}."
        )
    return shown, len(read) - len(shown)


def read_document(values: Any, find) -> Document:
    """A line as a document; ValueError: what is wrong with it. Texts that follow each other become one."""
    if not isinstance(values, list) or not all(is_segment(segment) for segment in values):
        raise ValueError(f"it is no list of images and texts; a line looks like {EXAMPLE}")
    images, pieces = [], []
    for segment in values:
        if "image" in segment:
            images.append(find(segment["image"]))
            pieces.append(PLACEHOLDER)
            continue
        if PLACEHOLDER in segment["text"]:
            raise ValueError(
                f"a text has an {PLACEHOLDER} placeholder, so there are more placeholders than images: an image is a segment, "
                f"as in {EXAMPLE}"
            )
        text = " ".join(segment["text"].split())
        if text and pieces and pieces[-1] != PLACEHOLDER:
            pieces[-1] += f" {text}"
        elif text:
            pieces.append(text)
    if not any(piece != PLACEHOLDER for piece in pieces):
        raise ValueError("it has no text")
    return Document(images, None, images[0] if images else "", pieces)


def is_segment(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and any(isinstance(value.get(k), str) for k in ("image", "text"))
