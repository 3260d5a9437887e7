"""Every architecture in one plot and one table: whose figures these are, and that they can be read."""

import json
import re
import shutil
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import pytest

from minivlm import config, zoo
from minivlm.errors import UserError
from minivlm.metrics import Score
from minivlm.recipes import RECIPES
from minivlm.recipes.options import override

ROOT = Path(__file__).parent.parent
KNOWN = zoo.read_zoo(ROOT / "docs/zoo.json")


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Leaves what a run of CLIP leaves, without its weights."""

    def run(name, score, step=RECIPES["clip"].steps, **changes):
        recipe = override(RECIPES["clip"], {key.replace("__", "."): value for key, value in changes.items()})
        folder = tmp_path / "out" / name / "checkpoints/step-000600"
        folder.mkdir(parents=True)
        record = {"step": step, "score": 0.5, "recipe": config.to_dict(recipe), "name": "clip"}
        record |= {"seconds": 60.0 * len(name), "parameters": 100, "trained": 90}
        (folder / "training.json").write_text(json.dumps(record))
        scores = {"zero-shot, seen pairs": Score(score, 1 / 64), "image→text R@1": Score(0.9, 0.002)}
        (tmp_path / "out" / name / "metrics.json").write_text(json.dumps({k: asdict(s) for k, s in scores.items()}))

    monkeypatch.setattr("minivlm.run.problem", lambda path, step: "")
    return run


def test_runs_of_several_seeds_are_averaged_and_others_are_left_out_by_name(ran, tmp_path, capsys):
    ran("clip", 0.9)
    ran("clip-seed1", 0.8, seed="1", save_every="50")
    ran("wider", 0.1, model__vision__width="256")
    ran("short", 0.1, step=3)
    ran("bare", 0.1)
    shutil.rmtree(tmp_path / "out/bare/checkpoints")
    ran("blind", 0.1)
    (tmp_path / "out/blind/metrics.json").write_text("{}")
    measured = zoo.measured(tmp_path / "out", KNOWN)
    told = capsys.readouterr().err
    assert "wider is left out: it was trained with model.vision.width = 256\n" in told
    assert f"short is left out: it is at step 3 of {RECIPES['clip'].steps}\n" in told
    assert "bare is left out: it has no checkpoint" in told
    assert "blind is left out: its metrics.json has no 'zero-shot, seen pairs'\n" in told
    assert measured == {
        "clip": replace(
            KNOWN["clip"], score=(0.85,), chance=1 / 64, minutes=(4, 10), seeds=2, parameters=100, trained=90
        )
    }


def test_a_page_keeps_its_words_and_gets_the_figures(ran, tmp_path, monkeypatch, capsys):
    row = '| `clip` | Radford | [a](b.py) | 1 of 2 | 3 | zero-shot 97.6 % (1.6) | `python sample.py "97.6 % (1.6)"` |\n'
    page = f"{row}\n<!-- zoo -->\n{row}| `other` | 9 | x 9 % (9) |\n<!-- /zoo -->\n"
    (tmp_path / "page.md").write_text(page)
    (tmp_path / "zoo.json").write_text((ROOT / "docs/zoo.json").read_text(encoding="utf-8"), encoding="utf-8")
    ran("clip", 0.9)
    monkeypatch.chdir(tmp_path)
    zoo.main(["--figures", "zoo.json", "--pages", "page.md", "--save", "plot.png", "--record"])
    changed = row.replace("| 3 | zero-shot 97.6 % (1.6) |", "| 4 | zero-shot 90 % (1.6) |")
    assert (tmp_path / "page.md").read_text() == page.replace(f"-->\n{row}", f"-->\n{changed}")
    assert zoo.read_zoo(tmp_path / "zoo.json") == KNOWN | {"clip": zoo.read_zoo(tmp_path / "zoo.json")["clip"]}
    assert "1 run here" in capsys.readouterr().out and (tmp_path / "plot.png").exists()
    with pytest.raises(UserError, match="no table between"):
        zoo.with_figures("no marks", KNOWN)


@pytest.mark.parametrize("page", ["README.md", "README_CN.md"])
def test_the_table_of_the_front_page_has_the_figures_of_the_plot(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert zoo.with_figures(text, KNOWN) == text
    rows = re.findall(r"^\| `([\w-]+)` \|", zoo.MARKED.search(text)[0], re.MULTILINE)
    assert set(rows) <= set(KNOWN) <= set(RECIPES) and len(rows) >= 17


def test_no_label_of_the_plot_lies_on_another_or_on_a_dot(monkeypatch):
    placed = []
    monkeypatch.setattr(
        zoo,
        "labels",
        lambda canvas, dots, room, of=zoo.labels: placed.append((dots, of(canvas, dots, room))) or placed[-1][1],
    )
    page = zoo.draw(KNOWN)
    assert len(placed) == 2 and page.width > page.height
    for dots, boxes in placed:
        around = [(x - zoo.DOT, y - zoo.DOT, x + zoo.DOT, y + zoo.DOT) for x, y in dots.values()]
        assert boxes.keys() == KNOWN.keys()
        assert not [pair for pair in combinations(boxes.values(), 2) if zoo.overlap(*pair, apart=0)]
        assert not [box for box in boxes.values() for dot in around if zoo.overlap(box, dot, apart=0)]
