"""The sheet for a rater: one HTML file with the images, the questions and the outputs of one system or two.

The page holds the outputs as left and right; whose they are follows from the seed and the ids (sides.py), and stands nowhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from minivlm.errors import UserError
from minivlm.evaluate.images_of import Images
from minivlm.evaluate.pairing import plain
from minivlm.evaluate.predictions import ImageNames, Prediction
from minivlm.html import Markup, data_url, page, tag
from minivlm.human.sides import HIGHEST, LOWEST, SheetRecord, digest, swapped

SIDE = 448  # pixels of an image
SCRIPT = Path(__file__).with_name("sheet.js")


class Sample(NamedTuple):
    """What a rater is asked about: the output of one system, or those of two, the first one's first."""

    id: str
    image: str
    question: str
    texts: tuple[str, ...]


def samples_of(files: Mapping[str, Sequence[Prediction]]) -> list[Sample]:
    """The samples that all systems have outputs for, in the order of the first. files: name of a file → its predictions.

    UserError where they have none in common, or ask different questions about the same one.
    """
    images = ImageNames([one.image for one in next(iter(files.values()))])
    tables = [{name_of(one, images): one for one in predictions} for predictions in files.values()]
    first, *others = tables
    common = [name for name in first if all(name in table for table in others)]
    if not common:
        raise UserError(
            f"{' and '.join(files)} have no samples in common ({next(iter(first))} in the one, {next(iter(others[0]))} in the "
            "other): are they about the same data?"
        )
    samples = []
    for name in common:
        known = [table[name] for table in tables]
        questions = {plain(one.question): one.question for one in known if one.question.strip()}
        if len(questions) > 1:
            differ = " and ".join(map(repr, questions.values()))
            raise UserError(
                f"{' and '.join(files)} ask different questions as {name} ({differ}): are they of one data set?"
            )
        image = next((one.image for one in known if one.image), "")
        texts = tuple(one.text.strip() for one in known)
        samples.append(Sample(name, image, next(iter(questions.values()), ""), texts))
    return samples


def name_of(prediction: Prediction, images: ImageNames) -> str:
    """The id of the question; where there is none the image, as the first file calls it, and the text of the question."""
    if prediction.question_id:
        return prediction.question_id
    image = images.find(prediction.image) or prediction.image
    return f"{image}: {plain(prediction.question)}" if prediction.question else image


def choose(samples: Sequence[Sample], n: int, seed: int) -> list[Sample]:
    """n of them, or all, in a random order that follows from the seed."""
    return sorted(samples, key=lambda sample: digest("order", seed, sample.id))[:n]


def sheet(samples: Sequence[Sample], images: Images, *, systems: Sequence[str], seed: int, ask: str) -> str:
    """The page. UserError where there is nothing to ask."""
    same = [one for one in samples if len(one.texts) > 1 and len(set(one.texts)) == 1]
    asked = [one for one in samples if one not in same]
    if not asked:
        raise UserError(
            f"{' and '.join(systems)} hold the same text for all {len(same)} samples: there is nothing to ask."
        )
    ids = [one.id for one in asked]
    turned = swapped(ids, seed) if len(systems) == 2 else set()
    items = [
        {
            "id": one.id,
            "image": one.image,
            "question": one.question,
            "texts": one.texts[:: -1 if one.id in turned else 1],
        }
        for one in asked
    ]
    embedded = {name: [data_url(image, side=SIDE) for image in some] for name, some in images.items()}
    content = hashlib.sha256(repr((items, sorted(embedded.items()))).encode("utf-8", "replace")).hexdigest()[:16]
    record = SheetRecord(tuple(systems), seed, tuple(ids), tuple(one.id for one in same), content)
    data = {"sheet": record.record(), "items": items, "images": embedded}
    return page("Rating sheet", body(ask, record.compared), script=SCRIPT.read_text(encoding="utf-8"), data=data)


def body(ask: str, compared: bool) -> Markup:
    if compared:
        keys = {"1": "the left one", "0": "no difference", "2": "the right one"}
    else:
        words = {LOWEST: "bad", HIGHEST: "perfect"}
        keys = {str(n): words.get(n, "") for n in range(LOWEST, HIGHEST + 1)}
    buttons = [button(f"key-{key}", tag("kbd", key), f" {meaning}".rstrip()) for key, meaning in keys.items()]
    texts = [
        tag("section", tag("h2", key) if compared else None, tag("p", id=f"text-{i}"), class_="card output")
        for i, key in enumerate(("1", "2") if compared else ("",))
    ]
    pressed = [tag("li", tag("kbd", key), " ", meaning) for key, meaning in keys.items() if meaning]
    start = tag(
        "form",
        tag("p", "Look at each image, and press a key:"),
        tag("ul", pressed, tag("li", tag("kbd", "←"), " back"), tag("li", tag("kbd", "→"), " skip")),
        tag("p", "Your ratings stay in this browser until you save them to a file; send that file back."),
        tag("p", tag("label", "Your name ", tag("input", id="name", required=True, maxlength=80, autocomplete="off"))),
        tag("p", tag("button", "Start", type="submit")),
        id="start",
    )
    rating = tag(
        "main",
        tag("div", id="images", class_="subjects"),
        tag("p", id="question", class_="question"),
        tag("div", texts, class_="pair"),
        tag("div", buttons, class_="keys"),
        tag(
            "div", button("back", tag("kbd", "←"), " back"), button("forward", tag("kbd", "→"), " skip"), class_="keys"
        ),
        id="rating",
        hidden=True,
    )
    end = tag(
        "section",
        tag("p", id="summary"),
        tag("p", button("save-end", "Save the ratings"), button("again", "Look at them again")),
        id="end",
        hidden=True,
    )
    status = tag(
        "div",
        tag("progress", id="progress", aria_labelledby="count"),
        tag("span", id="count", role="status"),
        tag("span", "rated by ", tag("b", id="who"), " ", button("other", "someone else"), class_="note"),
        button("save", "Save"),
        id="bar",
        class_="bar",
        hidden=True,
    )
    unkept = tag(
        "p",
        "This browser keeps nothing for this file: save before you close it.",
        id="unkept",
        role="alert",
        hidden=True,
    )
    return Markup(
        tag("h1", ask)
        + tag("noscript", tag("p", "This sheet needs JavaScript."))
        + status
        + unkept
        + start
        + rating
        + end
    )


def button(name: str, *content) -> Markup:
    return tag("button", content, id=name, type="button")
