"""Soft labels and the queue of ALBEF, against their definition."""

from dataclasses import replace

import pytest
import torch

from minivlm import ImageFeatures
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
    losses = [blip.losses(TOKENS, MASK, images), blip.losses(TOKENS, MASK, ImageFeatures(blip.image_features(images)))]
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
    blip.remove_momentum()
    blip.save_pretrained(tmp_path / "without")
    back, _ = checkpoint.load(tmp_path / "without")
    assert back.momentum is None and back.config.momentum is None
    blip.eval()
    images = pictures()
    assert torch.equal(*(m.generate(images, ASKED, max_new_tokens=3) for m in (blip, back)))


def test_the_opinion_of_a_copy_that_has_just_begun_counts_for_nothing_and_grows_with_the_pictures_seen():
    blip, shares = blip_with_ramp(12), []
    for _ in range(6):
        shares.append(blip.momentum.softness().item())
        blip.losses(TOKENS, MASK, pictures())
    assert shares == pytest.approx([0.0, 0.075, 0.15, 0.225, 0.3, 0.3])


def test_at_the_foot_of_the_ramp_the_labels_are_the_truth_and_beyond_it_as_without():
    images, plain = pictures(), model().train()
    for seen, soft in ((0, 0.0), (12, 0.3), (99, 0.3)):
        ramped, other = blip_with_ramp(12), blip(momentum=replace(CONFIG, soft=soft)).train()
        for one in (ramped, other):
            one.load_state_dict(plain.state_dict())
            one.momentum.seen.fill_(seen)
        pair = [one.losses(TOKENS, MASK, images)["contrast"] for one in (ramped, other)]
        assert_same(*pair)


def test_the_ramp_is_two_epochs_unless_it_is_told():
    assert CONFIG.over(500).ramp == 1000 and replace(CONFIG, ramp=7).over(500).ramp == 7


@pytest.mark.parametrize("name", ["soft", "rate"])
def test_shares_are_from_0_to_1_and_a_ramp_has_pictures(name):
    for good in (0.0, 1.0):
        MomentumConfig(**{name: good}, ramp=0)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"{name} {wrong}.* must be from 0 to 1"):
            MomentumConfig(**{name: wrong})
    with pytest.raises(ValueError, match="ramp -1 at least 0"):
        MomentumConfig(ramp=-1)


def blip_with_ramp(pictures):
    return blip(momentum=replace(CONFIG, ramp=pictures)).train()
