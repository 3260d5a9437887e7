"""The rows of a table, gathered into samples: images with captions, questions about an image, conversations."""

from __future__ import annotations

from typing import Any

from minivlm.datasets.class_folders import SPLIT_VALUES
from minivlm.datasets.entries import Conversation, Item, Quiz
from minivlm.datasets.folder_files import TEMPLATES
from minivlm.datasets.keys import Keys
from minivlm.datasets.rows import (
    CAPTION_EXAMPLE,
    CONVERSATION_EXAMPLE,
    QUESTION_EXAMPLE,
    Find,
    add_item,
    caption_item,
    read_conversation,
    read_question,
    several,
    split_of,
)


class Rows:
    """Collects the samples of a table."""

    def __init__(self, keys: Keys, find: Find, split: str | None, names: dict[str, str]):
        self.keys, self.find, self.split, self.names = keys, find, split, names
        self.without = 0

    def values(self, row: Any, example: str) -> dict[str, Any]:
        """The row by our own names. ValueError: it is none, or names no image."""
        keys = self.keys
        if not isinstance(row, dict):
            raise ValueError(f"it is no object with named fields, as in {example}")
        image = row.get(keys.image) if keys.image else None
        image = f"{image}" if isinstance(image, int) and not isinstance(image, bool) else image
        if keys.gives != "conversations" and not (isinstance(image, str) and image):
            raise ValueError(f'it names no image: its "{keys.image}" is empty')
        split = row.get(keys.split) if keys.split else None
        split = split_of({"split": split}, SPLIT_VALUES) if split is not None and str(split).strip() else self.split
        return {"image": image, "split": split}

    def name(self, row: Any, where: str) -> str:
        return where

    def notes(self, file: str) -> list[str]:
        return []


class CaptionRows(Rows):
    """Several rows about one image become one item with all their captions."""

    def __init__(self, *args):
        super().__init__(*args)
        self.items: dict[tuple[str, str | None], Item] = {}
        self.labels: dict[str, list[str]] = {}  # shared by all images of a class

    def add(self, row: Any, where: str) -> None:
        values = self.values(row, CAPTION_EXAMPLE)
        label = row.get(self.keys.label) if self.keys.label else None
        if label is not None and str(label) in self.names:
            label = self.names[str(label)]
        captions = [one for key in self.keys.captions for one in several(row.get(key))]
        captions = [one.get("raw", one.get("caption")) if isinstance(one, dict) else one for one in captions]
        if not self.keys.captions and label is not None:
            captions = self.labels.setdefault(str(label), [template.format(label) for template in TEMPLATES])
        if not captions:
            raise ValueError(f'it has no caption: its "{" and ".join(self.keys.captions) or self.keys.label}" is empty')
        item = caption_item({**values, "captions": captions, "label": label}, self.find)
        if (item.image, item.split) in self.items and self.keys.label is None:
            item.label = self.items[item.image, item.split].label
        one = {item.image: known} if (known := self.items.get((item.image, item.split))) else {}
        add_item(one, item)
        self.items[item.image, item.split] = one[item.image]

    def samples(self) -> list[Item]:
        return list(self.items.values())


class QuestionRows(Rows):
    """One sample for each image and split: in some datasets an image has questions to train on, and others to test."""

    def __init__(self, *args):
        super().__init__(*args)
        self.quizzes: dict[tuple[str, str | None], Quiz] = {}

    def add(self, row: Any, where: str) -> None:
        values, keys = self.values(row, QUESTION_EXAMPLE), self.keys
        answer = row.get(keys.answer) if keys.answer else None
        answers = row.get(keys.answers) if keys.answers else None
        if isinstance(answer, list) and answers is None:  # ALBEF's and BLIP's files: "answer" holds all of them
            answer, answers = None, answer
        answers = [one.get("answer") if isinstance(one, dict) else one for one in several(answers)] or None
        asked = read_question(
            {"question": row.get(keys.question), "answer": answer, "answers": answers, "kind": row.get(keys.kind or "")}
        )
        image = self.find(values["image"])
        self.quizzes.setdefault((image, values["split"]), Quiz([image], values["split"], image)).asked.append(asked)

    def samples(self) -> list[Quiz]:
        return list(self.quizzes.values())


class ConversationRows(Rows):
    """LLaVA's conversations, or OpenAI's messages. A first turn of the assistant's is dropped, as LLaVA's own code does."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read: list[Conversation] = []

    def name(self, row: Any, where: str) -> str:
        return where + (f" (id {row['id']})" if isinstance(row, dict) and "id" in row else "")

    def add(self, row: Any, where: str) -> None:
        values = self.values(row, CONVERSATION_EXAMPLE)
        turns = row.get(self.keys.turns)
        first = turns[0] if isinstance(turns, list) and len(turns) > 1 and isinstance(turns[0], dict) else {}
        if first.get("from", first.get("role")) in ("gpt", "assistant"):
            turns, self.without = turns[1:], self.without + 1
        entry = {**values, "conversations": turns}
        entry |= {"id": row["id"]} if "id" in row else {}
        self.read.append(read_conversation(entry, self.find, self.name(row, where)))

    def samples(self) -> list[Conversation]:
        return self.read

    def notes(self, file: str) -> list[str]:
        n = self.without
        return [f"{n} conversations of {file} start with the assistant: that turn is left out."] if n else []
