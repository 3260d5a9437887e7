"""One row of a table, or one entry of a list, as a sample: an image with captions, a question, a conversation.

A ValueError says what is wrong with it, without the full stop; whoever reads the file adds where.
"""

from __future__ import annotations

import ast
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minivlm.conversation import PLACEHOLDER, Turn, check_conversation, with_images
from minivlm.datasets.class_folders import SPLIT_NAMES
from minivlm.datasets.entries import Asked, Conversation, Item
from minivlm.files import check_texts
from minivlm.special_tokens import as_text

Find = Callable[[str], str]  # an image as a file calls it → its path below the folder; ValueError: there is none

CAPTION_EXAMPLE = '{"image": "a.jpg", "caption": "a red kite"}'
QUESTION_EXAMPLE = '{"image": "a.jpg", "question": "how many dogs are there?", "answer": "two"}'
CONVERSATION_EXAMPLE = (
    '{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nwhat is it?"}, '
    '{"from": "gpt", "value": "a kite"}]}'
)
MESSAGES_EXAMPLE = (
    '{"image": "a.jpg", "messages": [{"role": "user", "content": "<image>\\nwhat is it?"}, '
    '{"role": "assistant", "content": "a kite"}]}'
)
ROLES = {"human": "user", "gpt": "assistant"}


def image_of(values: Any, example: str) -> str:
    """The image that a line names; ValueError if it names none."""
    if not isinstance(values, dict) or not isinstance(values.get("image"), str) or not values["image"]:
        raise ValueError(f'it names no "image"; a line looks like {example}')
    return values["image"]


def caption_item(values: dict, find: Find) -> Item:
    image = image_of(values, CAPTION_EXAMPLE)
    given = [value for name in ("captions", "caption") if (value := values.get(name)) is not None]
    captions = [c for value in given for c in (value if isinstance(value, list) else [value])]
    if not given or not all(isinstance(c, str) for c in captions):
        raise ValueError(
            f'it has no caption: "captions" is a list of strings, "caption" one string, as in {CAPTION_EXAMPLE}'
        )
    captions = [c.strip() for c in captions if c.strip()]
    if not captions:
        raise ValueError("its caption is empty")
    return Item(find(image), captions, label_of(values), split_of(values))


def has_failed(row: Any) -> bool:
    """Was it written by `sample.py --save` for an image that could not be read: with an error, and nothing to learn?"""
    texts = ("caption", "captions", "answer", "answers")
    return (
        isinstance(row, dict)
        and isinstance(row.get("error"), str)
        and bool(row["error"])
        and not any(map(row.get, texts))
    )


def passed_over(failed: int, file: Path) -> str:
    rows = "1 row is" if failed == 1 else f"{failed} rows are"
    return f"{rows} passed over in {file.name}, with an error in place of a result."


def label_of(values: dict) -> str | None:
    """The class that a line names, if it does."""
    if (label := values.get("label")) is None:
        return None
    if not isinstance(label, (str, int, float)) or label != label:
        raise ValueError(f"its label is {label!r}, but must be a word or a number")
    if not (name := unicodedata.normalize("NFC", str(label)).strip()):
        raise ValueError("its label is empty: give it a name, or leave it out")
    return name


def split_of(values: dict, names: Mapping[str, str] = SPLIT_NAMES) -> str | None:
    """The split that a line or an entry names, if it does."""
    if (split := values.get("split")) is None:
        return None
    if str(split).lower() not in names:
        raise ValueError(f"its split is {split!r}, but there are train, val and test")
    return names[str(split).lower()]


def add_item(items: dict[str, Item], item: Item) -> None:
    """Add `item`, or its captions to the item of the same image; ValueError if the two disagree on anything else."""
    known = items.setdefault(item.image, item)
    if (known.split, known.label) != (item.split, item.label):
        raise ValueError(f"an earlier line gives {item.image!r} another split or label")
    known.captions = [*known.captions, *(c for c in item.captions if c not in known.captions)]


def several(value: Any) -> list:
    """A cell as a list: what a list was written as, "['a', 'b']", is one again."""
    if isinstance(value, str) and value.lstrip()[:1] == "[" and value.rstrip()[-1:] == "]":
        try:
            read = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]
        return read if isinstance(read, list) and all(isinstance(one, str) for one in read) else [value]
    return value if isinstance(value, list) else [] if value is None else [value]


def read_question(values: dict) -> Asked:
    """A line as a question; ValueError: what is wrong with it.

    Where there is no "answer", the most frequent one of "answers" is learned.
    """
    text, answers = values.get("question"), values.get("answers")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'it has no "question"; a line looks like {QUESTION_EXAMPLE}')
    answers = answers if isinstance(answers, list) else [] if answers is None else [answers]
    given = answers if values.get("answer") is None else [values["answer"]]
    if not given:
        raise ValueError(f"it has no answer; a line looks like {QUESTION_EXAMPLE}")
    if not all(isinstance(a, (str, int, float)) and a == a for a in given + answers):  # NaN is none
        raise ValueError(f'an answer is a string and "answers" a list of them, as in {QUESTION_EXAMPLE}')
    given, answers = [str(a).strip() for a in given], [str(a).strip() for a in answers]
    if not any(given):
        raise ValueError("its answer is empty")
    answer = Counter(a for a in given if a).most_common(1)[0][0]
    right = tuple(answers) if answer in answers else (answer, *answers)
    kinds = [values[name] for name in ("kind", "answer_type", "question_type") if values.get(name)]
    return Asked(as_text(text.strip()), answer, right, str(kinds[0]) if kinds else "all")


# ------------------------------------------------------------------------------------------------------- conversations


def read_conversation(values: Any, find: Find, name: str) -> Conversation:
    """An entry as a conversation; ValueError or UserError: what is wrong with it."""
    said = values.get("conversations", values.get("messages")) if isinstance(values, dict) else None
    if not isinstance(said, list):
        raise ValueError(f'it has no list "conversations"; an entry looks like {CONVERSATION_EXAMPLE}')
    check_texts(values)
    images = values.get("image") or values.get("images") or []  # datasets use either
    images = images if isinstance(images, list) else [images]
    if not all(isinstance(image, str) for image in images):
        raise ValueError('its "image" is no file name, and no list of them')
    shown: list[str] = []
    turns = [read_turn(turn, shown) for turn in said]
    if shown and images and len(shown) != len(images):
        raise ValueError(f"its turns show {len(shown)} images, but its own list has {len(images)}")
    images = images or shown
    if images and "role" in said[0] and not any(PLACEHOLDER in turn.text for turn in turns):
        turns = in_front(turns, len(images))
    check_conversation(turns, len(images))
    images = [find(image) for image in images]
    key = images[0] if images else str(values.get("id", name))
    return Conversation(images, split_of(values), key, turns, name=name)


def in_front(turns: Sequence[Turn], images: int) -> list[Turn]:
    """Images that no turn of OpenAI's form places stand in front of the first question."""
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    return [Turn(t.role, with_images(t.text, images)) if i == first else t for i, t in enumerate(turns)]


def read_turn(turn: Any, shown: list[str]) -> Turn:
    """A turn in LLaVA's words (from, value) or OpenAI's (role, content). shown: gets the images that its parts name."""
    if isinstance(turn, dict) and "role" in turn:
        content = turn.get("content")
        text = "\n".join(read_part(part, shown) for part in content) if isinstance(content, list) else content
        if not isinstance(turn["role"], str) or not isinstance(text, str):
            raise ValueError(f"a turn has a role and a content, as in {MESSAGES_EXAMPLE}")
        return Turn(ROLES.get(turn["role"], turn["role"]), text)
    if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("from", "value")):
        raise ValueError('a turn looks like {"from": "human", "value": "what is it?"}, with "gpt" for the answer')
    return Turn({**ROLES, "user": "user", "assistant": "assistant"}.get(turn["from"], turn["from"]), turn["value"])


def read_part(part: Any, shown: list[str]) -> str:
    """A part of a turn: a text, or an image, {"type": "image", "image": "a.jpg"}; OpenAI's "image_url" is one too."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in ("image", "image_url"):
        raise ValueError(
            f'a part of a turn is {{"type": "text", "text": …}} or {{"type": "image"}}, but one is of the type {kind!r}'
        )
    named = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key)), None)
    named = named.get("url") if isinstance(named, dict) else named
    if named is not None and not isinstance(named, str):
        raise ValueError("a part of a turn is an image without a file name")
    if named and named.startswith(("http:", "https:", "data:")):
        raise ValueError(f"a turn shows the image {named[:60]!r}, but must name a file of the folder: download it")
    shown += [named.removeprefix("file://")] if named else []
    return PLACEHOLDER
