"""DINOv2, with and without registers, and the plain ViT against transformers, in both directions."""

import json
import warnings

import pytest
import torch
from PIL import Image

import minivlm
from minivlm.errors import Note

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
DINOV2 = ("Dinov2Config", "Dinov2Model")
REGISTERS = ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel")
VIT = ("ViTConfig", "ViTModel")
VARIANTS = {
    "DINOv2": (*DINOV2, {"mlp_ratio": 4}),
    "DINOv2, other functions": (*DINOV2, {"mlp_ratio": 2, "hidden_act": "gelu_new", "qkv_bias": False, "layer_norm_eps": 1e-3}),
    "DINOv2 giant, gated": (*DINOV2, {"mlp_ratio": 4, "use_swiglu_ffn": True}),
    "DINOv2 with registers": (*REGISTERS, {"mlp_ratio": 4}),
    "DINOv2 with two registers, gated": (*REGISTERS, {"num_register_tokens": 2, "use_swiglu_ffn": True}),
    "ViT": (*VIT, {"intermediate_size": 40}),
    "ViT of a classifier": ("ViTConfig", "ViTForImageClassification", {"intermediate_size": 40, "num_labels": 5}),
    "DINOv2 of a classifier": ("Dinov2Config", "Dinov2ForImageClassification", {"mlp_ratio": 4, "num_labels": 5}),
}  # fmt: skip


def reference(config_class, model_class, values):
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**SIZES, **values)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def same_states(ours, theirs, close, sizes=((32, 32), (48, 48), (24, 40), (16, 64))):
    tower = getattr(theirs, theirs.base_model_prefix, theirs)
    for size in sizes:
        pixels = torch.randn(2, 3, *size)
        how = {"interpolate_pos_encoding": True} if theirs.config.model_type == "vit" else {}
        with torch.no_grad():
            expected = tower(pixels, output_hidden_states=True, **how)
            for layer, state in enumerate(expected.hidden_states):
                close(ours.features(pixels, layer=layer), state)
            close(ours(pixels), expected.last_hidden_state[:, 0])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("names_of", [5, 4])  # the version of transformers whose names the tensors have
def test_a_published_tower_computes_what_transformers_does_at_every_size(name, names_of, tmp_path, close):
    theirs = reference(*VARIANTS[name])
    theirs.save_pretrained(tmp_path, save_original_format=names_of == 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours, processor = minivlm.load(tmp_path)
    assert ["classifier" in str(one.message) for one in told if one.category is Note] == [True] * ("classifier" in name)
    assert type(ours) is minivlm.VisionTransformer and processor.source is None
    same_states(ours, theirs, close)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_layout_hf_writes_is_loaded_by_transformers_with_equal_states(name, tmp_path, close):
    reference(*VARIANTS[name]).save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        ours, processor = minivlm.load(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", processor=processor)
    ours, processor = minivlm.load(tmp_path / "ours")
    ours.save_pretrained(tmp_path / "again", processor=processor, layout="hf")
    [architecture] = json.loads((tmp_path / "again/config.json").read_text(encoding="utf-8"))["architectures"]
    theirs = getattr(transformers, architecture).from_pretrained(tmp_path / "again").eval()
    same_states(ours, theirs, close, sizes=((32, 32), (24, 40)))
    same = minivlm.load(tmp_path / "again")[0].state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in ours.state_dict().items())


SMALLER = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}


@pytest.mark.parametrize(
    ("name", "image_processor", "values"),
    [
        ("DINOv2", "BitImageProcessor", SMALLER | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.2, 0.3, 0.4]}),
        ("ViT", "ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
        ("ViT", "ViTImageProcessor", {"size": {"height": 48, "width": 48}, "resample": 3, "image_std": [0.2, 0.3, 0.4]}),
    ],
)  # fmt: skip
def test_images_are_prepared_as_the_towers_file_says(name, image_processor, values, tmp_path):
    reference(*VARIANTS[name]).save_pretrained(tmp_path)
    kind = getattr(transformers, f"{image_processor}Pil", None) or getattr(transformers, image_processor)
    theirs = kind(**values)
    theirs.save_pretrained(tmp_path)
    model, processor = minivlm.load(tmp_path)
    image = Image.effect_mandelbrot((61, 45), (-3, -2.5, 2, 2.5), 90).convert("RGB")
    expected = theirs(image, return_tensors="pt")["pixel_values"]
    assert (processor.images([image]) - expected).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "again", processor=processor, layout="hf")
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path / "again", use_fast=False)
    assert (again(image, return_tensors="pt")["pixel_values"] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["CLIPVision", "SiglipVision"])
def test_the_tower_of_a_clip_alone_there_and_back(kind, tmp_path, close):
    values = {"intermediate_size": 40}
    theirs = reference(f"{kind}Config", f"{kind}Model", values)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, processor = minivlm.load(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "again", processor=processor, layout="hf")
    again = getattr(transformers, f"{kind}Model").from_pretrained(tmp_path / "again").eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for one in (theirs, again):
            expected = one(pixels, output_hidden_states=True)
            close(ours(pixels), expected.pooler_output)
            close(ours.features(pixels, layer=-2), expected.hidden_states[-2])


def test_the_projection_of_a_clips_tower_is_not_read(tmp_path, close):
    values = {"intermediate_size": 40, "projection_dim": 12}
    theirs = reference("CLIPVisionConfig", "CLIPVisionModelWithProjection", values)
    theirs.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close(minivlm.load(tmp_path)[0](pixels), theirs.vision_model(pixels).pooler_output)
