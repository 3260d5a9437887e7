"""Conversations with a model that has learnt the names of three colours."""

import pytest
import torch

import minivlm
from minivlm.conversation import Turn, encode_conversation
from minivlm.errors import UserError
from minivlm.tasks import Chat
from tests.colours import ColourModel, ColourProcessor, paint
from tests.speakers import captioner, colour_llava, language_model, llava, plain, processor

WHICH, ELSE = "which colours?", "and what else?"
P = processor()


def chat(*colours, model=None, **options):
    return minivlm.chat(model or colour_llava(), P, *[plain(c) for c in colours], **options)


def say(conversation, text):
    return "".join(conversation.say(text))


class TestTalking:
    def test_a_second_picture_in_mid_conversation(self, tmp_path):
        conversation = chat("red")
        assert say(conversation, WHICH) == "red"
        conversation.see(paint(tmp_path / "b.png", "blue"))
        assert say(conversation, ELSE) == "blue"
        assert conversation.turns == [
            Turn("user", f"<image>\n{WHICH}"),
            Turn("assistant", "red"),
            Turn("user", f"<image>\n{ELSE}"),
            Turn("assistant", "blue"),
        ]

    def test_two_pictures_at_once(self):
        assert say(chat("green", "blue"), WHICH) == "green blue"

    def test_the_answer_comes_in_pieces(self):
        pieces = list(chat("red").say("describe the picture."))
        assert len(pieces) > 1 and all(pieces) and "".join(pieces) == "a picture of red"

    def test_the_model_reads_all_that_was_said(self):
        model = llava()  # whose answers depend on every token
        conversation = chat("red", model=model, max_new_tokens=6)
        turns = []
        for i, question in enumerate(("which?", "and of what?", "picture red blue")):
            if i == 2:
                conversation.see(plain("blue"))
            said = say(conversation, question)
            turns.append(Turn("user", "<image>\n" * (i != 1) + question))
            prompt = torch.tensor([encode_conversation(turns, P, prompt=True).tokens])
            images = P.images([plain("red"), *[plain("blue")] * (i == 2)])
            assert said == P.decode(model.generate(images, prompt, max_new_tokens=6))[0]
            turns.append(Turn("assistant", said))
        assert conversation.turns == turns

    @pytest.mark.parametrize("options", [{"num_beams": 3}, {"temperature": 0.1, "seed": 3}, {"top_k": 1}], ids=str)
    def test_options_reach_the_engine(self, options):
        conversation = chat("red", "green", **options)
        assert say(conversation, WHICH) == "red green"

    def test_stop_strings_end_an_answer(self):
        conversation = chat("red", stop=("of",))
        assert say(conversation, "describe the picture.").rstrip() == "a picture"
        assert conversation.turns[-1] == Turn("assistant", "a picture")

    def test_what_listens_keeps_its_gradients(self):
        for _ in chat("red").say(WHICH):
            assert torch.is_grad_enabled()

    def test_a_language_model_talks_without_pictures(self):
        conversation = Chat(language_model(), processor(image_tokens=0), max_new_tokens=5)
        assert say(conversation, WHICH) and len(conversation.turns) == 2
        with pytest.raises(UserError, match="this LanguageModel takes text alone, and no image"):
            conversation.see(plain("red"))


class TestInterruption:
    def test_the_answer_is_kept_as_far_as_it_came(self):
        conversation = chat("red")
        pieces = conversation.say("describe the picture.")
        assert [next(pieces), next(pieces)] == ["a", " picture"]
        pieces.close()
        assert conversation.turns == [Turn("user", "<image>\ndescribe the picture."), Turn("assistant", "a picture")]
        conversation.see(plain("blue"))
        assert say(conversation, ELSE) == "blue"  # and it goes on

    def test_by_an_exception_inside_the_model(self, monkeypatch):
        conversation = chat("red")
        pieces = conversation.say("describe the picture.")
        assert next(pieces) == "a"

        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("minivlm.layers.language_model.LMDecoding.step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
        assert conversation.turns[-1] == Turn("assistant", "a")

    def test_before_the_first_word_it_was_never_asked_and_its_picture_waits(self):
        conversation = chat("red")
        conversation.say("describe the picture.").close()
        assert conversation.turns == []
        assert say(conversation, WHICH) == "red"
        assert conversation.turns[0].text == f"<image>\n{WHICH}"


class Parrot(Chat):
    """Says "blue" to everything, and records what it was told and shown."""

    def tokens(self, prompt, pixels, options):
        self.prompt, self.pixels = prompt, pixels
        yield from P.ids("blue")


def parrot(*colours, **options):
    conversation = Parrot(llava(), P, **options)
    for colour in colours:
        conversation.see(plain(colour))
    return conversation


def length(turns):
    return len(encode_conversation(turns, P, prompt=True).tokens)


class TestTheContext:
    """Of 96 tokens."""

    @pytest.mark.parametrize(("options", "free"), [({"max_new_tokens": 40}, 40), ({}, 24)])
    def test_the_oldest_exchanges_are_forgotten_as_many_as_need_be_and_counted(self, options, free):
        conversation, total = parrot("red", **options), 0
        for i in range(10):
            before, new = conversation.turns, Turn("user", f"<image>\n{ELSE}")
            conversation.see(plain("blue"))
            say(conversation, ELSE)
            total += (gone := conversation.dropped)
            if i:
                assert conversation.turns == [*before[2 * gone :], new, Turn("assistant", "blue")]
                assert len(conversation.prompt) == length(conversation.turns[:-1]) <= 96 - free
                assert gone == 0 or length([*before[2 * gone - 2 :], new]) > 96 - free
            assert len(conversation.pixels) == sum(turn.text.count("<image>") for turn in conversation.turns)
        assert total > 2

    def test_the_picture_in_view_stays_in_view(self):
        conversation, total = parrot("green", max_new_tokens=60), 0
        for _ in range(12):
            say(conversation, WHICH)
            total += conversation.dropped
            assert torch.equal(conversation.pixels, P.images([plain("green")]))
            assert [turn.text.count("<image>") for turn in conversation.turns[::2]][:3] in ([1], [1, 0], [1, 0, 0])
        assert total > 2

    def test_also_where_all_exchanges_are_forgotten(self):
        conversation = parrot("green", max_new_tokens=88)
        say(conversation, "a")
        pieces = conversation.say("b")
        assert conversation.dropped == 1 and conversation.turns == []
        pieces.close()  # nothing came: the picture waits
        say(conversation, "b")
        assert torch.equal(conversation.pixels, P.images([plain("green")]))
        assert conversation.turns == [Turn("user", "<image>\nb"), Turn("assistant", "blue")]

    def test_it_goes_with_its_exchange_when_a_newer_one_is_in_view(self):
        conversation = parrot("red", max_new_tokens=60)
        say(conversation, WHICH)
        conversation.see(plain("blue"))
        say(conversation, ELSE)
        assert torch.equal(conversation.pixels, P.images([plain("red"), plain("blue")]))
        while not conversation.dropped:
            say(conversation, WHICH)
        assert torch.equal(conversation.pixels, P.images([plain("blue")]))

    @pytest.mark.parametrize("options", [{}, {"max_new_tokens": 60}])
    def test_a_question_that_does_not_fit_is_an_error_and_nothing_is_forgotten(self, options):
        conversation = parrot("red", **options)
        say(conversation, WHICH)
        conversation.see(plain("blue"))
        before, waiting = conversation.turns, conversation.waiting
        with pytest.raises(UserError, match=r"the prompt of 100 tokens .* not fit the context of 96"):
            conversation.say("red " * 95)
        assert (conversation.turns, conversation.waiting) == (before, waiting)
        say(conversation, ELSE)
        assert torch.equal(conversation.pixels, P.images([plain("red"), plain("blue")]))


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "message"), [("  ", "the question is empty"), ("<image> which?", "add the image, then ask")]
    )
    def test_a_question_that_makes_no_sense_is_refused_at_once(self, text, message):
        with pytest.raises(UserError, match=message):
            chat("red").say(text)

    def test_a_picture_that_is_missing(self):
        conversation = chat()
        with pytest.raises(UserError, match=r"gone.png is missing"):
            conversation.see("gone.png")
        assert conversation.waiting == ()

    def test_models_that_cannot_talk(self):
        with pytest.raises(UserError, match="this ImageCaptioningModel cannot chat; it can describe images"):
            Chat(captioner(), processor(image_tokens=0))
        with pytest.raises(UserError, match="this ColourModel cannot chat"):
            Chat(ColourModel(), ColourProcessor())

    def test_options_that_make_no_sense_before_the_first_question(self):
        with pytest.raises(UserError, match="top_p is 2"):
            chat("red", top_p=2.0)
