"""CoCa: one pass for both losses, no leak from the future, and cached decoding that equals the full forward."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivlm.layers import ImageFeatures, LanguageModelConfig, VisionConfig
from minivlm.models.coca import CoCa, CoCaConfig
from minivlm.testing import (
    assert_can_overfit,
    assert_causal,
    assert_gradient_does_not_reach,
    assert_gradient_reaches,
    assert_padding_invariant,
    assert_same,
)

B, T, V = 3, 7, 30
TEXT = LanguageModelConfig(width=16, depth=4, heads=2, vocab_size=V, context=16, end_tokens=(1,), pad_token=0)
CONFIG = CoCaConfig(
    vision=VisionConfig(image_size=16, patch_size=8, width=12, depth=1, heads=2),
    text=TEXT,
    multimodal_depth=2,
    image_queries=3,
    embed_width=8,
)
TOKENS = torch.randint(2, V, (B, T), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(T) < torch.tensor([[T], [T - 2], [3]])
TOKENS = TOKENS.masked_fill(~MASK, 0)
LABELS = TOKENS.masked_fill(~MASK, -100)


def model(**changes) -> CoCa:
    return CoCa(replace(CONFIG, **changes), seed=1).eval()


def images(n=B):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def batch():
    return {"images": images(), "tokens": TOKENS, "mask": MASK}


def test_the_contrast_is_that_of_the_two_encoders():
    m = model()
    vectors = m.encode_image(images()), m.encode_text(TOKENS, MASK)
    assert_same(m(images(), TOKENS, MASK).logits_per_image, m.loss.scale() * vectors[0] @ vectors[1].T)
    assert all(torch.allclose(v.norm(dim=1), torch.ones(B)) for v in vectors)


def test_training_adds_up_what_forward_gives():
    m = model()
    out, losses = m(images(), TOKENS, MASK, LABELS), m.losses(**batch())
    assert_same(losses["caption"], 2 * out.loss)
    truth = torch.arange(B)
    contrast = (F.cross_entropy(out.logits_per_image, truth) + F.cross_entropy(out.logits_per_image.T, truth)) / 2
    assert_same(losses["contrast"], contrast)


def test_captions_come_from_the_past_and_vectors_from_the_whole_text():
    m = model()
    assert_causal(lambda tokens: m(images(), tokens).logits, TOKENS)
    other = TOKENS.clone()
    other[:, -1] = 5
    assert (m.encode_text(other) - m.encode_text(TOKENS)).abs().amax(dim=1).min() > 1e-3


def test_padding_changes_nothing():
    m, image = model(), images(1)
    assert_padding_invariant(
        lambda tokens, mask: m(image.expand(len(tokens), -1, -1, -1), tokens, mask).logits, TOKENS, MASK
    )
    assert_same(m.encode_text(TOKENS[2:, :3]), m.encode_text(TOKENS, MASK)[2:])


def test_the_first_half_does_not_know_the_image():
    m = model().double()
    x = images().double().requires_grad_()
    hidden, image_vectors, text_vectors = m.states(m.image_features(x), TOKENS, MASK)
    assert_gradient_does_not_reach(text_vectors.sum(), [x])
    assert_gradient_reaches(hidden.square().sum() + image_vectors[:, 0].sum(), [x])


def test_features_take_the_place_of_images():
    m = model()
    features = ImageFeatures(m.image_features(images()))
    assert torch.equal(m(features, TOKENS, MASK).logits, m(images(), TOKENS, MASK).logits)
    assert torch.equal(m.encode_image(features), m.encode_image(images()))


@pytest.mark.parametrize("rope", [None, 10_000.0])
def test_cached_decoding_is_the_full_forward(rope):
    m = model(text=replace(TEXT, rope_theta=rope))
    generated = m.generate(images(), TOKENS, MASK, max_new_tokens=5, end_tokens=())
    for row in range(B):
        prompt = TOKENS[row : row + 1, : int(MASK[row].sum())]
        for _ in range(5):
            prompt = torch.cat([prompt, m(images()[row : row + 1], prompt).logits[:, -1:].argmax(-1)], dim=1)
        assert prompt[0, -5:].tolist() == generated[row].tolist()
    assert m.generate(images(), TOKENS[:, :2], max_new_tokens=5, num_beams=2).shape[1] <= 5


def test_parts_of_a_batch_give_its_gradients():
    whole, parts = model(), model()
    sum(whole.losses(**batch()).values()).backward()
    parts.backward_in_parts(batch(), 2)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == name.startswith("vision.norm."), name  # pooling has its own norm
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_it_learns():
    assert_can_overfit(
        model(), batch(), lambda m, batch: sum(m.losses(**batch).values()), learning_rate=1e-2, target=0.1
    )


def test_a_half_without_blocks_is_refused():
    with pytest.raises(ValueError, match="must leave at least one of the 4 blocks to each half"):
        replace(CONFIG, multimodal_depth=4)
