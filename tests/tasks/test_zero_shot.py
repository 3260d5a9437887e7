"""Zero-shot classification with a model whose right answers are known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minivlm.errors import UserError
from minivlm.tasks import class_features, zero_shot_classify
from minivlm.tasks.features import encode_images, encode_texts
from minivlm.tasks.templates import PHOTO, PLAIN, fill
from tests.colours import RGB, ColourModel, ColourProcessor, paint

LABELS = ["red circle", "green circle", "blue circle"]


def test_each_picture_gets_its_own_label_first(tmp_path):
    images = [
        Image.new("RGB", (9, 5), (200, 30, 30)),
        np.full((4, 4, 3), RGB["green"], dtype=np.uint8),
        paint(tmp_path / "b.png", "blue"),
    ]
    answers = zero_shot_classify(images, LABELS, ColourModel(), ColourProcessor())
    assert [answer[0][0] for answer in answers] == LABELS


def test_probabilities_are_the_softmax_of_the_scaled_cosines():
    model, processor = ColourModel(), ColourProcessor()
    image = Image.new("RGB", (8, 8), (255, 128, 0))
    answer = zero_shot_classify(image, LABELS, model, processor)
    cosines = encode_images([image], model, processor)[0] @ encode_texts([f"a {x}" for x in LABELS], model, processor).T
    want = (10 * cosines).softmax(0)
    assert dict(answer) == pytest.approx(dict(zip(LABELS, want.tolist(), strict=True)), rel=1e-5)
    assert [label for label, _ in answer] == [LABELS[i] for i in want.argsort(descending=True)]
    assert sum(p for _, p in answer) == pytest.approx(1)


def test_a_sigmoid_model_judges_each_label_by_itself():
    model, processor = ColourModel("sigmoid"), ColourProcessor()
    two = zero_shot_classify(Image.new("RGB", (8, 8), "red"), ["red", "blue"], model, processor)
    three = zero_shot_classify(Image.new("RGB", (8, 8), "red"), ["red", "blue", "yellow"], model, processor)
    assert dict(three)["red"] == pytest.approx(dict(two)["red"])
    assert dict(two)["red"] == pytest.approx(1 / (1 + math.exp(-(10 - 5))), rel=1e-3)  # cosine 1, scale 10, bias −5


def test_top_k_keeps_the_likeliest():
    image = Image.new("RGB", (8, 8), "red")
    whole = zero_shot_classify(image, LABELS, ColourModel(), ColourProcessor(), top_k=9)
    best = zero_shot_classify(image, LABELS, ColourModel(), ColourProcessor(), top_k=1)
    assert len(whole) == 3 and best == whole[:1]


def test_one_image_gets_one_list_and_a_list_of_one_a_list_of_lists(tmp_path):
    one = zero_shot_classify(paint(tmp_path / "b.png", "blue"), LABELS, ColourModel(), ColourProcessor())
    assert one[0][0] == "blue circle"
    for image in (str(tmp_path / "b.png"), Image.open(tmp_path / "b.png"), np.array(Image.open(tmp_path / "b.png"))):
        assert zero_shot_classify(image, LABELS, ColourModel(), ColourProcessor()) == one
        assert zero_shot_classify([image], LABELS, ColourModel(), ColourProcessor()) == [one]


def test_no_pictures_no_answers():
    assert zero_shot_classify([], LABELS, ColourModel(), ColourProcessor()) == []


def test_an_ensemble_is_the_unit_mean_of_its_templates():
    model, processor = ColourModel(), ColourProcessor()
    templates = ["{a}", "a red photo of {}", "{} on white"]
    got = class_features(LABELS, model, processor, templates)
    each = torch.stack([encode_texts([fill(t, x) for x in LABELS], model, processor) for t in templates])
    assert torch.allclose(got, F.normalize(each.mean(0), dim=-1), atol=1e-6)
    assert torch.allclose(got.norm(dim=1), torch.ones(3))
    assert not torch.allclose(got, class_features(LABELS, model, processor, "{a}"), atol=1e-2)


def test_one_label_and_one_template_give_the_same_as_encoding_the_sentence():
    model, processor = ColourModel(), ColourProcessor()
    assert torch.allclose(
        class_features(LABELS, model, processor, PLAIN), encode_texts(["a " + x for x in LABELS], model, processor)
    )


@pytest.mark.parametrize(
    ("template", "label", "sentence"),
    [
        ("{a}", "red circle", "a red circle"),
        ("{a}", "orange star", "an orange star"),
        ("{a}", "Unicorn", "a Unicorn"),
        ("{a}", "one-way street", "a one-way street"),
        ("{a}", "onion", "an onion"),
        ("{a}", "a red circle", "a red circle"),
        ("{a}", "the moon", "the moon"),
        ("a photo of a {}.", "orange star", "a photo of a orange star."),  # as published: {} is the label alone
        ("{a}, {0} of {}", "{odd}", "a {odd}, {0} of {odd}"),
    ],
)
def test_templates_are_filled(template, label, sentence):
    assert fill(template, label) == sentence


def test_the_named_sets_have_a_place_for_the_label_in_every_template():
    for template in (*PLAIN, *PHOTO):
        assert fill(template, "dog") != fill(template, "cat")


def test_the_model_is_left_as_it_was():
    model = ColourModel().train()
    class_features(LABELS, model, ColourProcessor())
    assert model.training and class_features(LABELS, model, ColourProcessor()).requires_grad is False
    model.eval()
    class_features(LABELS, model, ColourProcessor())
    assert not model.training


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["red circle"], "at least two labels"),
        ([], "at least two labels"),
        ("red circle", "at least two labels"),
        (["red", " "], "label 2 of 2 is empty"),
        (["red", "blue", "red"], "'red' is given twice"),
        (["red", "blue " * 20], "has 21 tokens, but the model takes 12"),
        (["red", "blue " * 300], "'a blue blue"),
    ],
)
def test_labels_that_make_no_sense_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        zero_shot_classify(Image.new("RGB", (8, 8)), labels, ColourModel(), ColourProcessor())


def test_templates_that_make_no_sense_are_refused():
    for templates, message in ([], "no template"), (["{a}", "a photo"], "'a photo' has no place for the label"):
        with pytest.raises(UserError, match=message):
            class_features(LABELS, ColourModel(), ColourProcessor(), templates)


def test_pictures_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for name, message in ("missing.png", "missing"), ("text.png", "cannot be read as an image"):
        with pytest.raises(UserError, match=message):
            zero_shot_classify([tmp_path / name], LABELS, ColourModel(), ColourProcessor())
    with pytest.raises(UserError, match="top_k is 0"):
        zero_shot_classify(tmp_path, LABELS, ColourModel(), ColourProcessor(), top_k=0)
