"""ViT and ModifiedResNet against open_clip's own classes, built from the same config."""

import json

import pytest
import torch

import minivlm
from minivlm.empty_model import Unfilled, empty_model
from minivlm.errors import UserError
from minivlm.models.clip import CLIP, clip_size
from minivlm.pretrained import comparable, names
from minivlm.pretrained import open_clip as tables

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed (tests/requirements.txt)")

TEXT = {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 64, "patch_size": None}
VARIANTS = {
    "gelu": {},
    "quick_gelu": {"quick_gelu": True},
    "wide heads, narrow MLP": {"vision_cfg": {"head_width": 16, "mlp_ratio": 1.3}, "text_cfg": {"mlp_ratio": 2.5}},
    "uneven heads": {"vision_cfg": {"width": 40, "head_width": 16}},
    "a border": {"vision_cfg": {"image_size": [38, 38], "patch_size": 9}, "embed_dim": 10},
    "an end token": {"text_cfg": {"pool_type": "eos", "eos_id": 50}},
    "bidirectional text, read at the end": {"text_cfg": {"no_causal_mask": True, "pool_type": "last"}},
    "read at the front": {"text_cfg": {"pool_type": "first", "no_causal_mask": True}},
    "no first norm, eps, tanh": {
        "vision_cfg": {"no_ln_pre": True, "norm_kwargs": {"eps": 1e-2}, "act_kwargs": {"approximate": "tanh"}},
        "text_cfg": {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}, "proj_bias": True},
    },
    "sigmoid": {"init_logit_bias": -10.0, "init_logit_scale": 2.3, "nonscalar_logit_scale": True},
    "harmless options": {"vision_cfg": {"patch_dropout": 0.5, "final_ln_after_pool": True, "output_tokens": False}},
    "ResNet": {"vision_cfg": RESNET},
    "ResNet, quick_gelu, heads": {"vision_cfg": {**RESNET, "head_width": 32, "image_size": 96}, "quick_gelu": True},
}


def reference(variant, custom=False):
    """(model_cfg, random model with norms, biases and running statistics that matter)"""
    vision = variant.get("vision_cfg", {})
    cfg = {"embed_dim": 24, **variant, "text_cfg": {**TEXT, **variant.get("text_cfg", {})}}
    cfg["vision_cfg"] = vision if "layers" in vision else {**VIT, **vision}
    model = (open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP)(**cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return {**cfg, "custom_text": True} if custom else cfg, model


def write(directory, cfg, state, *, pickled=False):
    from safetensors.torch import save_file

    values = {"model_cfg": cfg, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "interpolation": "bilinear"}}
    (directory / "open_clip_config.json").write_text(json.dumps(values))
    if pickled:
        torch.save(state, directory / "open_clip_pytorch_model.bin")
    else:
        save_file(state, directory / "open_clip_model.safetensors")


def compare(ours, theirs, cfg, images, close):
    size = cfg["vision_cfg"]["image_size"]
    pixels, tokens = images(3, size if isinstance(size, int) else size[0]), torch.randint(1, 50, (3, 12))
    tokens[0, 6:], tokens[0, 5], tokens[1, [3, 11]] = 0, 50, 50
    with torch.no_grad():
        out = ours(pixels, tokens, tokens > 0)
        close(out.image_features, theirs.encode_image(pixels, normalize=True))
        close(out.text_features, theirs.encode_text(tokens, normalize=True))
        if not hasattr(theirs, "text"):  # get_logits of the other class is its own affair
            close(out.logits_per_image, theirs.get_logits(pixels, tokens)[0])


@pytest.mark.parametrize("custom", [False, True], ids=["", "custom text"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_same_numbers(variant, custom, tmp_path, images, close):
    cfg, theirs = reference(variant, custom)
    write(tmp_path, cfg, theirs.state_dict())
    compare(minivlm.load(tmp_path)[0], theirs, cfg, images, close)


def test_pickled_file_with_the_extras_of_openai(tmp_path, images, close):
    cfg, theirs = reference({})
    extras = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12), "vocab_size": torch.tensor(60)}
    write(tmp_path, cfg, {**theirs.state_dict(), **extras}, pickled=True)
    compare(minivlm.load(tmp_path)[0], theirs, cfg, images, close)


@pytest.mark.parametrize(
    ("variant", "named"),
    [
        ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg.pool_type = 'avg'"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value = 0.1"),
        ({"vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 4}}, "vision_cfg.attentional_pool"),
        ({"vision_cfg": {"qk_norm": True}}, "vision_cfg.qk_norm"),
        ({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224"}}, "vision_cfg.timm_model_name"),
        ({"vision_cfg": {"norm_kwargs": {"elementwise_affine": False}}}, "norm_kwargs"),
        ({"text_cfg": {"embed_cls": True}}, "text_cfg.embed_cls"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "text_cfg.hf_model_name"),
        ({"text_cfg": {"proj_type": "none"}}, "text_cfg.proj_type"),
        ({"text_cfg": {"pool_type": "none"}}, "text_cfg.pool_type"),
        ({"quick_gelu": True, "text_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs"),
        ({"multimodal_cfg": {}}, "model_cfg.multimodal_cfg"),
        ({"vision_cfg": {"something_new": 1}}, "vision_cfg.something_new"),
    ],
)
def test_what_would_give_other_numbers_is_refused(variant, named):
    cfg = {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}
    for name, value in variant.items():
        cfg = {**cfg, name: {**cfg[name], **value} if name in ("vision_cfg", "text_cfg") else value}
    with pytest.raises(UserError) as error:
        tables.read_config({"model_cfg": cfg})
    assert named in str(error.value)


SIZES = {
    "ViT-B-32-quickgelu": ("ViT-B/32", 151_277_313),
    "ViT-L-14-quickgelu": ("ViT-L/14", 427_616_513),
    "ViT-H-14": ("ViT-H/14", 986_109_441),
    "RN50-quickgelu": ("RN50", 102_007_137),
    "RN101-quickgelu": ("RN101", 119_688_033),
    "RN50x4-quickgelu": ("RN50x4", 178_300_601),
    "RN50x16-quickgelu": ("RN50x16", 290_979_217),
    "RN50x64-quickgelu": ("RN50x64", 623_258_305),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_name_by_name(name):
    """Every name and shape of the full-size models, both ways, without their memory."""
    cfg = open_clip.get_model_config(name)
    with torch.device("meta"), Unfilled():
        theirs = open_clip.model.CLIP(**cfg).state_dict()
    ours = empty_model(CLIP, tables.read_config({"model_cfg": cfg}))
    size, parameters = SIZES[name]
    assert comparable(ours.config) == comparable(clip_size(size))
    assert sum(p.numel() for p in ours.parameters()) == parameters
    state, rows = ours.state_dict(keep_vars=True), tables.rows(ours.config)
    names.to_ours(theirs, state, rows, name)  # raises unless every name and shape agrees
    written = {k: v.numel() for k, v in names.to_theirs(state, rows).items()}
    assert written == {k: v.numel() for k, v in theirs.items()}
