import json

import numpy as np
import pytest
from PIL import Image

from minivlm.conversation import IGNORED
from minivlm.datasets.interleaved import Interleaved, ahead, encode_document, is_interleaved
from minivlm.errors import UserError
from tests.speakers import processor

PLACEHOLDER = "<image>"
NAMES = [f"{i}.png" for i in range(40)]


def image(name):
    return {"image": name}


def text(words):
    return {"text": words}


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(NAMES):
        Image.new("RGB", (12, 10), (i, 0, 0)).save(tmp_path / name)
    return tmp_path


def write(folder, *documents):
    lines = (document if isinstance(document, str) else json.dumps(document) for document in documents)
    (folder / "interleaved.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def opened(folder):
    splits = [Interleaved(folder, split, image_size=8) for split in ("train", "val", "test")]
    return {split.key(i): (split, i) for split in splits for i in range(len(split))}


def test_documents_are_read_in_their_order_and_all_land_in_one_split(folder):
    documents = [
        [text("so  far "), image(a), text("a"), text("b"), image(b)]
        for a, b in zip(NAMES[::2], NAMES[1::2], strict=True)
    ]
    assert not is_interleaved(folder) and is_interleaved(write(folder, *documents))
    found = opened(folder)
    assert list(found) and len(found) == 20
    split, i = found["4.png"]
    assert split.text(i) == "so far<image>a b<image>"
    assert [picture[0, 0, 0] for picture in split.images([i])[0]] == [4, 5]
    assert set(split.texts()) == {"so far", "a b"}


def test_a_picture_may_belong_to_the_text_before_it(folder):
    assert ahead(["t", PLACEHOLDER, "u", PLACEHOLDER, PLACEHOLDER, "v"]) == [
        PLACEHOLDER,
        "t",
        PLACEHOLDER,
        PLACEHOLDER,
        "u",
        "v",
    ]
    assert ahead([PLACEHOLDER, "u"]) == [PLACEHOLDER, "u"]
    write(folder, *([text("t"), image(name), text("u")] for name in NAMES))
    split = Interleaved(folder, "train", image_size=8)
    drawn = [split.text(0, np.random.default_rng(i)) for i in range(200)]
    assert set(drawn) == {"t<image>u", "<image>tu"} and 70 < drawn.count("t<image>u") < 130
    assert split.text(0) == "t<image>u"


def test_documents_without_an_image_are_counted_told_and_skipped(folder):
    write(folder, [text("words")], *([image(name), text("u")] for name in NAMES), [text("alone")])
    split = Interleaved(folder, "train", image_size=8)
    assert "2 of 42 documents are skipped because they have no image." in split.notes
    assert len(opened(folder)) == 40
    write(folder, [text("words")])
    with pytest.raises(UserError, match=r"none of the 1 documents in .*interleaved\.jsonl has an image"):
        Interleaved(folder, "train", image_size=8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "it is not JSON"),
        ({"image": "0.png"}, "it is no list of images and texts"),
        ([{"image": "0.png", "text": "a"}], "it is no list of images and texts"),
        ([{"image": 3}], "it is no list of images and texts"),
        ([image("0.png"), text("a <image> b")], "more placeholders than images: an image is a segment"),
        ([image("0.png"), text(" ")], "it has no text"),
        ([image("gone.png"), text("a")], r"there is no image 'gone\.png'"),
    ],
)
def test_a_line_that_is_no_document_is_named(folder, line, message):
    write(folder, [image("1.png"), text("a")], line)
    with pytest.raises(UserError, match=rf"interleaved\.jsonl, line 2: .*{message}"):
        Interleaved(folder, "train", image_size=8)


def test_a_folder_without_documents_and_broken_pictures(folder):
    with pytest.raises(UserError, match=r"holds no documents of images and texts: looked for interleaved\.jsonl"):
        Interleaved(folder, "train", image_size=8)
    (folder / "0.png").write_text("no image")
    write(folder, *([image(name), text("u")] for name in NAMES))
    assert "0.png" not in {key for key, (split, _) in opened(folder).items() if split.split == "train"}


class TestEncode:
    words = processor(image_tokens=1)

    def test_what_follows_the_first_picture_is_learnt_and_pictures_are_not(self):
        mark, end = self.words.image_token_id, self.words.end_token
        sample = encode_document("red<image>green<image>blue", self.words)
        red, green, blue = (self.words.ids(colour) for colour in ("red", "green", "blue"))
        assert sample.tokens == [self.words.start_token, *red, mark, *green, mark, *blue, end]
        hidden = [IGNORED] * (2 + len(red))
        assert sample.labels == [*hidden, *green, IGNORED, *blue, end] and sample.cut == 0

    def test_what_does_not_fit_is_left_out_where_it_teaches_least(self):
        mark = self.words.image_token_id
        long = encode_document("red red red<image>green<image>blue", self.words)
        for context in range(3, len(long.tokens)):
            sample = encode_document("red red red<image>green<image>blue", self.words, context=context)
            assert len(sample.tokens) == context and mark in sample.tokens
            assert sample.tokens[0] == self.words.start_token
            assert sample.cut == len(long.tokens) - context
            assert any(label != IGNORED for label in sample.labels)

    def test_a_text_without_a_mark_is_refused(self):
        with pytest.raises(ValueError, match="here is none: 'red'"):
            encode_document("red", self.words)
