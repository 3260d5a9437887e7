import json

import pytest
import torch
from PIL import Image

from minivlm.errors import UserError
from minivlm.pretrained.preprocessing import (
    CLIP_IMAGES,
    SIGLIP_IMAGES,
    read_images,
    read_open_clip_images,
    read_pad_token,
    read_tokenizer,
    tokenizer_files,
    write_images,
)
from minivlm.processor import CLIP_MEAN, CLIP_STD, Processor, ProcessorConfig

DEFAULT = {
    "image_size": 336,
    "resize": "shortest",
    "resize_to": 336,
    "resample": "bicubic",
    "crop": "floor",
    "rescale": 1 / 255,
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
}


@pytest.mark.parametrize(
    ("values", "different"),
    [
        (None, {}),  # no file at all: the class's defaults, at the size of the model's images
        ({}, {}),
        ({"size": 300, "crop_size": 280, "resample": 2}, {"resize_to": 300, "image_size": 280, "resample": "bilinear"}),
        ({"size": {"shortest_edge": 300}, "crop_size": {"height": 280, "width": 280}}, {"resize_to": 300, "image_size": 280}),
        ({"size": {"height": 346, "width": 346}, "crop_size": 289}, {"resize": "squash", "resize_to": 346, "image_size": 289}),
        ({"do_center_crop": False, "size": {"shortest_edge": 300}}, {"crop": "none", "resize_to": 300, "image_size": 300}),
        ({"do_center_crop": False, "size": 300}, {"crop": "none", "resize_to": 300, "image_size": 300}),
        ({"do_resize": False}, {"resize": "none"}),
        ({"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"do_rescale": False}, {"rescale": 1.0}),
        ({"rescale_factor": 1 / 127.5, "image_mean": 1, "image_std": [1, 2, 3]},
         {"rescale": 1 / 127.5, "mean": (1.0,) * 3, "std": (1.0, 2.0, 3.0)}),
        ({"image_mean": None, "resample": None}, {}),
    ],
)  # fmt: skip
def test_clip_files(values, different, tmp_path):
    if values is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert read_images(tmp_path, 336, CLIP_IMAGES) == {**DEFAULT, **different}


def test_the_newer_file_goes_before_the_older(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 300}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert read_images(tmp_path, 336, CLIP_IMAGES) == {**DEFAULT, "resize_to": 300}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": {"shortest_edge": 320}}}))
    assert read_images(tmp_path, 336, CLIP_IMAGES) == {**DEFAULT, "resize_to": 320}


def test_siglip_files(tmp_path):
    half = (0.5, 0.5, 0.5)
    expected = {**DEFAULT, "resize": "squash", "crop": "none", "mean": half, "std": half}
    assert read_images(tmp_path, 336, SIGLIP_IMAGES) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"size": {"shortest_edge": 224, "longest_edge": 300}},
        {"size": {"height": 224, "width": 300}},
        {"crop_size": {"height": 224, "width": 300}},
        {"size": "224"},
        {"resample": 9},
        {"do_thumbnail": True},
        {"image_processor_type": "DonutImageProcessor"},
        {"use_square_size": True},
        {"image_num_channels": 1},
    ],
)
def test_files_that_cannot_be_followed(values, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"preprocessor_config\.json has"):
        read_images(tmp_path, 224, CLIP_IMAGES)


def test_fields_without_effect_are_no_obstacle(tmp_path):
    values = {
        "processor_class": "CLIPProcessor",
        "size_divisor": 32,
        "do_thumbnail": False,
        "crop_pct": None,
        "auto_map": {},
    }
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**values, "feature_extractor_type": "CLIPFeatureExtractor"})
    )
    assert read_images(tmp_path, 336, CLIP_IMAGES) == DEFAULT


def test_a_square_of_the_mean_colour_is_llavas_alone(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    for kind, color in (("LlavaImageProcessor", (25, 51, 76)), ("CLIPImageProcessor", None)):
        path.write_text(json.dumps({"image_processor_type": kind, "do_pad": True, "image_mean": [0.1, 0.2, 0.3]}))
        assert read_images(tmp_path, 336, CLIP_IMAGES).get("pad_color") == color
    picture = Image.new("RGB", (30, 10), (200, 0, 0))
    processor = Processor(
        None, ProcessorConfig(image_size=30, pad_color=(25, 51, 76), rescale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    )
    pixels = processor.images([picture])[0]
    assert (pixels[:, :10] == torch.tensor([25.0, 51, 76])[:, None, None]).all() and (pixels[0, 10:20] == 200).all()
    assert (pixels[:, 20:] == pixels[:, :10]).all()
    narrow = Image.new("RGB", (60_000, 2))
    assert processor.images([narrow]).shape == (1, 3, 30, 30)


@pytest.mark.parametrize(
    "config",
    [
        ProcessorConfig(image_size=32, resize_to=32, pad_color=(122, 116, 104)),
        ProcessorConfig(image_size=32, resize_to=32),
        ProcessorConfig(image_size=32, resize_to=40, resize="squash", resample="lanczos", rescale=1.0),
        ProcessorConfig(image_size=32, resize_to=32, resize="squash", crop="none", mean=(0.0, 1.0, 2.0)),
        ProcessorConfig(image_size=32, resize_to=32, crop="none"),
    ],
)
def test_what_is_written_is_read_back(config, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(write_images(config, "CLIPImageProcessor")))
    assert ProcessorConfig(**read_images(tmp_path, 999, CLIP_IMAGES)) == config


def test_open_clip_files():
    half = [0.5, 0.5, 0.5]
    squash = read_open_clip_images({"resize_mode": "squash", "mean": half, "std": half, "interpolation": "random"}, 224)
    c = ProcessorConfig(**squash)
    assert (c.image_size, c.resize, c.crop, c.resample, c.mean) == (224, "squash", "none", "bicubic", (0.5, 0.5, 0.5))
    for wrong in ({"size": 256}, {"mode": "L"}, {"blur": 3}):
        with pytest.raises(UserError, match=rf"preprocess_cfg has {next(iter(wrong))} = "):
            read_open_clip_images({"fill_color": 0, **wrong}, 224)
    c = ProcessorConfig(**read_open_clip_images({"interpolation": "bilinear", "size": [224, 224]}, 224))
    assert (c.resize, c.crop, c.resample, c.mean) == ("shortest", "round", "bilinear", CLIP_MEAN)


# ---- tokeniser -------------------------------------------------------------------------------------------------------

VOCAB = {
    s: i for i, s in enumerate(["a", "b", "a</w>", "b</w>", "ab</w>", "!</w>", "<|startoftext|>", "<|endoftext|>"])
}


def clip_tokenizer(directory):
    (directory / "vocab.json").write_text(json.dumps(VOCAB))
    (directory / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return read_tokenizer(directory, "CLIPTokenizer")


def test_clip_vocabularies(tmp_path):
    processor = Processor(clip_tokenizer(tmp_path), ProcessorConfig(pad_token=0))
    tokens, _ = processor.text(["AB  ba!", "b"])
    assert tokens.tolist() == [[6, 4, 1, 2, 5, 7], [6, 3, 7, 0, 0, 0]]
    assert processor.decode(tokens) == ["ab ba !", "b"]
    assert (processor.start_token, processor.end_token, processor.vocab_size) == (6, 7, 8)
    (tmp_path / "tokenizer.json").write_text(processor.tokenizer.to_str())
    assert (
        read_tokenizer(tmp_path, "CLIPTokenizer") == processor.tokenizer.to_str().encode()
    )  # which goes before its parts


def test_no_tokeniser(tmp_path):
    assert read_tokenizer(tmp_path, "CLIPTokenizer") is None


def test_padding_tokens_are_named_by_either_file(tmp_path):
    assert read_pad_token(tmp_path, "<default>") == "<default>"
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<map>", "lstrip": False}}))
    assert read_pad_token(tmp_path, "<default>") == "<map>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<config>"}))
    assert read_pad_token(tmp_path, "<default>") == "<config>"


def test_a_word_is_not_written_as_padding(tmp_path):
    """open_clip pads with id 0, a letter; transformers would take that letter for a special token."""
    processor = Processor(clip_tokenizer(tmp_path), ProcessorConfig(pad_token=0))
    values = json.loads(tokenizer_files(processor)["tokenizer_config.json"])
    assert values["pad_token"] == values["eos_token"] == "<|endoftext|>" and values["bos_token"] == "<|startoftext|>"
    assert tokenizer_files(Processor(None, ProcessorConfig())) == {}
