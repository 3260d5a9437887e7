"""open_clip's layout without open_clip: the same numbers after our weights went through its names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivlm.checkpoint import load
from minivlm.empty_model import empty_model
from minivlm.errors import UserError
from minivlm.models.clip import CLIP, clip_size
from minivlm.pretrained import names, open_clip

TEXT = {"context_length": 8, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 16, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}


def publish(directory, vision, prefix="", **more) -> CLIP:
    """A random model of ours, written as open_clip would write it."""
    values = {"model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXT, **more}}
    (directory / "open_clip_config.json").write_text(json.dumps(values))
    model = CLIP(open_clip.read_config(values)).eval()
    tensors = names.to_theirs(model.state_dict(), open_clip.rows(model.config))
    towers = ("visual", "logit")
    tensors = {k if k.startswith(towers) else prefix + k: v.contiguous() for k, v in tensors.items()}
    save_file(tensors, directory / "open_clip_model.safetensors")
    return model


@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_there_and_back(vision, prefix, tmp_path):
    model = publish(tmp_path, vision, prefix)
    back, processor = load(tmp_path)
    size = vision["image_size"]
    images, tokens = torch.randn(2, 3, size, size), torch.randint(30, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(back(images, tokens).logits_per_image, model(images, tokens).logits_per_image)
    assert (processor.image_size, processor.config.crop, processor.config.pad_token) == (size, "round", 0)


def test_fused_and_transposed_tensors(tmp_path):
    model = publish(tmp_path, VIT)
    stored = load_file(tmp_path / "open_clip_model.safetensors")
    attention = model.text.transformer.blocks[0].attention
    fused = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(stored["transformer.resblocks.0.attn.in_proj_weight"], fused)
    assert torch.equal(stored["visual.proj"], model.image_projection.weight.T)
    assert stored["visual.proj"].shape == (24, 12) and stored["text_projection"].shape == (16, 12)


def test_what_was_loaded_trains(tmp_path):
    """Parameters that are slices and transposed views of the file take an optimiser's step."""
    publish(tmp_path, VIT)
    before = (tmp_path / "open_clip_model.safetensors").read_bytes()
    model, _ = load(tmp_path)
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.randn(3, 3, 16, 16), torch.randint(30, (3, 8))).loss.backward()
    optimiser.step()
    assert not any(torch.equal(p, original[name]) for name, p in model.named_parameters())
    assert (tmp_path / "open_clip_model.safetensors").read_bytes() == before
    model.save_pretrained(tmp_path / "ours")
    back, _ = load(tmp_path / "ours")
    assert all(torch.equal(p, back.get_parameter(name)) for name, p in model.named_parameters())


def test_shapes_are_reported_as_they_are_stored(tmp_path):
    publish(tmp_path, VIT)
    path = tmp_path / "open_clip_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "visual.proj": torch.zeros(12, 24), "ln_final.bias": torch.zeros(3)}, path)
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert "ln_final.bias is (3,) instead of (16,)" in str(error.value)
    assert "visual.proj is (12, 24) instead of (24, 12)" in str(error.value)


def test_a_missing_piece_of_three_is_named_once(tmp_path):
    publish(tmp_path, VIT)
    path = tmp_path / "open_clip_model.safetensors"
    tensors = load_file(path)
    del tensors["visual.transformer.resblocks.1.attn.in_proj_bias"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"1 missing \(visual\.transformer\.resblocks\.1\.attn\.in_proj_bias\)\.$"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "no model_cfg.embed_dim"),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": {"ls_init_value": 0.1}}}, "vision_cfg.ls_init_value = 0.1"),
        ({"model_cfg": {"embed_dim": 8, "text_cfg": {"hf_model_name": "x"}}}, "text_cfg.hf_model_name = 'x'"),
        ({"model_cfg": {"embed_dim": 8, "text_cfg": {"pool_type": "none"}}}, "text_cfg.pool_type is 'none'"),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": {"image_size": [8, 9]}}}, r"image_size \[8, 9\]"),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": {"head_width": 0}}}, "no model that can be built"),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": {**RESNET, "image_size": 40}}}, "not a multiple of 32"),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": {**RESNET, "layers": [1, 1]}}}, "vision.blocks"),
        ({"model_cfg": {"embed_dim": 8}, "preprocess_cfg": {"resize_mode": "longest"}}, "resize_mode is 'longest'"),
    ],
)
def test_configs_that_cannot_be_followed(values, said, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=said):
        load(tmp_path)


def test_options_of_the_text_tower():
    def text(**options):
        return open_clip.read_config({"model_cfg": {"embed_dim": 8, "text_cfg": {**TEXT, **options}}}).text

    assert (text().causal, text().pool, text().mlp_width, text().norm_eps) == (True, "argmax", 64, 1e-5)
    both_ways = text(no_causal_mask=True, pool_type="last")
    assert (both_ways.causal, both_ways.use_mask, both_ways.pool) == (False, False, "last")
    assert (text(pool_type="eos", eos_id=9).pool, text(pool_type="eos", eos_id=9).end_token) == ("end", 9)
    assert text(norm_kwargs={"eps": 1e-6}).norm_eps == 1e-6
    assert text(act_kwargs={"approximate": "tanh"}).activation == "gelu_tanh"


def test_texts_that_are_cleaned_in_another_way_are_not_guessed(tmp_path):
    model = publish(tmp_path, VIT)
    values = json.loads((tmp_path / "open_clip_config.json").read_text())
    values["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer.json").write_text("{}")
    back, processor = load(tmp_path)
    assert torch.equal(back.text.norm.weight, model.text.norm.weight)
    with pytest.raises(UserError, match="no tokeniser"):
        processor.text(["a"])


@pytest.mark.parametrize(("name", "parameters"), [("RN50", 102_007_137), ("RN50x64", 623_258_305)])
def test_published_sizes(name, parameters):
    model = empty_model(CLIP, clip_size(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    stored = names.to_theirs(dict(model.named_parameters()), open_clip.rows(model.config))
    assert sum(t.numel() for t in stored.values()) == parameters
