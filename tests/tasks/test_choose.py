from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from minivlm.errors import UserError
from minivlm.tasks import answer
from tests.colours import WORDS, ColourProcessor, paint


class Chooser(nn.Module):
    """Says which colour a picture has most of, if it is asked about white at all: else the last answer."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(answers=("red", "green", "blue", "none"))
    abilities, takes_images = frozenset({"choose"}), True

    def answer(self, images, tokens, mask):
        asked = (tokens == WORDS.index("white")).any(dim=1, keepdim=True).float()
        return torch.cat([images.mean(dim=(2, 3)) * asked, 0.5 * (1 - asked)], dim=1)


def test_the_likeliest_answer_is_given(tmp_path):
    model, processor = Chooser(), ColourProcessor()
    red, blue = paint(tmp_path / "r.png", "red"), paint(tmp_path / "b.png", "blue")
    assert answer(red, "white", model, processor) == "red"
    assert answer([blue], "white", model, processor) == "blue"
    assert answer(blue, "what", model, processor) == "none"


@pytest.mark.parametrize(
    ("images", "question", "options", "message"),
    [
        (2, "white", {}, "Chooser answers about one image at a time, but was given 2 at once"),
        (0, "white", {}, "but was given 0 at once"),
        (1, " ", {}, "the question is empty"),
        (1, "white " * 20, {}, "has 20 tokens, but the model takes 12"),
        (
            1,
            "white",
            {"num_beams": 2, "temperature": 1.0},
            "chooses one of 4 answers .* leave out num_beams, temperature",
        ),
    ],
)
def test_what_makes_no_sense_is_one_sentence(images, question, options, message):
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    with pytest.raises(UserError, match=message):
        answer([picture] * images, question, Chooser(), ColourProcessor(), **options)


def test_a_model_without_eyes_says_what_it_reads():
    model = Chooser()
    model.takes_images = False
    with pytest.raises(UserError, match="takes features of regions that a detector has found, not images"):
        answer(np.zeros((8, 8, 3), dtype=np.uint8), "white", model, ColourProcessor())
