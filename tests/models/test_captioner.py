from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivlm import ImageCaptioningModel, checkpoint
from minivlm.conversation import Sample, collate
from minivlm.errors import UserError
from minivlm.layers import ImageFeatures, ResNetConfig
from minivlm.models.captioner import ImageCaptioningConfig
from minivlm.tasks import caption
from minivlm.testing import assert_gradient_reaches, assert_padding_invariant, assert_same
from tests.speakers import COLOURS, VISION, captioner, language, llava, plain, processor

TOKENS = torch.tensor([[1, 20, 21, 22, 3, 0], [1, 23, 24, 25, 26, 3]])
LABELS = TOKENS.masked_fill(TOKENS == 0, -100)
MASK = TOKENS != 0


def pictures(n=2):
    return torch.randn(n, 3, 16, 16)


def test_the_picture_stands_in_front_of_the_words():
    model, images = captioner(), pictures()
    features = model.projector(model.vision.features(images)[:, 1:])  # all patches, not the class token
    assert features.shape == (2, 4, 32)
    x = torch.cat([features, model.language_model.embed(TOKENS)], dim=1)
    out = model(images, TOKENS)
    assert out.logits.shape == (2, 6, model.config.language.vocab_size) and out.loss is None
    assert_same(out.logits, model.language_model(embeddings=x).logits[:, 4:])


def test_the_loss_is_that_of_guessing_each_word_from_those_before_it():
    model, images = captioner(), pictures()
    out = model(images, TOKENS, MASK, LABELS)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), ignore_index=-100)
    assert_same(out.loss, expected)
    assert_same(model.losses(images, TOKENS, LABELS)["next token"], expected)


def test_image_features_stand_for_images():
    model, images = captioner(), pictures()
    features = ImageFeatures(model.image_features(images))
    assert torch.equal(model(features, TOKENS).logits, model(images, TOKENS).logits)
    assert model.losses(features, TOKENS, LABELS) == model.losses(images, TOKENS, LABELS)
    said = [model.generate(given, TOKENS[:, :1], max_new_tokens=3) for given in (features, images)]
    assert torch.equal(*said)


def test_every_patch_is_looked_at():
    model, images = captioner(), pictures(1)
    before = model(images, TOKENS[:1]).logits
    for top, left in ((0, 0), (0, 8), (8, 0), (8, 8)):
        changed = images.clone()
        changed[:, :, top : top + 8, left : left + 8] = 0
        assert ((model(changed, TOKENS[:1]).logits - before).abs().amax(dim=-1) > 1e-4).all()


def test_gradients_reach_all_that_is_read():
    model = captioner()
    weights = {n: p for n, p in model.named_parameters() if "k_proj.bias" not in n and not n.startswith("vision.norm")}
    assert_gradient_reaches(model(pictures(), TOKENS, MASK, LABELS).loss, weights)


def test_padding_on_the_right_changes_nothing():
    model, image = captioner(), pictures(1)

    def logits(tokens, mask):
        return model(image.expand(len(tokens), -1, -1, -1), tokens, mask).logits

    assert_padding_invariant(logits, TOKENS, MASK)


@pytest.mark.parametrize("images", [pictures(1), pictures(4).view(2, 2, 3, 16, 16)], ids=["one", "two a row"])
def test_there_is_one_picture_a_row(images):
    with pytest.raises(ValueError, match=r"images are \(.*16, 16\), but tokens \(2, 6\) need one image a row"):
        captioner()(images, TOKENS)


class TestWithoutTokens:
    def test_captions_start_with_the_start_token_of_the_config(self):
        model, images = ImageCaptioningModel(replace(captioner().config, start_token=1)).eval(), pictures()
        start = torch.ones(2, 1, dtype=torch.long)
        expected = model.generate(images, start, max_new_tokens=6)
        assert torch.equal(model.generate(images, max_new_tokens=6), expected)
        assert torch.equal(model.generate(images=images, tokens=start, max_new_tokens=6), expected)
        assert torch.equal(torch.stack(list(model.stream(images, max_new_tokens=6)), dim=1), expected)
        assert torch.equal(model(images), model.generate(images, start))
        features = ImageFeatures(model.image_features(images))
        assert torch.equal(model.generate(features, max_new_tokens=6), expected)

    def test_a_config_that_does_not_know_it_is_an_error_that_says_what_to_set(self):
        with pytest.raises(
            UserError, match=r"set start_token in its config, to processor\.start_token, or give tokens"
        ):
            captioner()(pictures())

    def test_a_model_that_continues_prompts_needs_one(self):
        with pytest.raises(UserError, match="LLaVA has no prompt to start from: give tokens"):
            llava().generate(pictures())


class TestSpeaking:
    def test_is_the_likeliest_word_again_and_again(self):
        model, images = captioner(), pictures()
        tokens = TOKENS[:, :2]
        said = model.generate(images, tokens, max_new_tokens=6, end_tokens=())
        for t in range(6):
            best = model(images, tokens).logits[:, -1].argmax(dim=-1)
            assert torch.equal(said[:, t], best)
            tokens = torch.cat([tokens, best[:, None]], dim=1)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"repetition_penalty": 1.5}], ids=str)
    def test_a_batch_is_its_rows_alone_whatever_their_lengths(self, options):
        model, images = captioner(), pictures()
        said = model.generate(images, TOKENS, MASK, max_new_tokens=8, **options)
        for i, length in enumerate((5, 6)):
            alone = model.generate(images[i : i + 1], TOKENS[i : i + 1, :length], max_new_tokens=8, **options)[0]
            assert torch.equal(said[i, : len(alone)], alone) and not said[i, len(alone) :].any()

    def test_streams_the_same(self):
        model, images = captioner(), pictures()
        columns = list(model.stream(images, TOKENS, MASK, max_new_tokens=8))
        assert torch.equal(torch.stack(columns, dim=1), model.generate(images, TOKENS, MASK, max_new_tokens=8))

    def test_the_context_holds_the_picture_as_well(self):
        with pytest.raises(ValueError, match="a prompt of 5 tokens and 92 new ones do not fit the context of 96"):
            captioner().generate(pictures(), TOKENS[:, :1], max_new_tokens=92)


def test_a_picture_must_leave_room_for_words():
    with pytest.raises(
        ValueError,
        match=r"an image takes 4 positions, but the context of the language model is 4",
    ):
        ImageCaptioningConfig(vision=VISION, language=language(context=4))


def test_a_resnet_may_look():
    vision = ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=64)
    config = ImageCaptioningConfig(vision=vision, language=language(), vision_layer=-2)
    model = ImageCaptioningModel(config).eval()
    assert config.image_tokens == 16
    assert model(torch.randn(2, 3, 64, 64), TOKENS).logits.shape[:2] == TOKENS.shape


def test_the_seed_alone_says_what_the_weights_are():
    weights = []
    for seed, global_seed in ((1, 10), (1, 20), (2, 10)):
        torch.manual_seed(global_seed)
        weights.append(ImageCaptioningModel(captioner().config, seed=seed).state_dict())
    first, same, other = weights
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["vision.class_embedding"], other["vision.class_embedding"])


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model, images = captioner(), pictures()
    model.save_pretrained(tmp_path, processor=processor(image_tokens=0))
    loaded, _ = checkpoint.load(tmp_path)
    assert isinstance(loaded, ImageCaptioningModel) and loaded.config == model.config
    assert torch.equal(loaded(images, TOKENS).logits, model(images, TOKENS).logits)


def test_learns_to_say_what_it_sees():
    p, model = processor(image_tokens=0), captioner().train()
    rows = p.encode([f"a picture of {colour}" for colour in COLOURS])
    batch = collate([Sample(row, row, []) for row in rows], p.pad_token)
    images = p.images([plain(colour) for colour in COLOURS])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        sum(model.losses(images, **batch).values()).backward()
        optimiser.step()
    assert [caption(plain(colour), model, p) for colour in COLOURS] == [f"a picture of {c}" for c in COLOURS]
    assert caption(plain("red"), model, p, num_beams=3) == "a picture of red"
    assert model.training  # as it was found


def test_the_config_can_be_changed_in_its_parts():
    config = captioner().config
    assert replace(config, vision=replace(VISION, image_size=32)).image_tokens == 16
