"""What VisualBERT, UNITER and ViLBERT have alike, for each of them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivlm import checkpoint
from minivlm.errors import UserError
from minivlm.layers import BERTConfig, ImageFeatures, TransformerConfig, VisionConfig
from minivlm.layers.regions import grid_cells, pool_regions
from minivlm.models.uniter import UNITER, UNITERConfig
from minivlm.models.vilbert import ViLBERT, ViLBERTConfig
from minivlm.models.visualbert import VisualBERT, VisualBERTConfig
from minivlm.testing import assert_can_overfit, assert_padding_invariant, assert_same

COMMON = dict(
    text=BERTConfig(vocab_size=40, context=10, width=24, depth=3, heads=2),
    vision=VisionConfig(image_size=16, patch_size=8, width=12, depth=2, heads=2, pool="mean"),
    vision_layer=-2,
    region_width=12,
    answers=("yes", "no", "two"),
    heads=("words", "regions", "matching"),
)
STREAM = TransformerConfig(width=16, depth=2, heads=2, norm_place="post")
CONFIGS = [
    VisualBERTConfig(**COMMON, region_positions=True),
    UNITERConfig(**COMMON),
    ViLBERTConfig(**COMMON, regions=STREAM, connections=1, joint_heads=2, joint_width=20),
]
CLASSES = {VisualBERTConfig: VisualBERT, UNITERConfig: UNITER, ViLBERTConfig: ViLBERT}
TOKENS = torch.tensor([[1, 5, 6, 7, 8, 2], [1, 9, 3, 2, 0, 0]])
MASK = TOKENS != 0
ANSWERS = torch.eye(3)[[2, 0]]


@pytest.fixture(params=CONFIGS, ids=lambda config: type(config).__name__)
def model(request):
    return CLASSES[type(request.param)](request.param).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16)


def test_features_stand_in_for_images(model, images):
    seen, features = model(images, TOKENS, MASK), model.image_features(images)
    for other in (model(ImageFeatures(features), TOKENS, MASK), model(features, TOKENS, MASK)):
        assert seen.logits.keys() == other.logits.keys() == {"answers", "words", "regions", "matching"}
        for name, logits in seen.logits.items():
            assert_same(other.logits[name], logits)
    assert_same(model.answer(images, TOKENS, MASK), seen.logits["answers"])
    assert_same(model.match(images, TOKENS, MASK), seen.logits["matching"])


def test_what_was_not_learnt_is_not_told(images):
    model = UNITER(replace(CONFIGS[1], heads=(), answers=()))
    with pytest.raises(ValueError, match="this UNITER does not match: its config names no such head"):
        model.match(images, TOKENS, MASK)
    with pytest.raises(ValueError, match="this UNITER has no answers to choose from"):
        model.answer(images, TOKENS, MASK)


def test_in_parts_a_batch_whose_words_are_all_shown_is_told_by_its_regions(model, images):
    """Words, regions and pairs each count by their own number, which may be none."""
    hidden, matches = torch.tensor([[True] * 3 + [False], [False] * 4]), torch.tensor([True, False])
    batch = dict(tokens=TOKENS, mask=MASK, images=images, labels=torch.full_like(TOKENS, -100), hidden=hidden)
    whole = model.losses(**batch, matches=matches)
    sum(whole.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = model.backward_in_parts({**batch, "matches": matches}, 1)
    assert parts["words"] == 0 and parts["regions"] > 0
    for name, loss in whole.items():
        assert_same(parts[name], loss, name)
    for name, gradient in gradients.items():
        assert_same(model.get_parameter(name).grad, gradient, name)


def test_padding_of_words_and_of_regions_is_not_seen(model, images):
    features = model.image_features(images)
    answer = lambda tokens, mask: model.answer(features[:1].expand(len(tokens), -1, -1), tokens, mask)
    assert_padding_invariant(answer, TOKENS, MASK, pooled=True)
    boxes = grid_cells(4).expand(2, 4, 4)
    read = lambda x, mask: model.answer(ImageFeatures(x), TOKENS, MASK, boxes=boxes, region_mask=mask)
    region_mask = torch.arange(4) < torch.tensor([[4], [2]])
    other = features.clone()
    other[1, 2:] = 7.0
    assert_same(read(other, region_mask), read(features, region_mask))
    assert not torch.allclose(model.answer(other, TOKENS, MASK), model.answer(features, TOKENS, MASK))


def test_words_see_the_picture_and_regions_the_words(model, images):
    seen = model(images, TOKENS, MASK)
    other_image, other_text = model(images.flip(0), TOKENS, MASK), model(images, TOKENS.flip(0), MASK.flip(0))
    assert not torch.allclose(other_image.text, seen.text) and not torch.allclose(other_text.regions, seen.regions)


def test_boxes_are_the_regions_that_are_looked_at(model, images):
    boxes = torch.tensor([[0, 0, 0.5, 1], [0.25, 0, 1, 1]]).expand(2, 2, 4)
    pooled = pool_regions(model.image_features(images), boxes)
    assert_same(model.answer(images, TOKENS, MASK, boxes=boxes), model.answer(pooled, TOKENS, MASK, boxes=boxes))


@pytest.mark.parametrize("box", [(0.5, 0, 1.25, 1), (-0.1, 0, 1, 1), (0.5, 0, 0.5, 1), (0, 0.75, 1, 0.5)])
def test_boxes_outside_the_picture_are_refused(model, images, box):
    boxes = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]], [[0, 0, 1, 1], list(box)]])
    with pytest.raises(UserError, match=r"region 1 of image 1 is \(.*\), which is no box inside the image"):
        model.answer(images, TOKENS, MASK, boxes=boxes)


def test_a_hidden_region_is_told_without_being_seen(model, images):
    features, hidden = model.image_features(images), torch.zeros(2, 4, dtype=torch.bool)
    hidden[0, 1] = hidden[1, 3] = True
    shown = features.masked_fill(hidden[..., None], 0)
    loss = model.losses(ImageFeatures(features), TOKENS, MASK, hidden=hidden)["regions"]
    guess = model(shown, TOKENS, MASK).logits["regions"]
    assert_same(loss, F.mse_loss(guess[hidden], features[hidden]))


def test_losses_are_what_they_are_called(model, images):
    labels, matches = torch.full_like(TOKENS, -100), torch.tensor([True, False])
    labels[0, 2] = 11
    losses = model.losses(images, TOKENS, MASK, answers=ANSWERS, labels=labels, matches=matches)
    out = model(images, TOKENS, MASK)
    chosen = out.logits["answers"]
    if isinstance(model, VisualBERT):
        assert_same(losses["answers"], F.cross_entropy(chosen, torch.tensor([2, 0])))
    else:
        assert_same(losses["answers"], F.binary_cross_entropy_with_logits(chosen, ANSWERS.float(), reduction="sum") / 2)
    assert_same(losses["words"], F.cross_entropy(out.logits["words"][0, 2:3], torch.tensor([11])))
    assert_same(losses["matching"], F.cross_entropy(out.logits["matching"], torch.tensor([1, 0])))
    assert losses.keys() - {"answers", "words", "matching"} == ({"alignment"} if isinstance(model, UNITER) else set())


def test_one_batch_can_be_learnt(model, images):
    model.freeze("vision")
    labels = torch.where(torch.arange(6) == 1, TOKENS, -100)
    batch = dict(answers=ANSWERS, labels=labels, matches=torch.tensor([True, False]))
    shown = TOKENS.masked_fill(labels != -100, 4)
    told = lambda model, batch: sum(
        loss for name, loss in model.losses(images, shown, MASK, **batch).items() if name != "alignment"
    )
    assert_can_overfit(model, batch, told, learning_rate=3e-3)


def test_comes_back_from_a_directory(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    back, _ = checkpoint.load(tmp_path)
    assert back.config == model.config
    assert_same(back.answer(images, TOKENS, MASK), model.answer(images, TOKENS, MASK), tolerance=0)


def test_the_order_of_regions_means_nothing_but_by_their_boxes(images):
    order = [2, 0, 3, 1]
    for config in CONFIGS[1:]:
        model = CLASSES[type(config)](config).eval()
        features, boxes = model.image_features(images), grid_cells(4).expand(2, 4, 4)
        moved = model.answer(features[:, order], TOKENS, MASK, boxes=boxes[:, order])
        assert_same(moved, model.answer(features, TOKENS, MASK, boxes=boxes))
        assert not torch.allclose(moved, model.answer(features[:, order], TOKENS, MASK, boxes=boxes))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: replace(CONFIGS[0], region_width=13), "gives features of width 12, but region_width is 13"),
        (lambda: replace(CONFIGS[2], connections=3), "3 connections need as many blocks in both streams"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_what_a_model_lacks_it_says(images):
    model = VisualBERT(replace(CONFIGS[0], vision=None, answers=())).eval()
    with pytest.raises(UserError, match=r"no vision tower: it reads features \(B, R, 12\) of regions"):
        model(images, TOKENS, MASK)
    with pytest.raises(ValueError, match="this VisualBERT has no answers to choose from"):
        model.answer(torch.randn(2, 4, 12), TOKENS, MASK)
