"""Contact sheets: what is drawn where."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from minivlm.pictures import CURVES, EDGE, GREEN, PLOT, RED, Row, badge, chart, fit, font, sheet, shorten, wrap


def colours(page):
    """How often each colour occurs."""
    return {colour: count for count, colour in page.getcolors(maxcolors=1 << 24)}


def rgb(name):
    return ImageColor.getrgb(name)


def plain(colour="blue", size=(64, 64)):
    return Image.new("RGB", size, colour)


def test_right_is_green_wrong_is_red_and_unknown_is_neither():
    for mark, has, has_not in ((True, GREEN, RED), (False, RED, GREEN), (None, EDGE, RED)):
        found = colours(sheet([Row("text", [plain()], [mark])]))
        assert found[rgb(has)] > 100 and rgb(has_not) not in found
    unmarked = colours(sheet([Row("text", [plain()])]))
    assert rgb(GREEN) not in unmarked and unmarked[rgb("blue")] == 128 * 128


def test_marks_and_images_stand_in_the_order_given():
    page = sheet([Row("", [plain("blue"), plain("yellow")], [False, True])])
    left, right = (
        page.crop((0, 0, page.width // 2, page.height)),
        page.crop((page.width // 2, 0, page.width, page.height)),
    )
    assert rgb("blue") in colours(left) and rgb(RED) in colours(left) and rgb(GREEN) not in colours(left)
    assert rgb("yellow") in colours(right) and rgb(GREEN) in colours(right) and rgb(RED) not in colours(right)


def test_a_tick_is_no_cross():
    tick, cross = (np.asarray(badge(22, shape)) / 255 for shape in ("tick", "cross"))
    assert 10 < tick.sum() < 100 and 10 < cross.sum() < 100
    assert np.allclose(cross, cross[::-1], atol=0.3) and not np.allclose(tick, tick[::-1], atol=0.3)


def test_small_images_keep_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    large = np.asarray(fit(Image.fromarray(pixels), 128))
    assert np.array_equal(large, pixels.repeat(4, axis=0).repeat(4, axis=1))


@pytest.mark.parametrize(("size", "fitted"), [((48, 48), (128, 128)), ((400, 200), (128, 64)), ((90, 120), (96, 128))])
def test_every_size_fits_into_the_tile_and_keeps_its_shape(size, fitted):
    picture = fit(Image.new("RGB", size, (10, 200, 30)), 128)
    assert picture.size == fitted and set(colours(picture)) == {(10, 200, 30)}


def test_extreme_shapes_and_other_modes_are_drawn():
    images = [Image.new("RGB", (5000, 1)), Image.new("L", (9, 9), 200), np.zeros((20, 30, 3), dtype=np.uint8)]
    assert sheet([Row("text", images)]).mode == "RGB"


def test_the_sheet_grows_with_what_stands_on_it():
    one = sheet([Row("text", [plain()] * 3)])
    two = sheet([Row("text", [plain()] * 3), Row("text", [plain()] * 3)])
    assert two.width == one.width and two.height > one.height + 128
    folded = sheet([Row("text", [plain()] * 3)], columns=2)
    assert folded.width < one.width and colours(folded)[rgb("blue")] == 3 * 128 * 128
    assert sheet([Row("", [plain()] * 3)]).width < one.width  # no text, no column for it
    assert sheet([Row("text", [plain()] * 3)], title="title").height > one.height
    assert sheet([Row("text", [plain()] * 3, notes=["a\nb"] * 3)]).height > one.height


def test_texts_are_drawn_beside_and_notes_below():
    blank, written = sheet([Row(" ", [plain()])]), sheet([Row("a red circle", [plain()])])
    difference = np.asarray(blank, int) != np.asarray(written, int)
    assert difference.any() and not difference[:, 250:].any()
    assert sheet([Row("a b", [plain()], notes=["0.31"])]) != sheet([Row("a b", [plain()], notes=["0.13"])])


def test_text_is_wrapped_and_never_wider_than_its_place():
    text = "an orange star and a large blue square to the left of " + "x" * 100
    lines = wrap(text, 17, 220)
    assert len(lines) > 2 and all(font(17).getlength(line) <= 220 for line in lines)
    assert " ".join(lines[:-1]) == text[:-101] and lines[-1].endswith("…")
    assert shorten("short", 13, 220) == "short" and wrap("", 13, 100) == []
    tall = sheet([Row("word " * 200, [plain()])])
    assert tall.height > 600


def test_texts_without_images_are_wide_and_no_higher_than_they_need():
    text = "a red circle at the top left and a small star, " * 4
    alone, beside = sheet([Row(text, []), Row("b", [])]), sheet([Row(text, [plain()])])
    written = np.flatnonzero((np.asarray(alone) != 255).any(axis=(0, 2)))
    assert beside.width < written.max() < alone.width < 2 * beside.width
    assert alone.height < beside.height


# ---- curves ----------------------------------------------------------------------------------------------------------


def columns_of(page, colour):
    """The x at which a curve's colour is seen at all."""
    pixels = np.asarray(page)
    return np.flatnonzero((pixels == ImageColor.getrgb(colour)).all(axis=-1).any(axis=0))


def rows_of(page, colour):
    return np.flatnonzero((np.asarray(page) == ImageColor.getrgb(colour)).all(axis=-1).any(axis=1))


def test_a_curve_is_as_high_as_its_shares_and_starts_where_it_is_known():
    page = chart({"all": {0: 1.0, 2: 1.0, 8: 1.0}, "none": {2: 0.0, 8: 0.0}}, title="t", across="x")
    high, low = rows_of(page, CURVES[0]), rows_of(page, CURVES[1])
    assert high.max() < low.min() and low.min() - high.max() > 0.9 * (PLOT[1] - 8)
    assert columns_of(page, CURVES[0]).min() + 200 < columns_of(page, CURVES[1]).min()


def test_names_at_the_same_height_do_not_lie_on_each_other():
    page = chart({"one": {0: 0.5}, "two": {0: 0.5}}, title="", across="x")
    written = np.asarray(page)[:, 84 + PLOT[0] - 20 + 8 :]
    a, b = (np.flatnonzero((written == ImageColor.getrgb(c)).all(axis=-1).any(axis=1)) for c in CURVES[:2])
    assert len(a) and len(b) and a.max() < b.min()


def test_chance_is_a_dashed_line():
    lines = {"a": {0: 1.0, 1: 1.0}}
    with_line, without = (chart(lines, title="", across="x", chance=c) for c in (0.5, None))
    changed = (np.asarray(with_line) != np.asarray(without)).any(axis=-1)
    assert 200 < changed.any(axis=0).sum() < 400  # about half of its width
