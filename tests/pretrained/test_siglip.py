"""transformers' SigLIP layout without transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from minivlm.checkpoint import load, save
from minivlm.errors import UserError
from minivlm.layers import TextConfig, VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.pretrained import comparable, siglip

ACTIVATION = {"activation": "gelu_tanh", "norm_eps": 1e-6}
CONFIG = CLIPConfig(
    vision=VisionConfig(
        width=16,
        depth=2,
        heads=2,
        image_size=16,
        patch_size=8,
        pool="attention",
        embedding_norm=False,
        patch_bias=True,
        **ACTIVATION,
    ),
    text=TextConfig(
        width=24,
        depth=1,
        heads=2,
        vocab_size=30,
        context=8,
        causal=False,
        use_mask=False,
        pool="last",
        **ACTIVATION,
    ),
    embed_width=16,
    image_projection=False,
    text_projection_bias=True,
    loss="sigmoid",
)


def test_there_and_back(tmp_path):
    model = CLIP(CONFIG).eval()
    save(tmp_path, model, layout="hf")
    back, processor = load(tmp_path)
    assert comparable(back.config) == comparable(CONFIG)
    images, tokens = torch.randn(2, 3, 16, 16), torch.randint(30, (2, 8))
    with torch.no_grad():
        assert torch.equal(back(images, tokens).logits_per_image, model(images, tokens).logits_per_image)
    c = processor.config  # by default: SigLIP's images, and texts padded to the context
    assert (c.image_size, c.resize, c.crop, c.mean, c.std, c.pad_to_context) == (
        *(16, "squash", "none", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), True),
    )


def test_the_pooling_head_is_stored_in_one_piece(tmp_path):
    model = CLIP(CONFIG)
    save(tmp_path, model, layout="hf")
    stored = load_file(tmp_path / "model.safetensors")
    attention = model.vision.attention_pool.attention
    fused = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(stored["vision_model.head.attention.in_proj_weight"], fused)
    assert stored["vision_model.head.probe"].shape == (1, 1, 16)
    assert stored["logit_scale"].shape == stored["logit_bias"].shape == (1,)


def test_defaults_are_those_of_base_patch16_224():
    config = siglip.read_config({"text_config": {}, "vision_config": {}})
    assert (config.embed_width, config.text.vocab_size, config.text.context) == (768, 32000, 64)
    assert (config.vision.patch_size, config.vision.activation, config.vision.norm_eps) == (16, "gelu_tanh", 1e-6)


def test_towers_that_do_not_meet(tmp_path):
    values = {"model_type": "siglip", "vision_config": {"hidden_size": 24, "num_attention_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="the tower's width 24 must be embed_width 768"):
        load(tmp_path)
