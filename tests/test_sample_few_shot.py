"""sample.py few-shot, with a model that has learnt the names of three colours."""

import pytest

import sample
from minivlm.errors import UserError
from tests.colours import paint
from tests.speakers import captioner, colour_flamingo, processor

OF = "a picture of"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories as train.py leaves them."""
    folder = tmp_path_factory.mktemp("models")
    colour_flamingo().save_pretrained(folder / "flamingo", processor=processor(image_tokens=1))
    captioner().save_pretrained(folder / "captioner", processor=processor(image_tokens=0))
    return folder


@pytest.fixture(autouse=True)
def here(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("flamingo", "captioner"):
        (tmp_path / name).symlink_to(models / name)
    for colour in ("red", "green", "blue"):
        paint(tmp_path / f"{colour}.png", colour)


def run(*argv):
    sample.main(["few-shot", *map(str, argv), "--device", "cpu"])


def test_goes_on_with_the_query(capsys):
    run("flamingo", "--examples", "red.png", f"{OF} red", "blue.png", f"{OF} blue", "--query", "green.png", OF)
    run("flamingo", "--query", "blue.png", OF, "--max_new_tokens", 12)
    run("flamingo", "--query", "red.png", OF, "--candidates", "blue", "red")
    assert capsys.readouterr().out == "green\nblue\nred\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("flamingo", "--examples", "red.png", "--query", "red.png", OF), r"'red\.png' stands alone"),
        (("flamingo", "--examples", "gone.png", "a", "--query", "red.png", OF), r"gone\.png is missing"),
        (("flamingo", "--query", "red.png", "<image> a"), "has an <image>, but its one image"),
        (("captioner", "--query", "red.png", OF), "this ImageCaptioningModel cannot learn from examples"),
        (("flamingo",), "--query"),
        (("flamingo", "--query", "red.png", OF, "--num_beams", 0), "num_beams is 0"),
    ],
)
def test_mistakes_are_told(argv, message):
    with pytest.raises(UserError, match=message):
        run(*argv)


def test_too_many_examples_are_told_with_how_many_would_fit():
    with pytest.raises(UserError, match=r"50 examples and the query have .* at most \d+ of these examples fit"):
        run("flamingo", "--examples", *["red.png", f"{OF} red"] * 50, "--query", "green.png", OF)
