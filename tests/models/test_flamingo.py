import json
from dataclasses import replace

import pytest
import torch

from minivlm import Flamingo, FlamingoConfig, checkpoint
from minivlm.layers import GatedConfig, ImageFeatures, PerceiverConfig, ResNetConfig, image_mask
from minivlm.testing import (
    assert_batch_independent,
    assert_causal,
    assert_frozen,
    assert_generation_independent,
    assert_gradient_does_not_reach,
    assert_gradient_reaches,
    assert_images_seen_only_where_allowed,
    assert_keeps_no_activations,
    assert_later_image_changes_nothing_before,
    assert_padding_invariant,
    assert_same,
    assert_zero_gates_change_nothing,
)
from tests.speakers import VISION, language, processor

PLACEHOLDER = processor().image_token_id
PAD = processor().pad_token
RESAMPLER = PerceiverConfig(width=16, depth=1, heads=2, latents=3)
CONFIG = FlamingoConfig(
    vision=VISION, language=language(depth=4), resampler=RESAMPLER, image_token=PLACEHOLDER, every=2
)
ROTARY = dict(positions="none", rope_theta=1e4, norm="rmsnorm", gated_mlp=True, activation="silu")
CONFIGS = {
    "flamingo": CONFIG,
    "openflamingo": replace(CONFIG, offset=1, language=language(depth=4, positions="none", alibi=True)),
    "idefics": replace(
        CONFIG,
        language=language(depth=4, **ROTARY),
        gated=GatedConfig(norm="rmsnorm", gated_mlp=True, qk_norm="rmsnorm", gate="channel"),
        class_token=True,
        vision_norm=False,
    ),
    "all images, no resampler": replace(CONFIG, every=1, attend_to="all", resampler=None),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

TOKENS = torch.tensor([[1, 20, PLACEHOLDER, 21, 22, PLACEHOLDER, 23], [1, PLACEHOLDER, 20, 21, 22, 23, 24]])
LENGTHS = torch.tensor([[7], [5]])
MASK = torch.arange(7) < LENGTHS


def flamingo(config=CONFIG, opened=True):
    """opened: the gates, and norms away from where they start."""
    model = Flamingo(config).double().eval()
    if opened:
        for block in model.gated:
            for p in block.parameters():
                p.data += 0.5 * torch.randn_like(p)
    return model


def pictures(*shape):
    return torch.randn(*shape, 3, 16, 16).double()


@every_config
class TestForward:
    def test_closed_gates_are_the_language_model_to_the_bit(self, config):
        model, images = flamingo(config, opened=False), pictures(2, 2)
        assert not model.gates().any() and model.gates().shape == (len(config.block_indices), 2)
        lm = model.language_model
        gates = [p for n, p in model.gated.named_parameters() if n.endswith(("attention_gate", "mlp_gate"))]
        assert len(gates) == 2 * len(config.block_indices)
        given = images, TOKENS, MASK
        f, plain = lambda *x: model(*x).logits, lambda _, tokens, mask: lm(tokens, mask).logits
        assert_zero_gates_change_nothing(f, plain, *given, gates=gates)
        assert torch.equal(model.generate(*given, max_new_tokens=4), lm.generate(TOKENS, MASK, max_new_tokens=4))

    def test_another_image_shows_from_where_it_may_be_seen(self, config):
        model = flamingo(config)
        seen = image_mask(TOKENS, PLACEHOLDER, 2, attend_to=config.attend_to)
        allowed = seen.cummax(dim=1).values  # later tokens hear of it from those that saw it
        assert_images_seen_only_where_allowed(lambda images: model(images, TOKENS).logits, pictures(2, 2), allowed)

    def test_the_text_before_an_image_does_not_know_of_it(self, config):
        model = flamingo(config)
        f = lambda images, tokens: model(images, tokens).logits
        assert_later_image_changes_nothing_before(f, pictures(2, 2), TOKENS, PLACEHOLDER)

    def test_rows_are_independent_of_each_other_and_of_padding(self, config):
        model, images = flamingo(config), pictures(2, 2)
        assert_batch_independent(lambda *given: model(*given).logits, images, TOKENS)
        f = lambda tokens, mask: model(images[: len(tokens)], tokens, mask).logits
        assert_padding_invariant(f, TOKENS[:1, :6].clone(), MASK[1:, :6])
        left = torch.cat([TOKENS.new_full((2, 2), PAD), TOKENS], dim=1)
        mask = torch.cat([torch.zeros(2, 2, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)], dim=1)
        assert_same(model(images, left, mask).logits[:, 2:], model(images, TOKENS).logits)
        assert_same(
            model(images, left.masked_fill(~mask, PLACEHOLDER), mask).logits[:, 2:], model(images, TOKENS).logits
        )

    def test_each_row_answers_as_it_would_alone(self, config):
        model, images = flamingo(config), pictures(2, 2)

        def generate(tokens, mask):
            its = (
                images if len(tokens) == 2 else images[:1] if torch.equal(tokens[0, :3], TOKENS[0, :3]) else images[1:]
            )
            return model.generate(its, tokens, mask, max_new_tokens=6)

        assert_generation_independent(generate, TOKENS, MASK, pad_token=PAD)

    def test_generation_is_the_full_forward_again_and_again(self, config):
        model, images = flamingo(config), pictures(1, 2)
        tokens = TOKENS[:1]
        said = model.generate(images, tokens, max_new_tokens=6, end_tokens=())
        for i in range(6):
            expected = model(images, torch.cat([tokens, said[:, :i]], dim=1)).logits[:, -1].argmax(dim=-1)
            assert expected == said[:, i]

    def test_beams(self, config):
        model, images = flamingo(config), pictures(2, 2)
        both = model.generate(images, TOKENS, MASK, max_new_tokens=5, num_beams=3, end_tokens=())
        for i, n in enumerate(LENGTHS[:, 0]):
            alone = model.generate(
                images[i : i + 1], TOKENS[i : i + 1, :n], max_new_tokens=5, num_beams=3, end_tokens=()
            )
            assert torch.equal(both[i], alone[0])

    def test_saved_and_loaded(self, config, tmp_path):
        model, images = flamingo(config), pictures(2, 2)
        checkpoint.save(tmp_path, model)
        back, _ = checkpoint.load(tmp_path)
        assert back.config == config
        assert_same(back(images, TOKENS).logits, model(images, TOKENS).logits)


class TestWhereTheLayersStand:
    @pytest.mark.parametrize(
        ("every", "offset", "places"), [(1, 0, [0, 1, 2, 3]), (2, 0, [0, 2]), (2, 1, [1, 3]), (3, 2, [2])]
    )
    def test_block_indices(self, every, offset, places):
        config = replace(CONFIG, every=every, offset=offset)
        assert list(config.block_indices) == places and len(Flamingo(config).gated) == len(places)

    def test_a_layer_stands_before_its_block(self):
        """Written out with the blocks of an untouched language model."""
        model, images = flamingo(replace(CONFIG, offset=1)), pictures(2, 2)
        lm = model.language_model
        seen = model.resample(model.image_features(images)).view(2, 6, 16)
        mask = image_mask(TOKENS, PLACEHOLDER, 2, latents=3)
        x = lm.embed(TOKENS) + lm.position_embedding(torch.arange(7))
        for i, block in enumerate(lm.transformer.blocks):
            x = model.gated[i // 2](x, seen, mask) if i % 2 == 1 else x
            x = block(x)
        assert_same(model(images, TOKENS).logits, lm.head(lm.norm(x)))

    def test_the_language_model_is_untouched(self):
        model = flamingo()
        assert type(model.language_model).__name__ == "LanguageModel"
        names = set(model.language_model.state_dict())
        assert names == set(type(model.language_model)(CONFIG.language).state_dict())

    @pytest.mark.parametrize("wrong", [{"every": 0}, {"offset": 4}, {"offset": -1}])
    def test_no_place_at_all(self, wrong):
        with pytest.raises(ValueError, match="puts no gated layer before any of the language model's 4 blocks"):
            replace(CONFIG, **wrong)

    def test_a_tower_that_does_not_fit(self):
        with pytest.raises(ValueError, match="features of width 32, but the resampler reads features of width 16"):
            replace(CONFIG, vision=replace(VISION, width=32))
        wide = replace(CONFIG, vision=replace(VISION, width=32), resampler=replace(RESAMPLER, context_width=32))
        assert flamingo(wide)(pictures(1, 2), TOKENS[:1]).logits.shape[:2] == (1, 7)
        resnet = ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=64)
        with pytest.raises(ValueError, match="vision_norm needs a ViT"):
            replace(CONFIG, vision=resnet, resampler=replace(RESAMPLER, context_width=256))


class TestImages:
    def test_images_in_reading_order(self):
        """As many a row as it has marks: two, none, one."""
        model, images = flamingo(), pictures(3)
        none = TOKENS[:1].masked_fill(TOKENS[:1] == PLACEHOLDER, 30)
        tokens = torch.cat([TOKENS[:1], none, TOKENS[1:]])
        y = model(images, tokens).logits
        assert_same(y[0], model(images[None, :2], TOKENS[:1]).logits[0])
        assert_same(y[1], model(None, none).logits[0])
        assert_same(y[2], model(images[None, 2:], TOKENS[1:]).logits[0])
        assert torch.equal(model(ImageFeatures(model.image_features(images)), tokens).logits, y)
        said = model.generate(images, tokens, max_new_tokens=4, end_tokens=())
        assert torch.equal(said[1:2], model.generate(None, none, max_new_tokens=4, end_tokens=()))

    @pytest.mark.parametrize("count", [2, 4])
    def test_images_in_reading_order_are_as_many_as_marks(self, count):
        with pytest.raises(
            ValueError,
            match=rf"the texts have 3 image placeholders, but there are {count} images",
        ):
            flamingo()(pictures(count), TOKENS)

    def test_images_for_other_rows(self):
        with pytest.raises(ValueError, match="there are 2 texts, but images for 1"):
            flamingo()(pictures(1, 2), TOKENS)

    def test_without_any_image(self):
        """The attention half is not there; the other one is, as for a text before the first image."""
        model, images = flamingo(), pictures(1, 2)
        tokens = TOKENS[:1].masked_fill(TOKENS[:1] == PLACEHOLDER, 30)
        assert_same(model(None, tokens).logits, model(images, tokens).logits)
        assert model.generate(None, tokens, max_new_tokens=3).shape[0] == 1

    @pytest.mark.parametrize(("images", "count"), [(None, 0), (pictures(2, 1), 1)])
    def test_more_marks_than_images(self, images, count):
        with pytest.raises(
            ValueError,
            match=rf"a text has 2 image placeholders, but there are only {count} images a row",
        ):
            flamingo()(images, TOKENS)

    def test_images_to_spare(self):
        model, images = flamingo(), pictures(2, 3)
        assert_same(model(images, TOKENS).logits, model(images[:, :2], TOKENS).logits)

    def test_features_that_are_given_are_as_good_as_computed_ones(self):
        model, images = flamingo(), pictures(2, 2)
        features, labels = model.image_features(images), TOKENS.masked_fill(TOKENS == PLACEHOLDER, -100)
        assert features.shape == (4, 5, 16)
        features = ImageFeatures(features.unflatten(0, (2, 2)))
        given = model(features, TOKENS, labels=labels)
        assert torch.equal(given.logits, model(images, TOKENS).logits)
        for what in (images, features):
            assert_same(model.losses(TOKENS, labels, what)["next token"], given.loss)

    def test_images_are_looked_at_once_while_speaking(self):
        model, seen = flamingo(), []
        for part in (model.vision.transformer, model.gated[0].attention.k_proj):
            part.register_forward_hook(lambda *_: seen.append(1))
        model.generate(pictures(2, 2), TOKENS, max_new_tokens=5, end_tokens=())
        assert len(seen) == 2

    def test_speaks_with_packed_weights_as_with_plain_ones(self, monkeypatch):
        model, images = flamingo().float(), pictures(2, 2).float()
        begin = lambda: model.prefill(images, TOKENS, MASK, room=3)
        packed, plain = begin(), begin()
        for token in (20, 21, 22):
            packed.step(torch.full((2,), token))
            with monkeypatch.context() as patch:
                patch.setattr(model.language_model.packing, "of", lambda model, dtype: None)
                plain.step(torch.full((2,), token))
            assert packed.packed is not None and plain.packed is None
            assert_same(packed.logits, plain.logits)

    def test_what_is_said_sees_what_the_prompt_saw_last(self):
        model, images = flamingo(), pictures(2, 2)
        decoding = model.prefill(images, TOKENS, MASK, room=2)
        visible = decoding.between.visible[:, 0]
        assert visible.tolist() == [[False] * 3 + [True] * 3, [True] * 3 + [False] * 3]
        decoding.reorder(torch.tensor([1, 1, 0]))
        assert torch.equal(decoding.between.visible[:, 0], visible[[1, 1, 0]])


class TestTraining:
    def test_a_frozen_model_learns_in_its_new_parts_alone(self):
        model, images = flamingo().float(), pictures(2, 2).float()
        model.freeze("vision", "language_model")
        model.train()
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert {n.partition(".")[0] for n in trained} == set(model.trained_parts)
        labels = TOKENS.masked_fill(TOKENS == PLACEHOLDER, -100)
        loss = model.losses(TOKENS, labels, images)["next token"]
        assert_gradient_reaches(loss, {n: p for n, p in model.named_parameters() if p.requires_grad})
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

        def step():
            optimiser.zero_grad()
            model.losses(TOKENS, labels, images)["next token"].backward()
            optimiser.step()

        for part in ("vision", "language_model"):
            assert_frozen(model.get_submodule(part), step, whole=model, optimiser=optimiser)
        assert_keeps_no_activations(lambda: model.image_features(images))

    def test_before_the_gates_open_they_alone_learn(self):
        model, images = flamingo(opened=False), pictures(2, 2)
        loss = model.losses(TOKENS, TOKENS, images)["next token"]
        gates = {n: p for n, p in model.gated.named_parameters() if n.endswith(("attention_gate", "mlp_gate"))}
        assert_gradient_reaches(loss, gates)
        assert_gradient_does_not_reach(loss, model.resampler)

    def test_causal(self):
        model, images = flamingo(), pictures(2, 2)
        assert_causal(lambda tokens: model(images, tokens).logits, TOKENS.masked_fill(TOKENS == PLACEHOLDER, 29))


def test_a_directory_of_an_older_version_keeps_the_activation_it_was_trained_with(tmp_path):
    """GELU, named or not yet named in its config; today's default is the paper's squared ReLU."""
    model = Flamingo(CONFIGS["flamingo"]).eval()
    assert (model.config.gated.activation, model.config.resampler.activation) == ("squared_relu", "squared_relu")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for named in (True, False):
        for part in ("gated", "resampler"):
            if named:
                values["config"][part]["activation"] = "gelu"
            else:
                del values["config"][part]["activation"]
        path.write_text(json.dumps(values | {"minivlm": "0.5.0"}), encoding="utf-8")
        old = Flamingo.from_pretrained(tmp_path).config
        assert (old.gated.activation, old.resampler.activation) == ("gelu", "gelu")
