"""The report: one page about a model, of any kind, or about predictions alone."""

import json

import numpy as np
import pytest
from PIL import Image

from minivlm.checkpoint import load
from minivlm.datasets.shapes import ShapesWorld, make_shapes
from minivlm.errors import UserError
from minivlm.evaluate.command import main
from minivlm.evaluate.diagnose.pitfall import Pitfall
from minivlm.evaluate.images_of import images_named
from minivlm.evaluate.predictions import Prediction
from minivlm.evaluate.report import Report, write_report
from minivlm.evaluate.report.samples import EACH, chosen
from minivlm.evaluate.report.scores import parents
from minivlm.evaluate.report.shown import attention
from minivlm.evaluate.report.training import charts_of
from minivlm.layers import TextConfig, VisionConfig
from minivlm.metrics import Samples, Score
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor
from tests import speakers
from tests.colours import RGB
from tests.pages import Browser, Page, chromium

HOSTILE = "</script><img src=x onerror=document.title=1>"


def read(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def photos(tmp_path):
    """Images of one colour, asked about and described; one question is of a stranger."""
    rows = []
    for i in range(12):
        name = list(RGB)[i % 3]
        Image.new("RGB", (20, 16), RGB[name]).save(tmp_path / f"{i}.png")
        text = HOSTILE if i == 4 else f"which colour has number {i}?"
        rows.append({"image": f"{i}.png", "question": text, "answer": name, "kind": "colour" if i % 2 else "other <b>"})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def answered(folder, right=8):
    """What someone's model answers to these, in a file."""
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    for i, row in enumerate(rows):
        row["answer"] = row["answer"] if i < right else HOSTILE
    path = folder.parent / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_predictions_alone_have_a_report_with_scores_kinds_and_samples(photos, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("out") / "report.html"
    references = photos / "questions.jsonl"
    main(
        [
            "--predictions",
            str(answered(photos)),
            "--references",
            str(references),
            "--data",
            str(photos),
            "--report",
            str(out),
        ]
    )
    assert f"wrote {out}" in capsys.readouterr().out
    page = read(out)
    assert page.count("article", "right") == 8 and page.count("article", "wrong") == 4
    assert sum(values.get("src", "").startswith("data:image/") for _, values in page.tags) == 12
    assert "66.7%" in page.text and HOSTILE in page.text and "other <b>" in page.text
    assert "Attention Left out: there is no model" in page.text and "95 % interval" in page.text
    assert "right (8)" in page.text and "wrong (4)" in page.text


def test_without_a_folder_the_samples_are_shown_without_images(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "report.html"
    main(
        ["--predictions", str(answered(photos)), "--references", str(photos / "questions.jsonl"), "--report", str(out)]
    )
    assert "12 without an image: no folder with images is known: name it by --data" in read(out).text


@pytest.mark.parametrize("kind", ["captioner", "llava"])
def test_models_that_generate_have_a_report_with_samples_and_attention(kind, photos, tmp_path):
    model = {"captioner": speakers.captioner, "llava": speakers.llava}[kind]()
    prepares = speakers.processor(image_tokens=0) if kind == "captioner" else speakers.processor()
    model.save_pretrained(tmp_path / "model", processor=prepares)
    if kind == "captioner":
        rows = [{"image": f"{i}.png", "caption": f"a picture of {list(RGB)[i % 3]}"} for i in range(12)]
        (photos / "questions.jsonl").unlink()
        (photos / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "report.html"
    main([str(tmp_path / "model"), "--data", str(photos), "--device", "cpu", "--report", str(out)])
    page = read(out)
    assert page.count("article", "wrong") + page.count("article", "right") > 0
    assert "grey none, yellow the most" in page.text or "generates nothing" in page.text
    assert "it is not the directory of a run" in page.text and f"--report {out}" in page.text


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=16, image_size=32, progress=False)
    return directory


@pytest.fixture
def clip(world, tmp_path):
    processor = Processor.train(ShapesWorld(world, "train").texts(), vocab_size=300, image_size=32, context=96)
    vision = VisionConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2)
    ids = dict(vocab_size=processor.vocab_size, end_token=processor.end_token)
    text = TextConfig(width=16, depth=1, heads=2, context=96, **ids)
    CLIP(CLIPConfig(vision=vision, text=text, embed_width=16)).save_pretrained(tmp_path / "clip", processor=processor)
    lines = [{"step": i, "loss": 3 / (i + 1), "contrast": 3 / (i + 1), "gradient_norm": 1.0} for i in range(9)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "clip/log.jsonl").write_text(text, encoding="utf-8")
    return tmp_path / "clip"


@pytest.mark.usefixtures("little_to_judge_by")
def test_a_clip_has_classes_queries_attention_curves_and_the_diagnosis(clip, world, tmp_path):
    out = tmp_path / "report.html"
    where = ["--data", str(world), "--device", "cpu", "--images", str(tmp_path / "images")]
    main([str(clip), *where, "--diagnose", "modality-gap,language-bias", "--report", str(out)])
    page = read(out)
    for words in ("zero-shot, seen pairs", "Classes, the worst kinds first", "a small blue star", "the class token"):
        assert words in page.text
    assert (
        "modality gap" in page.text
        and "before after difference" in page.text
        and "language bias Left out:" in page.text
    )
    assert page.count("polyline") == 2, "loss and gradient norm"
    assert out.stat().st_size < 2_000_000


def test_a_report_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "d.html").mkdir()
    for name, why in (
        ("d.html", "that is a folder"),
        ("no/r.html", "does not exist; make it first"),
        ("r.pdf", r"end in \.html"),
    ):
        with pytest.raises(UserError, match=rf"--report .*{why}"):
            main(["out/no-such-model", "--report", str(tmp_path / name)])


def test_samples_are_right_and_wrong_ones_of_every_kind():
    many = [Prediction("a", f"{i}", kind=f"kind {i % 7}", value=float(i % 10 > 0)) for i in range(5000)]
    shown = chosen(many)
    assert len(shown) == 2 * EACH and len({p.kind for p in shown}) == 7
    assert sum(p.value for p in shown) == EACH


def test_parts_of_a_score_stand_apart_from_it():
    names = [
        "accuracy",
        "accuracy, colour",
        "accuracy, blind",
        "never-seen pairs, accuracy",
        "never-seen pairs, accuracy, what",
    ]
    assert parents(names) == {
        "accuracy, colour": "accuracy",
        "never-seen pairs, accuracy, what": "never-seen pairs, accuracy",
    }


def test_whatever_a_log_holds_is_drawn():
    step = {"loss": 2.0, "a": 1.5, "b": 0.5, "learning_rate": 0.1, "samples_per_second": 9.0, "seconds": 3.0}
    log = [{"step": i, **step, "gradient_norm": None} for i in range(3)]
    log[2] |= {"validation": 0.5, "validated": "R@1", "peak_memory": 2_000_000_000}
    charts = charts_of(log)
    assert charts.keys() == {"loss", "learning rate", "samples per second", "validation", "peak memory, GB"}
    assert charts["loss"].keys() == {"loss", "a", "b"} and charts["validation"] == {"R@1": [(2, 0.5)]}
    assert charts["peak memory, GB"] == {"peak_memory": [(2, 2.0)]}


def test_a_pitfall_is_told_with_its_figures_its_remedy_and_its_image(tmp_path):
    score = lambda values: Score.of(Samples.mean(values), 0.5)
    figures, effect = {"right": score([1, 0, 0, 1])}, {"cure: right": (score([1, 0, 0, 1]), score([1, 1, 1, 1]))}
    found = Pitfall(
        "resolution", HOSTILE, "found: small ones", figures, "look closer", effect, Image.new("RGB", (50, 40))
    )
    report = Report(
        {"": {"accuracy": score([1, 0])}}, [], HOSTILE, "data", pitfalls=[found, Pitfall("x", left_out="it is blind")]
    )
    write_report(str(tmp_path / "r.html"), report)
    page = read(tmp_path / "r.html")
    assert "found: small ones" in page.text and "+50.0" in page.text and "Left out: it is blind" in page.text
    assert page.count("img") == 1


def test_images_are_found_in_a_world_in_a_folder_and_by_the_names_that_others_give_them(world, tmp_path):
    found = images_named(["test/003.png", "single_seen/2", "test/9999.png", "x"], world, side=64)
    assert found.keys() == {"test/003.png", "single_seen/2"} and found["test/003.png"][0].size == (32, 32)
    assert np.array_equal(np.asarray(found["single_seen/2"][0]), ShapesWorld(world, "single_seen").images([2])[0])
    (tmp_path / "val").mkdir()
    Image.new("RGB", (300, 200)).save(tmp_path / "val/COCO_val2014_000000000042.jpg")
    assert images_named(["42", "43"], tmp_path, side=64)["42"][0].size == (96, 64)


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
def test_in_a_browser_the_buttons_hide_what_was_not_chosen_and_nothing_runs_or_loads(photos, tmp_path_factory):
    directory = tmp_path_factory.mktemp("out")
    out = directory / "report.html"
    where = ["--references", str(photos / "questions.jsonl"), "--data", str(photos), "--report", str(out)]
    main(["--predictions", str(answered(photos)), *where])
    browser = Browser(directory)
    try:
        browser.open(out)
        seen = "[...document.querySelectorAll('article')].filter(e => e.offsetParent).length"
        assert browser.value(seen) == 12
        browser.value("document.querySelector('.show-wrong').click()")
        assert browser.value(seen) == 4
        browser.value("document.querySelector('.kind-0').click()")
        assert browser.value(seen) == 2
        assert (
            browser.value("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length")
            == 0
        )
        assert browser.value("document.title") != "1"
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.close()


def test_attention_to_a_single_image_is_drawn(clip, world):
    model, processor = load(str(clip), device="cpu")
    image = Image.new("RGB", (32, 32), "red")
    assert any("<img" in str(part) for part in attention(model, processor, [(image, None)]))
