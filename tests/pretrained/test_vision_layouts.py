"""The config.json of vision towers as they are published."""

import json

import pytest

from minivlm import pretrained
from minivlm.errors import Note, UserError

COMMON = {
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "num_channels": 3,
    "qkv_bias": True,
    "torch_dtype": "float32",
}
DINOV2 = COMMON | {
    "apply_layernorm": True,
    "drop_path_rate": 0.0,
    "image_size": 518,
    "layer_norm_eps": 1e-06,
    "layerscale_value": 1.0,
    "mlp_ratio": 4,
    "out_features": ["stage12"],
    "out_indices": [12],
    "patch_size": 14,
    "reshape_hidden_states": True,
    "stage_names": ["stem", "stage1"],
}
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "use_swiglu_ffn": False}
GIANT = {"hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 40, "use_swiglu_ffn": True}
NAMED = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
REGISTERS = {
    "architectures": ["Dinov2WithRegistersModel"],
    "model_type": "dinov2_with_registers",
    "num_register_tokens": 4,
}
VIT = COMMON | {
    "architectures": ["ViTForImageClassification"],
    "encoder_stride": 16,
    "hidden_size": 768,
    "id2label": {"0": "tench", "1": "goldfish"},
    "image_size": 224,
    "intermediate_size": 3072,
    "label2id": {"tench": 0, "goldfish": 1},
    "layer_norm_eps": 1e-12,
    "model_type": "vit",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 16,
}


def read(directory, values, **images):
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    if images:
        (directory / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")
    return pretrained.read(directory, pretrained.recognise(directory))


def test_dinov2_small(tmp_path):
    described = read(tmp_path, DINOV2 | SMALL | NAMED)
    c, p = described.config, described.processor.config
    assert (c.width, c.depth, c.heads, c.mlp_width, c.patches, c.registers) == (384, 12, 6, 1536, 37 * 37, 0)
    assert not c.antialias_positions and not c.gated_mlp and c.layer_scale == 1.0
    assert (p.resize_to, p.image_size, p.mean[0]) == (256, 224, 0.485)  # as published, where the file is missing


def test_dinov2_giant_with_registers(tmp_path):
    c = read(tmp_path, DINOV2 | GIANT | REGISTERS | {"interpolate_antialias": True, "interpolate_offset": 0.0}).config
    assert (c.width, c.mlp_width, c.gated_mlp, c.activation, c.registers) == (1536, 4096, True, "silu", 4)
    assert c.antialias_positions


def test_vit_of_a_classifier_as_of_2021(tmp_path):
    images = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2,
              "size": 224, "feature_extractor_type": "ViTFeatureExtractor"}  # fmt: skip
    with pytest.warns(Note, match="the classifier of this ViTForImageClassification is not read"):
        described = read(tmp_path, VIT, **images)
    c, p = described.config, described.processor.config
    assert (c.width, c.norm_eps, c.patches, c.layer_scale) == (768, 1e-12, 196, None)
    assert (p.image_size, p.resize, p.resample, p.crop) == (224, "squash", "bilinear", "none")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (DINOV2 | SMALL | NAMED | {"num_channels": 1}, "images of 1 channels; only 3 are supported"),
        (DINOV2 | SMALL | NAMED | {"patch_size": [14, 16]}, "only squares are supported"),
        (DINOV2 | SMALL | NAMED | {"rope_theta": 100.0}, "rope_theta = 100.0, which is not known here"),
        ({**VIT, "model_type": "dinov3_vit"}, "'dinov3_vit', which is not supported; there are .*dinov2, "),
    ],
)
def test_what_cannot_be_followed_is_named(values, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, values)
