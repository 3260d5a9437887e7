"""Modules of a user's own in models of ours: built, trained, saved, and loaded into what is given again."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import minivlm
from minivlm.errors import UserError
from minivlm.info import info
from minivlm.layers import (
    BERTConfig,
    LanguageModel,
    LanguageModelConfig,
    TextConfig,
    TextTransformer,
    TransformerConfig,
    VisionConfig,
    VisionTransformer,
)
from minivlm.models.captioner import ImageCaptioningConfig, ImageCaptioningModel
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.models.llava import LLaVA, LLaVAConfig
from minivlm.models.multitask import MultitaskConfig, MultitaskVLM
from minivlm.models.uniter import UNITERConfig
from minivlm.models.vqa import VQAConfig, VQAModel
from minivlm.testing import assert_same

WIDTH, S = 20, 16
TOKENS = torch.tensor([[1, 5, 6, 7, 8, 2], [1, 9, 3, 2, 0, 0]])
MASK = TOKENS != 0


class Tower(nn.Module):
    """Convolutions of a user's: a grid of 2 × 2, with a summary in front."""

    image_size, leading = S, 1

    def __init__(self, width=WIDTH):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 8, stride=8), nn.BatchNorm2d(width)
        self.register_buffer("shift", torch.ones(1), persistent=False)

    def features(self, images, *, layer=-1):
        grid = self.norm(self.conv(images)).flatten(2).transpose(1, 2) + self.shift
        return torch.cat([grid.mean(dim=1, keepdim=True), grid], dim=1)

    def forward(self, images):
        return self.features(images)[:, 0]


class Text(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.embedding = nn.Embedding(40, width)

    def forward(self, tokens, mask):
        return self.embedding(tokens) * mask[..., None]


LAYERS = dict(width=24, depth=2, heads=2)
VQA = VQAConfig(
    vision=None,
    text=BERTConfig(vocab_size=40, context=10, **LAYERS),
    fusion=TransformerConfig(cross_attention_every=1, **LAYERS),
    answers=("yes", "no", "two"),
)
STAND_IN = VisionConfig(image_size=S, patch_size=8, width=WIDTH, depth=1, heads=2)
ENCODER = UNITERConfig(text=VQA.text, vision=STAND_IN, region_width=WIDTH, answers=VQA.answers)
MULTITASK = MultitaskConfig(encoder=ENCODER, embed_width=8, end_token=2)


SMALL = LanguageModelConfig(vocab_size=40, context=20, **LAYERS)
CLIP_CONFIG = CLIPConfig(vision=None, text=TextConfig(vocab_size=40, context=10, **LAYERS), embed_width=8)
LLAVA = LLaVAConfig(vision=None, language=SMALL, image_token=39, vision_layers=(-1,))
CAPTIONER = ImageCaptioningConfig(vision=None, language=SMALL)
IN_FRONT = torch.cat([torch.full((2, 4), 39), TOKENS], dim=1)


class Vector(Text):
    def forward(self, tokens, mask):
        return super().forward(tokens, mask).sum(dim=1)


def answers(model):
    return lambda images: model.answer(images, TOKENS, MASK)


def similarities(model):
    return lambda images: model(images, TOKENS, MASK).logits_per_image


MODELS = {  # name → (build(**modules), the modules, what it computes of images, one of its losses)
    "vqa": (lambda **own: VQAModel(VQA, **own), {"vision": Tower}, answers, "answers"),
    "vqa, text": (lambda **own: VQAModel(VQA, **own), {"vision": Tower, "text": Text}, answers, "answers"),
    "multitask": (lambda **own: MultitaskVLM(MULTITASK, **own), {"vision": Tower}, answers, "answer"),
    "clip": (lambda **own: CLIP(CLIP_CONFIG, **own), {"vision": Tower, "text": Vector}, similarities, "contrast"),
    "captioner": (
        lambda **own: ImageCaptioningModel(CAPTIONER, **own),
        {"vision": Tower},
        lambda model: lambda images: model(images, TOKENS, MASK).logits,
        "next token",
    ),
    "llava": (
        lambda **own: LLaVA(LLAVA, **own),
        {"vision": Tower},
        lambda model: lambda images: model(images, IN_FRONT).logits,
        "next token, placeholders",
    ),
}
BATCHES = {
    "contrast": dict(tokens=TOKENS, mask=MASK),
    "next token": dict(tokens=TOKENS, labels=TOKENS.masked_fill(~MASK, -100)),
    "next token, placeholders": dict(tokens=IN_FRONT, labels=IN_FRONT.masked_fill(IN_FRONT == 39, -100)),
    "answers": dict(tokens=TOKENS, mask=MASK, answers=torch.eye(3)[[2, 0]]),
    "answer": dict(tokens=TOKENS, mask=MASK, question=TOKENS, question_mask=MASK, answers=torch.eye(3)[[2, 0]]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_modules_of_ones_own_learns_and_comes_back_with_them(name, tmp_path):
    build, kinds, compute, loss = MODELS[name]
    own = {part: kind() for part, kind in kinds.items()}
    model, images = build(**own), torch.randn(2, 3, S, S)
    assert all(p.requires_grad for p in own["vision"].parameters())
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    before = own["vision"].conv.weight.clone()
    for _ in range(3):
        losses.append(sum(model.losses(images=images, **BATCHES[loss]).values()))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0] and not own["vision"].conv.weight.equal(before)

    model.eval().save_pretrained(tmp_path)
    assert f"{Tower.__module__}:Tower" in (tmp_path / "config.json").read_text()
    fresh = {part: kind() for part, kind in kinds.items()}
    back = type(model).from_pretrained(tmp_path, **fresh)
    assert back.config == model.config
    assert any(part is fresh["vision"] for part in back.modules())
    assert_same(compute(back)(images), compute(model)(images), tolerance=0)
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters()}
    again, _ = minivlm.load(tmp_path, **{part: kind() for part, kind in kinds.items()})
    assert_same(compute(again)(images), compute(model)(images), tolerance=0)
    assert f"{type(model).__name__}, saved by" in info(tmp_path)
    if "vision" in kinds:
        assert f"your vision     {__name__}:Tower, to be given as vision=…\n" in info(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_without_its_module_or_with_another_a_directory_is_refused_by_name(name, tmp_path):
    build, kinds, *_ = MODELS[name]
    build(**{part: kind() for part, kind in kinds.items()}).save_pretrained(tmp_path)
    rest = {part: kind() for part, kind in kinds.items() if part != "vision"}
    with pytest.raises(UserError, match=r"saved with a module of your own, .*:Tower: give it, as vision="):
        minivlm.load(tmp_path, **rest)
    with pytest.raises(
        UserError, match=r"width.* \(?20.*\), but .*width.* \(?12.*\)|of width 12, but region_width is 20"
    ):
        minivlm.load(tmp_path, vision=Tower(12), **rest)
    other = Tower()
    other.extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"vision\.extra"):
        minivlm.load(tmp_path, vision=other, **rest)
    with pytest.raises(UserError, match="was not saved with a module of your own as tower: leave out tower="):
        minivlm.load(tmp_path, vision=Tower(), tower=Tower(), **rest)
    with pytest.raises(UserError, match=r"vision of this \w+Config is .*:Tower: give the module, as vision="):
        model = minivlm.load(tmp_path, vision=Tower(), **rest)[0]
        type(model)(model.config, **rest)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_tower_is_refused_by_what_a_tower_has(name):
    build, kinds, *_ = MODELS[name]
    rest = {part: kind() for part, kind in kinds.items() if part != "vision"}
    has = r"features\(images, layer=…\) → \(M, N, C\)" if name != "clip" else r"a call, tower\(images\) → \(M, E\)"
    with pytest.raises(UserError, match=f"this Identity .*: a vision tower has {has}, and image_size, pixels a side"):
        build(vision=nn.Identity(), **rest)


def test_what_a_tower_or_a_text_encoder_gives_must_have_the_right_axes():
    class Flat(Tower):
        def features(self, images, *, layer=-1):
            return super().features(images)[:, 0]

    class Broken(Tower):
        def features(self, images):
            return images

    class Sizeless(Tower):
        image_size = None

    with pytest.raises(UserError, match=r"this Flat gave \(1, 20\) for one sample, but a vision tower has features"):
        VQAModel(VQA, vision=Flat())
    with pytest.raises(UserError, match=r"this Broken could not be called .*layer.*a vision tower has features"):
        VQAModel(VQA, vision=Broken())
    with pytest.raises(UserError, match="this Sizeless does not name its image_size: a vision tower has"):
        VQAModel(VQA, vision=Sizeless())
    with pytest.raises(UserError, match=r"this Identity could not be called .*tokens \(B, T\), mask \(B, T\)"):
        VQAModel(VQA, vision=Tower(), text=nn.Identity())
    with pytest.raises(UserError, match="the config describes neither this part nor was a module given"):
        VQAModel(VQA)
    with pytest.raises(ValueError, match="fusion takes text of width 16"):
        VQAModel(VQA, vision=Tower(), text=Text(16))
    with pytest.raises(
        UserError, match="a TextTransformer cannot be the text of a model that takes BERTConfig or OwnText"
    ):
        VQAModel(VQA, vision=Tower(), text=TextTransformer(CLIP_CONFIG.text))


def test_ready_modules_alone_are_short_for_a_config_of_them(tmp_path):
    images, language = torch.randn(2, 3, S, S), LanguageModel(SMALL)
    model = VQAModel(Tower(), Text(), fusion_dim=24, num_answers=5).eval()
    assert model(images, TOKENS, MASK).shape == (2, 5) and model.config.answers == tuple("01234")
    captioner = ImageCaptioningModel(Tower(), language, 40).eval()
    assert captioner.language_model is language and captioner.config.language == SMALL
    assert captioner(images, TOKENS, MASK).logits.shape == (2, 6, 40)
    captioner.save_pretrained(tmp_path)
    back = ImageCaptioningModel.from_pretrained(tmp_path, vision=Tower())
    assert_same(back(images, TOKENS).logits, captioner(images, TOKENS).logits, tolerance=0)
    assert LLaVA(replace(LLAVA, vision=STAND_IN), language=language).language_model is language
    with pytest.raises(UserError, match="this Identity is no vision tower, as it has no features: a vision tower has"):
        VQAModel(nn.Identity(), nn.Identity(), fusion_dim=64, num_answers=10)
    with pytest.raises(UserError, match=r"this Identity is no LanguageModel of minivlm.*language=LanguageModelConfig"):
        ImageCaptioningModel(Tower(), nn.Identity(), 300)
    with pytest.raises(UserError, match="vocab_size is 300, but the language model knows 40 tokens"):
        ImageCaptioningModel(Tower(), language, 300)
    with pytest.raises(ValueError, match="fusion takes text of width 24"):
        VQAModel(Tower(), Text(), fusion_dim=64)


def test_measuring_leaves_the_module_as_it_was():
    tower = Tower()
    tower.norm.eval()
    VQAModel(VQA, vision=tower)
    assert tower.training and not tower.norm.training and tower.norm.num_batches_tracked == 0


def test_a_ready_tower_of_ours_needs_no_module_to_come_back(tmp_path):
    tower = VisionTransformer(replace(STAND_IN, depth=2))
    model = VQAModel(VQA, vision=tower).eval()
    assert model.vision is tower and model.config.vision == tower.config
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, S, S)
    assert_same(VQAModel.from_pretrained(tmp_path)(images, TOKENS), model(images, TOKENS), tolerance=0)
    with pytest.raises(UserError, match="was not saved with a module of your own as vision: leave out vision="):
        VQAModel.from_pretrained(tmp_path, vision=tower)


def test_a_directory_whose_sizes_were_changed_is_refused(tmp_path):
    ImageCaptioningModel(CAPTIONER, vision=Tower()).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    vision = stored["config"]["vision"]
    assert vision["type"] == "OwnTower" and (vision["counts"], vision["widths"]) == ([4], [WIDTH])
    for changes, message in (
        ({"vision": vision | {"counts": []}}, "layers, counts and widths of a vision tower are not equally many"),
        ({"vision": vision | {"layers": [-2]}}, "layer -1 of .*:Tower was not measured"),
        ({"language": None}, "the config describes neither this part nor was a module given"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(stored | {"config": stored["config"] | changes}))
        for read in (info, lambda path: minivlm.load(path, vision=Tower())):
            with pytest.raises(UserError, match=message):
                read(tmp_path)


def test_a_module_of_ones_own_has_no_published_form(tmp_path):
    with pytest.raises(UserError, match=r"layout='hf' has no place for .*:Tower, .*:Vector: leave it out"):
        CLIP(CLIP_CONFIG, vision=Tower(), text=Vector()).save_pretrained(tmp_path, layout="hf")
