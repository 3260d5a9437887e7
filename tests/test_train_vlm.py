"""LLaVA's two stages on backbones that are published: what is handed on, where a new connector starts, what it tells apart."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import train
from minivlm import checkpoint
from minivlm.errors import UserError
from minivlm.layers import ImageFeatures, PerceiverConfig, ResNetConfig, VisionConfig
from minivlm.models.llava import LLaVA, LLaVAConfig, scale_projector
from minivlm.origins import mark_published
from minivlm.recipes import plan
from minivlm.recipes.llava import LLAVA_RECIPES, Projection, scaled
from tests.small_recipes import small_job, small_world
from tests.speakers import language

SHORT = ["--steps", "2", "--batch_size", "4", "--save_every", "2", "--device", "cpu", "--precision", "fp32"]


def rows(folder, kind, n=24):
    for i in range(n):
        colour = ("red", "green", "blue")[i % 3]
        Image.new("RGB", (20, 20), colour).save(folder / f"{i}.png")
        row = {"image": f"{i}.png", "split": ("train", "train", "train", "val", "test")[i % 5]}
        asked = {"question": "which colour?", "answer": colour}
        yield row | (asked if kind == "vqa" else {"caption": f"all is {colour}"})


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """A vision tower and a language model, both tiny."""
    root = tmp_path_factory.mktemp("backbones")
    small_world(root, train=64)
    small_job("vlm-stage1", root)  # and what it builds on
    return root


@pytest.fixture(params=["captions", "vqa"])
def data(request, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = [json.dumps(row) + "\n" for row in rows(folder, request.param)]
    (folder / f"{request.param}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def sources(backbones, vision="clip"):
    return ["--vision_from", str(backbones / vision), "--language_from", str(backbones / "lm")]


@pytest.mark.parametrize("name", ["llava", "vlm"])
def test_what_stage_two_is_given_goes_to_its_stage_one_which_is_trained_first(name, backbones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    todo = plan.chain(*plan.command_line([name, *sources(backbones), "--data", str(backbones / "world")]))
    assert [part for part, _, _ in todo] == [f"{name}-stage1", name]
    (_, first, options), (_, second, _) = todo
    assert (first.vision_from, first.language_from) == (str(backbones / "clip"), str(backbones / "lm"))
    assert second.starts_from == options.out == f"out/world-{name}-stage1"
    assert replace(first, data=LLAVA_RECIPES[f"{name}-stage1"].data).model == LLAVA_RECIPES[f"{name}-stage1"].model


def test_a_tower_alone_is_handed_on_and_the_language_model_is_trained(backbones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    todo = plan.chain(*plan.command_line(["llava", *sources(backbones)[:2]]))
    assert [part for part, _, _ in todo] == ["lm", "llava-stage1", "llava"]
    assert todo[1][1].vision_from == str(backbones / "clip") and todo[1][1].language_from == "out/lm"


def test_the_recipe_for_published_backbones_trains_none_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    todo = plan.chain(*plan.command_line(["vlm"]))
    assert [part for part, _, _ in todo] == ["vlm-stage1", "vlm"]
    assert todo[0][1].vision_from == "facebook/dinov2-small"


def test_both_stages_from_one_command_on_captions_or_on_questions_and_no_other_backbone_behind_it(
    data, backbones, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    command = ["vlm", "--data", str(data), *SHORT]
    train.main([*command, *sources(backbones)])
    told = capsys.readouterr().out
    assert "trained first: vlm-stage1 (out/photos-vlm-stage1)" in told
    model, _ = checkpoint.load("out/vlm")
    assert model.config.projector == "pixel_shuffle" and model.config.image_tokens == 1
    train.main(
        [*command, *sources(backbones), "--lora.rank", "2", "--out", "out/thin"]
    )  # stage 1 is there, and the same
    assert "trained first" not in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"--vision_from elsewhere .* out/photos-vlm-stage1 is there, made from .*clip: "
    ):
        train.main([*command, "--vision_from", "elsewhere"])
    with pytest.raises(UserError, match=r"--language_from b is for a model that is trained first, but .* is there"):
        train.main(["vlm", "--starts_from", str(backbones / "clip"), "--language_from", "b"])


def test_a_factor_that_does_not_divide_the_grid_is_refused_before_the_first_step(backbones, tmp_path):
    argv = ["vlm-stage1", *sources(backbones), "--data", str(backbones / "world"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"the model cannot be built: pixel_shuffle 3 does not divide .* 4 × 4 .* 2, 4"):
        train.main([*argv, "--model.pixel_shuffle", "3"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["linear", "mlp", "pixel_shuffle", "resampler", "qformer"])
def test_every_connector_is_chosen_by_name_for_a_resnet_as_well(kind):
    vision = ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=64)
    config = Projection(projector=kind).config(vision, language(), 5)
    model = LLaVA(config)
    images = torch.randn(2, 3, 64, 64)
    assert model.projector(model.image_features(images)).shape[:2] == (2, config.image_tokens)


def lengths(model, images):
    words = model.language_model.token_embedding.weight.norm(dim=-1).mean()
    return model.projector(model.image_features(images)).norm(dim=-1).mean() / words


@pytest.mark.parametrize(("kind", "starts_there"), [("mlp", False), ("resampler", True), ("pixel_shuffle", True)])
def test_a_new_connector_starts_at_the_length_of_words_but_for_an_mlp_before_a_model_of_ours(
    kind, starts_there, backbones
):
    work = small_job("llava-stage1", backbones, vision_from=str(backbones / "clip"), model__projector=kind)
    images = work.processor.images([image for [image] in work.samples.conversations.images(range(32))])
    with torch.no_grad():
        assert (abs(lengths(work.model, images).item() - 1) < 0.05) == starts_there


def test_an_mlp_before_a_published_language_model_starts_at_the_length_of_words(backbones):
    recipe = small_job("llava-stage1", backbones).recipe
    made = recipe.start(quiet=True)
    mark_published(made.model.language_model)
    scaled(replace(made, prepare=lambda *_: None)).prepare(torch.device("cpu"), torch.float32)
    images = made.processor.images([image for [image] in made.samples.conversations.images(range(32))])
    with torch.no_grad():
        assert abs(lengths(made.model, images).item() - 1) < 0.05


def share_of_its_own(model, features):
    """How far an image's tokens are from the mean over all images, beside the length of that mean."""
    with torch.no_grad():
        tokens = model.projector(features)
    mean = tokens.mean(dim=0, keepdim=True)
    return ((tokens - mean).norm(dim=-1).mean() / mean.norm(dim=-1).mean()).item()


def test_different_images_stay_different_behind_a_resampler_that_learns():
    """What all images share in a batch is learnt first. It must not drown what each of them is."""
    torch.manual_seed(0)
    vision = VisionConfig(width=32, depth=1, heads=2, image_size=64, patch_size=8)
    sizes = PerceiverConfig(width=64, depth=2, heads=4, latents=4, context_width=32)
    fields = dict(vision=vision, language=language(), image_token=5, projector="resampler", resampler=sizes)
    model = LLaVA(LLaVAConfig(**fields))
    model.freeze("vision", "language_model")
    kinds, N = torch.randn(8, 1, 32), 64  # of images; each has patches of its own around what its kind is
    features = torch.randn(1, 1, 32) + kinds + torch.randn(8, N, 32)
    scale_projector(model, ImageFeatures(features))
    assert share_of_its_own(model, features) > 0.5
    optimiser = torch.optim.AdamW(model.projector.parameters(), lr=2e-3)
    tokens = torch.cat([torch.full((8, 4), 5), torch.full((8, 1), 7), torch.randint(20, 60, (8, 1))], dim=1)
    labels = tokens.masked_fill(torch.arange(6) < 5, -100)
    for _ in range(30):
        loss = model.losses(tokens, labels, ImageFeatures(features))["next token"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert share_of_its_own(model, features) > 0.3
