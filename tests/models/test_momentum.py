"""Soft labels and the queue of ALBEF, against their definition."""

import pytest
import torch

from minivlm.models.momentum import MomentumConfig
from minivlm.testing import assert_same
from tests.models.test_blip import ASKED, MASK, TOKENS, blip, pictures

CONFIG = MomentumConfig(queue=9, rate=0.9, soft=0.3)


def model():
    return blip(momentum=CONFIG)


def cross_entropy(logits, labels):
    return -(labels * logits.log_softmax(dim=1)).sum(dim=1).mean()


def test_the_copy_follows():
    blip = model()
    old = {name: p.clone() for name, p in blip.momentum.copies["encoder"].named_parameters()}
    blip.momentum.follow(blip)
    for name, p in blip.momentum.copies["encoder"].named_parameters():
        assert_same(p, 0.9 * old[name] + 0.1 * blip.encoder.get_parameter(name), name)


def test_the_copy_learns_nothing_by_itself():
    blip = model().train()
    sum(blip.losses(TOKENS, MASK, pictures()).values()).backward()
    assert not any(p.requires_grad or p.grad is not None for p in blip.momentum.copies.parameters())
    assert not any(part.training for part in blip.momentum.copies.modules())


def test_the_loss_is_as_defined():
    """Three batches: the first finds an empty queue, the later ones what came before them, newest or not."""
    blip, seen_images, seen_texts = model().train(), [], []
    blip.vision.eval()
    for step in range(4):
        images = pictures()
        loss = blip.losses(TOKENS, MASK, images)["contrast"]
        with torch.no_grad():
            slow = blip.momentum.copies
            features = slow["vision"].norm(slow["vision"].features(images))
            slow_images = slow["vision_projection"](features[:, 0])
            slow_texts = slow["text_projection"](slow["encoder"](TOKENS, MASK).hidden[:, 0])
            slow_images, slow_texts = (x / x.norm(dim=1, keepdim=True) for x in (slow_images, slow_texts))
            fast_images, fast_texts = blip.encode_image(images), blip.encode_text(TOKENS, MASK)
            total = 0.0
            for fast, slow_one, others, queue in (
                (fast_images, slow_images, slow_texts, seen_texts),
                (fast_texts, slow_texts, slow_images, seen_images),
            ):
                columns = torch.cat([others, *queue[-3:]]).T * blip.logit_scale.exp()
                labels = 0.3 * (slow_one @ columns).softmax(dim=1)
                labels[:, :3] += 0.7 * torch.eye(3)
                total = total + cross_entropy(fast @ columns, labels) / 2
        assert_same(loss, total, f"step {step}")
        seen_images.append(slow_images)
        seen_texts.append(slow_texts)
        assert blip.momentum.seen == 3 * (step + 1)


def test_in_evaluation_nothing_is_remembered():
    blip = model()
    before = {name: p.clone() for name, p in blip.momentum.state_dict().items()}
    blip.losses(TOKENS, MASK, pictures())
    assert all(torch.equal(p, before[name]) for name, p in blip.momentum.state_dict().items())


def test_features_of_a_frozen_tower_are_those_of_its_copy():
    blip, images = model(), pictures()
    blip.momentum.copies["vision"].load_state_dict(blip.vision.state_dict())
    losses = [blip.losses(TOKENS, MASK, images), blip.losses(TOKENS, MASK, features=blip.look(images))]
    assert_same(losses[0]["contrast"], losses[1]["contrast"])


def test_a_queue_that_batches_do_not_fill():
    with pytest.raises(ValueError, match="a momentum queue of 9 is not a multiple of the batch of 2"):
        model().train().losses(TOKENS[:2], MASK[:2], pictures(2))
    for batch, fits in ((9, True), (3, True), (18, False), (6, False)):
        if fits:
            CONFIG.check_batch(batch)
        else:
            with pytest.raises(ValueError, match=f"a batch of {batch}|the batch of {batch}"):
                CONFIG.check_batch(batch)


def test_comes_back_from_a_directory_and_is_left_behind(tmp_path):
    from minivlm import checkpoint

    blip = model().train()
    blip.losses(TOKENS, MASK, pictures())
    blip.save_pretrained(tmp_path / "with")
    back, _ = checkpoint.load(tmp_path / "with")
    assert torch.equal(back.momentum.texts, blip.momentum.texts) and back.momentum.seen == 3
    blip.forget()
    blip.save_pretrained(tmp_path / "without")
    back, _ = checkpoint.load(tmp_path / "without")
    assert back.momentum is None and back.config.momentum is None
    blip.eval()
    images = pictures()
    assert torch.equal(*(m.generate(images, ASKED, max_new_tokens=3) for m in (blip, back)))
