"""transformers' CLIP layout without transformers: what is in tests/parity/ is not repeated here."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from minivlm.checkpoint import load, save
from minivlm.empty_model import empty_model
from minivlm.errors import UserError
from minivlm.layers import ResNetConfig, TextConfig, VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig, clip_size
from minivlm.pretrained import MODULES, comparable, hf_clip, names
from minivlm.processor import Processor

VISION = VisionConfig(width=16, depth=2, heads=2, image_size=16, patch_size=8, activation="quick_gelu")
TEXT = TextConfig(width=16, depth=1, heads=4, vocab_size=300, context=8, end_token=3, mlp_width=20, norm_eps=1e-6)
CONFIG = CLIPConfig(vision=VISION, text=TEXT, embed_width=12)


def numbers(model):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(300, (3, 8), generator=generator)
    tokens[0, 4] = tokens[1, 7] = 3
    with torch.no_grad():
        return model(torch.randn(3, 3, 16, 16, generator=generator), tokens, tokens > 0).logits_per_image


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, text=replace(TEXT, pool="argmax", end_token=None)),
        replace(CONFIG, vision=replace(VISION, activation="gelu_tanh", dropout=0.1, head_width=8), loss_chunk=2),
        replace(CONFIG, vision=replace(VISION, image_size=19, drop_border=True)),
    ],
)
def test_there_and_back(config, tmp_path):
    model = CLIP(config).eval()
    processor = Processor.train(["a red disc"], vocab_size=260, image_size=16, context=8)
    save(tmp_path, model, processor, layout="hf")
    back, back_processor = load(tmp_path)
    assert comparable(back.config) == comparable(config)
    assert torch.equal(numbers(back), numbers(model))
    assert back_processor.text(["a disc"])[0].tolist() == processor.text(["a disc"])[0].tolist()
    assert back_processor.config == replace(processor.config, resize_to=16, pad_token="<pad>")


def test_the_names_are_those_of_the_published_files(tmp_path):
    """Spelt as on the hub, pre_layrnorm included."""
    save(tmp_path, CLIP(CONFIG), layout="hf")
    stored = load_file(tmp_path / "model.safetensors")
    assert {name for name in stored if ".layers." not in name} == {
        *("text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"),
        *(
            "text_model.final_layer_norm.weight",
            "text_model.final_layer_norm.bias",
            "vision_model.embeddings.class_embedding",
        ),
        *("vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.position_embedding.weight"),
        *("vision_model.pre_layrnorm.weight", "vision_model.pre_layrnorm.bias"),
        *("vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"),
        *("visual_projection.weight", "text_projection.weight", "logit_scale"),
    }
    assert {name for name in stored if name.startswith("text_model.encoder.layers.0.")} == {
        f"text_model.encoder.layers.0.{module}.{kind}"
        for kind in ("weight", "bias")
        for module in (
            *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
            *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        )
    }


def test_old_extras_are_ignored_and_a_layer_too_many_is_not(tmp_path):
    from safetensors.torch import save_file

    save(tmp_path, CLIP(CONFIG), layout="hf")
    path = tmp_path / "model.safetensors"
    tensors = {**load_file(path), "text_model.embeddings.position_ids": torch.arange(8)[None]}
    save_file(tensors, path)
    load(tmp_path)
    save_file({**tensors, "vision_model.encoder.layers.2.layer_norm1.weight": torch.ones(16)}, path)
    with pytest.raises(UserError, match=r"1 unexpected \(vision_model\.encoder\.layers\.2\.layer_norm1\.weight\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(CONFIG, vision=replace(VISION, pool="mean")), "vision.pool = 'mean'"),
        (replace(CONFIG, vision=replace(VISION, embedding_norm=False)), "vision.embedding_norm = False"),
        (replace(CONFIG, vision=replace(VISION, norm="rmsnorm")), "vision.norm = 'rmsnorm'"),
        (replace(CONFIG, text=replace(TEXT, causal=False)), "text.causal = False"),
        (replace(CONFIG, text=replace(TEXT, end_token=2)), "text.pool = 'end', text.end_token = 2"),
        (replace(CONFIG, text=replace(TEXT, kv_heads=2)), "text.kv_heads = 2"),
        (replace(CONFIG, text=replace(TEXT, gated_mlp=True)), "text.gated_mlp = True"),
        (replace(CONFIG, text_projection_bias=True), "text_projection_bias = True"),
        (replace(CONFIG, loss="sigmoid", embed_width=16), "vision.pool = 'class'"),
        (replace(CONFIG, loss="sigmoid"), "SiglipModel cannot express this model"),
    ],
)
def test_what_transformers_cannot_express_is_named(config, named, tmp_path):
    with pytest.raises(UserError) as error:
        save(tmp_path, CLIP(config), layout="hf")
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_resnet_has_no_such_form(tmp_path):
    resnet = ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=32)
    with pytest.raises(UserError, match="cannot express a ResNet tower"):
        save(tmp_path, CLIP(replace(CONFIG, vision=resnet, image_projection=False)), layout="hf")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"text_config": {"hidden_act": "tanh"}}, "activation 'tanh'"),
        ({"vision_config": {"num_channels": 1}}, "images of 1 channels"),
        ({"vision_config": {"image_size": [224, 336]}}, r"image_size \[224, 336\]"),
        ({"vision_config": {"patch_size": 0}}, "no model that can be built"),
        ({"vision_config": "small"}, "no model that can be built"),
        ({"text_config": {"hidden_size": "512"}}, "text.width is '512', but must be int"),
        ({"text_config": {"num_attention_heads": 7}}, "no model that can be built"),
        ({"text_config": {"eos_token_id": [1, 2]}}, "text.end_token is"),
    ],
)
def test_configs_that_cannot_be_followed(values, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **values}))
    with pytest.raises(UserError, match=said):
        load(tmp_path)


def test_defaults_are_those_of_base_patch32():
    config = hf_clip.read_config({"model_type": "clip", "text_config": {"eos_token_id": 2}})
    assert comparable(config) == comparable(clip_size("ViT-B/32"))


@pytest.mark.parametrize(
    ("name", "parameters"), [("ViT-B/32", 151_277_313), ("ViT-L/14", 427_616_513), ("ViT-H/14", 986_109_441)]
)
def test_published_sizes(name, parameters):
    model = empty_model(CLIP, clip_size(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    stored = names.to_theirs(model.state_dict(), hf_clip.rows)
    assert sum(t.numel() for t in stored.values()) == parameters


def test_other_types_are_listed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    known = ", ".join(sorted(MODULES))
    with pytest.raises(UserError, match=f"type 'mamba', which is not supported; there are {known}"):
        load(tmp_path)
