"""Self-contained HTML pages: one file that requests nothing, for light and dark screens, narrow ones and paper.

    page("Title", tag("p", "a < b", class_="note"), image(pil, side=160), table(rows))

Every text that is not `Markup` is escaped, wherever it comes from; only the functions of this file make `Markup`. A page says
by its content security policy that a browser may load nothing but what it holds, and run no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from minivlm.atomic_writing import write_atomically
from minivlm.command_line import check_place
from minivlm.errors import UserError

VOID = {"br", "hr", "img", "input", "meta"}
QUALITY = 82  # of JPEG
UNSHOWN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")  # of no HTML text
STYLE = Path(__file__).with_name("html.css")

Content = Any  # Markup, a value whose text is escaped, None for nothing, or any of these in a list


class Markup(str):
    """HTML that stands in a page as it is. What is added to it is escaped, unless it is Markup as well."""

    __slots__ = ()

    def __add__(self, other: Content) -> Markup:
        return Markup(str.__add__(self, markup(other)))


def markup(content: Content) -> Markup:
    """Text escaped, lists joined, Markup as it is. Signs that HTML cannot hold, such as NUL, become a replacement character.

    Signs that turn the direction of writing stay in their element (see `html.css`)."""
    if isinstance(content, Markup):
        return content
    if content is None:
        return Markup()
    if isinstance(content, Iterable) and not isinstance(content, str | bytes):
        return Markup("".join(map(markup, content)))
    return Markup(html.escape(UNSHOWN.sub("\ufffd", str(content))))


def tag(name: str, /, *content: Content, **attributes: Any) -> Markup:
    """An element. attributes: class_ for class, aria_label for aria-label; True stands alone, None and False are left out."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{markup(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{given}>" if name in VOID else f"<{name}{given}>{markup(content)}</{name}>")


def page(title: str, *body: Content, script: str = "", data: Mapping[str, Any] | None = None) -> str:
    """The text of a whole file. script: JavaScript of ours, which finds `data` as JSON in the element with the id "data"."""
    values = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c") if data is not None else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
    policy += f"; script-src 'sha256-{digest}'" if script else ""
    head = [
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(STYLE.read_text(encoding="utf-8"))),
    ]
    scripts = [tag("script", Markup(values), type="application/json", id="data")] if data is not None else []
    scripts += [tag("script", Markup(script))] if script else []
    parts = [tag("head", head), "\n", tag("body", body, scripts)]
    return f"<!DOCTYPE html>\n{tag('html', parts, lang='en')}\n"


def write_page(path: str | Path, text: str) -> None:
    """UserError where the file cannot be written; what was there before is still there then."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def check_page(path: str, option: str) -> None:
    """UserError, before the work rather than after it, unless a page can be written there."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{option} {path}: the name has to end in .html.")
    check_place(path, option)


# ---- images ----------------------------------------------------------------------------------------------------------


def image(picture: Any, *, side: int, alt: str = "") -> Markup:
    """A PIL image or an (H, W, 3) uint8 array, embedded, at most `side` pixels wide and high. Smaller ones keep hard pixels."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    scale = side / max(picture.size)
    shown = tuple(max(1, round(length * scale)) for length in picture.size)
    return tag(
        "img",
        src=data_url(picture, side=side),
        alt=alt,
        width=shown[0],
        height=shown[1],
        class_="pixels" if scale >= 2 else None,
    )


def data_url(picture: Image.Image, *, side: int) -> str:
    """As JPEG or PNG, whichever is shorter: photographs and drawings."""
    picture = picture.convert("RGB")
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    forms = {"jpeg": {"quality": QUALITY, "optimize": True}, "png": {"optimize": True}}
    kind, content = min(
        ((kind, encoded(picture, kind, how)) for kind, how in forms.items()), key=lambda pair: len(pair[1])
    )
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def encoded(picture: Image.Image, kind: str, how: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **how)
    return file.getvalue()


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(head: Sequence[Content], rows: Iterable[Sequence[Content]], caption: str = "") -> Markup:
    """The first column names the row; the others stand to the right, as numbers do."""
    top = tag("tr", [tag("th", cell, scope="col") for cell in head])
    lines = [tag("tr", tag("th", first, scope="row"), [tag("td", cell) for cell in rest]) for first, *rest in rows]
    named = tag("caption", caption) if caption else None
    return tag("div", tag("table", named, tag("thead", top), tag("tbody", lines)), class_="wide")


def definitions(pairs: Mapping[str, Content]) -> Markup:
    return tag("dl", [tag("dt", name) + tag("dd", value) for name, value in pairs.items()])
