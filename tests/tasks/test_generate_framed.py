"""Prompts that are one whole text behind the pictures: the published BLIP-2's, and those of models with an encoder."""

import pytest

from minivlm import BLIP2, BLIP2Config
from minivlm.conversation import TEMPLATES, Turn, encode_conversation, with_images
from minivlm.errors import UserError
from minivlm.layers import QFormerConfig, T5Config
from minivlm.tasks import generate
from tests import speakers

QFORMER = QFormerConfig(width=16, depth=2, heads=2, queries=4)


def blip2(*, places: bool, encoder: bool):
    ids = speakers.processor()
    language = speakers.language()
    if encoder:
        ends = dict(vocab_size=ids.vocab_size, end_tokens=(ids.end_token,), pad_token=ids.pad_token)
        language = T5Config(width=32, depth=2, heads=2, context=speakers.CONTEXT, **ends)
    mark = ids.image_token_id if places else None
    return BLIP2(BLIP2Config(vision=speakers.VISION, qformer=QFORMER, language=language, image_token=mark)).eval()


@pytest.mark.parametrize("chat", ["encoder", "blip2"])
def test_pictures_come_first_then_the_text_in_its_frame(chat):
    p = speakers.processor(chat=chat)
    tokens = generate.question_tokens("which colours?", 2, p)
    assert tokens == [p.image_token_id] * 8 + p.ids("which colours?", frame=True)
    assert tokens[-1] == p.end_token


def test_earlier_turns_are_part_of_the_text_and_the_last_answer_is_learnt():
    p = speakers.processor(chat="encoder")
    turns = [Turn("user", with_images("which colours?")), Turn("assistant", "red"), Turn("user", "and what else?")]
    sample = encode_conversation([*turns, Turn("assistant", "blue")], p)
    asked = [p.image_token_id] * 4 + p.ids("which colours? red and what else?", frame=True)
    said = [*p.ids("blue"), p.end_token]
    assert sample.tokens == asked + said
    assert sample.labels == [-100] * len(asked) + said
    assert encode_conversation(turns, p, prompt=True).tokens == asked


@pytest.mark.parametrize("encoder", [False, True])
def test_without_an_image_token_the_same_is_said(encoder):
    """Older configs name none: the queries' outputs stand in front all the same."""
    new, old = (blip2(places=places, encoder=encoder) for places in (True, False))
    places, none = speakers.processor(chat="blip2"), speakers.processor(chat="blip2", image_tokens=0)
    picture = speakers.plain("red")
    for question in ("which colours?", "describe the picture."):
        said = generate.answer(picture, question, new, places, max_new_tokens=8)
        assert said == generate.answer(picture, question, old, none, max_new_tokens=8)
    assert generate.caption(picture, new, places, max_new_tokens=8) == generate.caption(
        picture, old, none, max_new_tokens=8
    )
    assert (
        len(
            {generate.answer(speakers.plain(c), "which colours?", old, none, max_new_tokens=8) for c in ("red", "blue")}
        )
        == 2
    )


def test_a_caption_is_what_the_published_one_says_without_a_word():
    assert TEMPLATES["blip2"].describe == ""
    p, model, picture = speakers.processor(chat="blip2"), blip2(places=True, encoder=False), speakers.plain("red")
    assert generate.question_tokens("", 1, p) == [p.image_token_id] * 4 + p.ids("", frame=True)
    assert isinstance(generate.caption(picture, model, p, max_new_tokens=4), str)
    with pytest.raises(UserError, match="the question is empty"):
        generate.answer(picture, " ", model, p)
