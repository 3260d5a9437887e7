"""ALIGN against transformers.AlignModel, in both directions."""

import pytest
import torch

import minivlm
from minivlm.empty_model import empty_model
from minivlm.models.clip import CLIP, align_size
from minivlm.pretrained import align, comparable, names

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

TEXT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 12,
}
VISION = {"width_coefficient": 0.25, "depth_coefficient": 0.4, "image_size": 33, "hidden_dim": 80}
VARIANTS = {
    "Kakao's": {},
    "another size": {"vision": {"image_size": 64, "width_coefficient": 0.5}, "projection_dim": 160},
    "odd grids, padded evenly": {"vision": {"image_size": 75, "depthwise_padding": [2, 3]}},
    "other stages": {
        "vision": {
            "in_channels": [32, 24],
            "out_channels": [24, 48],
            "kernel_sizes": [5, 3],
            "strides": [2, 2],
            "num_block_repeats": [3, 6],
            "expand_ratios": [2, 4],
            "squeeze_expansion_ratio": 0.5,
            "hidden_act": "relu",
            "batch_norm_eps": 1e-2,
        },
        "projection_dim": 16,
    },
}


def reference(variant):
    config = transformers.AlignConfig(
        text_config={**TEXT, **variant.get("text", {})},
        vision_config={**VISION, **variant.get("vision", {})},
        projection_dim=variant.get("projection_dim", 80),
    )
    model = transformers.AlignModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.temperature.fill_(0.2)
        size = config.vision_config.image_size
        for _ in range(5):  # moves the running statistics
            model.vision_model(torch.randn(8, 3, size, size))
    return model.eval()


def compare(ours, theirs, images, close):
    tokens, pixels = torch.randint(60, (3, 10)), images(3, theirs.config.vision_config.image_size)
    mask = torch.arange(10) < torch.tensor([10, 6, 3])[:, None]
    with torch.no_grad():
        out = ours(pixels, tokens, mask)
        expected = theirs(input_ids=tokens, pixel_values=pixels, attention_mask=mask.long(), return_loss=True)
    close(out.image_features, torch.nn.functional.normalize(expected.image_embeds, dim=-1))
    close(out.text_features, torch.nn.functional.normalize(expected.text_embeds, dim=-1))
    close(out.logits_per_image, expected.logits_per_image)
    close(out.loss, expected.loss)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_saved_by_transformers_loaded_by_us_and_back(variant, tmp_path, images, close):
    theirs = reference(variant)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    compare(ours, theirs, images, close)
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    again, info = transformers.AlignModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all("pooler" in name for name in info["missing_keys"])  # which nothing reads
    compare(ours, again.eval(), images, close)


def test_published_size_name_by_name():
    vision = {"image_size": 289, "hidden_dim": 640}
    with torch.device("meta"):
        theirs = transformers.AlignModel(transformers.AlignConfig(vision_config=vision))
    config = align.read_config({"vision_config": vision})
    assert comparable(config) == comparable(align_size("B7"))
    ours = empty_model(CLIP, config)
    stored, rows = theirs.state_dict(), align.rows(config)
    names.to_ours(stored, ours.state_dict(keep_vars=True), rows, "align-base")
    pooler = 768 * 768 + 768
    assert sum(p.numel() for p in theirs.parameters()) == 172_117_841
    assert sum(p.numel() for p in ours.parameters()) == 172_117_841 - pooler
    written = names.to_theirs(ours.state_dict(), rows)
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in stored.items() if "pooler" not in k}
