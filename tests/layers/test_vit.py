from dataclasses import replace

import pytest
import torch

from minivlm.errors import UserError
from minivlm.layers import VIT_SIZES, VisionConfig, VisionTransformer, resize_position_table
from minivlm.testing import (
    assert_batch_independent,
    assert_gradient_reaches,
    assert_permutation_invariant,
    assert_same,
)

SMALL = VisionConfig(width=16, depth=3, heads=4, image_size=12, patch_size=4)
POOLS = ["class", "mean", "attention"]


def build(**options) -> VisionTransformer:
    return VisionTransformer(replace(SMALL, **options))


def images(height=12, width=12):
    return torch.randn(2, 3, height, width)


def cut(images, P=4):
    """(B, 3, H, W) → (B, N, 3·P·P): patches row by row, by hand."""
    H, W = images.shape[-2:]
    patches = [images[:, :, i : i + P, j : j + P].flatten(1) for i in range(0, H, P) for j in range(0, W, P)]
    return torch.stack(patches, dim=1)


class TestEmbed:
    @pytest.mark.parametrize("bias", [False, True])
    def test_is_a_linear_map_of_each_patch_behind_the_class_token(self, bias):
        vit, x = build(patch_bias=bias), images()
        patches = cut(x) @ vit.patch_embedding.weight.flatten(1).T + (vit.patch_embedding.bias if bias else 0)
        tokens = torch.cat([vit.class_embedding.expand(2, 1, -1), patches], dim=1)
        assert_same(vit.embed(x), vit.embedding_norm(tokens + vit.position_embedding))

    @pytest.mark.parametrize("pool", ["mean", "attention"])
    def test_without_a_class_token(self, pool):
        vit, x = build(pool=pool, embedding_norm=False), images()
        assert_same(vit.embed(x), cut(x) @ vit.patch_embedding.weight.flatten(1).T + vit.position_embedding)


class TestPool:
    def test_class(self):
        vit, x = build(), images()
        assert_same(vit(x), vit.norm(vit.features(x)[:, 0]))

    def test_mean(self):
        vit, x = build(pool="mean"), images()
        assert_same(vit(x), vit.norm(vit.features(x)).mean(dim=1))

    def test_attention(self):
        vit, x = build(pool="attention"), images()
        pool, tokens = vit.attention_pool, vit.norm(vit.features(x))
        y = pool.attention(pool.query.expand(2, 1, -1), tokens)[:, 0]
        assert_same(vit(x), y + pool.mlp(pool.norm(y)))


class TestFeatures:
    def test_layers_are_what_a_run_by_hand_gives(self):
        vit, x = build(), images()
        states = [vit.embed(x)]
        for block in vit.transformer.blocks:
            states.append(block(states[-1]))
        for layer in (-1, -2, -3, 0, 1):
            assert_same(vit.features(x, layer=layer), states[layer])

    def test_the_last_block_is_not_run_for_layer_minus_two(self):
        vit = build()
        vit.transformer.blocks[-1] = None
        assert vit.features(images(), layer=-2).shape == (2, 1 + 9, 16)

    def test_a_layer_that_does_not_exist(self):
        with pytest.raises(ValueError, match="layer 4 does not exist"):
            build().features(images(), layer=4)


class TestResolution:
    @pytest.mark.parametrize("pool", POOLS)
    @pytest.mark.parametrize("size", [(8, 20), (24, 24)])
    def test_another_size_is_the_model_with_an_interpolated_table(self, pool, size):
        vit, x = build(pool=pool), images(*size)
        H, W = size[0] // 4, size[1] // 4
        table = resize_position_table(vit.position_embedding, (H, W), leading=vit.leading)
        leading = [vit.class_embedding.expand(2, 1, -1)] if vit.leading else []
        tokens = torch.cat([*leading, cut(x) @ vit.patch_embedding.weight.flatten(1).T], dim=1)
        assert_same(vit.embed(x), vit.embedding_norm(tokens + table))
        assert vit.features(x).shape == (2, vit.leading + H * W, 16)
        assert vit(x).shape == (2, 16)

    def test_a_side_that_is_no_multiple_of_the_patch(self):
        for size in [(12, 13), (10, 12)]:
            with pytest.raises(UserError, match=f"images are {size[0]}×{size[1]}, .* multiples of the patch size 4"):
                build()(images(*size))
        with pytest.raises(ValueError, match="image_size 30 is not a multiple of patch_size 4"):
            replace(SMALL, image_size=30)


@pytest.mark.parametrize("pool", POOLS)
class TestEveryPool:
    def test_rows_are_independent(self, pool):
        assert_batch_independent(build(pool=pool), images())

    def test_gradients_reach_all(self, pool):
        vit = build(pool=pool)
        weights = {n: p for n, p in vit.named_parameters() if not n.endswith("k_proj.bias")}  # shifts all scores alike
        assert_gradient_reaches(vit(images()), weights)

    def test_patches_are_a_set_but_for_their_positions(self, pool):
        vit = build(pool=pool)
        patches = cut(images())

        def from_patches(patches):
            grid = patches.view(2, 3, 3, 3, 4, 4)  # (B, row, column, channel, P, P)
            return vit(grid.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 12, 12))

        with pytest.raises(AssertionError):
            assert_permutation_invariant(from_patches, patches)
        with torch.no_grad():
            vit.position_embedding.zero_()
        assert_permutation_invariant(from_patches, patches)


def test_rmsnorm_and_gated_mlps_fit_in_a_vit():
    vit = build(norm="rmsnorm", gated_mlp=True, activation="silu", rope_theta=100.0)
    assert_same(vit(images()[:1] * 0), vit.norm(vit.features(torch.zeros(1, 3, 12, 12))[:, 0]))


def test_named_sizes():
    """(patches, width, depth, heads) of Dosovitskiy et al. 2021, table 1, of LAION's H/14, and of BLIP-2's g/14."""
    sizes = {name: (c.patches, c.width, c.depth, c.heads, c.hidden_width) for name, c in VIT_SIZES.items()}
    assert sizes == {
        "B/32": (49, 768, 12, 12, 3072),
        "B/16": (196, 768, 12, 12, 3072),
        "L/14": (256, 1024, 24, 16, 4096),
        "H/14": (256, 1280, 32, 16, 5120),
        "g/14": (256, 1408, 39, 16, 6144),
    }


def test_a_stem_of_convolutions_is_the_convolutions_by_hand():
    vit = build(stem="convolutions")
    x = images()
    first, second = vit.patch_embedding.convolutions()
    assert (first.weight.shape[:2], second.weight.shape[:2]) == ((8, 3), (16, 8))  # channels double up to the width
    grid = torch.nn.functional.gelu(torch.nn.functional.conv2d(x, first.weight, first.bias, stride=2, padding=1))
    grid = torch.nn.functional.conv2d(grid, second.weight, second.bias, stride=2, padding=1)  # (2, 16, 3, 3)
    tokens = grid.permute(0, 2, 3, 1).reshape(2, 9, 16)
    by_hand = torch.cat([vit.class_embedding.expand(2, 1, -1), tokens], dim=1) + vit.position_embedding
    assert_same(vit.features(x, layer=0), vit.embedding_norm(by_hand))
    assert_batch_independent(vit.eval(), x)
    assert vit(images(16, 8)).shape == (2, 16)


def test_its_patches_overlap_where_those_of_one_stride_do_not():
    """A pixel on the border of a patch is seen by its neighbour as well."""
    for stem, reached in (("patch", 1), ("convolutions", 2)):
        vit, x = build(stem=stem), images()
        changed = x.clone()
        changed[:, :, 0, 3] += 1  # in the last column of the first patch
        moved = (vit.patch_embedding(x) - vit.patch_embedding(changed)).abs().amax(dim=(0, 1)) > 0  # (3, 3)
        assert int(moved.sum()) == reached


@pytest.mark.parametrize(("patch_size", "width"), [(6, 16), (4, 18)])
def test_a_stem_that_cannot_halve_is_refused(patch_size, width):
    with pytest.raises(ValueError, match=f"patch_size {patch_size} must be a power of two that divides {width}"):
        build(stem="convolutions", patch_size=patch_size, width=width, heads=2)
