"""Which objects a text names, and which are in an image: what hallucination is judged by (Rohrbach et al. 2018, "Object
Hallucination in Image Captioning", §3.2).

    the shapes world            "red circle", by exact parsing
    a folder of one's own       the names of --objects FILE, a line each: a name, and after commas its synonyms;
                                else the categories of COCO's instances in the folder, else the classes of a labelled one

There is what a box or a label says, or any reference caption of the image.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minivlm.datasets.boxes import boxes_in
from minivlm.datasets.conversations import Conversations
from minivlm.datasets.folder import open_pairs
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.facts import pair
from minivlm.datasets.shapes.scenes import CLASSES
from minivlm.datasets.shapes.text import parse
from minivlm.errors import UserError
from minivlm.files import read_bytes

ENDINGS = (("y", "ies"), ("fe", "ves"), ("f", "ves"), ("man", "men"), ("child", "children"))  # of one word, and of many
IRREGULAR = {"person": ("people",), "mouse": ("mice",), "goose": ("geese",), "skis": ("ski",)}
HOW = "give the names that count as objects, a line each, as --objects FILE"


@dataclass(frozen=True)
class Objects:
    """names: all that there are. named: text → the names in it, one for each mention. question: "is there {}?" of a name.
    labels: the names that are known to be in an image, by its key, beside those in its captions."""

    names: tuple[str, ...]
    named: Callable[[str], list[str]]
    labels: Callable[[str], set[str]]
    question: str = "is there {} in the image?"

    def there(self, conversations: Conversations, index: int) -> set[str]:
        of_captions = {name for text in conversations.captions(index) for name in self.named(text)}
        return of_captions | self.labels(conversations.key(index))

    def ask(self, name: str) -> str:
        return self.question.format(with_article(name))


def with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def objects_of(data, file: str | None = None) -> Objects | None:
    """Those of a folder; None where nothing says what its objects are. UserError for a file that names none."""
    if is_world(data):
        if file is not None:
            raise UserError(f"--objects {file}: the objects of the shapes world are known; leave it out.")
        found = lambda text: [pair(thing) for thing in parse(text)]
        return Objects(CLASSES, found, lambda key: set(), "is there {}?")
    boxes = boxes_in(data)
    of_boxes = lambda key: {box.name for box in boxes.get(Path(key).name, [])}
    if file is not None:
        synonyms = read_synonyms(file)
        found = mentions(synonyms)
        return Objects(
            tuple(dict.fromkeys(synonyms.values())), found, lambda key: {x for n in of_boxes(key) for x in found(n)}
        )
    if boxes:
        names = sorted({box.name for some in boxes.values() for box in some})
        return Objects(tuple(names), mentions({name: name for name in names}), of_boxes)
    pairs = open_pairs(data, "test", image_size=8)
    if not pairs.classes:
        return None
    classes = [name.replace("_", " ").lower() for name in pairs.classes]
    label = {pairs.key(i): {classes[at]} for i, at in enumerate(pairs.labels) if at >= 0}
    return Objects(tuple(classes), mentions({name: name for name in classes}), lambda key: label.get(key, set()))


def read_synonyms(file: str) -> dict[str, str]:
    """Each word → the name of its object, the first of its line."""
    text = read_bytes(Path(file)).decode("utf-8-sig", "replace")
    lines = [[word.strip().lower() for word in line.split(",") if word.strip()] for line in text.splitlines()]
    synonyms: dict[str, str] = {}
    for words in lines:
        for word in words:
            if synonyms.setdefault(word, words[0]) != words[0]:
                raise UserError(
                    f"--objects {file}: {word!r} is of {synonyms[word]!r} and of {words[0]!r}: keep one of them."
                )
    if not synonyms:
        raise UserError(f"--objects {file} names no objects: write a name a line, and after commas its synonyms.")
    return synonyms


def mentions(synonyms: dict[str, str]) -> Callable[[str], list[str]]:
    """Finds names in a text, in singular or plural, the longer ones first: "teddy bear" holds no bear."""
    known = {form: name for word, name in synonyms.items() for form in plurals(word)} | synonyms
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(known, key=len, reverse=True)))})\b")
    return lambda text: [known[match[1]] for match in pattern.finditer(text.lower())]


def plurals(word: str) -> list[str]:
    """ "teddy bear" → "teddy bears", "wine glass" → "wine glasses", "knife" → "knives", "puppy" → "puppies"."""
    first, _, last = word.rpartition(" ")
    forms = [f"{last}s", f"{last}es", *IRREGULAR.get(last, ())]
    forms += [f"{last[: -len(end)]}{many}" for end, many in ENDINGS if last.endswith(end)]
    return [f"{first} {form}".strip() for form in forms]
