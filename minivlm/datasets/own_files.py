"""The files of our own names, which say by themselves what a folder holds: captions.jsonl, vqa.jsonl, conversations.json.

DIR/conversations.json  LLaVA's format: [{"id": "1", "image": "a.jpg", "conversations": [
                        {"from": "human", "value": "<image>\\nwhat is it?"}, {"from": "gpt", "value": "a kite"}]}]
                        "image" may be a list, one for each <image>, or absent; optional: "split"
DIR/vqa.jsonl           {"image": "a.jpg", "question": "what is it?", "answer": "a kite"}, or questions.jsonl
                        optional: "answers": [all that are right], "split", and "kind", "answer_type" or
                        "question_type", for each of which the accuracy is reported
DIR/captions.jsonl      {"image": "a.jpg", "captions": ["…"]}, or "caption": "…"; optional: "split", "label"
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minivlm.datasets.entries import Conversation, Item, Quiz
from minivlm.datasets.rows import (
    CAPTION_EXAMPLE,
    QUESTION_EXAMPLE,
    Find,
    add_item,
    caption_item,
    has_failed,
    image_of,
    passed_over,
    read_conversation,
    read_question,
    split_of,
)
from minivlm.datasets.tree import Tree
from minivlm.errors import UserError
from minivlm.files import parse_json, read_bytes

FIXED = {  # a file of such a name → what it gives, in the order in which they are read
    "conversations.json": "conversations",
    "vqa.jsonl": "questions",
    "questions.jsonl": "questions",
    "captions.jsonl": "captions",
}


def read_fixed(file: Path, problems: list[str] | None, notes: list[str]) -> list:
    """The samples of one of these files. What is wrong raises UserError, or is added to `problems`."""
    find = Tree(file.parent).image
    if FIXED[file.name] == "conversations":
        return read_conversations(file, find, problems)
    return (read_captions if FIXED[file.name] == "captions" else read_questions)(file, find, problems, notes)


def read_captions(file: Path, find: Find, problems: list[str] | None, notes: list[str] | None = None) -> list[Item]:
    """Several lines about one image become one item with all their captions."""
    items: dict[str, Item] = {}
    read_lines(file, lambda values: add_item(items, caption_item(values, find)), CAPTION_EXAMPLE, problems, notes)
    if not items and not problems:
        raise UserError(f"{file} is empty: it needs one line an image, like {CAPTION_EXAMPLE}.")
    return list(items.values())


def read_questions(file: Path, find: Find, problems: list[str] | None, notes: list[str] | None = None) -> list[Quiz]:
    """One entry for each image and split: in some datasets an image has questions to train on, and others to test."""
    entries: dict[tuple, Quiz] = {}

    def add(values: dict) -> None:
        image, split = find(image_of(values, QUESTION_EXAMPLE)), split_of(values)
        asked = read_question(values)
        entries.setdefault((image, split), Quiz([image], split, image)).asked.append(asked)

    read_lines(file, add, QUESTION_EXAMPLE, problems, notes)
    if not entries and not problems:
        raise UserError(f"{file} is empty: it needs one line a question, like {QUESTION_EXAMPLE}.")
    return list(entries.values())


def read_conversations(file: Path, find: Find, problems: list[str] | None) -> list[Conversation]:
    try:
        values = parse_json(read_bytes(file), texts=False)  # of each entry by itself
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{file} is not JSON ({error}).") from None
    if not isinstance(values, list) or not values:
        raise UserError(f'{file} holds no list of conversations, [{{"image": …, "conversations": […]}}, …].')
    entries = []
    for number, value in enumerate(values, 1):
        name = f"entry {number}" + (f" (id {value['id']})" if isinstance(value, dict) and "id" in value else "")
        try:
            entries.append(read_conversation(value, find, name))
        except (ValueError, UserError) as error:
            message = f"{file}, {name}: {str(error).rstrip('.')}."
            if problems is None:
                raise UserError(message) from error
            problems.append(message)
    return entries


def read_lines(
    file: Path,
    add: Callable[[Any], None],
    example: str,
    problems: list[str] | None = None,
    notes: list[str] | None = None,
) -> None:
    """add(values) for each line of JSON; a ValueError from it, or from reading, names the line, as in `read_fixed`."""
    failed = 0
    for number, line in enumerate(read_bytes(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = read_json(line, example)
            if has_failed(values):
                failed += 1
            else:
                add(values)
        except ValueError as error:
            message = f"{file}, line {number}: {error}."
            if problems is None:
                raise UserError(message) from error
            problems.append(message)
    if failed and notes is not None:
        notes.append(passed_over(failed, file))


def read_json(line: bytes, example: str) -> Any:
    """One line of JSON. ValueError: what is wrong with it."""
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"it is not JSON ({error.msg} at character {error.pos + 1}); a line looks like {example}"
        ) from None
