"""Samples of a page: images with what the model said and what is right, to be chosen from by buttons that need no script."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from minivlm.evaluate.images_of import Images
from minivlm.evaluate.predictions import Prediction
from minivlm.html import Markup, image, tag
from minivlm.pictures import Row

SIDE = 160  # pixels of an image
EACH = 48  # right ones, and as many wrong ones, at most
KINDS = 16  # kinds with a button, of html.css
REFERENCES = 3  # of a caption


def is_right(p: Prediction) -> bool | None:
    return None if p.value is None else p.value >= 0.5


def chosen(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Of those that are right, of those that are wrong, and of those that nobody judged: at most EACH, every kind in turn."""
    found = []
    for mark in (False, True, None):
        kinds: dict[str, list[Prediction]] = {}
        for p in predictions:
            if is_right(p) is mark:
                kinds.setdefault(p.kind, []).append(p)
        spread = [some[:: max(1, len(some) // EACH)] for some in kinds.values()]
        turns = [some[i] for i in range(EACH) for some in spread if i < len(some)]
        found += turns[:EACH]
    place = {id(p): i for i, p in enumerate(predictions)}
    return sorted(found, key=lambda p: place[id(p)])


def sample_section(
    number: int, group: str, predictions: Sequence[Prediction], images: Images, folder: str | os.PathLike | None
) -> Markup:
    """number: of the section on its page, which tells its buttons from those of others."""
    shown = chosen(predictions)
    kinds = [kind for kind in dict.fromkeys(p.kind for p in shown) if kind]
    kinds = kinds[:KINDS] if len(kinds) > 1 else []
    marks = {"all": len(shown), "right": 0, "wrong": 0}
    for p in shown:
        if (mark := is_right(p)) is not None:
            marks["right" if mark else "wrong"] += 1
    buttons = (
        choice(f"mark-{number}", {f"show-{name}": f"{name} ({n})" for name, n in marks.items()})
        if marks["right"] + marks["wrong"]
        else []
    )
    if kinds:
        names = {"kind-all": "all kinds", **{f"kind-{i}": kind for i, kind in enumerate(kinds)}}
        buttons += [tag("br"), *choice(f"kind-of-{number}", names)]
    cards = [card(p, kinds, images) for p in shown]
    missing = sum(not images.get(p.image) for p in shown)
    where = (
        "no folder with images is known: name it by --data" if folder is None else f"their images are not in {folder}"
    )
    notes = [f"{len(shown):,} of {len(predictions):,}: right and wrong ones, of every kind."]
    notes += [f"{missing:,} without an image: {where}."] if missing else []
    return (
        tag("h3", group)
        + tag("p", " ".join(notes), class_="note")
        + tag("div", buttons, tag("div", cards, class_="grid"), class_="filter")
    )


def choice(name: str, words: dict[str, str]) -> list[Markup]:
    """Radio buttons, the first one chosen. Their classes are what html.css hides by."""
    found = []
    for i, (class_, word) in enumerate(words.items()):
        one = f"{name}-{i}"
        found += [
            tag("input", type="radio", name=name, id=one, class_=class_, checked=i == 0),
            tag("label", word, for_=one),
        ]
    return found


def card(p: Prediction, kinds: Sequence[str], images: Images) -> Markup:
    mark, classes = is_right(p), ["card"]
    if mark is not None:
        classes.append("right" if mark else "wrong")
    if p.kind in kinds:
        classes.append(f"of-{kinds.index(p.kind)}")
    told = (
        ""
        if mark is None
        else {1.0: "✓ right", 0.0: "✗ wrong"}.get(p.value, f"{'✓' if mark else '✗'} {p.value:.0%} right")
    )
    others = [text for text in dict.fromkeys(p.references) if text != p.text]
    references = others[:REFERENCES] if p.is_caption else others
    expected = [tag("p", "expected: ", " / ".join(references), class_="note")] if references else []
    shown = [image(one, side=SIDE, alt=p.image) for one in images.get(p.image, [])] or [
        tag("p", p.image or p.question_id, class_="note")
    ]
    text = tag("p", p.text) if p.text.strip() else tag("p", "(no text)", class_="note")
    question = tag("p", p.question, class_="note") if p.question else None
    return tag(
        "article",
        shown,
        question,
        text,
        expected,
        tag("p", told, class_="mark") if told else None,
        class_=" ".join(classes),
    )


def strips(title: str, rows: Sequence[Row], *, side: int = 112) -> list[Markup]:
    """Rows of a contact sheet (pictures.py) as strips of cards that a narrow screen scrolls."""
    found = [tag("h3", title)] if title else []
    for row in rows:
        marks = row.marks or [None] * len(row.images)
        notes = row.notes or [""] * len(row.images)
        cards = []
        for i, (one, mark, note) in enumerate(zip(row.images, marks, notes, strict=True), 1):
            classes = "card" if mark is None else f"card {'right' if mark else 'wrong'}"
            told = None if mark is None else tag("span", "✓ " if mark else "✗ ", class_="mark")
            parts = re.split(r"\n(?=\d+% )", note)  # a probability begins a part; other lines were broken for a sheet
            lines = [tag("p", told if j == 0 else None, part.replace("\n", " ")) for j, part in enumerate(parts)]
            cards.append(tag("article", image(one, side=side, alt=f"number {i}"), lines, class_=classes))
        detail = tag("p", row.detail, class_="note") if row.detail else None
        found += [
            tag("p", tag("b", row.text)) if row.text else None,
            detail,
            tag("div", cards, class_="strip", tabindex=0),
        ]
    return [one for one in found if one is not None]
