"""What every dataset of conversations offers, and which one a folder is opened as."""

import json

import numpy as np
import pytest
from PIL import Image

from minivlm.conversation import Turn
from minivlm.datasets import Conversations, FolderConversations, Question, make_shapes, open_conversations
from minivlm.datasets.shapes.conversations import ShapesConversations
from minivlm.errors import UserError


class Fruit(Conversations):
    """Two samples, of which the first has captions."""

    split = "train"

    def __len__(self):
        return 2

    def conversation(self, index, rng):
        return [Turn("user", f"<image> what is {index}?"), Turn("assistant", "a plum")]

    def captions(self, index):
        return [["an apple", "a red apple"], []][index]


def test_what_is_not_told_is_not_there():
    assert Fruit().questions() == [] and Fruit().notes == () and Fruit().one_image_each
    for missing in (
        lambda: Fruit().images([0]),
        lambda: Fruit().key(0),
        lambda: Fruit().texts(),
        lambda: len(Conversations()),
    ):
        with pytest.raises(NotImplementedError):
            missing()
    assert Question(0, "what?", ("this",)).kind == "all"


def test_a_caption_is_asked_for_and_where_there_is_none_a_conversation_stands_in():
    asked = [Fruit().caption_conversation(0, np.random.default_rng(seed)) for seed in range(20)]
    assert {turns[0] for turns in asked} == {Turn("user", "<image>\ndescribe the picture.")}
    assert {turns[1] for turns in asked} == {Turn("assistant", "an apple"), Turn("assistant", "a red apple")}
    rng = np.random.default_rng(0)
    assert Fruit().caption_conversation(1, rng) == Fruit().conversation(1, rng)


def test_a_folder_is_opened_as_what_it_holds(tmp_path):
    with pytest.raises(UserError, match=r"no dataset that is recognised: looked for world\.json .* captions\.jsonl"):
        open_conversations(tmp_path, "train", image_size=32)
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        open_conversations(tmp_path / "nowhere", "train", image_size=32)

    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    files = {
        "captions.jsonl": json.dumps({"image": "a.png", "caption": "c"}),
        "questions.jsonl": json.dumps({"image": "a.png", "question": "q?", "answer": "old"}),
        "vqa.jsonl": json.dumps({"image": "a.png", "question": "q?", "answer": "new"}),
        "conversations.json": json.dumps(
            [{"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}]
        ),
    }
    told = {"describe the picture."}
    for (name, text), said in zip(files.items(), ("c", "q? old", "q? new", "h g"), strict=True):  # all are read
        (tmp_path / name).write_text(text)
        talk = open_conversations(tmp_path, "train", image_size=32)
        assert isinstance(talk, FolderConversations)
        assert set(talk.texts()) == (told := told | {said})

    make_shapes(tmp_path, train=4, image_size=32, progress=False)
    assert isinstance(open_conversations(tmp_path, "train", image_size=32), ShapesConversations)
