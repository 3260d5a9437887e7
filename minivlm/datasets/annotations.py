"""JSON files in which images and what is said about them are lists of their own: COCO's captions, Karpathy's splits, VQA v2.

    {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": [{"image_id": 7, "caption": "a kite"}]}      COCO
    {"images": [{"filename": "7.jpg", "filepath": "val2014", "split": "restval", "sentences": [{"raw": …}]}]}  Karpathy
    {"questions": [{"question_id": 1, "image_id": 7, "question": …}]} and {"annotations": [{"question_id": 1, "answers": …}]}

Lin et al. 2014 (COCO); Karpathy and Fei-Fei 2015; Goyal et al. 2017 (VQA v2).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minivlm.datasets.class_folders import SPLIT_VALUES
from minivlm.datasets.entries import Asked, Item, Quiz
from minivlm.datasets.rows import Find, read_question, split_of
from minivlm.datasets.tree import NoImage
from minivlm.errors import UserError
from minivlm.files import check_text, check_texts, parse_json, read_bytes

Lists = dict[str, list[dict]]


def lists_in(path: Path) -> Lists:
    """The lists of objects in a JSON object, by name. ValueError: it is not JSON."""
    values = parse_json(read_bytes(path), texts=False)
    lists = values.items() if isinstance(values, dict) else ()
    return {name: value for name, value in lists if isinstance(value, list) and value and isinstance(value[0], dict)}


def kind_of(lists: Lists) -> str | None:
    """ "coco", "karpathy", "instances", "questions", "answers"; None: a file of another kind."""
    if any("sentences" in image for image in lists.get("images", ())[:100]):
        return "karpathy"
    annotations = lists.get("annotations", [])
    if "images" in lists and annotations:
        return "coco" if any("caption" in one for one in annotations[:100]) else "instances"
    if "question" in lists.get("questions", [{}])[0]:
        return "questions"
    if (
        annotations
        and "question_id" in annotations[0]
        and annotations[0].keys() & {"answers", "multiple_choice_answer"}
    ):
        return "answers"
    return None


def first_images(lists: Lists, kind: str, n: int = 8) -> list[str]:
    """The names of the first images that have a caption."""
    if kind == "karpathy":
        return [karpathys_name(image) for image in lists["images"][:n] if "filename" in image]
    wanted = {one.get("image_id") for one in lists["annotations"][:n]}
    return [f"{image.get('file_name')}" for image in lists["images"] if image.get("id") in wanted]


def karpathys_name(image: dict) -> str:
    folder = image.get("filepath")
    return f"{folder}/{image['filename']}" if folder else image["filename"]


def judge(path: Path, problems: list[str] | None, name: str, add: Callable[[], None]) -> None:
    """add(); what is wrong raises UserError, or goes to `problems`."""
    try:
        add()
    except KeyError as error:
        tell(f"{path}, {name}: it has no {error}.", problems)
    except (TypeError, AttributeError):
        tell(f"{path}, {name}: it has other values than such a file holds there.", problems)
    except ValueError as error:
        tell(f"{path}, {name}: {str(error).rstrip('.')}.", problems)


def tell(message: str, problems: list[str] | None) -> None:
    if problems is None:
        raise UserError(message)
    problems.append(message)


def read_coco(path: Path, find: Find, split: str | None, problems: list[str] | None, notes: list[str]) -> list[Item]:
    """The images with captions, in the order of the file."""
    lists, items, known = lists_in(path), {}, {}

    def add_image(image: dict) -> None:
        known[image["id"]] = image["file_name"]

    def add_caption(one: dict) -> None:
        if (image := one["image_id"]) not in known:
            raise ValueError(f"there is no image of the id {image}")
        if not (caption := " ".join(one["caption"].split())):
            raise ValueError("its caption is empty")
        check_text(caption)
        if image not in items:
            items[image] = Item(find(known[image]), [], None, split)
        items[image].captions.append(caption)

    for number, image in enumerate(lists["images"], 1):
        judge(path, problems, f"image {number}", lambda image=image: add_image(image))
    for number, one in enumerate(lists["annotations"], 1):
        judge(path, problems, f"annotation {number}", lambda one=one: add_caption(one))
    if without := len(known) - len(items):
        notes.append(f"{without} of {len(known)} images of {path.name} have no caption, and are not used.")
    return list(items.values())


def read_karpathy(
    path: Path, find: Find, split: str | None, problems: list[str] | None, notes: list[str]
) -> list[Item]:
    """The images of COCO, Flickr8k or Flickr30k with Karpathy's splits, of which "restval" is trained on."""
    items: list[Item] = []

    def add(image: dict) -> None:
        check_texts(image.get("sentences"))
        texts = [one.get("raw") or " ".join(one.get("tokens", ())) for one in image["sentences"]]
        captions = [text for text in (" ".join(text.split()) for text in texts) if text]
        if not captions:
            raise ValueError("it has no sentence")
        items.append(Item(find(karpathys_name(image)), captions, None, split_of(image, SPLIT_VALUES) or split))

    for number, image in enumerate(lists_in(path)["images"], 1):
        judge(path, problems, f"image {number}", lambda image=image: add(image))
    return items


def read_vqa(
    questions: Path,
    answers: Path,
    find: Find,
    split: str | None,
    problems: list[str] | None,
    notes: list[str],
) -> list[Quiz]:
    """VQA v2: what most people answered is learned, and the answers of all ten are kept to judge by."""
    asked = {one.get("question_id"): one for one in lists_in(questions)["questions"]}
    quizzes: dict[str, Quiz] = {}
    answered = lists_in(answers)["annotations"]
    subset = subset_of(questions, answers)

    def add(one: dict) -> None:
        check_texts(one)
        if (question := asked.get(one["question_id"])) is None:
            raise ValueError(f"{questions.name} has no question {one['question_id']}")
        values = {"question": question["question"], "answer": one.get("multiple_choice_answer")}
        values |= {key: one.get(key) for key in ("answer_type", "question_type")}
        values["answers"] = [person["answer"] for person in one.get("answers", ())] or None
        read: Asked = read_question(values)
        image = find_numbered(one.get("image_id", question.get("image_id")), subset, find)
        quizzes.setdefault(image, Quiz([image], split, image)).asked.append(read)

    for number, one in enumerate(answered, 1):
        judge(answers, problems, f"annotation {number}", lambda one=one: add(one))
    if more := len(asked) - len(answered):
        notes.append(f"{more} of {len(asked)} questions of {questions.name} have no answer, and are not used.")
    return list(quizzes.values())


def subset_of(*files: Path) -> str:
    """ "train2014", as the official files and the folders of their images are called; "" where no name says so."""
    parts = [part for path in files for part in re.split(r"[_-]", path.stem)]
    return next((part for part in parts if re.fullmatch(r"[a-z]+20\d\d", part)), "")


def find_numbered(number: Any, subset: str, find: Find) -> str:
    """COCO's image of an id: COCO_train2014_000000000009.jpg, or 000000000009.jpg as since 2017; or 9.jpg, 9.png."""
    if isinstance(number, bool) or not isinstance(number, (int, str)):
        raise ValueError(f"its image_id is {number!r}, but must be a number")
    padded = f"{int(number):012d}" if str(number).isdigit() else f"{number}"
    names = [f"COCO_{subset}_{padded}.jpg"] if subset else []
    names += [f"{padded}.jpg", *(f"{number}{ending}" for ending in (".jpg", ".png", ".jpeg", ""))]
    for name in dict.fromkeys(names):
        try:
            return find(name)
        except NoImage:
            continue
    raise ValueError(f"there is no image of the id {number}: looked for {', '.join(dict.fromkeys(names[:2]))}")
