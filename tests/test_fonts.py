"""Text on pictures in any script: a font that has the signs, or their numbers; never boxes."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minivlm import fonts
from minivlm.fonts import font, font_with, legible, length, pieces, write
from minivlm.pictures import Row, sheet, wrap


@pytest.fixture
def no_fonts(monkeypatch):
    """A system that has none."""
    monkeypatch.setattr(fonts, "system_fonts", list)
    font_with.cache_clear()
    yield
    font_with.cache_clear()


def ink(text, size=17):
    page = Image.new("L", (400, 40), 255)
    write(ImageDraw.Draw(page), (5, 5), text, size, "black")
    return np.asarray(page) < 128


def test_latin_is_drawn_in_pillows_own_font_as_ever():
    page = Image.new("L", (400, 40), 255)
    ImageDraw.Draw(page).text((5, 5), "a cat, 50 %", "black", font(17))
    assert np.array_equal(ink("a cat, 50 %"), np.asarray(page) < 128)
    assert legible("a cat") == "a cat" and length("a cat", 17) == font(17).getlength("a cat")


def test_signs_that_no_font_has_are_written_as_their_numbers(no_fonts):
    assert legible("a 猫") == r"a \u732b" and legible("\U0001f408") == r"\U0001f408"
    assert (
        legible("caf\udce9.png") == r"caf\udce9.png"
        and legible("a\0b") == r"a\u0000b"
        and legible("\ue000") == r"\ue000"
    )
    assert legible("a\u200db") == "ab" and legible("e\u0301") == r"\u00e9" and legible("a\nb") == "a\nb"


def test_other_scripts_are_drawn_in_a_font_of_the_system_or_told():
    """Every sign of `legible` text has a font in which it is no box."""
    for text in ("кот", "γάτα", "القط على اليسار", "猫が右", "고양이", "→ ♥"):
        for face, part in pieces(legible(text), 20):
            box = fonts.drawn(face, fonts.UNASSIGNED)
            assert all(sign == " " or fonts.drawn(face, sign) != box for sign in part)
    if font_with("к"):  # this system has a Cyrillic font
        assert legible("кот") == "кот" and length("кот", 20) > 10
        assert not np.array_equal(ink("кот"), ink("кит"))


def test_a_sheet_says_so_where_signs_are_spelt_out(no_fonts):
    image = Image.new("RGB", (40, 40))
    plain, escaped = (sheet([Row("a cat", [image], notes=[name])]) for name in ("cat.png", "caf\udce9.png"))
    assert escaped.height > plain.height and escaped.width == plain.width


def test_lines_are_broken_between_signs_of_scripts_without_spaces(monkeypatch):
    assert wrap(r"\u732b" * 20, 17, 120) == [r"\u732b\u732b"] * 10
    monkeypatch.setattr(fonts, "font_with", lambda sign: "")
    lines = wrap("猫" * 40 + " cat", 17, 200)
    assert "".join(lines) == "猫" * 40 + " cat" and len(lines) > 1 and all(length(line, 17) <= 200 for line in lines)
    assert wrap("two words", 17, 1000) == ["two words"]
