"""Pixels against the published preprocessing on PIL images, to the bit."""

import json

import numpy as np
import pytest
from PIL import Image

from minivlm.pretrained import read

CONFIG = {"vision_config": {"image_size": 32, "patch_size": 8}}
SHAPES = [(45, 61), (70, 38), (33, 32), (32, 32), (7, 50), (200, 131), (1, 3)]  # (H, W)
CLIP_FILES = {
    "2021": {"size": 32, "crop_size": 32, "do_resize": True, "do_center_crop": True, "resample": 3},
    "4.x": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_rescale": True},
    "crops from larger": {"size": {"shortest_edge": 43}, "crop_size": 32, "image_mean": [0.1, 0.2, 0.3]},
    "squashes, then crops": {"size": {"height": 37, "width": 37}, "crop_size": {"height": 32, "width": 32}},
    "pads": {"size": {"shortest_edge": 21}, "crop_size": {"height": 32, "width": 32}, "resample": 2},
    "does not resize": {"do_resize": False, "crop_size": {"height": 32, "width": 32}},
    "does not crop, 2021": {"size": 32, "do_center_crop": False},
    "does not crop": {"size": {"shortest_edge": 32}, "do_center_crop": False},
    "does not normalise": {"size": {"shortest_edge": 32}, "crop_size": 32, "do_normalize": False},
    "does not rescale": {"size": {"shortest_edge": 32}, "crop_size": 32, "do_rescale": False, "image_std": [2, 3, 4]},
    "other factor": {"size": {"shortest_edge": 32}, "crop_size": 32, "rescale_factor": 0.0078, "resample": 1},
    "nearest": {"size": {"shortest_edge": 32}, "crop_size": 32, "resample": 0},
}
SIGLIP_FILES = {
    "Google's": {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "defaults": {"size": {"height": 32, "width": 32}},
}


def pictures():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]
    rgb = [Image.fromarray(a) for a in arrays]
    other_modes = [rgb[0].convert("L"), rgb[1].convert("P"), rgb[0].convert("CMYK")]
    transparent = rgb[1].convert("RGBA")
    transparent.putalpha(Image.fromarray(arrays[1][..., 0]))
    return [*rgb, *other_modes, transparent]


def processor(tmp_path, kind, values):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_type": kind}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    return read(tmp_path, kind).processor


@pytest.mark.parametrize("values", CLIP_FILES.values(), ids=CLIP_FILES)
def test_clip_images(values, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ours, theirs = processor(tmp_path, "clip", values), CLIPImageProcessorPil(**values)
    for picture in pictures():
        expected = theirs(picture)["pixel_values"][0]
        assert np.array_equal(ours.images([picture])[0].numpy(), expected)


def test_the_file_that_transformers_writes_since_version_5(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=36, image_mean=[0.1, 0.2, 0.3])
    vocab = {"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[])
    transformers.CLIPProcessor(image_processor=theirs, tokenizer=tokenizer).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_type": "clip"}))
    ours = read(tmp_path, "clip").processor
    for picture in pictures():
        assert np.array_equal(ours.images([picture])[0].numpy(), theirs(picture)["pixel_values"][0])


@pytest.mark.parametrize("values", SIGLIP_FILES.values(), ids=SIGLIP_FILES)
def test_siglip_images(values, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    ours, theirs = processor(tmp_path, "siglip", values), SiglipImageProcessorPil(**values)
    for picture in pictures():
        assert np.array_equal(ours.images([picture])[0].numpy(), theirs(picture)["pixel_values"][0])


KINDS = {  # what a silent file means depends on whose it is
    "Llava": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "Llava pads": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_pad": True},
    "Llava pads, no crop": {"size": {"height": 32, "width": 32}, "do_center_crop": False, "do_pad": True, "image_mean": [0.9, 0.2, 0.4]},
    "Llava pads, not normalised": {"size": {"shortest_edge": 35}, "crop_size": 32, "do_pad": True, "do_normalize": False, "do_rescale": False},
    "CLIP that does not pad": {"size": {"shortest_edge": 32}, "crop_size": 32, "do_pad": True},
    "Siglip": {"size": {"height": 32, "width": 32}},
    "Blip": {"size": {"height": 32, "width": 32}},
    "ViT": {"size": {"height": 32, "width": 32}},
    "Bit": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
}  # fmt: skip


@pytest.mark.parametrize("backend", ["", "Fast"])
@pytest.mark.parametrize(("kind", "values"), KINDS.items(), ids=KINDS)
def test_images_of_every_kind_of_file(kind, values, backend, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")
    name = f"{kind.split()[0]}ImageProcessor"
    theirs = getattr(transformers, f"{name}Pil")(**values)
    ours = processor(tmp_path, "clip", {**values, "image_processor_type": name + backend})
    for picture in pictures()[: len(SHAPES)]:
        expected = theirs(picture, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(ours.images([picture])[0].numpy(), expected)


@pytest.mark.parametrize("size", [32, 31])
@pytest.mark.parametrize(
    "values", [{}, {"resize_mode": "squash"}, {"interpolation": "bilinear", "std": [0.5, 0.6, 0.7]}, {"mean": 0.5}]
)
def test_open_clip_images(values, size, tmp_path):
    pytest.importorskip("open_clip", reason="open_clip is not installed (tests/requirements.txt)")
    from open_clip.transform import PreprocessCfg, image_transform_v2

    cfg = {"embed_dim": 8, "vision_cfg": {"image_size": size, "patch_size": size}, "text_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": values}))
    ours = read(tmp_path, "open_clip").processor
    theirs = image_transform_v2(PreprocessCfg(size=size, **values), is_train=False)
    for picture in pictures()[: len(SHAPES)]:  # RGB alone: open_clip converts other modes after resizing
        assert np.array_equal(ours.images([picture])[0].numpy(), theirs(picture).numpy())


def test_what_we_write_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")
    from minivlm.layers import TextConfig, VisionConfig
    from minivlm.models.clip import CLIP, CLIPConfig
    from minivlm.processor import Processor

    vision = VisionConfig(width=16, depth=1, heads=2, image_size=24, patch_size=8)
    text = TextConfig(width=16, depth=1, heads=2, vocab_size=300, context=8, end_token=3)
    ours = Processor.train(["a"], vocab_size=260, image_size=24, context=8, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    model = CLIP(CLIPConfig(vision=vision, text=text, embed_width=8))
    model.save_pretrained(tmp_path, processor=ours, layout="hf")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for picture in pictures():
        assert np.array_equal(ours.images([picture])[0].numpy(), theirs(picture)["pixel_values"][0])
