"""Captions and answers of a model that has learnt the names of three colours, and what is refused."""

import pytest
import torch
from PIL import Image

import minivlm
from minivlm.conversation import Turn, encode_conversation
from minivlm.errors import UserError
from minivlm.tasks import answer, answer_all, caption, caption_all, complete
from minivlm.tasks.abilities import can_answer
from minivlm.tasks.generate import fitting
from tests.colours import ColourModel, ColourProcessor, paint
from tests.speakers import (
    COLOURS,
    captioner,
    colour_llava,
    language_model,
    llava,
    plain,
    processor,
)

WHICH = "which colours?"
P = processor()


class TestAnswers:
    def test_a_picture_is_described(self, tmp_path):
        assert caption(plain("red"), colour_llava(), P) == "a picture of red"
        assert caption(paint(tmp_path / "b.png", "blue"), colour_llava(), P) == "a picture of blue"
        assert caption(Image.new("L", (40, 30)), colour_llava(), P).startswith("a picture of")

    def test_what_the_model_was_published_with_holds_besides_the_marks_of_pictures(self):
        model = colour_llava()
        red = P.ids(" red")[0]
        try:
            model.defaults = {"suppress_tokens": (red,), "max_new_tokens": 3}
            how = fitting(model, 5, 1, P, {})
            assert set(how.suppress_tokens) == {red, *P.placeholder_tokens} and how.max_new_tokens == 3
            assert "red" not in caption(plain("red"), model, P)
            assert fitting(model, 5, 1, P, {"max_new_tokens": 7}).max_new_tokens == 7
        finally:
            del model.defaults

    def test_a_question_is_answered_about_one_picture_or_several(self, tmp_path):
        assert [answer(plain(c), WHICH, colour_llava(), P) for c in COLOURS] == list(COLOURS)
        assert answer([plain("red"), paint(tmp_path / "b.png", "blue")], WHICH, colour_llava(), P) == "red blue"
        assert answer((plain("blue"), plain("red")), WHICH, colour_llava(), P) == "blue red"

    def test_marks_say_where_the_pictures_stand(self):
        images = [plain("green"), plain("blue")]
        assert answer(images, f"<image>\n<image>\n{WHICH}", colour_llava(), P) == "green blue"

    def test_a_mark_in_the_midst_of_a_sentence_may_be_a_word_and_is_refused(self):
        with pytest.raises(
            UserError, match="<image> in the middle of a sentence may be a word or the place of the image"
        ):
            answer(plain("red"), "what does <image> mean?", colour_llava(), P)
        for question in (f"<image> {WHICH}", f"{WHICH}\n<image>", f"look:\n<image>\n{WHICH}", f"{WHICH} <image>"):
            assert isinstance(answer(plain("red"), question, colour_llava(), P), str)

    def test_the_prompt_is_the_template_of_the_processor(self):
        model, vicuna = llava(), processor(chat="vicuna")
        tokens = vicuna.ids("USER: <image>\nwhich colours? ASSISTANT:")
        assert tokens.count(P.image_token_id) == 4
        said = model.generate(P.images([plain("red")]), torch.tensor([[P.start_token, *tokens]]), max_new_tokens=9)
        assert answer(plain("red"), WHICH, model, vicuna, max_new_tokens=9) == P.decode(said)[0]

    @pytest.mark.parametrize("batch_size", [1, 2, 64])
    def test_many_are_answered_as_each_alone(self, batch_size):
        samples = [
            ([plain("red")], WHICH),
            ([], "and what else?"),
            ([plain("blue"), plain("green")], WHICH),
            ([plain("green")], "describe the picture."),
        ]
        alone = [answer(images, question, colour_llava(), P) for images, question in samples]
        assert answer_all(samples, colour_llava(), P, batch_size=batch_size) == alone
        assert alone[2:] == ["blue green", "a picture of green"]

    def test_nothing_asked_nothing_said(self):
        assert answer_all([], colour_llava(), P) == caption_all([], captioner(), P) == []

    def test_options_reach_the_engine(self):
        model = llava()
        sampled = [answer(plain("red"), WHICH, model, P, temperature=2.0, seed=s, max_new_tokens=8) for s in (1, 1, 2)]
        assert sampled[0] == sampled[1] != sampled[2]
        assert caption(plain("red"), colour_llava(), P, num_beams=3) == "a picture of red"
        assert caption(plain("red"), colour_llava(), P, stop=("of",)) == "a picture"
        assert caption(plain("red"), colour_llava(), P, max_new_tokens=2) == "a picture"

    def test_an_answer_ends_before_its_end_token_whatever_that_is(self):
        model = colour_llava()
        [of] = P.ids("of")
        assert caption(plain("red"), model, P, end_tokens=(of,)) == "a picture"

    def test_padding_that_is_a_word_to_the_tokeniser_is_not_said(self):
        [word] = P.ids("else")
        samples = [([plain("red")], WHICH), ([plain("red")], "describe the picture.")]
        assert answer_all(samples, colour_llava(), P, pad_token=word) == ["red", "a picture of red"]

    def test_the_model_is_left_as_it_was_found(self):
        model = llava().train()
        caption(plain("red"), model, P)
        assert model.training and torch.is_grad_enabled()


class TestCaptioner:
    def test_goes_on_from_the_start_token(self):
        model, p = captioner(), processor(image_tokens=0)
        said = model.generate(p.images([plain("red")]), torch.tensor([[p.start_token]]), max_new_tokens=64)
        assert caption(plain("red"), model, p) == p.decode(said)[0]
        many = caption_all([[plain(c)] for c in COLOURS], model, p, batch_size=2)
        assert many == [caption(plain(c), model, p) for c in COLOURS]

    def test_answers_no_questions(self):
        assert not can_answer(captioner(), processor(image_tokens=0))
        with pytest.raises(
            UserError, match="this ImageCaptioningModel cannot answer questions; it can describe images and show"
        ):
            answer(plain("red"), WHICH, captioner(), processor(image_tokens=0))

    def test_has_no_prompt_and_one_picture(self):
        with pytest.raises(UserError, match="takes no prompt: leave it out"):
            caption(plain("red"), captioner(), processor(image_tokens=0), prompt="say it")
        with pytest.raises(UserError, match="one image at a time, but was given 2 at once"):
            caption_all([[plain("red"), plain("blue")]], captioner(), processor(image_tokens=0))


class TestText:
    def test_goes_on_and_comes_back_whole(self):
        model = language_model()
        said = model.generate(torch.tensor([[P.start_token, *P.ids("a picture")]]), max_new_tokens=5)[0].tolist()
        expected = P.decode([[*P.ids("a picture"), *said]])[0]
        assert complete("a picture", model, P, max_new_tokens=5) == expected
        assert expected.startswith("a picture") and len(expected) > len("a picture")

    def test_the_marks_of_pictures_are_not_said_unless_they_are_wanted(self):
        model, asked = language_model(), []
        speak_freely = model.generate

        def generate(*inputs, **options):
            asked.append(options["suppress_tokens"])
            return speak_freely(*inputs, **options)

        model.generate = generate
        complete("a picture", model, P, max_new_tokens=4)
        complete("a picture", model, P, max_new_tokens=4, suppress_tokens=())
        assert asked == [(P.image_token_id,), ()]

    def test_a_stop_string_in_the_beginning_does_not_stop_it(self):
        whole = complete(WHICH, colour_llava(), P)
        said = whole.removeprefix(f"{WHICH} ")
        assert said in COLOURS
        assert complete(WHICH, colour_llava(), P, stop=("colours",)) == whole
        assert complete(WHICH, colour_llava(), P, stop=(said[2:],)) == f"{WHICH} {said[:2]}"

    def test_a_model_that_sees_can_do_without_a_picture(self):
        model = colour_llava()
        prompt = encode_conversation([Turn("user", WHICH)], P, prompt=True).tokens
        said = model.generate(None, torch.tensor([prompt]), max_new_tokens=8)
        assert answer([], WHICH, model, P, max_new_tokens=8) == P.decode(said)[0]
        assert complete(WHICH, model, P, max_new_tokens=8) == f"{WHICH} {P.decode(said)[0]}".strip()

    def test_needs_something_to_go_on_from(self, monkeypatch):
        monkeypatch.setattr(type(P), "start_token", None)
        with pytest.raises(UserError, match="no text to continue"):
            complete("", language_model(), P)


class TestTheContext:
    def test_without_a_wish_an_answer_is_as_long_as_there_is_room(self):
        model = language_model()
        model.options = lambda **given: type(model).options(model, **{**given, "end_tokens": ()})
        long = "red " * 89  # and the start token: 90 of 96
        lengths = [len(complete(long, model, P, max_new_tokens=n)) for n in (5, 6)]
        assert len(complete(long, model, P)) == lengths[1] > lengths[0]

    @pytest.mark.parametrize(
        ("words", "options", "message"),
        [
            (90, {}, "the prompt of 99 tokens does not fit the context of 96: ask in fewer words"),
            (80, {"max_new_tokens": 10}, "of 89 tokens and 10 new ones do not fit .* 96: .* or lower max_new_tokens"),
        ],
    )
    def test_a_prompt_beyond_it_is_an_error_with_the_numbers(self, words, options, message):
        with pytest.raises(UserError, match=message):
            answer([plain("red"), plain("red")], "red " * words, llava(), P, **options)

    def test_a_captioner_counts_its_picture(self):
        with pytest.raises(UserError, match="the prompt of 5 tokens and 92 new ones do not fit the context of 96"):
            caption(plain("red"), captioner(), processor(image_tokens=0), max_new_tokens=92)


class TestRefusals:
    @pytest.mark.parametrize(
        ("images", "question", "message"),
        [
            (["red"], " ", "the question is empty"),
            (
                ["red"],
                "<image> <image> which?",
                "placeholders in the conversation is 2, but that of its images is 1",
            ),
            (
                ["red", "red", "red"],
                "<image> which?",
                "placeholders in the conversation is 1, but that of its images is 3",
            ),
        ],
    )
    def test_a_question_that_makes_no_sense(self, images, question, message):
        with pytest.raises(UserError, match=message):
            answer([plain(c) for c in images], question, llava(), P)

    @pytest.mark.parametrize(
        ("option", "message"),
        [({"top_p": 0.0}, "top_p is 0.0"), ({"top_p": 2.0}, "top_p is 2.0"), ({"num_beams": 0}, "num_beams is 0")],
    )
    def test_options_that_make_no_sense(self, option, message):
        with pytest.raises(UserError, match=message):
            caption("gone.png", llava(), P, **option)  # before the picture is looked for

    def test_a_picture_that_is_missing(self):
        with pytest.raises(UserError, match=r"gone.png is missing"):
            caption("gone.png", llava(), P)

    def test_models_that_cannot_do_it(self):
        with pytest.raises(
            UserError, match="this ColourModel cannot describe images; it can compare texts and images as vectors"
        ):
            caption(plain("red"), ColourModel(), ColourProcessor())
        with pytest.raises(UserError, match="no processor beside this LLaVA"):
            answer(plain("red"), WHICH, llava(), None)
        with pytest.raises(UserError, match="this LanguageModel takes text alone, and no image"):
            answer(plain("red"), WHICH, language_model(), processor(image_tokens=0))
        with pytest.raises(
            UserError,
            match="this LanguageModel cannot describe images; it can answer questions, chat and continue a text",
        ):
            caption(plain("red"), language_model(), processor(image_tokens=0))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"image_token": "<end>"}, r"image placeholder is 3 in the processor but 2 in the LLaVA"),
            ({"image_tokens": 9}, "number of placeholders for an image is 9 in the processor but 4 in the LLaVA"),
            ({"image_tokens": 0}, "number of placeholders for an image is 0 in the processor but 4 in the LLaVA"),
        ],
    )
    def test_a_processor_of_another_model(self, changes, message):
        for ask in (lambda p: caption(plain("red"), llava(), p), lambda p: answer(plain("red"), WHICH, llava(), p)):
            with pytest.raises(UserError, match=message):
                ask(processor(**changes))

    def test_a_tokeniser_of_another_model(self):
        other = minivlm.Processor.train(
            [f"word{i} of many" for i in range(200)], vocab_size=400, image_size=16, context=96
        )
        with pytest.raises(UserError, match=r"the tokeniser has \d+ tokens, but the LanguageModel has \d+"):
            complete("word", language_model(), other)
