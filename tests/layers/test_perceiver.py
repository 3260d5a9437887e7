from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivlm.layers import PerceiverConfig, PerceiverResampler
from minivlm.testing import (
    assert_batch_independent,
    assert_can_overfit,
    assert_gradient_reaches,
    assert_permutation_equivariant,
    assert_permutation_invariant,
    assert_same,
)

PLAIN = PerceiverConfig(width=16, depth=2, heads=2, latents=3)
IDEFICS = replace(PLAIN, head_width=6, activation="relu", qk_norm="layernorm")
FRAMES = replace(PLAIN, max_images=4, context_width=12, mlp_width=24)
CONFIGS = {"flamingo": PLAIN, "idefics": IDEFICS, "frames": FRAMES}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def resampler(config, seed=0):
    """In double, norms included, all weights away from where they start."""
    model = PerceiverResampler(config, seed=seed).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def features(config, *shape):
    return torch.randn(*shape, config.context_width or config.width).double()


@every_config
class TestEveryConfig:
    def test_any_number_of_features_a_fixed_number_of_tokens(self, config):
        model = resampler(config)
        for n in (1, 5, 9):
            assert model(features(config, 2, n)).shape == (2, 3, 16)

    def test_each_picture_alone(self, config):
        assert_batch_independent(resampler(config), features(config, 4, 5))

    def test_a_set_of_features_has_no_order(self, config):
        assert_permutation_invariant(resampler(config), features(config, 2, 6))

    def test_everything_learns(self, config):
        model = PerceiverResampler(config)
        x = features(config, 2, 2, 5).float() if config.max_images else features(config, 2, 5).float()
        parameters = {n: p for n, p in model.named_parameters() if n != "times"}
        assert_gradient_reaches(model(x), parameters)
        if config.max_images:
            (grad,) = torch.autograd.grad(model(x).square().sum() + model(x)[..., 0].sum(), model.times)
            assert grad[:2].any() and not grad[2:].any()  # of the frames that are there


def test_the_formula():
    """One block, written out: keys and values from features and latents together."""
    model = resampler(replace(IDEFICS, depth=1))
    block, x = model.blocks[0], features(IDEFICS, 2, 5)
    a, heads = block.attention, lambda t: t.unflatten(-1, (2, 6)).transpose(1, 2)
    latents = model.latents.expand(2, 3, 16)
    asking = block.latents_norm(latents)
    both = torch.cat([block.features_norm(x), asking], dim=1)
    q, k, v = a.q_norm(heads(a.q_proj(asking))), a.k_norm(heads(a.k_proj(both))), heads(a.v_proj(both))
    weights = (q @ k.transpose(2, 3) / 6**0.5).softmax(dim=-1)
    assert weights.shape == (2, 2, 3, 8)
    latents = latents + a.out_proj((weights @ v).transpose(1, 2).flatten(2))
    hidden = F.relu(block.mlp.up_proj(block.mlp_norm(latents)))
    assert_same(model(x), model.norm(latents + block.mlp.down_proj(hidden)))


def test_frames_are_told_apart_by_their_time_alone():
    model, x = resampler(FRAMES), features(FRAMES, 2, 3, 5)
    assert not torch.allclose(model(x), model(x.flip(1)))
    model.times.data.zero_()
    assert_permutation_invariant(model, x)
    assert_same(model(x), model(x.flatten(1, 2)))
    assert_same(model(x[:, :1]), model(x[:, 0]))


def test_latents_are_equals():
    model, x = resampler(PLAIN), features(PLAIN, 2, 5)

    def f(latents):
        model.latents.data = latents[0]
        return model(x)

    assert_permutation_equivariant(f, model.latents.data[None].clone())


def test_more_frames_than_there_are_times():
    with pytest.raises(ValueError, match="5 images are to be resampled together, but max_images is 4"):
        resampler(FRAMES)(features(FRAMES, 2, 5, 3))


def test_no_biases_but_in_norms():
    names = [n for n, _ in PerceiverResampler(IDEFICS).named_parameters() if n.endswith("bias")]
    assert names and all("norm" in name for name in names)


def test_seeds():
    a, b, c = (PerceiverResampler(FRAMES, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(not torch.equal(a[n], c[n]) for n in a if "norm" not in n)


def test_it_learns_to_find_the_odd_one():
    x = torch.randn(8, 6, 16)
    target = x[:, :1].expand(-1, 3, -1).clone()
    x[:, 0] += 5  # the one to be found
    loss = lambda model, batch: (model(batch) - target).square().mean()
    assert_can_overfit(PerceiverResampler(PLAIN), x, loss, learning_rate=1e-2)


class TestPlaces:
    """A ResNet's features do not know where they stand, and what reads them gives each a learnt position."""

    def test_features_have_an_order(self):
        model = resampler(replace(PLAIN, positions=6))
        x = features(PLAIN, 2, 6)
        assert not torch.allclose(model(x), model(x.flip(1)))

    def test_they_are_added_to_the_features(self):
        with_places, without = resampler(replace(PLAIN, positions=6), seed=1), resampler(PLAIN)
        without.load_state_dict({n: t for n, t in with_places.state_dict().items() if n != "image_position_embedding"})
        x = features(PLAIN, 2, 6)
        assert_same(with_places(x), without(x + with_places.image_position_embedding))

    def test_another_number_of_features(self):
        with pytest.raises(ValueError, match="an image has 5 features, but there are positions for 6"):
            resampler(replace(PLAIN, positions=6))(features(PLAIN, 2, 5))
