import math

import pytest
import torch
import torch.nn.functional as F

from minivlm.errors import UserError
from minivlm.layers import RESNET_SIZES, ResNet, ResNetConfig, resize_position_table
from minivlm.layers.resnet import Bottleneck, GridAttentionPool
from minivlm.testing import assert_batch_independent, assert_gradient_reaches, assert_same

SMALL = ResNetConfig(blocks=(1, 2, 1, 1), width=8, output_width=12, heads=4, image_size=64)


@pytest.fixture
def resnet():
    """In eval mode, with running statistics and norms that are not the identity."""
    model = ResNet(SMALL)
    model(torch.randn(4, 3, 64, 64))  # moves the running statistics
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.weight, 1.0, 0.1)
        torch.nn.init.normal_(norm.bias, 0.0, 0.1)
    return model.eval()


def conv_norm(layer, x, *, stride=1):
    """Convolution and batch norm by hand, with the running statistics."""
    y = F.conv2d(x, layer.conv.weight, stride=stride, padding=layer.conv.weight.shape[-1] // 2)
    n = layer.norm
    mean, var, weight, bias = (t[:, None, None] for t in (n.running_mean, n.running_var, n.weight, n.bias))
    return (y - mean) / (var + n.eps).sqrt() * weight + bias


class TestBottleneck:
    @pytest.mark.parametrize("stride", [1, 2])
    def test_is_three_convolutions_around_a_residual(self, stride):
        block, x = Bottleneck(6, 4, stride=stride).eval(), torch.randn(2, 6, 8, 8)
        y = conv_norm(block.reduce, x).relu()
        y = conv_norm(block.conv, y).relu()
        pool = (lambda t: t) if stride == 1 else (lambda t: F.avg_pool2d(t, 2))  # strides blur before they skip
        y = conv_norm(block.expand, pool(y)) + conv_norm(block.shortcut, pool(x))
        assert_same(block(x), y.relu())

    def test_the_shortcut_is_the_input_where_nothing_changes(self):
        block, x = Bottleneck(16, 4), torch.randn(2, 16, 8, 8)
        torch.nn.init.zeros_(block.expand.norm.weight)
        assert torch.equal(block(x), x.relu())


class TestResNet:
    def test_stem_and_stages(self, resnet):
        x = images = torch.randn(2, 3, 64, 64)
        for i, layer in enumerate(resnet.stem):
            x = conv_norm(layer, x, stride=2 if i == 0 else 1).relu()
        states = [F.avg_pool2d(x, 2)]
        for stage in resnet.stages:
            states.append(stage(states[-1]))
        assert [tuple(s.shape[1:]) for s in states] == [(8, 16, 16), (32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]
        for layer in (0, 1, 4, -1, -2, -5):
            assert_same(resnet.grid(images, layer), states[layer])
            tokens = states[layer].permute(0, 2, 3, 1).flatten(1, 2)  # row by row
            assert_same(resnet.features(images, layer=layer), tokens)
        assert_same(resnet(images), resnet.attention_pool(states[-1]))
        assert (resnet.feature_width, resnet.output_width) == (256, 12)

    @pytest.mark.parametrize("layer", [5, -6])
    def test_a_layer_that_does_not_exist(self, resnet, layer):
        with pytest.raises(ValueError, match=f"layer {layer} does not exist: 4 stages have states 0 to 4"):
            resnet.features(torch.randn(1, 3, 64, 64), layer=layer)

    def test_rows_are_independent_in_eval_mode(self, resnet):
        assert_batch_independent(resnet, torch.randn(3, 3, 64, 64))

    def test_gradients_reach_all(self, resnet):
        weights = {n: p for n, p in resnet.named_parameters() if not n.endswith("k_proj.bias")}
        assert_gradient_reaches(resnet(torch.randn(2, 3, 64, 64)), weights)

    @pytest.mark.parametrize("size", [(32, 96), (128, 128)])
    def test_another_resolution(self, resnet, size):
        images, pool = torch.randn(2, 3, *size), resnet.attention_pool
        grid = resnet.grid(images)
        assert grid.shape[-2:] == (size[0] // 32, size[1] // 32)
        table = resize_position_table(pool.position_embedding, grid.shape[-2:], leading=1)
        assert_same(resnet(images), pool_by_hand(pool, grid, table))

    def test_sides_that_are_no_multiples_of_32(self, resnet):
        with pytest.raises(UserError, match="images are 64×48, but both sides must be multiples of 32"):
            resnet(torch.randn(1, 3, 64, 48))
        with pytest.raises(ValueError, match="image_size 100 is not a multiple of 32"):
            ResNetConfig(image_size=100)


def pool_by_hand(pool, grid, table):
    """The mean asks the mean and the grid, one head at a time. grid (B, C, h, w), table (1 + h·w, C)."""
    tokens = grid.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + table
    a, heads = pool.attention, []
    q, k, v = a.q_proj(tokens[:, 0]), a.k_proj(tokens), a.v_proj(tokens)
    for h in range(a.heads):
        channels = slice(h * a.head_width, (h + 1) * a.head_width)
        scores = (k[..., channels] @ q[:, channels, None])[..., 0] / math.sqrt(a.head_width)
        heads.append((scores.softmax(dim=1)[..., None] * v[..., channels]).sum(dim=1))
    return a.out_proj(torch.cat(heads, dim=1))


def test_attention_pool_is_its_formula():
    pool, grid = GridAttentionPool(8, 5, heads=2, side=3), torch.randn(2, 8, 3, 3)
    assert_same(pool(grid), pool_by_hand(pool, grid, pool.position_embedding))


def test_named_sizes():
    """Layers are 1 of the stem (as the names count), 3 a bottleneck, 1 of the pool: Radford et al. 2021, table 19."""
    sizes = {n: (c.blocks, c.width, c.output_width, c.heads, c.image_size) for n, c in RESNET_SIZES.items()}
    assert sizes == {
        "RN50": ((3, 4, 6, 3), 64, 1024, 32, 224),
        "RN101": ((3, 4, 23, 3), 64, 512, 32, 224),
        "RN50x4": ((4, 6, 10, 6), 80, 640, 40, 288),
        "RN50x16": ((6, 8, 18, 8), 96, 768, 48, 384),
        "RN50x64": ((3, 15, 36, 10), 128, 1024, 64, 448),
    }
