from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivlm import checkpoint
from minivlm.layers import ImageFeatures, PerceiverConfig, QFormerConfig, ResNetConfig, VisionConfig
from minivlm.layers.lora import LoRAConfig, lora_parameters
from minivlm.layers.projector import pixel_shuffle
from minivlm.models.llava import LLaVA, LLaVAConfig, scale_projector
from minivlm.models.own_modules import OwnTower
from minivlm.testing import (
    assert_causal,
    assert_frozen,
    assert_gradient_does_not_reach,
    assert_gradient_reaches,
    assert_same,
)
from tests.speakers import VISION, language, llava, llava_config, processor

PLACEHOLDER = processor().image_token_id
N = 4  # placeholders of a picture
LORA = LoRAConfig(rank=2, alpha=4.0)


def text(*parts):
    """(1, T): numbers are words, "picture" its placeholders."""
    return torch.tensor([[t for part in parts for t in ([PLACEHOLDER] * N if part == "picture" else [part])]])


ROW = text(1, 20, "picture", 21, 22, "picture", 23, 24)


def pictures(*shape):
    return torch.randn(*shape, 3, 16, 16)


def labelled(tokens):
    return tokens.masked_fill(tokens == PLACEHOLDER, -100)


class TestFillingIn:
    def test_pictures_stand_where_their_marks_stand_in_reading_order(self):
        model = llava()
        images = pictures(1, 2)
        x = model.embed(images, ROW)
        first, second = (model.projector(model.vision.features(image, layer=-2)[:, 1:]) for image in images[0][:, None])
        assert_same(x[:, 2 : 2 + N], first)
        assert_same(x[:, 4 + N : 4 + 2 * N], second)
        words = ROW[0] != PLACEHOLDER
        assert torch.equal(x[:, words], model.language_model.embed(ROW)[:, words])

    def test_rows_may_have_different_numbers_of_pictures(self):
        model = llava()
        one = text(1, "picture", 20, 21)
        tokens = torch.cat([F.pad(one, (0, ROW.shape[1] - one.shape[1])), ROW])
        images = pictures(3)
        x = model.embed(images, tokens)
        assert_same(x[1:], model.embed(images[1:], ROW))
        assert_same(x[:1, : one.shape[1]], model.embed(images[:1], one))

    def test_without_a_picture_it_is_its_language_model(self):
        model, tokens = llava(), text(1, 20, 21, 22)
        assert torch.equal(model(None, tokens).logits, model.language_model(tokens).logits)

    def test_a_place_without_any_picture_is_an_error(self):
        with pytest.raises(ValueError, match=r"has placeholders for 8 image features, but the images have 0$"):
            llava()(None, ROW)

    @pytest.mark.parametrize("images", [1, 3])
    def test_a_wrong_number_is_an_error_with_both(self, images):
        with pytest.raises(
            ValueError,
            match=rf"has placeholders for 8 image features, but the images have {4 * images}$",
        ):
            llava()(pictures(1, images), ROW)

    def test_features_that_are_given_are_as_good_as_computed_ones(self):
        model, images = llava(), pictures(1, 2)
        features = ImageFeatures(model.image_features(images))
        assert features.tensor.shape == (2, N, VISION.width)
        given = model(features, ROW, labels=labelled(ROW))
        assert torch.equal(given.logits, model(images, ROW).logits)
        losses = [model.losses(ROW, labelled(ROW), what) for what in (images, features)]
        assert losses[0] == losses[1] == {"next token": given.loss}

    def test_parts_of_a_batch_take_the_features_of_their_own_placeholders(self):
        model, features = llava().train(), ImageFeatures(torch.randn(3, N, VISION.width))
        one = text(1, "picture", 20, 21)
        tokens = torch.cat([F.pad(one, (0, ROW.shape[1] - one.shape[1])), ROW])
        batch = {"tokens": tokens, "labels": labelled(tokens), "images": features}
        first, second = model.cut(batch, 1)
        assert torch.equal(first["images"].tensor, features.tensor[:1])
        assert torch.equal(second["images"].tensor, features.tensor[1:])
        assert_same(model.backward_in_parts(batch, 1)["next token"], model.losses(**batch)["next token"])

    def test_a_prompt_of_one_mark_gets_the_placeholders_of_its_features(self):
        model, images = llava(), pictures(1, 2)
        short = torch.tensor([[1, PLACEHOLDER, 20, PLACEHOLDER, 21]])
        said = [
            model.generate(given, short, max_new_tokens=4)
            for given in (images, ImageFeatures(model.image_features(images)))
        ]
        assert torch.equal(*said)

    def test_tiles_are_more_views_of_the_same_picture(self):
        model = llava(tiles=2)
        images = pictures(2, 5)  # two pictures, each whole and in 2 × 2 tiles
        marks = torch.full((2, 5 * N), PLACEHOLDER)
        x = model.embed(images, marks)
        assert_same(x[1, 2 * N : 3 * N], model.projector(model.image_features(images[1, 2:3]))[0])


class TestWhatTheTowerGives:
    @pytest.mark.parametrize(
        ("changes", "n", "width"),
        [
            ({}, 4, 16),
            ({"class_token": True}, 5, 16),
            ({"vision_layers": (-1, -2, 0)}, 4, 48),
            ({"tiles": 3}, 4, 16),
            ({"vision": ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=64)}, 16, 128),
        ],
    )
    def test_is_what_the_config_says(self, changes, n, width):
        model = llava(**changes)
        c = model.config
        side = c.vision.image_size
        features = model.image_features(torch.randn(2, 3, side, side))
        assert features.shape == (2, n, width) == (2, c.features_per_view, c.feature_width)
        assert c.image_tokens == n * (10 if c.tiles == 3 else 1)

    def test_the_published_sizes(self):
        vision = VisionConfig(width=1024, depth=24, heads=16, image_size=336, patch_size=14)
        published = LLaVAConfig(vision=vision, language=language(), image_token=PLACEHOLDER)
        assert published.image_tokens == 576
        assert replace(published, class_token=True, tiles=2).image_tokens == 5 * 577

    def test_the_last_block_does_not_matter_for_the_layer_before_it(self):
        model, images = llava(), pictures(1, 2)
        before = model.image_features(images)
        torch.nn.init.normal_(model.vision.transformer.blocks[-1].mlp.up_proj.weight)
        assert torch.equal(model.image_features(images), before)

    def test_grids_of_different_size_do_not_lie_side_by_side(self):
        vision = ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=64)
        with pytest.raises(ValueError, match=r"layers \(-1, -2\) do not lie side by side"):
            llava_config(vision=vision, vision_layers=(-1, -2))


class TestLoss:
    def test_is_the_cross_entropy_of_the_labelled_tokens(self):
        model, images = llava(), pictures(1, 2)
        labels = labelled(ROW)
        labels[:, :3] = -100
        out = model(images, ROW, labels=labels)
        assert_same(out.loss, F.cross_entropy(out.logits[0, :-1], labels[0, 1:]))

    def test_words_see_only_what_stands_before_them(self):
        model, features = llava(), ImageFeatures(torch.randn(2, N, VISION.width))
        after = torch.randn(1, 3, 32)  # embeddings behind the last picture

        def logits(after):
            x = torch.cat([model.embed(features, ROW)[:, :-2], after], dim=1)
            return model.language_model(embeddings=x).logits[:, -3:]

        assert_causal(logits, after)

    def test_padding_on_the_right_changes_nothing(self):
        model, images = llava(), pictures(1, 2)
        padded = F.pad(ROW, (0, 3))
        mask = torch.arange(padded.shape[1])[None] < ROW.shape[1]
        assert_same(model(images, padded, mask).logits[:, :-3], model(images, ROW).logits)


class TestGradients:
    def loss(self, model, images):
        return sum(model.losses(ROW, labelled(ROW), images).values())

    def test_reach_all_that_is_read(self):
        model = llava(vision_layers=(-1,))
        unread = ("vision.norm", "k_proj.bias")  # a pooled vector is not wanted; the bias shifts all scores alike
        weights = {n: p for n, p in model.named_parameters() if not n.startswith(unread[0]) and unread[1] not in n}
        assert_gradient_reaches(self.loss(model, pictures(1, 2)), weights)

    def test_reach_only_the_projector_where_the_rest_is_frozen(self):
        model = llava()
        model.freeze("vision", "language_model")
        loss = self.loss(model, pictures(1, 2))
        assert_gradient_reaches(loss, model.projector)
        assert_gradient_does_not_reach(loss, model.vision)
        assert_gradient_does_not_reach(loss, model.language_model)

    def test_frozen_parts_stay_as_they_are_while_the_projector_learns(self):
        model = llava(language=language(dropout=0.5))
        model.freeze("vision", "language_model")
        optimiser = torch.optim.SGD(model.projector.parameters(), lr=0.1)

        def step():
            self.loss(model, pictures(1, 2)).backward()
            optimiser.step()

        for part in (model.vision, model.language_model):
            assert_frozen(part, step, whole=model, optimiser=optimiser)

    def test_a_frozen_tower_keeps_no_activations(self):
        model, images = llava(), pictures(1, 2)
        features = ImageFeatures(model.image_features(images).detach())

        def kept(what):
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape), lambda _: None):
                sum(model.losses(ROW, labelled(ROW), what).values())
            return sizes

        trained = kept(images)
        model.freeze("vision")
        assert kept(images) == kept(features)
        assert len(trained) > len(kept(images))


class TestLoRA:
    def test_step_zero_is_the_model_without(self):
        images = pictures(1, 2)
        assert torch.equal(llava(lora=LORA)(images, ROW).logits, llava()(images, ROW).logits)

    def test_the_adapters_projector_and_tower_learn_and_the_language_model_does_not(self):
        model = llava(lora=LORA)
        learning = {id(p) for p in model.parameters() if p.requires_grad}
        adapters = {id(p) for p in lora_parameters(model)}
        assert len(adapters) == 2 * 4 * 2  # A and B, of q, k, v and out, in two blocks
        assert learning == adapters | {id(p) for part in (model.vision, model.projector) for p in part.parameters()}

    def test_merges_into_a_plain_model(self):
        model, images = llava(lora=LORA), pictures(1, 2)
        for p in lora_parameters(model):
            torch.nn.init.normal_(p)
        before = model(images, ROW).logits
        assert not torch.equal(before, llava()(images, ROW).logits)
        model.merge_lora()
        assert model.config == llava_config()
        assert_same(model(images, ROW).logits, before)
        plain = llava()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(images, ROW).logits, model(images, ROW).logits)


@pytest.mark.parametrize("changes", [{}, {"lora": LORA}, {"tiles": 2, "projector": "linear"}], ids=str)
def test_saved_and_loaded_it_is_the_same(changes, tmp_path):
    model = llava(**changes)
    for p in lora_parameters(model):
        torch.nn.init.normal_(p)
    model.save_pretrained(tmp_path, processor=processor())
    loaded, ids = checkpoint.load(tmp_path)
    assert loaded.config == model.config and ids.config == processor().config
    assert [(n, p.requires_grad) for n, p in loaded.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    images, tokens = pictures(2 * model.config.views), ROW.repeat(1, model.config.views)
    assert torch.equal(loaded(images, tokens).logits, model(images, tokens).logits)


class TestSpeaking:
    rows = (ROW, text(1, "picture", 20), text(1, 20, 21, 22, 23))
    counts = (2, 1, 0)

    def batch(self):
        tokens = torch.zeros(3, ROW.shape[1], dtype=torch.long)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for i, row in enumerate(self.rows):
            tokens[i, : row.shape[1]], mask[i, : row.shape[1]] = row, True
        return tokens, mask

    @pytest.mark.parametrize(
        "options", [{}, {"num_beams": 3}, {"temperature": 1.0, "top_p": 0.9, "seed": [5, 6, 7]}], ids=str
    )
    def test_a_batch_is_its_rows_alone(self, options):
        model, images = llava(), pictures(3)
        said = model.generate(images, *self.batch(), max_new_tokens=8, **options)
        start = 0
        for i, (row, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            own = {**options, "seed": [options["seed"][i]]} if "seed" in options else options
            mine = images[start : start + count] if count else None
            alone = model.generate(mine, row, max_new_tokens=8, **own)[0]
            assert torch.equal(said[i, : len(alone)], alone) and not said[i, len(alone) :].any()
            start += count

    def test_is_the_likeliest_token_again_and_again(self):
        model, images, tokens = llava(), pictures(1, 2), ROW
        said = model.generate(images, ROW, max_new_tokens=6, end_tokens=())
        for t in range(6):
            best = model(images, tokens).logits[:, -1].argmax(dim=-1)
            assert said[0, t] == best
            tokens = torch.cat([tokens, best[:, None]], dim=1)

    def test_a_prompt_may_have_one_mark_a_picture(self):
        """As `Processor.text` and published tokenisers write it, rows of different lengths and numbers of pictures."""
        model, images = llava(), pictures(3)
        short = torch.tensor([[1, PLACEHOLDER, 20, 0, 0, 0], [1, PLACEHOLDER, 21, 22, PLACEHOLDER, 23]])
        mask = torch.arange(6) < torch.tensor([[3], [6]])
        long = text(1, "picture", 21, 22, "picture", 23)
        rows = torch.cat([F.pad(text(1, "picture", 20), (0, long.shape[1] - N - 2)), long])
        wide = torch.arange(long.shape[1]) < torch.tensor([[N + 2], [long.shape[1]]])
        said = model.generate(images, short, mask, max_new_tokens=5)
        assert torch.equal(said, model.generate(images, rows, wide, max_new_tokens=5))

    def test_streams_the_same(self):
        model, images = llava(), pictures(3)
        columns = list(model.stream(images, *self.batch(), max_new_tokens=8))
        assert torch.equal(torch.stack(columns, dim=1), model.generate(images, *self.batch(), max_new_tokens=8))


def test_the_seed_alone_says_what_the_weights_are():
    weights = []
    for seed, global_seed in ((1, 10), (1, 20), (2, 10)):
        torch.manual_seed(global_seed)
        weights.append(LLaVA(llava_config(lora=LORA), seed=seed).state_dict())
    first, same, other = weights
    assert all(torch.equal(first[name], same[name]) for name in first)
    names = ("vision.class_embedding", "projector.up_proj.weight", "language_model.token_embedding.weight")
    assert not any(torch.equal(first[name], other[name]) for name in names)


class TestPixelShuffle:
    """Squares of neighbouring features become one token."""

    def test_a_square_is_one_token_its_features_row_by_row(self):
        x = torch.arange(16.0).reshape(1, 16, 1)  # a grid of 4 × 4
        assert pixel_shuffle(x, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]

    @pytest.mark.parametrize("projector", ["pixel_shuffle", "linear", "mlp"])
    @pytest.mark.parametrize("tiles", [1, 2])
    def test_fewer_tokens_stand_in_the_text_whatever_projects_them(self, projector, tiles):
        model = llava(projector=projector, pixel_shuffle=2, tiles=tiles)
        c, images = model.config, pictures(2, model.config.views)
        assert c.features_per_view == 1 and c.image_tokens == c.views
        x = model.embed(images, torch.full((2, c.views), PLACEHOLDER))
        alone = model.vision.features(images[1, :1], layer=-2)[:, 1:].reshape(1, 1, -1)  # its four patches in a row
        assert_same(x[1, :1], model.projector(alone)[0])
        features = ImageFeatures(model.image_features(images))
        assert features.tensor.shape == (2 * c.views, 1, 4 * VISION.width)
        tokens = torch.full((2, c.views), PLACEHOLDER)
        assert torch.equal(model.embed(features, tokens), model.embed(images, tokens))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"pixel_shuffle": 3}, r"3 does not divide the vision tower's grid of 2 × 2 features: choose 2"),
            ({"pixel_shuffle": 1}, "must be at least 2 for projector='pixel_shuffle'"),
            ({"pixel_shuffle": 0, "projector": "mlp"}, "must be at least 1"),
            ({"pixel_shuffle": 2, "class_token": True}, "does not go together with class_token"),
            ({"pixel_shuffle": 2, "vision": OwnTower(module="m", image_size=16, layers=(-2,), counts=(6,), widths=(8,))},
             "needs a square grid of features, but the vision tower gives 6"),
            ({"pixel_shuffle": 2, "projector": "resampler", "resampler": PerceiverConfig(width=16)},
             "does not go together with projector='resampler'"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_folded_is_a_sentence(self, changes, said):
        with pytest.raises(ValueError, match=said):
            llava_config(**{"projector": "pixel_shuffle", **changes})


CONNECTORS = {
    "linear": {"projector": "linear"},
    "mlp": {"projector": "mlp"},
    "pixel shuffle": {"projector": "pixel_shuffle", "pixel_shuffle": 2},
    "resampler": {"projector": "resampler", "resampler": PerceiverConfig(width=16, depth=2, heads=2, latents=3)},
    "q-former": {"projector": "qformer", "qformer": QFormerConfig(width=16, depth=2, heads=2, queries=3)},
}


class TestScale:
    @pytest.mark.parametrize("connector", CONNECTORS)
    def test_a_new_connector_can_start_at_the_length_of_words(self, connector):
        model, images = llava(**CONNECTORS[connector]), pictures(4)
        before = model.projector(model.image_features(images))
        factor = scale_projector(model, images)
        after = model.projector(model.image_features(images))
        assert_same(after, factor * before)
        words = model.language_model.token_embedding.weight.norm(dim=-1).mean()
        assert_same(after.norm(dim=-1).mean(), words)
