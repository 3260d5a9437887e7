"""Answers and captions of held-out images: each image is looked at once, and texts are expected to the digit."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm import evaluate
from minivlm.conversation import Turn, collate, encode_conversation, with_images
from minivlm.datasets.conversations import open_conversations
from minivlm.evaluate.expectation import some_of, text_perplexity
from minivlm.evaluate.generation import answers, by_image
from minivlm.layers import LanguageModelConfig, VisionConfig
from minivlm.models.coca import CoCa, CoCaConfig
from minivlm.processor import Processor
from minivlm.tasks import answer
from tests import speakers
from tests.colours import RGB

COLOURS = ("red", "green", "blue", "red")


def folder(directory, rows, file):
    directory.mkdir()
    rng = np.random.default_rng(0)
    for i, colour in enumerate(COLOURS):
        noisy = speakers.plain(colour) // 2 + rng.integers(0, 99, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noisy).save(directory / f"{i}.png")
    lines = rows if file.endswith(".json") else "\n".join(map(json.dumps, rows))
    (directory / file).write_text(json.dumps(lines) if file.endswith(".json") else lines)
    return directory


def asked(directory):
    """Three questions about each of four images, in an order in which no image is asked about twice in a row."""
    rows = [
        {"image": f"{i}.png", "question": text, "answer": colour, "split": "test"}
        for text in ("which colours?", "and what else?", "a picture of red")
        for i, colour in enumerate(COLOURS)
    ]
    return folder(directory, rows, "vqa.jsonl")


@pytest.fixture
def looked(monkeypatch):
    """How many images the vision tower is shown."""
    counts = []

    def counting(model):
        model.vision.register_forward_hook(lambda m, args, out: counts.append(len(args[0])))
        whole = model.vision.features
        monkeypatch.setattr(model.vision, "features", lambda x, **k: counts.append(len(x)) or whole(x, **k))
        return counts

    return counting


@pytest.mark.parametrize("make", [speakers.llava, speakers.flamingo])
def test_an_image_is_looked_at_once_however_often_it_is_asked_about(tmp_path, looked, make):
    model, processor = make(), speakers.processor(image_tokens=4 if make is speakers.llava else 1)
    conversations = open_conversations(asked(tmp_path / "data"), "test", image_size=16)
    counts = looked(model)
    scores = answers(model, processor, conversations, conversations.questions())
    assert sum(counts) == len(COLOURS)  # for the answers, and for those beside another image
    assert 0 <= scores["accuracy, blind"].value <= 1


def test_answers_are_those_of_one_question_at_a_time(tmp_path):
    model, processor = speakers.llava(), speakers.processor()
    conversations = open_conversations(asked(tmp_path / "data"), "test", image_size=16)
    questions = conversations.questions()
    together = evaluate.ask(model, processor, conversations, questions)
    alone = [answer(conversations.images([q.index])[0], q.text, model, processor, max_new_tokens=16) for q in questions]
    assert together == alone


def test_questions_about_an_image_stay_together_in_parts_of_a_bounded_size():
    indices = [3, 1] * 100 + [2] * 300
    parts = list(by_image(indices))
    assert sorted(i for part in parts for i in part) == list(range(500))
    assert max(map(len, parts)) <= 128 and [indices[part[0]] for part in parts] == [1, 2, 2, 2, 3]


@pytest.mark.parametrize("file", ["captions.jsonl", "conversations.json"])
def test_perplexity_is_that_of_all_held_out_tokens(tmp_path, file):
    model, processor = speakers.llava(), speakers.processor()
    said = [f"a picture of {colour}" + " and green" * i for i, colour in enumerate(COLOURS)]
    turns = lambda text: [{"from": "human", "value": "<image>\nwhich colours?"}, {"from": "gpt", "value": text}]
    rows = [
        {"image": f"{i}.png", "caption": text, "conversations": turns(text), "split": "test"}
        for i, text in enumerate(said)
    ]
    directory = folder(tmp_path / "data", rows, file)
    conversations = open_conversations(directory, "test", image_size=16)
    captions = file == "captions.jsonl"
    score = text_perplexity(model, processor, conversations, captions=captions)

    def surprise(shift):
        total = count = 0
        for i, text in enumerate(said):
            question = with_images("describe the picture." if captions else "which colours?")
            batch = collate([encode_conversation([Turn("user", question), Turn("assistant", text)], processor)], 0)
            images = processor.images(conversations.images([(i - shift) % 4])[0])
            n = (batch["labels"] != -100).sum().item()
            with torch.no_grad():
                total += n * model(images, batch["tokens"], labels=batch["labels"]).loss.item()
            count += n
        return math.exp(total / count)

    assert score.value == pytest.approx(surprise(0), rel=1e-5)
    assert score.chance == pytest.approx(surprise(2), rel=1e-5) and score.chance != pytest.approx(score.value, rel=1e-5)
    named = evaluate.answers_and_captions(model, processor, directory)
    assert named["perplexity of " + ("captions" if captions else "answers")] == score
    assert "accuracy" not in named  # of sentences, none is exactly right


def test_some_of_many_are_always_the_same():
    assert some_of(5, 9) == range(5)
    few = some_of(1000, 10)
    assert few == some_of(1000, 10) == sorted({*few}) and len(few) == 10 and few[-1] > 500


def test_a_model_with_vectors_that_also_describes_is_judged_by_both(tmp_path):
    rows = []
    for i, name in enumerate(list(RGB)[:3]):
        Image.new("RGB", (16, 16), RGB[name]).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "caption": f"a {name} wall"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    processor = Processor.train([f"a {name} wall" for name in RGB], vocab_size=280, image_size=16, context=96)
    vision = VisionConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2)
    ids = dict(vocab_size=processor.vocab_size, end_tokens=(processor.end_token,), pad_token=processor.pad_token)
    text = LanguageModelConfig(width=16, depth=2, heads=2, context=96, **ids)
    config = CoCaConfig(vision=vision, text=text, multimodal_depth=1, image_queries=2, embed_width=8)
    kept = []
    scores = evaluate.evaluate(CoCa(config, seed=0).eval(), processor, tmp_path, kept)
    assert {"text→image R@1", "captions, words in common"} <= set(scores) and len(kept) == 3
