"""Opens a folder as images with conversations, or as texts, by what it contains."""

from __future__ import annotations

import os

from minivlm.datasets.conversation_base import Conversations, Question
from minivlm.datasets.folder_conversations import FolderConversations
from minivlm.datasets.forms import recognised
from minivlm.datasets.interleaved import Interleaved, is_interleaved
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.conversations import ShapesConversations
from minivlm.datasets.source import judged

__all__ = ["Conversations", "Question", "has_conversations", "open_conversations", "open_texts"]


def open_conversations(directory: str | os.PathLike, split: str, *, image_size: int | None) -> Conversations:
    """One split of a folder that holds the shapes world; or files with conversations, questions or captions in any form,
    of which all that are there are read; or images in class folders.

    image_size  the model's; training images are cached with a shorter side of 1.25 times it. None: no image is used, so
                none is decoded
    """
    if is_world(directory):
        return ShapesConversations(directory, judged(directory, split))
    return FolderConversations(directory, split, image_size=image_size)


def has_conversations(directory: str | os.PathLike) -> bool:
    """Whether a folder holds conversations, questions or captions."""
    return is_world(directory) or bool(recognised(directory))


def open_texts(directory: str | os.PathLike, split: str) -> list[str]:
    """All texts of one split of a folder, each once, those of interleaved.jsonl included."""
    sources: list = [Interleaved(directory, split, image_size=None)] if is_interleaved(directory) else []
    if has_conversations(directory) or not sources:
        sources.append(open_conversations(directory, split, image_size=None))
    return list(dict.fromkeys(text for source in sources for text in source.texts()))
