"""A sheet for raters, and what their ratings say."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from minivlm.errors import UserError
from minivlm.human.command import main
from minivlm.human.results import agreement, read_ratings, scores
from minivlm.human.sides import SheetRecord, swapped
from tests.pages import Browser, Page, chromium, wait_for

HOSTILE = "</script><img src=x onerror=document.title=1>"


def predictions(path, texts, **about):
    rows = [{"image": f"{i}.png", **about, ("answer" if about else "caption"): text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 10), (30 * i, 90, 200)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def write_sheet(folder, *options, a=None, b=None):
    one = predictions(folder / "one.jsonl", a or [f"first {i}" for i in range(8)])
    other = predictions(folder / "other.jsonl", b or [f"second {i}" for i in range(8)])
    out = folder / "sheet.html"
    main(["sheet", "--a", one, "--b", other, "--images", str(folder / "images"), "--out", str(out), *options])
    source = out.read_text(encoding="utf-8")
    return source, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', source)[1])


def ratings(path, sheet, rater, values):
    path.write_text(json.dumps({"sheet": sheet, "rater": rater, "ratings": values}), encoding="utf-8")
    return path


def prefer(sheet, system, ids):
    """What a rater says who always prefers the first system, or the second."""
    turned = swapped(sheet["ids"], sheet["seed"])
    return {name: "left" if (system == 0) != (name in turned) else "right" for name in ids}


def test_a_sheet_is_one_page_that_shows_each_system_on_the_left_as_often_as_the_other(folder):
    source, data = write_sheet(folder)
    page = Page(source)
    assert "Which text describes the image better?" in page.text and "one" not in data["items"][0]
    turned = swapped(data["sheet"]["ids"], 0)
    assert len(turned) == 4
    for item in data["items"]:
        assert item["texts"][item["id"] in turned].startswith("first"), item
    assert len(data["images"]) == 8 and data["images"]["0.png"][0].startswith("data:image/")


def test_a_sheet_shows_nowhere_whose_text_is_whose(folder):
    source, data = write_sheet(folder)
    for item in data["items"]:
        assert set(item) == {"id", "image", "question", "texts"}
    visible = Page(source).text
    assert "one.jsonl" not in visible and "other.jsonl" not in visible


def test_the_seed_chooses_samples_order_and_sides(folder):
    first, again, other = (write_sheet(folder, "--n", "4", "--seed", seed)[1]["sheet"]["ids"] for seed in "001")
    assert first == again != other and len(first) == 4


def test_texts_of_systems_are_no_markup(folder):
    source, data = write_sheet(folder, a=[HOSTILE] * 8)
    assert source.count("</script>") == 2 and HOSTILE in data["items"][0]["texts"]
    Page(source)


def test_nobody_is_asked_where_both_systems_say_the_same_and_it_counts_as_a_tie(folder):
    data = write_sheet(folder, a=["same", "same"] + [f"first {i}" for i in range(6)], b=["same"] * 8)[1]
    sheet = data["sheet"]
    assert sorted(sheet["same"]) == ["0.png", "1.png"] and len(sheet["ids"]) == 6
    path = ratings(folder / "r.json", sheet, "Anna", prefer(sheet, 0, sheet["ids"]))
    found = scores(*read_ratings([path]))
    assert found["one preferred, ties as half"].value == pytest.approx((6 + 2 / 2) / 8)
    assert found["ties"].value == pytest.approx(2 / 8)


def test_results_give_the_win_rate_with_ties_as_half_its_interval_and_the_position_bias(folder, capsys):
    sheet = write_sheet(folder)[1]["sheet"]
    ids = sheet["ids"]
    anna = prefer(sheet, 0, ids[:5]) | dict.fromkeys(ids[5:], "tie")  # 5 wins, 3 ties
    ben = prefer(sheet, 0, ids[:5]) | prefer(sheet, 1, ids[5:7]) | {ids[7]: "tie"}  # 5 wins, 2 losses, 1 tie
    paths = [ratings(folder / f"{name}.json", sheet, name, some) for name, some in (("Anna", anna), ("Ben", ben))]
    known, raters = read_ratings(paths)
    found = scores(known, raters)
    win = found["one preferred, ties as half"]
    assert win.value == pytest.approx((5 + 2 * 0.25 + 0.5) / 8) and win.n == 8
    assert win.interval[0] < win.value < win.interval[1]
    left = [value == "left" for some in (anna, ben) for value in some.values() if value != "tie"]
    assert found["the left one won"].value == pytest.approx(np.mean(left)) and found["the left one won"].n == 12
    # Both gave the same answer to 6 of 8; by chance to 5/8 · 5/8 + 3/8 · 1/8 of them.
    chance = 25 / 64 + 3 / 64
    assert agreement(known, raters).value == pytest.approx((6 / 8 - chance) / (1 - chance))
    main(["results", *map(str, paths), "--save", str(folder / "out.json")])
    printed = capsys.readouterr().out
    assert "Cohen's kappa 0.556, of 8 samples" in printed
    saved = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert saved["raters"] == {"Anna": 8, "Ben": 8} and saved["agreement"]["value"] == pytest.approx(0.5556, abs=1e-4)


def test_three_raters_agree_by_fleiss_also_where_one_has_rated_a_part_alone(folder, capsys):
    sheet = write_sheet(folder)[1]["sheet"]
    ids = sheet["ids"]
    given = {"Anna": prefer(sheet, 0, ids), "Ben": prefer(sheet, 1, ids[:4]), "Cem": prefer(sheet, 0, ids[:2])}
    paths = [ratings(folder / f"{name}.json", sheet, name, some) for name, some in given.items()]
    found = agreement(*read_ratings(paths))
    observed, chance = (1 / 3 + 1 / 3 + 0 + 0) / 4, 0.6**2 + 0.4**2  # of 10 answers, 6 prefer the first
    assert found.name == "Fleiss' kappa" and found.samples == 4
    assert found.value == pytest.approx((observed - chance) / (1 - chance))
    main(["results", *map(str, paths)])
    assert "Cem has rated 2 of 8 samples" in capsys.readouterr().out


def test_one_system_is_rated_from_1_to_5(folder, capsys):
    one = predictions(folder / "one.jsonl", ["red", "blue", "no"], question="what colour?")
    out = folder / "sheet.html"
    main(["sheet", "--a", one, "--images", str(folder / "images"), "--out", str(out), "--n", "3"])
    source = out.read_text(encoding="utf-8")
    page = Page(source)
    assert "How good is the answer?" in page.text
    sheet = json.loads(re.search(r'id="data">(.*?)</script>', source)[1])["sheet"]
    both = [dict(zip(sheet["ids"], some, strict=True)) for some in ([1, 3, 5], [2, 3, 5])]
    paths = [ratings(folder / f"{i}.json", sheet, f"rater {i}", some) for i, some in enumerate(both)]
    main(["results", *map(str, paths)])
    printed = capsys.readouterr().out
    assert re.search(r"mean rating of .*one\.jsonl\s+3\.17", printed) and "quadratic weights, 0.9" in printed


def test_ids_alone_are_joined_with_the_references_that_say_what_was_asked(folder):
    (folder / "asked.json").write_text(
        json.dumps(
            [{"question_id": i, "image": f"{i}.png", "question": f"how many {i}?", "answer": "2"} for i in range(3)]
        )
    )
    for name, answer in (("one", "two"), ("other", "three")):
        rows = [{"question_id": i, "answer": answer} for i in range(3)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    options = ["--a", str(folder / "one.json"), "--b", str(folder / "other.json"), "--images", str(folder / "images")]
    options += ["--out", str(folder / "sheet.html")]
    with pytest.raises(UserError, match=r"3 of 3 images are not in .* or with --references"):
        main(["sheet", *options])
    main(["sheet", *options, "--references", str(folder / "asked.json")])
    assert "how many 2?" in (folder / "sheet.html").read_text(encoding="utf-8")


def test_files_that_do_not_belong_together_are_refused(folder):
    with pytest.raises(UserError, match=r"no samples in common \(0\.png in the one, x\.png in the other\)"):
        (folder / "other.jsonl").write_text('{"image": "x.png", "caption": "a"}\n')
        a = predictions(folder / "one.jsonl", ["a"])
        main(
            [
                "sheet",
                "--a",
                a,
                "--b",
                str(folder / "other.jsonl"),
                "--images",
                str(folder),
                "--out",
                str(folder / "s.html"),
            ]
        )
    with pytest.raises(UserError, match="1 of 9 images are not in"):
        write_sheet(folder, a=["a"] * 9, b=["b"] * 9)
    with pytest.raises(UserError, match="same text for all 8 samples"):
        write_sheet(folder, a=["a"] * 8, b=["a"] * 8)
    with pytest.raises(UserError, match=r"end in \.html"):
        main(["sheet", "--a", "a", "--images", "i", "--out", "sheet.txt"])
    with pytest.raises(UserError, match="no such folder of images"):
        main(["sheet", "--a", a, "--images", str(folder / "nowhere"), "--out", str(folder / "s.html")])
    with pytest.raises(UserError, match=r"no command 'sheets'. Did you mean sheet"):
        main(["sheets"])


def test_ratings_that_do_not_belong_together_are_refused(folder):
    sheet = write_sheet(folder)[1]["sheet"]
    ids = sheet["ids"]
    anna = ratings(folder / "anna.json", sheet, "Anna", {ids[0]: "left"})
    other = write_sheet(folder, "--seed", "1")[1]["sheet"]
    cases = [
        ("different sheets", ratings(folder / "o.json", other, "Ben", {ids[0]: "left"})),
        ("both ratings of anna", ratings(folder / "a.json", sheet, "anna", {ids[1]: "left"})),
        ("which is not on its sheet", ratings(folder / "i.json", sheet, "Ben", {"x": "left"})),
        ("none of left, right, tie", ratings(folder / "v.json", sheet, "Ben", {ids[0]: "middle"})),
        ("lacks the name of its rater", ratings(folder / "n.json", sheet, " ", {ids[0]: "left"})),
        ("holds no ratings of a sheet", ratings(folder / "s.json", {"seed": 1}, "Ben", {})),
    ]
    for why, path in cases:
        with pytest.raises(UserError, match=why):
            read_ratings([anna, path])
    with pytest.raises(UserError, match="nobody has rated anything"):
        scores(*read_ratings([ratings(folder / "e.json", sheet, "Ben", {})]))


def test_sides_are_random_and_balanced_and_follow_from_ids_and_seed():
    ids = [str(i) for i in range(101)]
    assert len(swapped(ids, 0)) == 50 and len(swapped(ids, 1)) == 51
    assert swapped(ids, 0) == swapped(ids[::-1], 0) != swapped(ids, 2)
    assert SheetRecord(("a", "b"), 0, ("1",), (), "f").compared


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
def test_in_a_browser_keys_rate_a_reload_resumes_and_the_ratings_are_saved(folder):
    _, data = write_sheet(folder, a=[HOSTILE] * 8)
    ids = data["sheet"]["ids"]
    browser = Browser(folder)
    try:
        browser.open(folder / "sheet.html")
        browser.value("document.getElementById('name').value = 'Anna'; document.querySelector('[type=submit]').click()")
        for key in ("1", "2", "0", "1", "ArrowLeft", "2"):
            browser.press(key)
        browser.value("window.before = true")
        browser.call("Page.reload")
        browser.wait_for("!window.before && document.readyState === 'complete'")
        assert browser.value("document.getElementById('count').textContent") == "4 of 8 rated, this is number 5"
        assert browser.value("document.title") == "Rating sheet" and browser.value("document.images.length") == 1
        browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        browser.value("document.getElementById('save').click()")
        wait_for(lambda: (folder / "ratings-Anna.json").exists())
    finally:
        browser.close()
    _, [anna] = read_ratings([folder / "ratings-Anna.json"])
    turned = swapped(ids, 0)
    given = {
        name: value if value == "tie" else ["right", "left"][value == (name in turned)]
        for name, value in anna.values.items()
    }
    assert given == dict(zip(ids, ("left", "right", "tie", "right"), strict=False))


def test_results_are_not_written_over_ratings(folder):
    sheet = write_sheet(folder)[1]["sheet"]
    anna = ratings(folder / "anna.json", sheet, "Anna", {sheet["ids"][0]: "left"})
    with pytest.raises(UserError, match="would be written over ratings"):
        main(["results", str(anna), "--save", str(anna)])
    assert "Anna" in anna.read_text()


def test_one_file_as_both_systems_is_refused_and_what_only_one_has_is_told(folder, capsys):
    one = predictions(folder / "one.jsonl", ["a", "b", "c"])
    options = ["--images", str(folder / "images"), "--out", str(folder / "sheet.html")]
    with pytest.raises(UserError, match=r"--a and --b are both .*one\.jsonl"):
        main(["sheet", "--a", one, "--b", one, *options])
    main(["sheet", "--a", one, "--b", predictions(folder / "two.jsonl", ["d", "e"]), *options])
    assert "1 outputs have no counterpart" in capsys.readouterr().err
