from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivlm import BLIP2, BLIP2Config, LanguageModelConfig, checkpoint
from minivlm.errors import UserError
from minivlm.layers import ImageFeatures, T5Config
from minivlm.testing import assert_same
from tests.models.test_blip2_stage1 import QFORMER, VISION

LM = LanguageModelConfig(width=32, depth=2, heads=2, vocab_size=60, context=40, end_tokens=(2,))
T5 = T5Config(width=32, depth=2, heads=2, vocab_size=60, end_tokens=(2,))
PLACEHOLDER, Q = 50, 3
CONFIG = BLIP2Config(vision=VISION, qformer=replace(QFORMER, vocab_size=None), language=LM, image_token=PLACEHOLDER)
MODELS = {
    "decoder": CONFIG,
    "decoder, queries in front": replace(CONFIG, image_token=None),
    "t5": replace(CONFIG, language=T5),
    "t5, queries in front": replace(CONFIG, language=T5, image_token=None),
}
TEXT = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 10, 0, 0]])
MASK = TEXT != 0
SAID = torch.tensor([[11, 12, 2], [13, 2, -100]])


def blip2(config=CONFIG):
    model = BLIP2(config)
    model.freeze("vision", "language_model")
    return model.eval()


def pictures(n=2):
    return torch.randn(n, 3, 16, 16)


def marked(tokens=TEXT, mask=MASK):
    return F.pad(tokens, (Q, 0), value=PLACEHOLDER), F.pad(mask, (Q, 0), value=True)


def seen(model, images):
    return model.projection(model.qformer(model.vision.norm(model.vision.features(images))).queries)


@pytest.mark.parametrize("mark", [PLACEHOLDER, None])
def test_what_queries_see_is_read_like_words(mark):
    model, images = blip2(replace(CONFIG, image_token=mark)), pictures()
    x = torch.cat([seen(model, images), model.language_model.embed(TEXT)], dim=1)
    expected = model.language_model(embeddings=x, mask=marked()[1]).logits
    tokens, mask = (TEXT, MASK) if mark is None else marked()
    logits = model(images, tokens, mask).logits
    assert_same(logits[mask], expected[:, -tokens.shape[1] :][mask])
    assert_same(model(ImageFeatures(model.image_features(images)), tokens, mask).logits, logits)


@pytest.mark.parametrize("mark", [PLACEHOLDER, None])
def test_a_t5_reads_them_in_its_encoder(mark):
    model, images = blip2(replace(CONFIG, language=T5, image_token=mark)), pictures()
    x = torch.cat([seen(model, images), model.language_model.embed(TEXT)], dim=1)
    expected = model.language_model(embeddings=x, mask=marked()[1], labels=SAID)
    tokens, mask = (TEXT, MASK) if mark is None else marked()
    out = model(images, tokens, mask, SAID)
    assert out.logits.shape == (2, 3, 60)
    assert_same(out.logits, expected.logits)
    assert_same(model.losses(tokens, SAID, images, mask=mask)["next token"], expected.loss)


@pytest.mark.parametrize("mark", [PLACEHOLDER, None])
def test_the_loss_is_that_of_guessing_the_labelled_words(mark):
    model, images = blip2(replace(CONFIG, image_token=mark)), pictures()
    tokens, mask = (TEXT, MASK) if mark is None else marked()
    labels = tokens.masked_fill(~mask | (tokens == PLACEHOLDER) | (tokens == 1), -100)
    out = model(images, tokens, mask, labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert_same(out.loss, expected)
    assert_same(model.losses(tokens, labels, images)["next token"], expected)
    assert_same(model.losses(tokens, labels, ImageFeatures(model.image_features(images)))["next token"], expected)


def test_several_pictures_a_row_and_none():
    model, images = blip2(), pictures(4).view(2, 2, 3, 16, 16)
    tokens = torch.tensor([[PLACEHOLDER] * Q + [5] + [PLACEHOLDER] * Q + [6], [1] + [PLACEHOLDER] * Q * 2 + [7]])
    x = model.language_model.embed(tokens)
    x[tokens == PLACEHOLDER] = seen(model, images.flatten(0, 1)).flatten(0, 1)
    assert_same(model(images, tokens).logits, model.language_model(embeddings=x).logits)
    assert_same(model(None, TEXT, MASK).logits, model.language_model(TEXT, MASK).logits)
    front = blip2(MODELS["decoder, queries in front"])
    assert_same(front(None, TEXT, MASK).logits, front.language_model(TEXT, MASK).logits)
    with pytest.raises(
        ValueError,
        match=r"the text has placeholders for 12 image features, but the images have 6",
    ):
        model(pictures(), tokens)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_gradients_reach_queries_and_projection_alone(config):
    model = blip2(config).train()
    tokens, mask = (TEXT, MASK) if config.image_token is None else marked()
    labels = (
        SAID if isinstance(config.language, T5Config) else tokens.masked_fill(~mask | (tokens == PLACEHOLDER), -100)
    )
    model.losses(tokens, labels, pictures(), mask=mask)["next token"].backward()
    learns = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {"qformer", "projection"}
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad and "k_proj.bias" not in n}
    assert all(p.grad.abs().sum() > 0 for p in weights.values())


class TestSpeaking:
    @pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
    def test_a_batch_is_its_rows_alone_whatever_their_lengths(self, config, options):
        model, images = blip2(config), pictures()
        said = model.generate(images, TEXT, MASK, max_new_tokens=6, **options)
        for i, n in enumerate(MASK.sum(dim=1).tolist()):
            alone = model.generate(images[i : i + 1], TEXT[i : i + 1, :n], max_new_tokens=6, **options)[0]
            assert torch.equal(said[i, : len(alone)], alone) and not said[i, len(alone) :].any()

    def test_is_the_likeliest_word_again_and_again(self):
        model, images = blip2(), pictures()
        tokens = marked()[0][:, : Q + 3]
        said = model.generate(images, tokens, max_new_tokens=5, end_tokens=())
        for t in range(5):
            best = model(images, tokens).logits[:, -1].argmax(dim=-1)
            assert torch.equal(said[:, t], best)
            tokens = torch.cat([tokens, best[:, None]], dim=1)

    @pytest.mark.parametrize("language", [LM, T5], ids=["decoder", "t5"])
    def test_one_mark_all_placeholders_or_none_in_front_are_the_same(self, language):
        model, images = blip2(replace(CONFIG, language=language)), pictures()
        one = F.pad(TEXT, (1, 0), value=PLACEHOLDER), F.pad(MASK, (1, 0), value=True)
        said = model.generate(images, *marked(), max_new_tokens=6)
        assert torch.equal(model.generate(images, *one, max_new_tokens=6), said)
        assert torch.equal(model.generate(images, TEXT, MASK, max_new_tokens=6), said)


def test_the_tower_must_fit_the_q_former_that_was_saved(tmp_path):
    blip2().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"width": 20', '"width": 28', 1))
    with pytest.raises(UserError, match="features of width 28, but the Q-Former reads features of width 20"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_comes_back_from_a_directory(config, tmp_path):
    model, images = blip2(config), pictures()
    model.save_pretrained(tmp_path)
    back, _ = checkpoint.load(tmp_path)
    assert back.config == config
    said = [m.generate(images, TEXT, MASK, max_new_tokens=5) for m in (back, model)]
    assert torch.equal(*said)


def test_a_t5_and_a_decoder_are_not_taken_for_each_other(tmp_path):
    blip2().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"type": "LanguageModelConfig"', '"type": "GPTConfig"'))
    with pytest.raises(UserError, match=r"language is .* must be LanguageModelConfig or T5Config"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(("name", "counts"), [("decoder", True), ("t5", False)])
def test_what_a_t5_has_read_does_not_count_as_said(name, counts):
    """A penalty far below 1 makes a word that was said the likeliest to follow."""
    model, images, (tokens, mask) = blip2(MODELS[name]), pictures(), marked()
    plain, drawn = (model.generate(images, tokens, mask, max_new_tokens=1, repetition_penalty=p) for p in (1.0, 1e-6))
    read = torch.stack([(tokens == t).any(dim=1) for t in drawn[:, 0]]).diagonal()
    assert read.all() and not torch.equal(plain, drawn) if counts else torch.equal(plain, drawn)
