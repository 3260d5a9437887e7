from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivlm.layers import EFFICIENTNET_SIZES, EfficientNet, EfficientNetConfig
from minivlm.layers.efficientnet import MBConv, SqueezeExcitation
from minivlm.layers.resnet import ConvNorm
from minivlm.testing import assert_batch_independent, assert_gradient_reaches, assert_same

SMALL = EfficientNetConfig(
    image_size=33,
    stem_channels=8,
    channels=(8, 16, 24),
    blocks=(1, 2, 1),
    kernels=(3, 5, 3),
    strides=(1, 2, 2),
    expansions=(1, 2, 3),
)


@pytest.fixture
def net():
    """In eval mode, with running statistics and norms that are not the identity."""
    model = EfficientNet(SMALL)
    model(torch.randn(4, 3, 33, 33))  # moves the running statistics
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.weight, 1.0, 0.1)
        torch.nn.init.normal_(norm.bias, 0.0, 0.1)
    return model.eval()


def normed(layer, y):
    """Batch norm by hand, with the running statistics."""
    n = layer.norm
    mean, var, weight, bias = (t[:, None, None] for t in (n.running_mean, n.running_var, n.weight, n.bias))
    return (y - mean) / (var + 1e-3).sqrt() * weight + bias


def by_hand(block, x, *, kernel, stride, pad):
    """Expand, each channel by itself, weigh, project: without the residual."""
    y = x if block.expand is None else F.silu(normed(block.expand, F.conv2d(x, block.expand.conv.weight)))
    channels = y.shape[1]
    y = F.conv2d(
        F.pad(y, pad), block.depthwise.conv.weight.view(channels, 1, kernel, kernel), None, stride, 0, 1, channels
    )
    y = F.silu(normed(block.depthwise, y))
    w = block.weigh
    hidden = F.silu(y.mean(dim=(2, 3)) @ w.reduce.weight[:, :, 0, 0].T + w.reduce.bias)
    y = y * torch.sigmoid(hidden @ w.expand.weight[:, :, 0, 0].T + w.expand.bias)[:, :, None, None]
    return normed(block.project, F.conv2d(y, block.project.conv.weight))


class TestMBConv:
    def test_the_first_of_a_stage_has_nothing_to_add_to(self, net):
        x = torch.randn(2, 8, 16, 16)
        assert_same(net.stages[0][0](x), by_hand(net.stages[0][0], x, kernel=3, stride=1, pad=(1, 1, 1, 1)))
        assert net.stages[0][0].expand is None  # ratio 1
        assert_same(net.stages[1][0](x), by_hand(net.stages[1][0], x, kernel=5, stride=2, pad=(1, 2, 1, 2)))

    def test_the_others_add_what_came_in(self, net):
        block, x = net.stages[1][1], torch.randn(2, 16, 8, 8)
        assert_same(block(x), x + by_hand(block, x, kernel=5, stride=1, pad=(2, 2, 2, 2)))

    def test_a_stride_that_pads_evenly(self):
        config = replace(SMALL, even_padding=(1,))  # the first block of the second stage
        block, x = MBConv(config, 1, first=True).eval(), torch.randn(2, 8, 15, 15)
        assert_same(block(x), by_hand(block, x, kernel=5, stride=2, pad=(2, 2, 2, 2)))

    def test_the_squeeze_is_relative_to_what_enters_the_block(self):
        assert MBConv(SMALL, 2, first=True).weigh.reduce.out_channels == 4  # a quarter of 16, not of 3 · 16

    def test_channels_are_weighed_by_their_means(self):
        weigh, x = SqueezeExcitation(4, 2, "silu"), torch.randn(2, 4, 3, 3)
        shuffled = x.flatten(2)[..., torch.randperm(9)].view_as(x)
        assert_same((weigh(x) / x).mean(dim=(2, 3)), (weigh(shuffled) / shuffled).mean(dim=(2, 3)))


class TestEfficientNet:
    def test_stem_and_stages(self, net):
        images = torch.randn(2, 3, 33, 33)
        stem = F.conv2d(F.pad(images, (0, 1, 0, 1)), net.stem.conv.weight, stride=2)
        states = [F.silu(normed(net.stem, stem))]
        for stage in net.stages:
            states.append(stage(states[-1]))
        assert [tuple(s.shape[1:]) for s in states] == [(8, 16, 16), (8, 16, 16), (16, 8, 8), (24, 4, 4)]
        for layer in (0, 1, 3, -1, -2, -4):
            assert_same(net.grid(images, layer), states[layer])
            tokens = states[layer].permute(0, 2, 3, 1).flatten(1, 2)  # row by row
            assert_same(net.features(images, layer=layer), tokens)
            assert net.config.features_at(layer) == tuple(tokens.shape[1:])
        assert_same(net(images), states[-1].mean(dim=(2, 3)))
        assert net.output_width == net.config.output_width == 24

    @pytest.mark.parametrize("even", [(), (1,), (3,), (1, 3)])
    @pytest.mark.parametrize("size", [32, 33, 37, 46, 63])
    def test_features_at_is_what_comes_out(self, size, even):
        config = replace(SMALL, image_size=size, even_padding=even)
        net, images = EfficientNet(config).eval(), torch.randn(1, 3, size, size)
        for layer in range(-4, 4):
            assert net.features(images, layer=layer)[0].shape == config.features_at(layer)

    @pytest.mark.parametrize("layer", [4, -5])
    def test_a_layer_that_does_not_exist(self, net, layer):
        with pytest.raises(ValueError, match=f"layer {layer} does not exist: 3 stages have states 0 to 3"):
            net.features(torch.randn(1, 3, 33, 33), layer=layer)

    def test_rows_are_independent_in_eval_mode(self, net):
        assert_batch_independent(net, torch.randn(3, 3, 33, 33))

    def test_gradients_reach_all(self, net):
        assert_gradient_reaches(net(torch.randn(2, 3, 33, 33)), net)

    def test_half_precision_weights_take_any_images(self, net):
        images = torch.randn(2, 3, 33, 33)
        assert_same(net.bfloat16()(images).float(), net.float()(images), tolerance=0.05)


def test_a_stride_is_padded_evenly_or_as_tensorflow_does():
    x = torch.randn(1, 2, 6, 6)
    for skewed, pad in ((False, (1, 1, 1, 1)), (True, (0, 1, 0, 1))):
        layer = ConvNorm(2, 4, 3, stride=2, eps=1e-3, skewed=skewed).eval()
        assert_same(layer(x), normed(layer, F.conv2d(F.pad(x, pad), layer.conv.weight, stride=2)))


@pytest.mark.parametrize(
    ("name", "parameters"),  # of the released networks, less the last convolution and the classifier on top of it
    [
        ("B0", 5_288_548 - (320 * 1280 + 2 * 1280) - 1281 * 1000),
        ("B4", 19_341_616 - (448 * 1792 + 2 * 1792) - 1793 * 1000),
        ("B7", 66_347_960 - (640 * 2560 + 2 * 2560) - 2561 * 1000),
    ],
)
def test_named_sizes_have_as_many_parameters_as_the_released(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in EfficientNet(EFFICIENTNET_SIZES[name]).parameters()) == parameters


def test_channels_are_rounded_but_not_far_down():
    scaled = EfficientNetConfig(width_scale=1.4).scaled
    assert [scaled(n) for n in (32, 16, 40, 320)] == [48, 24, 56, 448]  # 44.8, 22.4, 56, 448
    assert EfficientNetConfig(width_scale=0.25).scaled(32) == 8
    assert EfficientNetConfig(width_scale=1.1).scaled(10) == 16  # 11 → 8 would be too little


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (1, 2)}, "one entry for each stage"),
        ({"strides": (1, 3, 2)}, r"strides \(1, 3, 2\) must be 1 or 2"),
        ({"kernels": (3, 4, 3)}, r"kernels \(3, 4, 3\) odd"),
        ({"activation": "tanh"}, "unknown activation 'tanh'; there are gelu"),
        ({"image_size": 7}, "image_size 7 is too small"),
    ],
)
def test_configs_that_make_no_network(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
