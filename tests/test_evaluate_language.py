"""A language model is judged by what it expects and by what it finds in its context: an oracle gets everything right."""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minivlm.conversation import IGNORED, Turn
from minivlm.datasets.shapes.episodes import document, documents, few_shot, words
from minivlm.datasets.shapes.questions import judge
from minivlm.layers import LanguageModel, LanguageModelConfig
from minivlm.processor import Processor

language = importlib.import_module("minivlm.evaluate.language")  # as an attribute it is the function of that name


@pytest.fixture(scope="module")
def processor():
    return Processor.train(documents(0, "train", 300), vocab_size=400, image_size=16, context=192)


@pytest.fixture
def model(processor):
    return LanguageModel(LanguageModelConfig(width=16, depth=1, heads=2, vocab_size=processor.vocab_size, context=192))


def test_all_of_a_text_is_learnt_and_of_a_conversation_the_answers(processor):
    text = language.text_sample("a red circle", processor)
    assert text.tokens == processor.encode(["a red circle"])[0]
    assert text.labels == [IGNORED, *text.tokens[1:]]
    turns = [Turn("user", "a red circle. which shape?"), Turn("assistant", "circle")]
    talk = language.text_sample(turns, processor)
    answer = [*processor.ids("circle"), processor.end_token]
    assert [label for label in talk.labels if label != IGNORED] == answer
    assert talk.tokens == [processor.start_token, *processor.ids("a red circle. which shape?"), *answer]


def test_perplexity_is_the_mean_surprise_of_what_is_learnt(model, processor):
    some = [document(0, "held out", i) for i in range(12)]
    assert any(isinstance(text, str) for text in some) and not all(isinstance(text, str) for text in some)
    surprises, tokens = [], []
    for text in some:
        sample = language.text_sample(text, processor)
        with torch.no_grad():
            odds = model.eval()(torch.tensor([sample.tokens])).logits[0].log_softmax(dim=-1)
        foretold = [(i, t) for i, t in enumerate(sample.labels) if t != IGNORED]
        surprises += [-odds[i - 1, t].item() for i, t in foretold]
        tokens += [t for _, t in foretold]
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    score = language.perplexity(model, processor, some, batch_size=5)
    assert score.value == pytest.approx(math.exp(np.mean(surprises)), rel=1e-4)
    assert score.chance == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert language.unigram_entropy(some, processor) == pytest.approx(math.log(score.chance), rel=1e-6)


def oracle(processor, answers, wrong=()):
    """It knows what follows each text, but for those in `wrong`."""

    def generate(tokens, mask, *, max_new_tokens):
        texts = processor.decode([row[seen].tolist() for row, seen in zip(tokens, mask, strict=True)])
        said = [[*processor.ids("nothing" if text in wrong else answers[text]), processor.end_token] for text in texts]
        width = max(map(len, said))
        return torch.tensor([row + [processor.pad_token] * (width - len(row)) for row in said])

    still = SimpleNamespace(training=False, eval=lambda: None, train=lambda mode: None)
    still.continues_prompt, still.takes_images = True, False
    return SimpleNamespace(**vars(still), generate=generate, device=torch.device("cpu"))


def test_who_knows_the_new_words_gets_them_all(processor, monkeypatch):
    monkeypatch.setattr(language, "EPISODES", 40)
    answers = {episode.text: f"{episode.answer}. more" for episode in few_shot(40, shots=2)}
    score = language.new_words(oracle(processor, answers), processor, 2)
    assert (score.value, score.chance) == (1.0, 0.5)
    forgotten = set(list(answers)[:10])
    wrong = sum(episode.text in forgotten for episode in few_shot(40, shots=2))
    assert language.new_words(oracle(processor, answers, forgotten), processor, 2).value == pytest.approx(
        1 - wrong / 40
    )


def test_who_knows_the_told_scenes_answers_all_questions_about_them(processor, monkeypatch):
    monkeypatch.setattr(language, "TOLD", 300)
    monkeypatch.setattr(language, "QUESTIONS", 30)
    scenes = language.held_out_scenes(0, 300)
    asked = judge(scenes, 30)
    answers = {f"{language.canonical(scenes[i])}. {question.text}": question.answer for i, question in asked}
    scores = language.told_scenes(oracle(processor, answers), processor)
    assert {score.value for score in scores.values()} == {1.0} and len(scores) == 7
    scores = language.told_scenes(oracle(processor, answers, set(answers)), processor)
    assert {score.value for score in scores.values()} == {0.0}


def test_held_out_texts_are_those_of_the_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "is_world", lambda directory: True)
    held_out = language.held_out_texts(tmp_path)
    assert len(held_out) == language.HELD_OUT
    assert [words(text) for text in held_out[:20]] == list(documents(0, "held out", 20))
