"""Which reference belongs to which prediction: captions by their image, answers by the id of the question or by image and
question, POPE's also by their order. UserError where two predictions belong to one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from minivlm.errors import UserError
from minivlm.evaluate.predictions import ImageNames, Prediction
from minivlm.evaluate.references import Asked, References

Pair = tuple[Prediction, Any]  # and the captions of its image, or the question that it answers


def captioned(predictions: Sequence[Prediction], references: References) -> list[Pair]:
    """In the order of the references, in which the official evaluation reads them."""
    images = ImageNames([*references.captions], references.names)
    found = [(p, images.find(p.image)) for p in predictions if p.is_caption and p.image]
    known = [(p, image) for p, image in found if image is not None]
    check_once(known, "captions")
    of = {image: p for p, image in known}
    return [(of[image], captions) for image, captions in references.captions.items() if image in of]


def answered(predictions: Sequence[Prediction], references: References) -> list[Pair]:
    return matched([p for p in predictions if not p.is_caption], references.questions)


def said_yes_or_no(predictions: Sequence[Prediction], references: References) -> list[Pair]:
    """POPE's files of answers have neither ids nor images: as many rows as there are questions are in their order."""
    asked = references.pope
    if len(predictions) == len(asked) and not any(p.question_id or p.image for p in predictions):
        for i, (p, question) in enumerate(zip(predictions, asked, strict=True), 1):
            if p.question and not asks(p.question, question.text):
                raise UserError(
                    f"answer {i} is to {p.question!r}, but question {i} is {question.text!r}: keep their order."
                )
        return [*zip(predictions, asked, strict=True)]
    return matched([p for p in predictions if not p.is_caption], asked)


def matched(predictions: Sequence[Prediction], asked: Sequence[Asked]) -> list[Pair]:
    """By the id of the question, or by image and question."""
    by_id = {question.id: question for question in asked if question.id}
    twice = [name for name, n in Counter(question.id for question in asked if question.id).items() if n > 1]
    if twice and any(p.question_id for p in predictions):
        raise UserError(
            f"question {twice[0]} is twice in the references ({len(twice)} such in all): keep one of each, or give each file "
            "of questions a file of predictions."
        )
    images = ImageNames([*dict.fromkeys(question.image for question in asked)])
    by_text: dict[tuple[str | None, str], list[Asked]] = {}  # a folder may ask one question twice about an image
    for question in reversed(asked):
        by_text.setdefault((question.image, plain(question.text)), []).append(question)
    found = []
    for p in predictions:
        if p.question_id and by_id:
            question = by_id.get(p.question_id)
            if question and p.question and question.text and not asks(p.question, question.text):
                raise UserError(
                    f"{p.name} is {p.question!r} there and {question.text!r} here: are they of one data set?"
                )
        else:
            image = images.find(p.image)
            texts = (plain(p.question), first_line(p.question))
            same = next((by_text[image, text] for text in texts if (image, text) in by_text), None)
            if same == []:
                raise UserError(f"there are more answers than questions for {p.name}: keep one of each.")
            question = same.pop() if same else None
        if question is not None:
            found.append((p, question))
    check_once([(p, id(question)) for p, question in found], "answers")
    return found


def plain(text: str) -> str:
    return " ".join(text.replace("<image>", " ").split()).lower()


def asks(prompt: str, question: str) -> bool:
    """Whether a prompt is this question: LLaVA's add a line on how to answer it."""
    return plain(question) in (plain(prompt), first_line(prompt))


def first_line(prompt: str) -> str:
    return plain(prompt.replace("<image>", " ").strip().partition("\n")[0])


def check_once(known: Sequence[tuple[Prediction, Any]], what: str) -> None:
    first: dict[Any, Prediction] = {}
    for p, place in known:
        if place in first:
            raise UserError(f"{first[place].name} and {p.name} are {what} of the same: keep one of each.")
        first[place] = p
