"""Who looks where: the maps are the model's own weights, and the picture shows them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minivlm import BLIP, CLIP, BLIPConfig, CLIPConfig, tasks
from minivlm.errors import UserError
from minivlm.layers import BERTConfig, ImageFeatures, TextConfig, TransformerConfig, VisionConfig
from minivlm.layers.qformer import QFormerConfig
from minivlm.layers.resnet import ResNetConfig
from minivlm.models.blip2_stage1 import BLIP2Stage1, BLIP2Stage1Config
from minivlm.models.multitask import MultitaskConfig, MultitaskVLM
from minivlm.models.vilbert import ViLBERT, ViLBERTConfig
from minivlm.models.visualbert import VisualBERT, VisualBERTConfig
from minivlm.models.vqa import VQAConfig, VQAModel
from minivlm.pictures import heat
from minivlm.recording import record_attention
from minivlm.tasks.attend import WORDS, different, to_maps
from minivlm.tasks.generate import question_tokens
from tests.speakers import CONTEXT, captioner, colour_llava, language_model, llava, plain, processor

PICTURES = [plain("red"), plain("blue"), np.arange(768, dtype=np.uint32).reshape(16, 16, 3).astype(np.uint8)]


def clip(**vision):
    vision = VisionConfig(**{**dict(width=16, depth=2, heads=2, image_size=16, patch_size=4), **vision})
    return CLIP(
        CLIPConfig(
            vision=vision, text=TextConfig(width=16, depth=1, heads=2, vocab_size=20, end_token=3), embed_width=8
        )
    ).eval()


def stage_1(**changes):
    vision = VisionConfig(width=16, depth=1, heads=2, image_size=16, patch_size=4)
    qformer = QFormerConfig(width=16, depth=3, heads=2, queries=12, vocab_size=20, context=8)
    ids = dict(start_token=1, decode_token=2, end_token=3)
    return BLIP2Stage1(BLIP2Stage1Config(vision=vision, qformer=qformer, embed_width=8, **ids, **changes)).eval()


@pytest.mark.parametrize("class_token", [False, True])
def test_queries_a_row_each_over_all_pictures(class_token):
    model = stage_1(class_token=class_token)
    rows = tasks.attention_maps(PICTURES, model, processor())
    assert len(rows) == 8 and all(row.images == [0, 1, 2] for row in rows)
    with record_attention(model) as maps:
        model.encode_image(processor().images(PICTURES))
    [weights] = maps["qformer.blocks.2.cross_attention"]  # of the last block that reads the picture
    q = int(rows[0].title.removeprefix("query ")) - 1
    want = weights.mean(dim=1)[2, q, int(class_token) :]
    assert torch.allclose(rows[0].maps[2], (want / want.sum()).view(4, 4), atol=1e-6)


def test_queries_that_look_alike_are_shown_once():
    maps = torch.zeros(1, 6, 1, 4)
    for q, place in enumerate([0, 0, 1, 0, 2, 0]):
        maps[0, q, 0, place] = 1
    chosen = different(maps, 3)
    assert {int(maps[0, q].argmax()) for q in chosen} == {0, 1, 2} and chosen == sorted(chosen)
    assert different(maps, 9) == [0, 1, 2, 3, 4, 5]


def test_the_class_token_of_a_clip():
    model = clip()
    [row] = tasks.attention_maps(PICTURES, model, processor())
    with record_attention(model.vision) as maps:
        model.vision.features(processor().images(PICTURES))  # all tokens, not the class token alone
    [weights] = maps["transformer.blocks.1.attention"]
    want = weights.mean(dim=1)[:, 0, 1:]
    assert row.title == "the class token"
    assert torch.allclose(torch.stack(row.maps).flatten(1), want / want.sum(dim=1, keepdim=True), atol=1e-6)


def test_a_pooling_query_and_a_resnet():
    [row] = tasks.attention_maps(PICTURES, clip(pool="attention"), processor())
    assert row.title == "the pooling query" and row.maps[0].shape == (4, 4)
    config = ResNetConfig(width=8, blocks=(1, 1, 1, 1), image_size=64, output_width=8, heads=2)
    text = TextConfig(width=16, depth=1, heads=2, vocab_size=20, end_token=3)
    model = CLIP(CLIPConfig(vision=config, text=text, embed_width=8, image_projection=False)).eval()
    [row] = tasks.attention_maps(PICTURES, model, processor(image_size=64))
    assert row.title == "the mean of the image" and row.maps[0].shape == (2, 2)
    assert row.maps[0].sum() == pytest.approx(1)


def test_the_words_of_an_answer():
    model, p = colour_llava(), processor()
    rows = tasks.attention_maps(PICTURES[:2], model, p, prompt="which colours?")
    assert [(row.title, row.images) for row in rows] == [
        ("red", [0] * len(rows[0].maps)),
        ("blue", [1] * len(rows[1].maps)),
    ]
    assert "".join(rows[0].notes) == "red"
    asked = question_tokens("which colours?", 1, p)
    tokens = torch.tensor([asked])  # the last of which foretells the first word
    with record_attention(model.language_model) as maps:
        model(p.images(PICTURES[:1]), tokens)
    layers = torch.stack([weights[0, :, -1] for [weights] in maps.values()])  # (layers, H, S)
    want = layers.mean(dim=(0, 1))[tokens[0] == model.config.image_token]
    assert torch.allclose(rows[0].maps[0].flatten(), want / want.sum(), atol=1e-5)


def test_the_first_word_of_a_caption_has_seen_the_picture_alone():
    model, p = captioner(), processor(image_tokens=0)
    [row] = tasks.attention_maps(PICTURES[:1], model, p)
    assert 1 <= len(row.maps) <= WORDS and row.maps[0].shape == (2, 2)
    with record_attention(model.language_model) as maps:
        model(p.images(PICTURES[:1]), torch.tensor([[p.start_token]]))
    layers = torch.stack([weights[0, :, -1] for [weights] in maps.values()]).mean(dim=(0, 1))[:4]
    assert torch.allclose(row.maps[0].flatten(), layers / layers.sum(), atol=1e-5)


FUSING = dict(
    text=BERTConfig(vocab_size=processor().vocab_size, context=16, width=24, depth=3, heads=2),
    vision=VisionConfig(width=12, depth=2, heads=2, image_size=16, patch_size=8, pool="mean"),
    region_width=12,
    answers=("red", "blue"),
)
STREAM = dict(depth=2, heads=2, norm_place="post")
LAYERS = dict(width=24, depth=2, heads=2, cross_attention_every=1)
READERS = {
    "visualbert": lambda: VisualBERT(VisualBERTConfig(**FUSING)),
    "vilbert": lambda: ViLBERT(
        ViLBERTConfig(
            **FUSING, regions=TransformerConfig(width=16, **STREAM), connections=2, joint_heads=2, joint_width=20
        )
    ),
    "multitask": lambda: MultitaskVLM(MultitaskConfig(encoder=VisualBERTConfig(**FUSING), end_token=3)),
    "vqa": lambda: VQAModel(
        VQAConfig(**{k: v for k, v in FUSING.items() if k != "region_width"}, fusion=TransformerConfig(**LAYERS))
    ),
}


def seen_by_words(name, model, kept, T):
    """The weights (H, T, N) of words on the picture, of each layer, as this kind of model has them."""
    layers = [
        weights[0] for some in kept.values() for weights in some if weights.shape[-2:] in ((T, 4), (4 + T, 4 + T))
    ]
    assert len(layers) == (2 if name in ("vilbert", "vqa") else 3)
    return [w if w.shape[-1] == 4 else w[:, 4:, :4] for w in layers]


@pytest.mark.parametrize("name", READERS)
def test_the_words_of_a_question_that_is_answered_from_a_list(name):
    model, p = READERS[name]().eval(), processor(image_tokens=0)
    rows = tasks.attention_maps(PICTURES, model, p, prompt="which colour?")
    assert [row.title.removeprefix("which colour? ") in ("red", "blue") for row in rows] == [True] * 3
    tokens, mask = p.text(["which colour?"])
    tokens = tokens[:, : mask.sum()]
    assert rows[0].notes[0] == "[start]" and "".join(rows[0].notes[1:]) == "whichcolour?"
    assert len(rows[0].maps) == len(rows[0].notes) == tokens.shape[1] - 1  # all but the end token
    features = model.image_features(p.images(PICTURES[:1]))
    with record_attention(model) as kept:
        model.answer(ImageFeatures(features), tokens)
    want = torch.stack(seen_by_words(name, model, kept, tokens.shape[1])).mean(dim=(0, 1))[2]
    assert torch.allclose(rows[0].maps[2].flatten(), want / want.sum(), atol=1e-5)


def blip(**changes):
    sizes = dict(vocab_size=processor().vocab_size, context=CONTEXT, token_types=0, cross_attention_every=1)
    text = BERTConfig(width=24, depth=2, heads=2, **sizes)
    vision = VisionConfig(width=24, depth=1, heads=2, image_size=16, patch_size=8)
    return BLIP(BLIPConfig(vision=vision, text=text, embed_width=8, decode_token=3, end_token=3, **changes)).eval()


@pytest.mark.parametrize("class_token", [False, True])
def test_the_words_of_a_text_that_blip_matches(class_token):
    model, p = blip(class_token=class_token), processor(image_tokens=0)
    [row] = tasks.attention_maps(PICTURES[:1], model, p, prompt="red")
    assert row.title.startswith("red ") and row.title.endswith("%") and row.maps[0].shape == (2, 2)
    tokens, mask = p.text(["red"])
    with record_attention(model.encoder, only=lambda name: name.endswith("cross_attention")) as kept:
        model.match(p.images(PICTURES[:1]), tokens[:, : mask.sum()])
    want = torch.stack([weights[0] for [weights] in kept.values()]).mean(dim=(0, 1))[1, int(class_token) :]
    assert torch.allclose(row.maps[1].flatten(), want / want.sum(), atol=1e-5)


@pytest.mark.parametrize(("roles", "part"), [("caption", "decoder"), ("answer", "encoder")])
def test_the_words_of_a_text_that_blip_only_reads(roles, part):
    model, p = blip(roles=roles), processor(image_tokens=0)
    [row] = tasks.attention_maps(PICTURES[:1], model, p, prompt="red")
    assert row.title == "red"
    tokens, mask = p.text(["red"])
    tokens, features = tokens[:, : mask.sum()], model.image_features(p.images(PICTURES[:1]))
    with record_attention(getattr(model, part), only=lambda name: name.endswith("cross_attention")) as kept:
        if roles == "answer":
            model.encode_with_image(features, tokens)
        else:
            tokens[:, 0] = model.config.decode_token  # as every caption begins
            model(ImageFeatures(features), tokens)
    want = torch.stack([weights[0][0] for weights in kept.values()]).mean(dim=(0, 1))[1, 1:]
    assert torch.allclose(row.maps[1].flatten(), want / want.sum(), atol=1e-5)
    if roles == "caption":
        assert tasks.attention_maps(PICTURES[:1], model, p)[0].title == tasks.caption(PICTURES[0], model, p)
    else:
        with pytest.raises(UserError, match="answers a question, and generates no captions"):
            tasks.attention_maps(PICTURES[:1], model, p)


def test_of_tiles_the_whole_picture_is_drawn_and_the_class_token_left_out():
    model = llava(tiles=2, class_token=True)
    [row] = tasks.attention_maps(PICTURES[:1], model, processor(tiles=2, image_tokens=25))
    assert row.maps[0].shape == (2, 2) and row.maps[0].sum() == pytest.approx(1)


def test_grids_need_not_be_square():
    maps = to_maps(torch.ones(2, 3, 8), torch.zeros(1, 3, 16, 32))
    assert maps.shape == (2, 3, 2, 4) and torch.allclose(maps, torch.tensor(1 / 8))


def test_the_sheet_shows_the_pictures_and_the_maps():
    page = tasks.attention_sheet(PICTURES, clip(), processor())
    colours = {colour for _, colour in page.getcolors(1 << 24)}
    assert (255, 0, 0) in colours and page.width > 3 * 144 and page.height > 2 * 144
    page = tasks.attention_sheet(PICTURES[:2], colour_llava(), processor(), prompt="which colours?")
    assert page.height > 3 * 144


def test_heat_is_yellow_where_the_weight_is_and_grey_where_none_is():
    page = np.asarray(heat(plain("red"), [[1.0, 0.0], [0.0, 0.0]], 64)).astype(int)
    assert page.shape == (64, 64, 3)
    red, green, blue = page[2, 2]
    assert red > 200 and green > 180 and blue < 60
    assert np.ptp(page[60, 60]) < 5 and page[60, 60].max() < 80


def test_a_model_that_looks_at_nothing_is_one_sentence():
    with pytest.raises(
        UserError,
        match="this LanguageModel cannot show its attention to an image; it can answer questions, chat and continue",
    ):
        tasks.attention_maps(PICTURES, language_model(), processor())
    with pytest.raises(UserError, match="takes the mean of its features"):
        tasks.attention_maps(PICTURES, clip(pool="mean"), processor())
    with pytest.raises(
        UserError, match="this VisualBERT answers a question, and generates no captions: give it a prompt"
    ):
        tasks.attention_maps(PICTURES, READERS["visualbert"](), processor())
    unasked = VisualBERT(VisualBERTConfig(**{**FUSING, "answers": ()}))
    with pytest.raises(UserError, match="this VisualBERT cannot show its attention to an image; no task can use it"):
        tasks.attention_maps(PICTURES, unasked, processor(), prompt="which colour?")
    with pytest.raises(UserError, match=r"this SimpleNamespace cannot show its attention to an image; it can chat\."):
        tasks.attention_maps(PICTURES, SimpleNamespace(abilities={"chat"}), processor())
    with pytest.raises(UserError, match="no processor beside this CLIP"):
        tasks.attention_maps(PICTURES, clip(), None)
