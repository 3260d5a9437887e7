from dataclasses import replace

import pytest
import torch

from minivlm import checkpoint
from minivlm.layers import BERTConfig, ImageFeatures, TransformerConfig, VisionConfig
from minivlm.models.vqa import VQAConfig, VQAModel
from minivlm.testing import assert_can_overfit, assert_padding_invariant, assert_same

CONFIG = VQAConfig(
    vision=VisionConfig(image_size=16, patch_size=8, width=12, depth=2, heads=2),
    text=BERTConfig(vocab_size=40, context=10, width=24, depth=1, heads=2),
    fusion=TransformerConfig(width=24, depth=2, heads=2, cross_attention_every=1),
    answers=("yes", "no", "two"),
)
TOKENS = torch.tensor([[1, 5, 6, 7, 8, 2], [1, 9, 3, 2, 0, 0]])
MASK = TOKENS != 0


def test_the_question_reads_the_picture_place_by_place():
    model, images = VQAModel(CONFIG).eval(), torch.randn(2, 3, 16, 16)
    features = model.image_features(images)
    assert features.shape == (2, 4, 12)  # without the class token
    logits = model(images, TOKENS, MASK)
    assert_same(model.answer(ImageFeatures(features), TOKENS, MASK), logits)
    assert not torch.allclose(model.answer(ImageFeatures(features.flip(1)), TOKENS, MASK), logits)
    assert not torch.allclose(model.answer(images, TOKENS.flip(0), MASK.flip(0)), logits)


def test_a_loop_of_ones_own_trains_it_by_the_cross_entropy_of_its_output():
    model, images, right = VQAModel(CONFIG), torch.randn(2, 3, 16, 16), torch.tensor([2, 0])
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(20):
        losses.append(torch.nn.functional.cross_entropy(model(images, TOKENS, MASK), right))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.3 < losses[0]
    assert_same(losses[0], VQAModel(CONFIG).losses(images, TOKENS, MASK, answers=torch.eye(3)[right])["answers"])


def test_padding_is_not_seen():
    model, image = VQAModel(CONFIG).eval(), torch.randn(1, 3, 16, 16)
    answer = lambda tokens, mask: model.answer(image.expand(len(tokens), -1, -1, -1), tokens, mask)
    assert_padding_invariant(answer, TOKENS, MASK, pooled=True)


def test_one_batch_can_be_learnt():
    model, images = VQAModel(CONFIG), torch.randn(2, 3, 16, 16)
    batch = dict(tokens=TOKENS[:1].expand(2, -1), images=images, answers=torch.eye(3)[[2, 0]])  # the picture decides
    assert_can_overfit(model, batch, lambda model, batch: model.losses(**batch)["answers"], learning_rate=3e-3)


def test_comes_back_from_a_directory(tmp_path):
    model, images = VQAModel(CONFIG).eval(), torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    back, _ = checkpoint.load(tmp_path)
    assert back.config == CONFIG
    assert_same(back.answer(images, TOKENS, MASK), model.answer(images, TOKENS, MASK), tolerance=0)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="fusion takes text of width 24"):
        replace(CONFIG, fusion=replace(CONFIG.fusion, width=16))
    with pytest.raises(ValueError, match="no answers to choose from"):
        replace(CONFIG, answers=())
