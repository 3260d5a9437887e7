import pytest
import torch

from minivlm.errors import UserError
from minivlm.layers import QFormerConfig
from minivlm.models.blip2 import BLIP2, BLIP2Config
from minivlm.tasks.few_shot import Example, Prompt, few_shot, few_shot_prompt, likeliest, pair_up, score, shot_prompt
from minivlm.tasks.generate import prompt_tokens
from tests.speakers import (
    COLOURS,
    VISION,
    captioner,
    colour_flamingo,
    colour_llava,
    flamingo,
    language,
    language_model,
    plain,
    processor,
)

OF = "a picture of"


@pytest.fixture(scope="module")
def words():
    return processor(image_tokens=1)


def shots(*colours):
    return [(plain(colour), f"{OF} {colour}") for colour in colours]


def test_a_prompt_is_read_as_it_is_written(words):
    assert shot_prompt(["dax", "wug"]) == "<image>this is a dax.<image>this is a wug.<image>this is a"
    assert shot_prompt([], lead="a") == "<image>a"
    prompt = few_shot_prompt([Example("a.png", " x. "), Example("b.png", "y")], Example("c.png", "z "), words)
    assert prompt.images == ["a.png", "b.png", "c.png"]
    assert "".join(prompt.text) == "<image>x.<image>y.<image>z"


def test_openflamingos_examples_end_with_its_own_token(words):
    tokenizer = type(words.tokenizer).from_str(words.tokenizer.to_str())
    tokenizer.add_special_tokens(["<|endofchunk|>"])
    own = type(words)(tokenizer, words.config)
    text = few_shot_prompt([Example("a", "x")], Example("b", "y"), own).text
    assert "".join(text) == "<image>x.<|endofchunk|><image>y"
    assert tokenizer.token_to_id("<|endofchunk|>") in own.ids(text)
    spelt = few_shot_prompt([Example("a", "<|endofchunk|>")], Example("b", "y"), own).text
    assert own.ids(spelt).count(tokenizer.token_to_id("<|endofchunk|>")) == 1


@pytest.mark.parametrize("query", COLOURS)
def test_it_goes_on_about_the_query_as_the_examples_do(words, query):
    model = colour_flamingo()
    for examples in (shots(), shots("red"), shots("blue", "green")):
        assert few_shot(model, words, examples, (plain(query), OF)) == query
    examples = shots("red", "green", "blue")[:2] + shots("blue")
    assert few_shot(model, words, examples, (plain(query), OF), candidates=COLOURS) == query


def test_a_score_is_the_log_likelihood_of_the_candidate_and_its_end(words):
    model = colour_flamingo()
    prompts = [
        Prompt([plain("red"), plain("blue")], shot_prompt(["red"], OF)),
        Prompt([plain("green")], shot_prompt([], OF)),
    ]
    candidates = [["blue", "red", "a picture"], ["green", "blue"]]
    scores = score(model, words, prompts, candidates)
    for prompt, some, row in zip(prompts, candidates, scores, strict=True):
        for text, value in zip(some, row, strict=True):
            tokens = torch.tensor([prompt_tokens(f"{prompt.text} {text}.", model, words)])
            log_p = model(words.images(prompt.images)[None], tokens).logits.log_softmax(dim=-1)
            start = len(prompt_tokens(prompt.text, model, words))
            known = sum(log_p[0, t - 1, tokens[0, t]].item() for t in range(start, tokens.shape[1]))
            assert value == pytest.approx(known, rel=1e-4)
    alone = score(model, words, prompts, candidates, batch_size=1)
    assert scores == [pytest.approx(row, rel=1e-4) for row in alone]
    assert likeliest(model, words, prompts, candidates) == ["blue", "green"]


def test_any_model_whose_pictures_stand_in_the_text_can_be_shown_examples():
    model, words = colour_llava(), processor()
    prompts = [Prompt([plain("red"), plain("blue")], shot_prompt(["red"], OF))]
    [[blue, red]] = score(model, words, prompts, [["blue", "red"]])
    tokens = torch.tensor([prompt_tokens(f"{prompts[0].text} blue.", model, words)])
    log_p = model(words.images(prompts[0].images)[None], tokens).logits.log_softmax(dim=-1)[0]
    n = len(words.ids(" blue."))
    assert blue == pytest.approx(log_p[-n - 1 : -1].gather(1, tokens[0, -n:, None]).sum().item(), rel=1e-4)
    assert blue != red
    assert isinstance(few_shot(model, words, shots("red"), (plain("blue"), OF), max_new_tokens=3), str)


def test_who_cannot_read_examples_is_told(words):
    query = (plain("red"), OF)
    with pytest.raises(
        UserError, match="this ImageCaptioningModel cannot learn from examples in its prompt; it can describe images"
    ):
        few_shot(captioner(), processor(image_tokens=0), [], query)
    with pytest.raises(UserError, match="this LanguageModel cannot learn from examples in its prompt"):
        few_shot(language_model(), words, [], query)
    qformer = QFormerConfig(width=16, depth=1, heads=2, queries=2)
    in_front = BLIP2(BLIP2Config(vision=VISION, qformer=qformer, language=language(), image_token=None))
    with pytest.raises(
        UserError, match="this BLIP2 cannot learn from examples in its prompt; it can describe images, answer questions"
    ):
        few_shot(in_front, processor(image_tokens=0, chat="blip2"), [], query)


def test_what_is_wrong_with_an_example_is_told(words):
    model, query = colour_flamingo(), (plain("red"), OF)
    with pytest.raises(UserError, match=r"'b\.png' stands alone: give a text for each image"):
        pair_up(["a.png", "this is a dax", "b.png"])
    assert pair_up(["a.png", "x", "b.png", "y"]) == [("a.png", "x"), ("b.png", "y")]
    with pytest.raises(UserError, match="the text of example 2 is empty"):
        few_shot(model, words, [*shots("red"), (plain("blue"), " ")], query)
    with pytest.raises(UserError, match="the text of example 1 has an <image>, but its one image"):
        few_shot(model, words, [(plain("blue"), "<image> a")], query)
    with pytest.raises(UserError, match="the text of the query has an <image>, but"):
        few_shot(model, words, [], (plain("blue"), "a <image>"))
    with pytest.raises(UserError, match=r"nowhere\.png is missing"):
        few_shot(model, words, [("nowhere.png", "a")], query)


def test_an_answer_that_no_example_shows_is_told(words):
    model, query = colour_flamingo(), (plain("red"), OF)
    with pytest.raises(UserError, match="the answer 'green' is not among the examples"):
        few_shot(model, words, shots("red", "blue"), query, candidates=["red", "green"])
    with pytest.raises(UserError, match="at least two candidates to choose from, not 1"):
        few_shot(model, words, shots("red"), query, candidates=["red"])
    assert few_shot(model, words, [], query, candidates=["red", "green"]) == "red"  # nothing is shown


@pytest.mark.parametrize("how", [{"max_new_tokens": 3}, {"candidates": ["red", "blue"]}])
def test_more_examples_than_the_context_has_room_for(words, how):
    model, query = colour_flamingo(), (plain("red"), OF)
    many = shots(*("red", "blue") * 30)
    with pytest.raises(UserError, match=r"60 examples and the query have \d+ tokens .* at most (\d+) of") as error:
        few_shot(model, words, many, query, **how)
    most = int(str(error.value).split("at most ")[1].split()[0])
    assert 2 < most < 60
    few_shot(model, words, many[:most], query, **how)
    with pytest.raises(UserError, match=f"at most {most} of these"):
        few_shot(model, words, many[: most + 1], query, **how)
    with pytest.raises(UserError, match="not even the query alone fits"):
        few_shot(flamingo(language=language(context=2)), words, many, query, **how)
