"""Pages are whole, request nothing, and show the texts of strangers as texts."""

import re

import numpy as np
import pytest
from PIL import Image

from minivlm.errors import UserError
from minivlm.html import Markup, check_page, image, markup, page, table, tag, write_page
from minivlm.html_charts import bar, curves, number, ticks
from tests.pages import Page

HOSTILE = "</script><img src=x onerror=alert(1)>\"' & \x00\ud800 &lt; <!-- ]]>"


def test_text_of_strangers_is_text_wherever_it_stands():
    body = [
        tag("p", HOSTILE, title=HOSTILE),
        table([HOSTILE, "n"], [[HOSTILE, HOSTILE]], caption=HOSTILE),
        image(Image.new("RGB", (4, 4)), side=64, alt=HOSTILE),
        curves({HOSTILE: [(0, 1.0), (1, 2.0)], "b": [(0, 1.0)]}, title=HOSTILE),
    ]
    source = page(HOSTILE, body, script="let a = 1 < 2;", data={HOSTILE: HOSTILE})
    found = Page(source)
    assert [values["src"][:10] for name, values in found.tags if name == "img"] == ["data:image"]
    assert found.count("script") == 2 and found.text.count("<img src=x onerror=alert(1)>") == 8
    source.encode("utf-8")


def test_a_page_forbids_the_browser_to_load_anything_and_to_run_other_scripts():
    assert "default-src 'none'; img-src data:" in page("a") and "script-src" not in page("a")
    assert "script-src 'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='" in page("a", script="a")


def test_markup_stays_and_all_else_is_escaped():
    assert markup(["<", Markup("<b>"), None, 3]) == "&lt;<b>3"
    assert (
        tag("input", id="a", class_="x", hidden=True, disabled=False, aria_label=None)
        == '<input id="a" class="x" hidden>'
    )


def test_images_are_shrunk_to_what_is_shown_and_small_ones_keep_their_pixels():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8))
    assert 'width="160" height="107"' in image(photo, side=160) and len(image(photo, side=160)) < 40_000
    assert 'class="pixels"' in image(np.zeros((32, 32, 3), np.uint8), side=160)
    assert "image/png" in image(Image.new("RGB", (300, 300), "white"), side=160)


def test_curves_leave_out_what_is_no_number_and_thin_what_is_long():
    drawn = curves({"loss": [(i, float("nan") if i == 5 else 1 / (i + 1)) for i in range(5000)]}, title="loss")
    [points] = re.findall(r'points="([^"]*)"', drawn)
    assert 200 < len(points.split()) <= 300 and "nan" not in drawn
    assert curves({"loss": [(0, float("inf"))]}, title="loss") == ""
    assert "circle" in curves({"val": [(3, 0.5)]}, title="val")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.27, 5.8, [0, 2, 4, 6]), (3, 3, [1, 2, 3, 4, 5]), (0, 0, [-0.5, 0, 0.5])],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    found = ticks(low, high, 5)
    assert found[0] <= low and found[-1] >= high and len(found) <= 7
    assert (low, high) == (0, 0) or found == pytest.approx(expected)


def test_numbers_on_axes_are_short():
    assert [number(x) for x in (0, 0.05, 1200, 3e-05, 2e7)] == ["0", "0.05", "1,200", "3e-5", "2e7"]


def test_a_bar_stays_inside_its_track():
    drawn = bar(1.3, (-0.2, 2.0), 0.5)
    assert all(0 <= float(x) <= 160 for x in re.findall(r'(?:x1|width)="([\d.-]+)"', drawn))


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "d.html").mkdir()
    for name, why in (("d.html", "folder; name a file"), ("no/a.html", "does not exist"), ("a.txt", r"end in \.html")):
        with pytest.raises(UserError, match=why):
            check_page(str(tmp_path / name), "--report")
    check_page(str(tmp_path / "a.html"), "--report")
    write_page(tmp_path / "a.html", page("ä"))
    assert Page((tmp_path / "a.html").read_text(encoding="utf-8")).text == "ä"
