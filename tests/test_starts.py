"""--starts_from, --freeze, --rates and --lora of every recipe, and the origins of weights that the rates follow from."""

import json
from dataclasses import replace

import pytest
import torch
from small_recipes import SIZES, small_recipe, small_world

import minivlm
import train
from minivlm import checkpoint, training
from minivlm.errors import UserError
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.layers.lora import lora_layers
from minivlm.layers.vocabulary import with_vocabulary
from minivlm.model import batch_norms
from minivlm.models.clip import CLIP
from minivlm.precision import HALF, as_stored, hold_for_training
from minivlm.recipes import plan
from minivlm.recipes.rates import part_rates

TEACHER = "blip-capfilt"  # starts from what proposes captions, and what learns is new
CONTINUED = [name for name in SIZES if name != TEACHER]
PREPARE = (torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A world, and beside it every recipe's model, with weights that no seed gives."""
    directory = small_world(tmp_path_factory.mktemp("starts"), train=60)
    for name in CONTINUED:
        job = started(small_recipe(name, directory))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in job.model.parameters():
                p += 0.01 * torch.randn(p.shape, generator=generator)
        checkpoint.save(directory / f"{name}-done", job.model, job.processor)
    return directory


def continued(name, bases, **changes):
    """The job of a recipe that starts from its own kind of model."""
    given = {"starts_from": bases / f"{name}-done"} if name in CONTINUED else {}
    return started(small_recipe(name, bases, **given | changes))


def started(recipe):
    job = recipe.start(quiet=True)
    job.prepare(*PREPARE)
    job.model.train()
    return job


def step_of(job):
    """One step at the rates of the recipe."""
    rates = part_rates(job.model, job.recipe)
    highest = max(rate for _, rate in rates.values())
    config = training.OptimiserConfig(learning_rate=highest)
    optimiser = training.make_optimiser(job.model, config, {p: rate for p, (_, rate) in rates.items()})
    sum(job.model.losses(**job.batch(0)).values()).backward()
    training.optimise(job.model, optimiser, highest, 1.0)
    return optimiser


@pytest.mark.parametrize("name", CONTINUED)
def test_every_recipe_starts_from_a_model_of_its_kind_as_that_was_left(name, bases):
    left, processor = minivlm.load(bases / f"{name}-done")
    job = continued(name, bases)
    state, kept = job.model.state_dict(), left.state_dict()
    assert state.keys() == kept.keys() and all(torch.equal(state[key], kept[key]) for key in kept)
    assert job.processor.tokenizer.to_str() == processor.tokenizer.to_str()
    batch = job.batch(0)
    with torch.no_grad():
        losses = [sum(model.eval().losses(**batch).values()) for model in (job.model, left)]
    assert losses[0] == losses[1]
    assert job.recipe.needs() == {} or "starts_from" in job.recipe.builds_on()


@pytest.mark.parametrize("name", SIZES)
def test_what_is_frozen_stays_to_the_bit_and_every_part_learns_at_its_rate(name, bases):
    """The rate is given to the part with most parameters, and what learns of the first other is frozen."""
    job = continued(name, bases)
    learns = lambda part: sum(p.numel() for p in part.parameters() if p.requires_grad)
    parts = sorted(
        (name for name, part in job.model.named_children() if learns(part)),
        key=lambda n: learns(job.model.get_submodule(n)),
    )
    frozen, rated = (parts[0], parts[-1]) if parts[1:] else (None, parts[-1])
    if rated == "vision" and frozen:
        frozen, rated = "vision", parts[-2]  # with batch norm, where it has some
    job = continued(name, bases, **{f"rates__{rated}": 5e-4} | ({"freeze": frozen} if frozen else {}))
    before = {key: tensor.clone() for key, tensor in job.model.state_dict().items()}
    optimiser = step_of(job)
    after = job.model.state_dict()
    same = {key: torch.equal(before[key], after[key]) for key in before}
    if frozen:
        tied = {id(p) for p in job.model.get_submodule(rated).parameters()}
        assert all(same[key] for key in before if key.startswith(f"{frozen}."))
        assert not all(id(p) in tied for p in job.model.get_submodule(frozen).parameters())
    assert not all(same[key] for key in before if key.startswith(f"{rated}."))
    rate_of = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    query = set(map(id, training.query_rates(job.model)))
    given = {
        rate_of[id(p)] for p in job.model.get_submodule(rated).parameters() if id(p) in rate_of and id(p) not in query
    }
    assert given and all(rate == pytest.approx(5e-4) for rate in given)
    own = {id(p) for p in job.model.get_submodule(rated).parameters()} | query
    others = [p for p in job.model.parameters() if p.requires_grad and id(p) not in own]
    assert all(rate_of[id(p)] == pytest.approx(job.recipe.optimiser.learning_rate) for p in others)


@pytest.mark.parametrize("name", CONTINUED)
def test_lora_learns_on_a_part_of_any_model_and_is_saved_resumed_merged_and_left_alone(name, bases, tmp_path):
    from minivlm.recipes.trained_parts import leave_adapter

    job = continued(name, bases, lora__rank=2)
    parts = job.model.lora.parts or ("",)
    layers = lora_layers(job.model)
    assert layers and all(name.startswith(parts) for name in layers)
    step_of(job)
    assert any(layer.lora_b.weight.abs().max() > 0 for layer in layers.values())
    left, _ = minivlm.load(bases / f"{name}-done")
    for layer_name, layer in layers.items():
        assert torch.equal(layer.base.weight, left.get_submodule(layer_name).weight)
    checkpoint.save(tmp_path / "checkpoint", job.model, job.processor)
    resumed = job.recipe.start(tmp_path / "checkpoint", quiet=True).model
    state = job.model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in resumed.state_dict().items())
    assert [n for n, p in resumed.named_parameters() if p.requires_grad] == [
        n for n, p in job.model.named_parameters() if p.requires_grad
    ]
    batch = job.batch(1)
    with torch.no_grad():
        apart = sum(job.model.eval().losses(**batch).values()).item()
    assert "merged" in leave_adapter(tmp_path, job.model, job.recipe)
    assert not lora_layers(job.model)
    with torch.no_grad():
        assert sum(job.model.losses(**batch).values()).item() == pytest.approx(apart, rel=1e-4)
    if name not in (
        "coca",
        "blip",
        "blip-noisy",
    ):  # beside LoRA these learn what two layers share, which no adapter holds
        alone, _ = minivlm.load(tmp_path / "adapter")
        assert lora_layers(alone).keys() == layers.keys()


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize(
    "name", ["lm", "t5", "captioner", "coca", "blip", "vqa", "llava", "blip2", "flamingo", "multitask"]
)
def test_a_small_step_is_not_lost_on_weights_in_half_precision_which_are_saved_as_they_came(
    name, half, bases, tmp_path
):
    model, processor = minivlm.load(bases / f"{name}-done", dtype=half)
    model.stored = half
    checkpoint.save(tmp_path / "half", model, processor)
    job = small_recipe(name, bases, starts_from=tmp_path / "half").start(quiet=True)
    hold_for_training(job.model.train(), torch.float32)
    learns = [p for p in job.model.parameters() if p.requires_grad]
    assert {p.dtype for p in learns} == {torch.float32}
    before = [p.detach().clone() for p in learns]
    for p in learns:
        p.grad = torch.ones_like(p)
    training.optimise(
        job.model, training.make_optimiser(job.model, training.OptimiserConfig(weight_decay=0)), 2e-5, 1e9
    )
    assert all(
        torch.allclose(was - p, torch.tensor(2e-5), rtol=0.05) or p in training.query_rates(job.model)
        for was, p in zip(before, learns, strict=True)
    )
    with as_stored(job.model):
        checkpoint.save(tmp_path / "left", job.model, job.processor)
    assert json.loads((tmp_path / "left/config.json").read_text())["dtype"] == str(half).removeprefix("torch.")


# ---- where weights come from, and the rates that follow ---------------------------------------------------------------


def highest(job):
    """Part → its rate."""
    return dict(part_rates(job.model, job.recipe).values())


@pytest.fixture(scope="module")
def published(bases):
    """The language model and the CLIP as other libraries publish them."""
    for name in ("lm", "clip"):
        model, processor = minivlm.load(bases / f"{name}-done")
        if name == "clip":
            model = CLIP(replace(model.config, vision=replace(model.config.vision, stem="patch")))
        else:
            model = LanguageModel(
                LanguageModelConfig(
                    width=16,
                    depth=2,
                    heads=2,
                    vocab_size=processor.vocab_size,
                    context=400,
                    end_tokens=(processor.end_token,),
                )
            )
        model.save_pretrained(bases / f"{name}-hf", processor=processor, layout="hf")
    return bases


def test_a_published_language_model_learns_slowly_also_over_runs_of_ours(published, tmp_path):
    job = small_recipe("lm", published, starts_from=published / "lm-hf").start(quiet=True)
    assert set(highest(job).values()) == {2e-5}
    checkpoint.save(tmp_path / "tuned", job.model, job.processor)
    assert (
        minivlm.load(tmp_path / "tuned")[0].pretrained
        == job.model.pretrained
        == {"token_embedding", "position_embedding", "transformer", "norm", "head"}
    )
    aligned = small_recipe("llava-stage1", published, language_from=tmp_path / "tuned").start(quiet=True)
    assert aligned.model.pretrained == {"language_model"}
    assert highest(aligned) == {"projector": 1e-3}  # the recipe's 2e-3 is for a small language model of its own
    checkpoint.save(tmp_path / "stage1", aligned.model, aligned.processor)
    tuned = small_recipe("llava", published, starts_from=tmp_path / "stage1").start(quiet=True)
    assert highest(tuned) == {"projector": 1e-3, "language_model": 2e-5}
    adapted = small_recipe("llava", published, starts_from=tmp_path / "stage1", lora__rank=2).start(quiet=True)
    assert highest(adapted) == {"projector": 1e-3, "language_model LoRA": 2e-4}
    one = {"starts_from": tmp_path / "stage1", "optimiser__learning_rate": 3e-5}
    assert set(highest(small_recipe("llava", published, **one).start(quiet=True)).values()) == {3e-5}


def test_a_published_tower_learns_more_slowly_still_and_what_is_new_as_the_recipe_has_it(published):
    job = small_recipe("blip", published, vision_from=published / "clip-hf").start(quiet=True)
    rates = highest(job)
    assert rates.pop("vision") == 1e-5 and set(rates.values()) == {1e-3}
    inside = small_recipe("multitask", published, vision_from=published / "clip-hf", freeze="none").start(quiet=True)
    assert inside.model.pretrained == {"encoder.vision"} and highest(inside)["encoder.vision"] == 1e-5
    ours = small_recipe("blip", published).start(quiet=True)
    assert ours.model.pretrained == frozenset() and set(highest(ours).values()) == {1e-3}


def test_a_larger_vocabulary_leaves_a_model_as_published_as_it_was():
    model = LanguageModel(LanguageModelConfig(width=16, depth=1, heads=2, vocab_size=50, context=20))
    model.pretrained = {"transformer"}
    assert with_vocabulary(model, 60).pretrained == {"transformer"}


# ---- what is chosen ----------------------------------------------------------------------------------------------------


def test_a_frozen_part_keeps_its_statistics_and_none_lets_all_learn(bases):
    job = continued("blip", bases, vision_from=bases / "clip-resnet", freeze="vision,encoder.blocks.0")
    assert job.model.frozen == ("vision", "encoder.transformer.blocks.0")
    tower = small_recipe("llava", bases, freeze="none").start(quiet=True).model.train()
    assert batch_norms(tower) and all(p.requires_grad for p in tower.parameters())
    assert not batch_norms(small_recipe("llava", bases).start(quiet=True).model.train())
    some = small_recipe("llava", bases, freeze="none,language_model").start(quiet=True).model
    assert some.frozen == ("language_model",) and all(p.requires_grad for p in some.vision.parameters())


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("lm", {"freeze": "vision"}, r"--freeze vision names no part of the model; there are token_embedding, .*head"),
        (
            "lm",
            {"freeze": "blocks.0-5"},
            r"--freeze blocks\.0-5 has blocks\.2, which is none; below transformer\.blocks there are 0 to 1\.",
        ),
        ("lm", {"freeze": "blocks.5-0"}, r"--freeze blocks\.5-0: the range 5-0 has no beginning before its end"),
        ("lm", {"freeze": "transformer,token_embedding,position_embedding,norm,head"}, r"leaves nothing to learn"),
        ("lm", {"rates__visoin": 1e-5}, r"--rates visoin names no part of the model; there are token_embedding"),
        ("lm", {"rates__transformer": -1}, r"rates\.transformer is -1\.0, but must be a finite number"),
        ("llava", {"rates__vision": 1e-5}, r"--rates\.vision: nothing in it learns; leave it out"),
        (
            "lm",
            {"lora__rank": 2, "lora__parts": "norm"},
            r"--lora: in norm no linear layer is called q_proj.*none at all",
        ),
        (
            "llava",
            {"lora__rank": 2, "lora__parts": "projector"},
            r"in projector no linear layer is called q_proj.*there are down_proj, up_proj",
        ),
        ("lm", {"starts_from": "clip-done"}, r"--starts_from \S+ holds a CLIP, but a LanguageModel is wanted\."),
        ("captioner", {"starts_from": "lm-done"}, r"holds a LanguageModel, but an ImageCaptioningModel is wanted\."),
        (
            "captioner",
            {"model__language__depth": 5},
            r"--model\.language\.depth is 5, but 2 in the model of --starts_from",
        ),
        ("lm", {"starts_from": "nowhere"}, r"nowhere does not exist"),
    ],
)
def test_what_cannot_be_chosen_is_told_in_one_sentence(name, given, message, bases):
    given = {"starts_from": f"{name}-done"} | given
    with pytest.raises(UserError, match=message) as caught:
        job = small_recipe(name, bases, **given | {"starts_from": bases / given["starts_from"]}).start(quiet=True)
        part_rates(job.model, job.recipe)
    assert "\n" not in str(caught.value)


def test_lora_on_what_is_new_is_refused(bases):
    with pytest.raises(
        UserError, match=r"--lora: .* is new, and adapters on it would learn nothing of use: give --starts"
    ):
        small_recipe("coca", bases, lora__rank=2).start(quiet=True)


def test_dropout_can_be_another_and_is_told(bases):
    job = continued("captioner", bases, model__language__dropout=0.25)
    assert job.model.config.language.dropout == 0.25
    assert any("dropout is 0.25 from now on" in note for note in job.notes())


def test_new_answers_get_rows_of_their_own_and_known_ones_keep_theirs(bases):
    from minivlm.recipes.fuse import with_answers

    for name in ("vqa", "multitask"):
        model, _ = minivlm.load(bases / f"{name}-done")
        encoder = lambda m: getattr(m, "encoder", m)
        known = encoder(model).config.answers
        assert with_answers(model, known[:2], seed=0) is model
        made = with_answers(model, (known[1], "something new", known[0]), seed=0)
        old, new = (encoder(m).answer_head.weight for m in (model, made))
        assert len(new) == 3 and torch.equal(new[0], old[1]) and torch.equal(new[2], old[0])
        assert torch.equal(encoder(made).bert.token_embedding.weight, encoder(model).bert.token_embedding.weight)


# ---- the command line --------------------------------------------------------------------------------------------------


def test_dotted_names_with_ranges_are_options_and_help_names_them():
    words = "lm --freeze text.blocks.0-5,vision --rates.text-model.blocks.0-5 1e-6 --rates.head 2e-5 --lora.parts a,b"
    recipe = plan.command_line(words.split())[1]
    assert recipe.freeze == ("text.blocks.0-5", "vision") and recipe.lora.parts == ("a", "b")
    assert recipe.rates == {"text_model.blocks.0-5": 1e-6, "head": 2e-5}
    assert plan.command_line(["lm", "--freeze", "none"])[1].freeze == ("none",)
    told = plan.help_text("lm", recipe)
    assert "--rates.PART" in told and "--lora.parts" in told and "--given" not in told
    for wrong, message in (("--rates 1", "--rates is 1, but must be"), ("--rates.a fast", r"--rates\.a is 'fast'")):
        with pytest.raises(UserError, match=message):
            plan.command_line(["lm", *wrong.split()])


def test_a_run_tells_its_rates_and_resumes_with_them(published, tmp_path, capsys):
    given = {"starts_from": published / "lm-hf", "data": published / "world", "out": tmp_path / "out", "freeze": "norm"}
    given |= {
        "rates.blocks.0": 1e-4,
        "steps": 2,
        "batch_size": 4,
        "save_every": 1,
        "device": "cpu",
        "precision": "fp32",
    }
    words = ["lm", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]
    train.main([*words, "--stop_at", "1"])
    train.main(
        ["lm", "--out", str(tmp_path / "out"), "--resume", "--stop_at", "2", "--device", "cpu", "--precision", "fp32"]
    )
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "2e-05 to 0.0001" in table["transformer"] and " frozen " in table["norm"] and "lm-hf" in table["transformer"]
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    rates = lines[0]["learning_rates"]
    assert rates["transformer.blocks.0"] == lines[0]["learning_rate"] == pytest.approx(5 * rates["token_embedding"])
    recorded = json.loads((tmp_path / "out/checkpoints/step-000001/training.json").read_text())["recipe"]
    assert recorded["rates"] == {"blocks.0": 1e-4} and recorded["freeze"] == ["norm"]


def test_answers_that_are_new_are_told(bases, tmp_path):
    model, processor = minivlm.load(bases / "vqa-done")
    from minivlm.recipes.fuse import with_answers

    checkpoint.save(tmp_path / "few", with_answers(model, ("yes", "perhaps"), seed=0), processor)
    job = small_recipe("vqa", bases, starts_from=tmp_path / "few").start(quiet=True)
    assert len(job.model.config.answers) > 2
    assert any("are new to the model in" in note for note in job.notes())
