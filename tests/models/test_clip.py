import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivlm import config
from minivlm.errors import UserError
from minivlm.layers import BERTConfig, EfficientNetConfig, ResNetConfig, TextConfig, VisionConfig
from minivlm.layers.resnet import Bottleneck
from minivlm.models.clip import CLIP, CLIPConfig, align_size, clip_size
from minivlm.testing import (
    assert_batch_independent,
    assert_can_overfit,
    assert_gradient_reaches,
    assert_padding_invariant,
    assert_same,
)

B, T, END = 6, 8, 29
TEXT = TextConfig(width=16, depth=2, heads=2, vocab_size=30, context=T, end_token=END)
VISION = VisionConfig(width=24, depth=2, heads=2, image_size=16, patch_size=4)
EFFICIENTNET = EfficientNetConfig(
    image_size=16,
    stem_channels=8,
    channels=(8, 16),
    blocks=(1, 2),
    kernels=(3, 5),
    strides=(1, 2),
    expansions=(1, 2),
)
RESNET = ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=32)
VIT_CLIP = CLIPConfig(vision=VISION, text=TEXT, embed_width=12)
CONFIGS = {
    "vit": VIT_CLIP,
    "resnet": CLIPConfig(vision=RESNET, text=TEXT, embed_width=12, image_projection=False),
    "siglip": CLIPConfig(
        vision=replace(VISION, pool="attention", embedding_norm=False, patch_bias=True),
        text=replace(TEXT, causal=False, pool="last", use_mask=False),
        embed_width=24,
        image_projection=False,
        text_projection_bias=True,
        loss="sigmoid",
        loss_chunk=4,
    ),
    "align": CLIPConfig(
        vision=EFFICIENTNET,
        text=BERTConfig(width=16, depth=2, heads=2, vocab_size=30, context=T),
        embed_width=16,
        image_projection=False,
        text_projection_bias=True,
        label_smoothing=0.1,
    ),
}
every_kind = pytest.mark.parametrize("name", CONFIGS)


def batch(c: CLIPConfig):
    """images, tokens with an end token and padding, mask."""
    lengths = torch.tensor([8, 3, 5, 2, 7, 4])
    mask = torch.arange(T) < lengths[:, None]
    tokens = torch.randint(1, END, (B, T)).masked_fill(~mask, 0)
    tokens[torch.arange(B), lengths - 1] = END
    return torch.randn(B, 3, c.vision.image_size, c.vision.image_size), tokens, mask


class TestForward:
    @every_kind
    def test_is_two_towers_projected_to_the_unit_sphere_and_compared(self, name):
        model = CLIP(CONFIGS[name]).eval()
        images, tokens, mask = batch(model.config)
        image = model.image_projection(model.vision(images))
        text = model.text(tokens, mask)
        text = model.text_projection(text.hidden[:, 0] if name == "align" else text)
        image, text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
        assert_same(model.encode_image(images), image)
        assert_same(model.encode_text(tokens, mask), text)
        out = model(images, tokens, mask)
        logits = model.loss.scale() * image @ text.T + (0 if model.loss.logit_bias is None else model.loss.logit_bias)
        assert_same(out.logits_per_image, logits)
        assert torch.equal(out.logits_per_text, out.logits_per_image.T)
        assert_same(out.loss, model.loss(image, text))
        assert torch.equal(model.losses(images, tokens, mask)["contrast"], out.loss)

    @every_kind
    def test_gradients_reach_all(self, name):
        model = CLIP(CONFIGS[name]).eval()
        for block in model.modules():  # the last norm of a fresh bottleneck is zero, so that what is before it waits
            if isinstance(block, Bottleneck):
                torch.nn.init.ones_(block.expand.norm.weight)
        weights = {
            n: p for n, p in model.named_parameters() if not n.endswith("k_proj.bias")
        }  # shifts all scores alike
        assert_gradient_reaches(model(*batch(model.config)).loss, weights)

    @every_kind
    def test_rows_are_independent_in_eval_mode(self, name):
        model = CLIP(CONFIGS[name]).eval()
        images, tokens, mask = batch(model.config)
        assert_batch_independent(model.encode_image, images)
        assert_batch_independent(model.encode_text, tokens, mask)

    @pytest.mark.parametrize("text", [TEXT, replace(TEXT, causal=False), CONFIGS["align"].text])
    def test_padding_is_not_read(self, text):
        model = CLIP(replace(VIT_CLIP, text=text))
        _, tokens, mask = batch(model.config)
        assert_padding_invariant(model.encode_text, tokens, mask, pooled=True, extra=0)

    def test_more_texts_than_images_are_scored_but_not_judged(self):
        model = CLIP(VIT_CLIP)
        images, tokens, mask = batch(model.config)
        out = model(images[:2], tokens, mask)
        assert_same(out.logits_per_image, model(images, tokens, mask).logits_per_image[:2])
        assert out.loss.isnan()

    def test_half_precision(self):
        model = CLIP(VIT_CLIP).eval()
        images, tokens, mask = batch(model.config)
        full = model(images, tokens, mask)
        half = model.bfloat16()(images.bfloat16(), tokens, mask)
        assert half.logits_per_image.dtype == torch.float32
        assert_same(half.logits_per_image, full.logits_per_image, tolerance=0.05)


class TestTraining:
    @every_kind
    def test_one_batch_can_be_overfitted(self, name):
        model = CLIP(replace(CONFIGS[name], label_smoothing=0.0))  # with it, the loss has a floor
        model.train()
        assert_can_overfit(
            model, batch(model.config), lambda model, batch: model.losses(*batch)["contrast"], learning_rate=3e-3
        )

    def test_a_fresh_model_is_at_its_chance_level(self):
        model = CLIP(VIT_CLIP)
        model.loss.logit_scale.data.zero_()  # without a temperature all pairs look alike
        loss = model(*batch(model.config)).loss.item()
        assert model.chance_losses(B) == {"contrast": math.log(B)}
        assert loss == pytest.approx(math.log(B), abs=0.3)

    def test_the_sigmoid_has_no_chance_level(self):
        assert CLIP(CONFIGS["siglip"]).chance_losses(B) == {}

    def test_temperature_and_bias_start_as_published(self):
        assert CLIP(VIT_CLIP).loss.scale().item() == pytest.approx(1 / 0.07, rel=1e-5)
        align = replace(VIT_CLIP, initial_temperature=align_size("B0").initial_temperature)
        assert CLIP(align).loss.scale() == 1
        with pytest.raises(ValueError, match="initial_temperature is 0, but must be above 0"):
            replace(VIT_CLIP, initial_temperature=0)
        siglip = CLIP(CONFIGS["siglip"]).loss
        assert (siglip.scale().item(), siglip.logit_bias.item()) == (pytest.approx(10, rel=1e-5), -10)
        assert (siglip.kind, siglip.chunk) == ("sigmoid", 4)


class TestInitialisation:
    @every_kind
    def test_the_seed_alone_says_what_the_weights_are(self, name):
        weights = []
        for seed, global_seed in ((1, 10), (1, 20), (2, 10)):
            torch.manual_seed(global_seed)
            weights.append(CLIP(CONFIGS[name], seed=seed).state_dict())
        first, same, other = weights
        for key, tensor in first.items():
            assert torch.equal(tensor, same[key]), key
        assert not torch.equal(first["text.token_embedding.weight"], other["text.token_embedding.weight"])

    def test_building_draws_from_the_global_generator_but_does_not_seed_it(self):
        """PyTorch's layers draw numbers that are then replaced: what follows differs, but still follows the global seed."""
        drawn = []
        for global_seed in (1, 1, 2):
            torch.manual_seed(global_seed)
            CLIP(VIT_CLIP, seed=0)
            drawn.append(torch.rand(1).item())
        assert drawn[0] == drawn[1] != drawn[2]

    def test_standard_deviations_are_those_of_the_table(self):
        c = CLIPConfig(
            vision=replace(VISION, width=64, depth=4, pool="attention"),
            text=replace(TEXT, width=128, depth=3, vocab_size=500, context=64),
            embed_width=256,
        )
        model = CLIP(c)
        vision, text = model.vision.transformer.blocks[1], model.text.transformer.blocks[2]
        expected = [
            (model.text.token_embedding.weight, 0.02),
            (model.text.position_embedding, 0.01),
            (model.vision.position_embedding, 64**-0.5),
            (model.vision.attention_pool.attention.v_proj.weight, 64**-0.5),
            (vision.attention.q_proj.weight, 64**-0.5),
            (vision.attention.out_proj.weight, 64**-0.5 * 8**-0.5),
            (vision.mlp.up_proj.weight, 128**-0.5),
            (vision.mlp.down_proj.weight, 64**-0.5 * 8**-0.5),
            (text.attention.k_proj.weight, 128**-0.5),
            (text.attention.out_proj.weight, 128**-0.5 * 6**-0.5),
            (text.mlp.down_proj.weight, 128**-0.5 * 6**-0.5),
            (model.image_projection.weight, 64**-0.5),
            (model.text_projection.weight, 128**-0.5),
        ]
        for tensor, std in expected:
            assert tensor.std().item() == pytest.approx(std, rel=0.08)
            assert tensor.mean().abs() < std / 5

    @every_kind
    def test_biases_are_zero_and_norms_one(self, name):
        for key, p in CLIP(CONFIGS[name]).named_parameters():
            if key.endswith("bias") and key != "loss.logit_bias":
                assert not p.any(), key
            elif p.dim() == 1 and "norm" in key:
                assert (p == (0.0 if name == "resnet" and key.endswith("expand.norm.weight") else 1.0)).all(), key


class TestSizes:
    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("ViT-B/32", 151_277_313),
            ("ViT-B/16", 149_620_737),
            ("ViT-L/14", 427_616_513),
            ("ViT-H/14", 986_109_441),
            ("RN50", 102_007_137),
            ("RN101", 119_688_033),
            ("RN50x4", 178_300_601),
            ("RN50x16", 290_979_217),
            ("RN50x64", 623_258_305),
        ],
    )
    def test_have_as_many_parameters_as_the_published_models(self, name, parameters):
        with torch.device("meta"):
            model = CLIP(clip_size(name))
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert all(p.is_meta for p in model.parameters())

    def test_align_has_as_many_as_published_but_for_a_pooler_that_nothing_reads(self):
        with torch.device("meta"):
            model = CLIP(align_size("B7"))
        assert sum(p.numel() for p in model.parameters()) == 172_117_841 - (768 * 768 + 768)
        with pytest.raises(ValueError, match=r"unknown size 'B9'; there are B0, .*B7"):
            align_size("B9")

    def test_a_forward_on_the_meta_device_gives_shapes(self):
        with torch.device("meta"):
            model = CLIP(clip_size("ViT-B/32"))
            out = model(torch.empty(2, 3, 224, 224), torch.empty(2, 77, dtype=torch.long))
        assert out.image_features.shape == out.text_features.shape == (2, 512)

    def test_an_unknown_size(self):
        with pytest.raises(ValueError, match=r"unknown size 'ViT-B/64'; there are ViT-B/32, .*RN50x64"):
            clip_size("ViT-B/64")


class TestConfig:
    @every_kind
    def test_through_json_and_back(self, name):
        c = CONFIGS[name]
        assert config.from_dict(CLIPConfig, json.loads(json.dumps(config.to_dict(c)))) == c

    def test_named_sizes_through_json_and_back(self):
        for name in ("ViT-H/14", "RN50x16"):
            c = clip_size(name)
            assert config.from_dict(CLIPConfig, json.loads(json.dumps(config.to_dict(c)))) == c

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (
                ("vision", "depht"),
                3,
                r"config.vision has an unknown field 'depht' for VisionConfig. Did you mean depth",
            ),
            (("embed_width",), "12", r"config.embed_width is '12', but must be int"),
            (("text", "pool"), "mean", r"config.text.pool is 'mean', but must be one of end, argmax, first, last"),
            (("loss",), None, r"config.loss is None, but must be one of softmax, sigmoid"),
            (("text", "end_token"), 1.5, r"config.text.end_token is 1.5, but must be int or None"),
            (("vision", "type"), "Swin", r"config.vision is .*'Swin'.* but must be VisionConfig or ResNetConfig"),
            (("vision", "patch_size"), 5, r"config.vision: image_size 16 is not a multiple of patch_size 5"),
            (
                ("image_projection",),
                False,
                r"config: without image_projection the tower's width 24 must be embed_width 12",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, path, value, message):
        values = config.to_dict(VIT_CLIP)
        *above, last = path
        inner = values
        for key in above:
            inner = inner[key]
        inner[last] = value
        with pytest.raises(UserError, match=message):
            config.from_dict(CLIPConfig, values)

    def test_what_is_missing_is_named(self):
        values = config.to_dict(VIT_CLIP)
        del values["vision"]["heads"], values["vision"]["width"]
        with pytest.raises(UserError, match=r"config\.vision lacks width, heads, which VisionConfig needs"):
            config.from_dict(CLIPConfig, values)

    def test_is_kept_by_the_model_and_cannot_be_changed(self):
        model = CLIP(VIT_CLIP)
        assert model.config is VIT_CLIP
        with pytest.raises(AttributeError):
            model.config.embed_width = 3


def test_device_and_dtype_are_those_of_the_weights():
    model = CLIP(VIT_CLIP).bfloat16()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.bfloat16)
    with torch.device("meta"):
        assert CLIP(VIT_CLIP).device == torch.device("meta")


def test_projected_features_are_unit_length_whatever_their_size():
    model = CLIP(VIT_CLIP)
    images = batch(model.config)[0]
    model.image_projection.weight.data *= 1e4
    assert_same(model.encode_image(images).norm(dim=1), torch.ones(B))
    assert_same(
        F.cosine_similarity(model.encode_image(images), model.image_projection(model.vision(images))), torch.ones(B)
    )


def test_a_name_of_transformers_is_answered_by_what_to_call():
    with pytest.raises(AttributeError, match=r"CLIP has no get_image_features: call encode_image\(images\)"):
        _ = CLIP(VIT_CLIP).get_image_features
    assert not hasattr(CLIP(VIT_CLIP), "get_text_features")
