"""The command line of train.py: names, overrides, mistakes."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from minivlm import config
from minivlm.datasets.source import Source
from minivlm.errors import UserError
from minivlm.recipes import RECIPES, plan
from minivlm.recipes.finish import no_options
from minivlm.recipes.folders import next_training
from minivlm.recipes.older_options import current_option, read_recipe
from minivlm.recipes.options import Options, dotted_names, split_arguments


def test_a_recipe_keeps_its_tower_on_a_folder_of_ones_own(tmp_path):
    lines = (json.dumps({"image": f"{i}.png", "caption": "a"}) + "\n" for i in range(40))
    (tmp_path / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    for i in range(40):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    for name in ("clip", "clip-resnet", "align"):
        of = plan.command_line([name, "--data", str(tmp_path)])[1]
        assert type(of.model.vision) is type(RECIPES[name].model.vision)
        assert of.data.augment and of.batch_size < 40


def test_the_sigmoid_starts_at_the_prior_of_the_batch_and_the_softmax_as_ever():
    of = lambda *more: plan.command_line(["clip", "--model.loss", *more])[1]
    recipe = of("sigmoid", "--batch_size", "64")
    assert torch.tensor(recipe.model.initial_bias).sigmoid().item() == pytest.approx(1 / 64)
    assert recipe.rates["loss"] > recipe.optimiser.learning_rate
    chosen = of("sigmoid", "--model.initial_bias", "-10", "--optimiser.learning_rate", "2e-3", "--rates.loss", "1e-3")
    assert (chosen.model.initial_bias, chosen.optimiser.learning_rate, chosen.rates) == (-10, 2e-3, {"loss": 1e-3})
    published = of("sigmoid", "--starts_from", "google/siglip-base-patch16-224")
    assert (published.model.initial_bias, published.rates) == (-10, {})
    assert of("softmax") == replace(RECIPES["clip"], given=("model.loss",))


def test_a_folder_that_gives_nothing_to_train_on_is_told_so(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = {"image": "a.png", "caption": "a", "split": "test"}
    (tmp_path / "captions.jsonl").write_text(json.dumps(line), encoding="utf-8")
    with pytest.raises(UserError, match="in its val and test split, and nothing to train on: give some"):
        plan.command_line(["clip", "--data", str(tmp_path)])


def test_a_class_name_too_long_to_judge_by_is_refused_before_the_first_step(tmp_path):
    name = "".join(chr(97 + (7 * i + i * i) % 26) for i in range(150))  # no two parts of it alike, so hardly merged
    lines = [{"image": f"{i}.png", "caption": "a b", "label": name if i % 2 else "cat"} for i in range(20)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    recipe = plan.command_line(["clip", "--data", str(tmp_path)])[1]
    with pytest.raises(UserError, match=r"makes a sentence of \d+ tokens, but the model reads 64: shorten the name"):
        recipe.start(quiet=True)


def test_minus_h_is_help_as_everywhere():
    assert plan.command_line(["lm", "-h"])[2].help


def test_a_file_that_is_called_like_an_option_is_proposed_so_that_it_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-o").mkdir()
    assert no_options("python sample.py search -o 'my data' 'a b' --top 8") == (
        "python sample.py search ./-o 'my data' 'a b' --top 8"
    )
    assert no_options('python sample.py complete out/lm "a b"') == 'python sample.py complete out/lm "a b"'


def test_without_arguments_the_default_recipe_as_it_stands():
    name, recipe, options = plan.command_line([])
    assert name == "clip" and recipe == RECIPES["clip"] and options == Options()


def test_dotted_names_replace_nested_fields_and_nothing_else():
    argv = [
        "clip",
        "--steps",
        "7",
        "--model.vision.depth=2",
        "--optimiser.learning_rate",
        "1e-2",
        "--compile",
        "--out",
        "2024",
    ]
    _, recipe, options = plan.command_line(argv)
    base = RECIPES["clip"]
    assert (recipe.steps, recipe.model.vision.depth, recipe.optimiser.learning_rate) == (7, 2, 0.01)
    assert recipe.model.text == base.model.text and recipe.batch_size == base.batch_size
    assert options.compile is True and options.out == "2024"


def test_values_that_only_fit_together_are_given_together():
    _, recipe, _ = plan.command_line(["--model.vision.image_size", "60", "--model.vision.patch_size", "6"])
    assert (recipe.model.vision.image_size, recipe.model.vision.patch_size) == (60, 6)


def test_a_list_is_given_with_commas_or_as_json():
    for given in ("caption,search", '["caption", "search"]'):
        _, recipe, _ = plan.command_line(["multitask", "--model.tasks", given])
        assert recipe.model.tasks == ("caption", "search")
    _, recipe, _ = plan.command_line(["multitask", "--model.tasks", "caption"])
    assert recipe.model.tasks == ("caption",)
    _, recipe, _ = plan.command_line(["blip", "--model.vision_layers", "-2,-1"])
    assert recipe.model.vision_layers == (-2, -1)
    with pytest.raises(UserError, match=r"model.tasks\[1\] is 'singing', but must be one of"):
        plan.command_line(["multitask", "--model.tasks", "caption,singing"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["clop"], "unknown recipe 'clop'.*clip"),
        (["clip", "--model.vision.deph", "3"], "unknown option --model.vision.deph.*model.vision.depth"),
        (["clip", "--stesp", "3"], "unknown option --stesp.*steps"),
        (["clip", "--steps", "many"], "--steps is 'many', but must be int"),
        (["clip", "--steps"], "--steps has no value behind it: give it one, or leave it out"),
        (["clip", "--steps", "3", "--steps=4"], "--steps is given twice, as 3 and as 4"),
        (["clip", "--model.vision.patch_size", "0"], r"--model\.vision\.patch_size is 0, but must be at least 1"),
        (["clip", "--model.text.depth", "0"], r"--model\.text\.depth is 0, but must be at least 1"),
        (["llava", "--lora.rank", "-1"], r"--lora\.rank is -1, but must be at least 1"),
        (["clip", "--seed", "-1", "--steps", "5"], r"^--seed -1: seed is -1, but must be from 0"),
        (["clip", "--seed", str(2**64)], "--seed is a number of 20 digits, but must be int"),
        (["clip", "--seed", "9" * 5000], r"--seed is '9{79}…, but must be int"),
        (["clip", "--steps", "[" * 100_000], r"--steps is '\[{79}…, but must be int"),
        (["clip", "--stop_at", "0"], "--stop_at 0: stop_at is 0, but must be at least 1"),
        (["clip", "--data", ""], "data is empty, but must name a folder"),
        (
            ["clip", "--optimiser.learning_rate", "NaN"],
            r"--optimiser\.learning_rate is nan, but must be a finite number",
        ),
        (["clip", "--model.vision.patch_size", "7"], "--model.vision.patch_size 7: .*not a multiple of patch_size 7"),
        (["clip", "--model.loss", "triplet"], "--model.loss is 'triplet', but must be one of softmax, sigmoid"),
        (["clip", "siglip"], "one recipe at a time"),
        (["clip", "--batch_size", "0"], "batch_size"),
        (["clip", "--resume", "--out", "nowhere"], "no checkpoint in nowhere"),
    ],
)
def test_each_mistake_is_one_sentence(argv, message):
    with pytest.raises(UserError, match=message):
        plan.command_line(argv)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_goes_through_json_without_loss(name):
    recipe = RECIPES[name]
    again = config.from_dict(type(recipe), json.loads(json.dumps(config.to_dict(recipe))))
    assert again == recipe


def test_help_names_every_field_and_list_every_recipe():
    _, recipe, _ = plan.command_line(["clip"])
    text = plan.help_text("clip", recipe)
    assert "--model.vision.depth" in text and "--optimiser.learning_rate" in text and "--resume" in text
    assert all(name in plan.list_text() for name in RECIPES)


def test_arguments_split_into_words_and_options():
    assert split_arguments(["clip", "--a", "1", "--b", "--c=x=y", "--d-e", "-3"]) == (
        ["clip"],
        {"a": "1", "b": True, "c": "x=y", "d_e": "-3"},
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["blip", "--wrong", "0.4"], "--wrong is called --data.wrong_captions now."),
        (["llava-stage1", "--projector=linear"], "--projector is called --model.projector now."),
        (["blip2-stage1", "--qformer.depth", "2"], "--qformer.depth is called --model.qformer.depth now."),
        (["blip2-stage1", "--qformer.places", "2"], "--qformer.places is called --model.qformer.positions now."),
        (["blip", "--directory", "photos"], "--directory is called --data.directory now."),
        (["flamingo", "--lessons", "0"], "--lessons is called --data.lessons now."),
        (
            ["lm", "--data.pack", "true"],
            "--data.pack no longer exists: it packed several texts into a row. Leave it out.",
        ),
    ],
)
def test_an_option_that_has_moved_or_is_gone_is_answered_by_a_sentence_of_its_own(argv, message):
    with pytest.raises(UserError) as refused:
        plan.command_line(argv)
    assert str(refused.value) == message


def test_an_option_that_a_recipe_never_had_has_no_other_address():
    with pytest.raises(UserError, match=r"unknown option --projector\."):
        plan.command_line(["lm", "--projector", "linear"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_data_and_what_it_starts_from_under_the_same_names(name):
    recipe = RECIPES[name]
    assert recipe.data.directory == "data/shapes" and set(recipe.builds_on()) <= set(plan.STARTS)
    left = [option for option in dotted_names(recipe) if current_option(option)]
    assert left == []  # no recipe has an option where earlier versions had it


def test_a_recipe_that_an_earlier_version_recorded_is_read():
    recorded = {"type": "BLIPRecipe", "summary": "s", "steps": 3, "batch_size": 4, "vision_from": "eyes", "wrong": 0.4}
    recorded |= {"directory": "photos", "vocab_size": 300, "questions": False, "vision_layers": [-2], "embed_width": 8}
    recorded["optimiser"] = config.to_dict(RECIPES["blip"].optimiser)
    recipe = read_recipe(RECIPES["blip"], recorded, "recipe")
    assert (recipe.vision_from, recipe.steps, recipe.model.vision_layers, recipe.model.embed_width) == (
        "eyes",
        3,
        (-2,),
        8,
    )
    data = recipe.data
    assert (data.directory, data.vocab_size, data.wrong_captions, data.questions) == ("photos", 300, 0.4, False)
    with pytest.raises(UserError, match="recipe has an unknown field 'wings'"):
        read_recipe(RECIPES["blip"], recorded | {"wings": 2}, "recipe")


def test_a_recorded_option_that_is_gone_is_read_where_it_did_nothing_and_refused_where_it_did():
    recorded = config.to_dict(RECIPES["lm"])
    recorded["data"]["pack"] = False
    assert read_recipe(RECIPES["lm"], recorded, "recipe") == RECIPES["lm"]
    recorded["data"]["pack"] = True
    with pytest.raises(UserError, match=r"packed several texts into a row, .* \(--data\.pack\): train it anew"):
        read_recipe(RECIPES["lm"], recorded, "recipe")


def test_how_a_folder_is_read_is_handed_to_all_that_is_trained_on_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    lines = [{"image": f"{i}.png", "caption": "a", "filepath": f"{i}.png", "title": "a"} for i in range(40)]
    (tmp_path / "photos" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for i in range(40):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / f"{i}.png")
    given = ["--data.caption_key", "title", "--data.image_key", "filepath", "--data.cache", "20GB"]
    _, recipe, options = plan.command_line(["captioner", "--data", "photos", *given])
    assert recipe.data.source == Source("photos", image_key="filepath", caption_key="title", cache="20GB")
    _, recipe, options = plan.command_line(["llava", "--data", "photos", *given])
    trained = plan.chain("llava", recipe, options)
    assert len(trained) > 2 and all(part.data.source == recipe.data.source for _, part, _ in trained)
    assert next_training("clip", recipe.data.source)[0].endswith(
        " ".join(["--data photos", *given[2:4], *given[:2], *given[4:]])
    )
