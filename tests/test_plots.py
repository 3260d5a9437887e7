"""Plots: axes, ticks and curves, and what is drawn of logs of any kind."""

import json

import numpy as np
import pytest
from PIL import Image

from minivlm import curves, plots
from minivlm.pictures import CURVES


def test_a_curve_stands_where_its_values_are():
    x, y = np.arange(200.0), np.linspace(0, 1, 200)
    drawn = plots.draw_page("t", [plots.Axes("a", "steps", [plots.Curve("a", x, y, "#0000ff", "line")], share=True)])
    ys, xs = np.nonzero((np.asarray(drawn) == (0, 0, 255)).all(axis=-1))
    line = np.polyfit(xs, ys, 1)
    left, right = plots.ROOM[0], 600 - plots.ROOM[2]
    top, bottom = 56 + plots.ROOM[1], 56 + 320 - plots.ROOM[3]
    assert np.polyval(line, [left, right]) == pytest.approx([bottom, top], abs=2)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 600, [0, 200, 400, 600]), (3, 3, [3]), (-1, 0.1, [-1, -0.5, 0])],
)
def test_ticks_are_round(low, high, ticks):
    assert plots.steps_between(low, high, 5) == pytest.approx(ticks)


def test_many_points_keep_their_outliers_and_a_smooth_line_their_mean():
    x, y = np.arange(100_000.0), np.ones(100_000)
    y[54_321] = 9
    shown, values = plots.thinned(x, y)
    assert len(shown) <= 2 * plots.MOST and 54_321 in shown and values.max() == 9
    assert plots.smooth(y).max() < 1.01 and plots.smooth(np.arange(9.0)) == pytest.approx(np.arange(9.0))


@pytest.mark.parametrize("lines", [[], [{"step": 0, "loss": 1.0}], [{"step": 0, "loss": None, "x": "y"}] * 3])
def test_older_short_and_strange_logs_are_drawn(lines, tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves.write(tmp_path, "猫", {})
    assert Image.open(tmp_path / "curves.png").width > 300


def test_losses_are_told_apart_and_each_has_its_chance():
    lines = [{"step": i, "loss": 3.0, "contrast": 2.0, "matching": 1.0, "learning_rate": 0.1} for i in range(9)]
    first = curves.run_plots(lines, {"contrast": 5.0})[0]
    assert [(curve.name, curve.chance) for curve in first.curves] == [
        ("loss", None),
        ("contrast", 5.0),
        ("matching", None),
    ]
    assert [curve.colour for curve in first.curves] == list(CURVES[:3])


@pytest.mark.parametrize(("most", "ticks"), [(0.97, ["0%", "25%"]), (0.008, ["0%", "1%"]), (0.0, ["0%", "1%"])])
def test_low_shares_are_not_a_line_on_the_floor(most, ticks):
    axes = plots.Axes("a", "steps", [plots.Curve("a", np.arange(2.0), np.array([0.0, most]), "#0000ff")], share=True)
    assert [text for _, text in axes.ticks(*axes.limits(axes.drawn()))][:2] == ticks
