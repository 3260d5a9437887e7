"""The tokens of captions, beside those that the official program of COCO's evaluation gave."""

import json
from pathlib import Path

import pytest

from minivlm.metrics.ptb_tokenizer import plain_tokens, tokenise_captions, tokens

FIXTURES = Path(__file__).parent / "fixtures/captions"


def test_odd_texts_have_the_official_tokens():
    pairs = json.loads((FIXTURES / "tokens.json").read_text(encoding="utf-8"))
    texts, official = zip(*pairs, strict=True)
    found = tokenise_captions(texts)
    assert [*zip(texts, found, strict=True)] == [*zip(texts, official, strict=True)]


def test_captions_and_their_references_have_the_official_tokens():
    images = json.loads((FIXTURES / "official.json").read_text(encoding="utf-8"))["images"]
    assert tokenise_captions([image["caption"] for image in images]) == [image["tokens"] for image in images]
    references = [text for image in images for text in image["references"]]
    assert tokenise_captions(references) == [text for image in images for text in image["reference_tokens"]]


@pytest.mark.parametrize(
    "text", ["A dog, a cat and I.", "We cannot see it", "", " ", "a dog.  ", "gonna ,run .", "No dog, no. .", "Mr. x"]
)
def test_plain_captions_have_the_tokens_that_the_rules_give(text):
    if (quick := plain_tokens(text)) is not None:
        assert quick == [*tokens(text, [text], 0)]


@pytest.mark.parametrize("space", ["\n", "\t", "\r\n", "\u2028", "\x85", "\u00a0"])
def test_every_kind_of_space_within_a_caption_is_a_space(space):
    assert tokenise_captions([f"a big{space}dog", "a cat"]) == ["a big dog", "a cat"]


def test_every_character_is_taken_somehow():
    everything = "".join(map(chr, range(0x3100))) + "\U0001f600" + "\ud800"
    for text in (everything, " ".join(everything), "a".join(everything)):
        assert len(tokenise_captions([text])) == 1
