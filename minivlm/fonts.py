"""Text on pictures in any script: pillow's own font where it has the signs, else a font of the system, else an escape.

A line is drawn in pieces, each in the first font that has its signs. What no font has is written as \\\\u732b.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

from minivlm.files import readable

FOLDERS = {
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": (r"%WINDIR%\Fonts", r"%LOCALAPPDATA%\Microsoft\Windows\Fonts"),
}
ELSEWHERE = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
STYLES = re.compile(
    "bold|italic|oblique|light|thin|black|medium|semi|extra|heavy|condensed|mono|serif|display|math|symbol"
)
MOST = 256  # fonts that are looked into
PROBE = 20  # the size at which is asked whether a font has a sign
UNASSIGNED = "\U0010ffff"  # a sign that no font has: how it looks is how any missing one does


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@cache
def system_fonts() -> list[str]:
    """Files of fonts, upright ones of usual weight first."""
    found = []
    for folder in FOLDERS.get(sys.platform, ELSEWHERE):
        for place, _, names in os.walk(os.path.expanduser(os.path.expandvars(folder))):
            found += [os.path.join(place, name) for name in names if name.lower().endswith((".ttf", ".ttc", ".otf"))]
    ranked = sorted(found, key=lambda path: (len(STYLES.findall(Path(path).stem.lower())), path))
    return [path for path in ranked if "lastresort" not in path.lower()][:MOST]


@cache
def load(path: str, size: int) -> ImageFont.FreeTypeFont | None:
    """None for one that cannot be drawn at this size, such as a font of coloured bitmaps."""
    try:
        return ImageFont.truetype(path, size)
    except OSError:
        return None


def drawn(face: ImageFont.FreeTypeFont, sign: str) -> tuple:
    mask = face.getmask(sign)
    return mask.size, bytes(mask)


@cache
def missing(path: str) -> tuple:
    """The glyph that the font draws for characters that it does not have. path: "" is pillow's own."""
    face = load(path, PROBE) if path else font(PROBE)
    return () if face is None else drawn(face, UNASSIGNED)


@cache
def has(path: str, sign: str) -> bool:
    """Has the font the sign? path: "" is pillow's own."""
    face = load(path, PROBE) if path else font(PROBE)
    return face is not None and drawn(face, sign) != missing(path)


@cache
def font_with(sign: str) -> str | None:
    """The file of the first font that has the sign, "" for pillow's own; None: there is none."""
    return next((path for path in ("", *system_fonts()) if has(path, sign)), None)


def legible(text: str) -> str:
    """The text with \\u732b for signs that no font here has; invisible ones among them, such as joiners, left out."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(spelt(sign) for sign in unicodedata.normalize("NFC", text))


def spelt(sign: str) -> str:
    category = unicodedata.category(sign)
    if sign in " \n" or (category not in ("Cc", "Cs", "Cn", "Co") and font_with(sign) is not None):
        return sign
    if category in ("Cf", "Mn"):
        return ""
    code = ord(sign)
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"


def pieces(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """The text in parts of one font each; `legible` text has a font for every sign.

    What is no letter stays with the letters before it: words from right to left are put in order within a part.
    """
    paths: list[str] = []
    for sign in text:
        stays = paths and not sign.isalnum() and has(paths[-1], sign)
        paths.append(paths[-1] if stays else font_with(sign) or "")
    parts = groupby(zip(paths, text, strict=True), lambda each: each[0])
    return [((load(path, size) if path else None) or font(size), "".join(s for _, s in each)) for path, each in parts]


def length(text: str, size: int) -> float:
    """Pixels."""
    if text.isascii():
        return font(size).getlength(text)
    return sum(face.getlength(part) for face, part in pieces(text, size))


def write(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, colour: str) -> None:
    """Draw text on one line that starts, and whose top is, at `at`; as `length` measures it."""
    if text.isascii():
        draw.text(at, text, colour, font(size))
        return
    x, y = at
    for face, part in pieces(readable(text), size):
        draw.text((x, y + font(size).getmetrics()[0]), part, colour, face, anchor="ls")
        x += face.getlength(part)
