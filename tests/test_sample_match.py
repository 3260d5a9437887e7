"""sample.py match, attend and search --rerank, with a real stage 1 of BLIP-2 that has learnt nothing yet."""

from pathlib import Path

import pytest
from PIL import Image

import minivlm
import sample
from minivlm.errors import UserError
from minivlm.layers import TextConfig, VisionConfig
from minivlm.layers.qformer import QFormerConfig
from minivlm.models.blip2_stage1 import BLIP2Stage1, BLIP2Stage1Config
from minivlm.tasks import match_all
from tests.colours import paint

VISION = VisionConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories as train.py leaves them."""
    folder = tmp_path_factory.mktemp("models")
    processor = minivlm.Processor.train(["a red circle"], vocab_size=270, image_size=16, context=24)
    ids = dict(start_token=processor.start_token, decode_token=2, end_token=processor.end_token)
    qformer = QFormerConfig(width=16, depth=2, heads=2, queries=9, vocab_size=processor.vocab_size, context=24)
    stage_1 = BLIP2Stage1(BLIP2Stage1Config(vision=VISION, qformer=qformer, embed_width=8, **ids))
    stage_1.save_pretrained(folder / "stage1", processor=processor)
    text = TextConfig(
        vocab_size=processor.vocab_size, context=24, width=16, depth=1, heads=2, end_token=processor.end_token
    )
    clip = minivlm.CLIP(minivlm.CLIPConfig(vision=VISION, text=text, embed_width=8))
    clip.save_pretrained(folder / "clip", processor=processor)
    return folder


@pytest.fixture(autouse=True)
def here(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("stage1", "clip"):
        (tmp_path / name).symlink_to(models / name)
    for name, colour in (("red.png", "red"), ("b/blue.jpg", "blue"), ("b/green.png", "green")):
        paint(tmp_path / "pictures" / name, colour)


def run(*argv):
    sample.main([*map(str, argv), "--device", "cpu"])


def test_match_prints_a_bar_and_a_percentage_for_each_picture(capsys):
    files = ["pictures/red.png", "pictures/b/blue.jpg"]
    run("match", "stage1", *files, "a red circle")
    lines = capsys.readouterr().out.splitlines()
    likely = match_all(files, ["a red circle"], *minivlm.load("stage1"))[:, 0].tolist()
    assert [line.split()[0] for line in lines] == files
    assert [float(line.split()[-1].rstrip("%")) for line in lines] == [pytest.approx(100 * p, abs=0.06) for p in likely]
    assert len({len(line) for line in lines}) == 1 and "█" in lines[0]


def test_search_is_ordered_by_matching_among_the_closest(capsys):
    run("search", "stage1", "pictures", "a red circle", "--top", 3)
    closest = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    run("search", "stage1", "pictures", "a red circle", "--top", 1, "--rerank", 2, "--save", "sheet.png")
    line, wrote = capsys.readouterr().out.splitlines()
    model, processor = minivlm.load("stage1")
    likely = match_all(closest[:2], ["a red circle"], model, processor)[:, 0].tolist()
    rank, probability, cosine, path = line.split()
    assert (rank, path) == ("1", closest[likely.index(max(likely))])
    assert probability == f"{max(likely):.1%}" and -1 <= float(cosine) <= 1
    assert wrote == "wrote sheet.png" and Path("sheet.png").is_file()
    run("search", "stage1", "pictures", "a red circle", "--top", 3, "--rerank", 1)  # all that is shown is matched
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_attend_writes_a_row_for_each_of_eight_queries(capsys):
    run("attend", "stage1", "pictures/red.png", "pictures/b/blue.jpg", "--save", "maps.png")
    assert capsys.readouterr().out == "wrote maps.png\n"
    queries = Image.open("maps.png").size
    run("attend", "clip", "pictures/red.png", "pictures/b/blue.jpg")
    assert queries[0] == Image.open("maps.png").width and queries[1] > 3 * Image.open("maps.png").height


def test_zero_shot_takes_the_best_query_of_each_label(capsys):
    run("zero-shot", "stage1", "pictures/red.png", "--labels", "red circle", "blue square")
    percents = [float(line.split()[-1].rstrip("%")) for line in capsys.readouterr().out.splitlines()[1:]]
    assert percents == sorted(percents, reverse=True) and sum(percents) == pytest.approx(100, abs=0.11)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["match", "clip", "pictures/red.png", "a red circle"], "this CLIP cannot match texts with images"),
        (["match", "stage1", "pictures/red.png", " "], "a text to match is empty"),
        (["match", "stage1", "gone.png", "a red circle"], "gone.png is missing"),
        (["match", "stage1", "pictures/red.png", "red " * 60], "tokens, but the model takes 24; make it shorter"),
        (["match", "stage1", "pictures/red.png"], "the following arguments are required"),
        (["search", "clip", "pictures", "red", "--rerank", "4"], "this CLIP cannot match texts with images"),
        (["search", "stage1", "pictures", "pictures/red.png", "--rerank", "4"], "the query is an image: leave it out"),
        (["search", "stage1", "pictures", "red", "--rerank", "0"], "--rerank: '0' is not a number from 1"),
        (["attend", "stage1", "pictures/red.png", "--save", "maps.doc"], "has to end in .png"),
        (["attend", "stage1", "gone.png"], "gone.png is missing"),
    ],
)
def test_a_mistake_is_one_sentence(argv, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        run(*argv)
    assert message in str(error.value)
