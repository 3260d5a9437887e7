"""transformers' ALIGN layout without transformers."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from minivlm.checkpoint import load, save
from minivlm.errors import UserError
from minivlm.layers import BERTConfig, EfficientNetConfig, TextConfig, VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.pretrained import align, comparable
from minivlm.processor import Processor
from minivlm.testing import assert_same

CONFIG = CLIPConfig(
    vision=EfficientNetConfig(
        width_scale=0.5,
        depth_scale=1.5,
        image_size=33,
        channels=(16, 24, 40),
        blocks=(1, 2, 1),
        kernels=(3, 5, 3),
        strides=(1, 2, 2),
        expansions=(1, 2, 3),
        even_padding=(2,),
    ),
    text=BERTConfig(vocab_size=30, context=12, width=16, depth=2, heads=2, mlp_width=40),
    embed_width=24,
    image_projection=False,
    text_projection_bias=True,
)


def test_there_and_back(tmp_path):
    model = CLIP(CONFIG)
    images, tokens = torch.randn(4, 3, 33, 33), torch.randint(30, (4, 9))
    model(images, tokens)  # moves the running statistics
    save(tmp_path, model.eval(), layout="hf")
    back, processor = load(tmp_path)
    assert comparable(back.config) == comparable(CONFIG) and back.config.label_smoothing == 0.1
    assert_same(back(images, tokens).logits_per_image, model(images, tokens).logits_per_image)
    assert (processor.config.image_size, processor.context) == (346, 12)  # without a file: its class's defaults


def test_blocks_are_counted_through_and_the_temperature_is_one(tmp_path):
    model = CLIP(CONFIG)
    model.loss.logit_scale.data.fill_(math.log(4))
    save(tmp_path, model, layout="hf")
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["temperature"].item() == pytest.approx(0.25)
    numbers = {int(name.split(".")[3]) for name in stored if name.startswith("vision_model.encoder.blocks.")}
    assert numbers == set(range(2 + 3 + 2))
    expected = model.vision.stages[1][1].depthwise.conv.weight  # the fourth
    assert torch.equal(stored["vision_model.encoder.blocks.3.depthwise_conv.depthwise_conv.weight"], expected)
    assert load(tmp_path)[0].loss.scale().item() == pytest.approx(4)


def test_images_between_minus_one_and_one(tmp_path):
    """rescale_offset: x / 127.5 − 1, and nothing else."""
    CLIP(CONFIG).save_pretrained(tmp_path, layout="hf")
    settings = {
        "size": {"height": 40, "width": 40},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": 33, "width": 33},
        "rescale_factor": 0.00784313725490196,
        "rescale_offset": True,
        "do_normalize": False,
        "include_top": False,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    _, processor = load(tmp_path)
    grey = torch.full((40, 40, 3), 51, dtype=torch.uint8).numpy()
    assert_same(processor.images([grey]), torch.full((1, 3, 33, 33), 51 / 127.5 - 1))

    trained = Processor.train(["a b"], vocab_size=260, image_size=33, context=12)
    model = CLIP(replace(CONFIG, text=replace(CONFIG.text, vocab_size=trained.vocab_size)))
    model.save_pretrained(tmp_path / "again", processor=Processor(trained.tokenizer, processor.config), layout="hf")
    _, again = load(tmp_path / "again")
    assert_same(again.images([grey]), processor.images([grey]))
    assert again.text(["a b"])[0].tolist() == trained.text(["a b"])[0].tolist()

    settings |= {"include_top": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    _, twice = load(tmp_path)
    assert_same(twice.images([grey]), torch.full((1, 3, 33, 33), (51 / 127.5 - 1 - 0.5) / 0.25 / 0.25))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(CONFIG, vision=replace(CONFIG.vision, stem_channels=16)), "AlignModel cannot express this model"),
        (replace(CONFIG, text=replace(CONFIG.text, norm_place="pre")), "cannot express text.norm_place = 'pre'"),
        (replace(CONFIG, text_projection_bias=False), "cannot express text_projection_bias = False"),
        (
            replace(CONFIG, vision=VisionConfig(width=24, depth=1, heads=2, image_size=16, patch_size=8)),
            "has an EfficientNet, which this is not",
        ),
        (
            replace(CONFIG, text=TextConfig(width=16, depth=1, heads=2, end_token=2)),
            "cannot express a EfficientNet tower",
        ),
    ],
)
def test_what_transformers_cannot_express_is_named(config, said, tmp_path):
    with pytest.raises(UserError, match=said):
        save(tmp_path, CLIP(config), layout="hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({"num_channels": 1}, "images of 1 channels"),
        ({"pooling_type": "max"}, "the pooling 'max'"),
        ({"in_channels": [32, 16, 16, 40, 80, 112, 192]}, "what comes before each stage has"),
        ({"kernel_sizes": [3, 3]}, "one entry for each stage"),
        ({"hidden_act": "tanh"}, "activation 'tanh'"),
        ({"width_coefficient": 1.0}, "the tower's width 320 must be embed_width 640"),
    ],
)
def test_configs_that_cannot_be_followed(vision, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "align", "vision_config": vision}))
    with pytest.raises(UserError, match=said):
        load(tmp_path)


def test_defaults_are_those_of_the_class():
    config = align.read_config({})
    assert (config.embed_width, config.vision.output_width, config.text.width) == (640, 640, 768)
    assert sum(config.vision.depths) == 55
