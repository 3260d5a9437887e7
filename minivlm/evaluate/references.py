"""What predictions are judged beside: captions of images, answers to questions, POPE's yes and no, objects.

COCO's annotations   {"images": […], "annotations": [{"image_id", "caption"}, …]}, or {"9": ["a kite", …], …}
Karpathy's splits    {"images": [{"filename", "cocoid", "sentences": [{"raw": "a kite"}, …]}, …]}
VQA v2's             {"annotations": [{"question_id", "image_id", "answers": […], "answer_type", …}, …]}
POPE's questions     {"question_id": 1, "image": "9.jpg", "text": "Is there a kite in the image?", "label": "yes"}, a line each
a folder             in any form that training takes (datasets/forms.py), or the shapes world
a table              JSON lines, JSON or CSV with captions, or questions and answers, in our names (docs/data.md)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minivlm.datasets.contents import contents
from minivlm.datasets.conversations import open_conversations
from minivlm.datasets.rows import read_question, several
from minivlm.datasets.shapes import is_world
from minivlm.errors import UserError
from minivlm.evaluate.generation import SHAPES_SPLITS
from minivlm.evaluate.judge_objects import is_instances, objects_in
from minivlm.evaluate.predictions import IMAGES, QUESTION_IDS, check, place, rows_of, value_of, values_of


@dataclass(frozen=True)
class Asked:
    """A question: its answers, of which any is right (ten: those of ten people), and of which kinds it is."""

    image: str
    text: str
    answers: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    id: str = ""


@dataclass(frozen=True)
class References:
    """Of one split.

    captions   image → its captions; of the shapes world (`world`) canonical ones of scenes
    questions  VQA's, or a folder's; `free`: their answers are sentences
    pope       questions whose answer is yes or no
    objects    image → what is in it, by COCO's instances, whose `categories` are all that counts as an object
    names      further names of images
    texts      question id → the question: VQA's questions, whose answers stand in another file
    prefix     in front of the names of scores
    """

    captions: Mapping[str, list[str]] = field(default_factory=dict)
    questions: tuple[Asked, ...] = ()
    pope: tuple[Asked, ...] = ()
    objects: Mapping[str, set[str]] = field(default_factory=dict)
    categories: tuple[str, ...] = ()
    world: bool = False
    free: bool = False
    prefix: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def read_references(path: Any, *, questions: bool = True) -> list[References]:
    """Of a file, or of each split of a folder that has some. questions: whether a folder's are wanted: the shapes
    world has thousands. UserError where there is nothing to judge by."""
    if Path(path).is_dir():
        return references_of_folder(path, questions)
    values = values_of(path)
    if isinstance(values, dict) and values and all(isinstance(v, list) for v in values.values()) and texts(values):
        return [References(captions={name: checked(some, f"{path}, {name}") for name, some in values.items()})]
    if is_instances(values):
        objects, names, categories = objects_in(values, path)
        return [References(objects=objects, names=names, categories=categories)]
    listed = values.get("images") if isinstance(values, dict) else None
    images = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    if any("sentences" in one for one in images):
        return [references_of_karpathy(path, images)]
    read = references_of_rows(path)
    named = {value_of(one, ("id",)): one.get("file_name") for one in images}  # in COCO's order
    captions = {image: read.captions[image] for image in named if image in read.captions} | read.captions
    return [replace(read, captions=captions, names={name: image for image, name in named.items() if name})]


def joined(references: list[References]) -> list[References]:
    """Those of several files as one, so that a score is of all of them; folders and their splits stay apart."""
    apart = [one for one in references if one.world or one.free or one.prefix]
    files = [one for one in references if not (one.world or one.free or one.prefix)]
    if len(files) < 2:
        return references
    captions: dict[str, list[str]] = {}
    for one in files:
        for image, some in one.captions.items():
            captions.setdefault(image, []).extend(some)
    asked = {name: text for one in files for name, text in one.texts.items()}
    whole = References(
        captions,
        tuple(replace(q, text=q.text or asked.get(q.id, "")) for one in files for q in one.questions),
        tuple(question for one in files for question in one.pope),
        {image: some for one in files for image, some in one.objects.items()},
        tuple(name for one in files for name in one.categories),
        names={name: image for one in files for name, image in one.names.items()},
    )
    return [whole, *apart]


def references_of_karpathy(path: Any, images: list[dict]) -> References:
    """Of COCO, Flickr8k or Flickr30k with Karpathy's splits: all of them, since predictions say which are meant."""
    captions, names = {}, {}
    for number, one in enumerate(images, 1):
        sentences = [s.get("raw") or " ".join(s.get("tokens", ())) for s in one.get("sentences") or ()]
        image = value_of(one, ("cocoid", "filename"))
        captions[image] = checked(sentences, place(path, "image", number))
        names[value_of(one, ("filename",))] = image
    return References(captions, names=names)


def texts(values: Mapping[str, list]) -> bool:
    """Is it {"9": ["a kite", "kites"], …}?"""
    return all(isinstance(one, str) for some in values.values() for one in some[:1]) and any(values.values())


def checked(captions: list[Any], where: str) -> list[str]:
    if not captions or not all(isinstance(one, str) for one in captions):
        raise UserError(f"{where}: an image needs one or more captions, which are strings.")
    for one in captions:
        check(one, where)
    return captions


def references_of_rows(path: Any) -> References:
    captions: dict[str, list[str]] = {}
    questions, pope, asked_alone = [], [], {}
    for where, row in rows_of(path):
        try:
            image = value_of(row, IMAGES)
            asked = row.get("text", row.get("question"))
            label = str(row.get("label")).strip().lower()
            if label in ("yes", "no") and isinstance(asked, str):
                kinds = tuple(str(row[name]) for name in ("category", "split") if row.get(name))
                pope.append(Asked(image, asked, (label,), kinds, value_of(row, QUESTION_IDS)))
            elif "answers" in row or "answer" in row or "multiple_choice_answer" in row:
                questions.append(question_of(row, image))
            elif "caption" in row or "captions" in row:
                known = several(row["captions"]) if row.get("captions") else [row.get("caption")]
                captions.setdefault(image, []).extend(checked(known, where))
            elif isinstance(asked, str) and "label" not in row and value_of(row, QUESTION_IDS):
                asked_alone[value_of(row, QUESTION_IDS)] = asked
            else:
                raise ValueError(
                    f"its label is {row['label']!r}, but must be yes or no"
                    if "label" in row and asked
                    else "it has no caption, no answer, and no label"
                )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where} is no reference: {str(error).rstrip('.')}.") from None
    if not (captions or questions or pope or asked_alone):
        raise UserError(f"{path} holds no references: no captions, no answered questions.")
    return References(captions, tuple(questions), tuple(pope), texts=asked_alone)


def question_of(row: Mapping[str, Any], image: str) -> Asked:
    """A line of VQA's annotations, which do not repeat the question, or of a table of ours."""
    answers = row.get("answers")
    if isinstance(answers, list) and answers and isinstance(answers[0], dict):
        answers = [one["answer"] for one in answers]
    values = {**row, "answers": answers, "answer": row.get("multiple_choice_answer", row.get("answer"))}
    read = read_question({**values, "question": row.get("question") or "?"})
    given = tuple(str(one) for one in answers) if isinstance(answers, list) and answers else read.answers
    kinds = tuple(str(row[name]) for name in ("kind", "answer_type", "question_type") if row.get(name))
    return Asked(image, str(row.get("question") or ""), given, kinds, value_of(row, QUESTION_IDS))


def references_of_folder(directory: Any, questions: bool = True) -> list[References]:
    """The held-out splits first. Images are named as they are below the folder."""
    world, found, there = is_world(directory), [], set()
    held = contents(directory)
    for split, prefix in ({"test": ""} | (SHAPES_SPLITS if world else {"val": "val, ", "train": "train, "})).items():
        if not (world or held[split]):
            continue
        data = open_conversations(directory, split, image_size=None)
        images = {data.key(i) for i in range(len(data))}
        if images <= there:  # another split stands in for this one
            continue
        there |= images
        captions = {data.key(i): data.captions(i) for i in range(len(data)) if data.captions(i)}
        asked = (
            tuple(Asked(data.key(q.index), q.text, q.answers, (q.kind,)) for q in data.questions()) if questions else ()
        )
        if captions or asked:
            found.append(References(captions, asked, world=world, free=data.free_answers, prefix=prefix))
    if not found:
        raise UserError(f"{directory} holds no captions and no questions to judge by.")
    return found
