"""BLIP and CapFilt through train.py: tiny runs, what each may change, and what is asked of what they leave."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import minivlm
import sample
import train
from minivlm import tasks
from minivlm.datasets.noisy import NoisyPairs
from minivlm.datasets.shapes import ShapesWorld, make_shapes
from minivlm.datasets.shapes.negatives import is_true
from minivlm.datasets.shapes.questions import true_questions
from minivlm.errors import UserError
from minivlm.layers import TextConfig, VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor
from minivlm.recipes import RECIPES
from minivlm.recipes.capfilt import PROPOSED, WEB, Bootstrapped, Judged, judge
from minivlm.recipes.folders import for_data
from tests.test_train_captioner import SHORT, arguments, weights

SIZES = {
    f"model.{name}": value
    for name, value in {"text.width": 16, "text.depth": 2, "text.heads": 2, "embed_width": 8}.items()
}
SIZES |= {"data.vocab_size": 400}
TINY = SHORT | SIZES | {"optimiser.warmup": 0}
WIDTH = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory, little_to_judge_by):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=48, image_size=32, progress=False)
    return directory


@pytest.fixture(scope="module")
def eyes(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("eyes") / "clip"
    ids = Processor.train(list(ShapesWorld(world, "train").texts()), vocab_size=400, image_size=32, context=40)
    vision = VisionConfig(image_size=32, patch_size=16, width=WIDTH, depth=1, heads=2)
    text = TextConfig(width=16, depth=1, heads=2, vocab_size=ids.vocab_size, context=40, end_token=ids.end_token)
    CLIP(CLIPConfig(vision=vision, text=text, embed_width=16), seed=1).save_pretrained(out, processor=ids)
    return out


@pytest.fixture(scope="module")
def built(world, eyes):
    """The three recipes one after the other, beside the eyes that they start from."""
    out, base = eyes.parent, TINY | {"data": world, "vision_from": eyes}
    train.main(arguments("blip", **base, out=out / "blip", **{"model.momentum.queue": 16}))
    train.main(arguments("blip-noisy", **base, freeze_vision="true", out=out / "noisy"))
    options = dict(starts_from=out / "noisy", data__threshold=0.05, data__proposed=32, out=out / "capfilt")
    train.main(arguments("blip-capfilt", **base, **options))
    return out


def recipe_of(name, world, *, data=None, **changes):
    recipe = RECIPES[name]
    text = replace(recipe.model.text, width=16, depth=1, heads=2)
    vision = VisionConfig(image_size=32, patch_size=16, width=WIDTH, depth=1, heads=2)
    model = replace(recipe.model, vision=vision, text=text, embed_width=8)
    data = replace(recipe.data, directory=str(world), vocab_size=400, **(data or {}))
    return replace(recipe, **{"vision_from": None, "batch_size": 8, "model": model, "data": data, **changes})


# ---- blip --------------------------------------------------------------------------------------------------------------


def test_it_starts_from_the_eyes_and_trains_them_unless_they_are_frozen(built, eyes):
    clip = {name: t for name, t in weights(eyes).items() if name.startswith("vision.")}
    for run, same in (("blip", False), ("noisy", True)):
        mine = weights(built / run)
        assert all(torch.equal(mine[name], t) for name, t in clip.items()) is same


def test_every_loss_is_learnt_and_judged(built):
    lines = [json.loads(line) for line in (built / "blip/log.jsonl").read_text().splitlines()]
    assert {"contrast", "matching", "generation", "answering"} <= set(lines[0])
    assert "answering" not in json.loads((built / "noisy/log.jsonl").read_text().splitlines()[0])
    scores = json.loads((built / "blip/metrics.json").read_text())
    assert {"matching, colour", "accuracy", "accuracy, blind", "captions, exact scene match"} <= set(scores)
    assert Image.open(built / "blip/picture.png").width > 400


def test_the_slow_copy_helps_in_training_and_is_left_behind(built):
    assert not any(name.startswith("momentum.") for name in weights(built / "blip"))
    during = weights(built / "blip/checkpoints/step-000004")
    assert int(during["momentum.seen"]) == 4 * 8 and during["momentum.texts"].norm(dim=1).allclose(torch.ones(16))
    optimised = load_file(built / "blip/checkpoints/step-000004/training.safetensors")
    assert not any("momentum.copies" in name for name in optimised)


def test_a_resumed_run_goes_the_same_way(world, eyes, built, tmp_path):
    base = TINY | {"data": world, "vision_from": eyes, "model.momentum.queue": 16, "out": tmp_path / "blip"}
    train.main(arguments("blip", **base, stop_at=2))
    train.main(["blip", "--resume", "--out", str(tmp_path / "blip"), "--device", "cpu", "--precision", "fp32"])
    for name, tensor in weights(built / "blip/checkpoints/step-000004").items():
        assert torch.equal(weights(tmp_path / "blip/checkpoints/step-000004")[name], tensor), name


def test_what_it_left_does_all_four(built, world):
    model, processor = minivlm.load(built / "blip")
    picture = world / "test/000.png"
    assert isinstance(tasks.caption(picture, model, processor), str)
    assert tasks.caption(picture, model, processor, prompt="a small red").startswith("a small red")
    assert isinstance(tasks.answer(picture, "how many red shapes are there?", model, processor), str)
    assert 0 < tasks.match_all([picture], ["a red circle"], model, processor).item() < 1
    index = tasks.build_image_index(world / "test", model, processor, path=None)
    assert len(tasks.search_images("a red circle", index, model, processor, top_k=3)) == 3
    with pytest.raises(UserError, match="BLIP takes one image at a time, but was given 2 at once"):
        tasks.answer([picture, picture], "how many?", model, processor)


def test_answers_are_ranked(built, world, capsys):
    model, processor = minivlm.load(built / "blip")
    picture, words = world / "test/000.png", ["yes", "no", "a red circle"]
    ranked = tasks.rank_answers(picture, "is there a star?", words, model, processor)
    assert sorted(word for word, _ in ranked) == sorted(words) and ranked[0][1] >= ranked[1][1] >= ranked[2][1]
    tokens, mask = processor.text(["is there a star?"])
    alone = model.rank(processor.images([picture]), tokens, mask, *processor.text([ranked[0][0]]))
    assert alone.item() == pytest.approx(ranked[0][1], rel=1e-4)
    with pytest.raises(UserError, match="there is nothing to rank"):
        tasks.rank_answers(picture, "is there a star?", [], model, processor)
    with pytest.raises(UserError, match="ranks answers about one image, but was given 2"):
        tasks.rank_answers([picture, picture], "is there a star?", words, model, processor)
    with pytest.raises(UserError, match="ranked and not generated: leave out --temperature"):
        sample.main(["answer", "x", str(picture), "is it?", "--temperature", "1", "--candidates", *words])
    capsys.readouterr()
    sample.main(["answer", str(built / "blip"), str(picture), "is there a star?", "--candidates", *words])
    assert [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()] == [word for word, _ in ranked]


def test_questions_are_about_the_picture_that_they_come_with(world):
    job = recipe_of("blip", world).start(quiet=True)
    batch, indices = job.batch(0), job.order.indices(0)
    told, said = (job.processor.decode([row[1:] for row in batch[name]]) for name in ("question", "answer"))
    for i, question, answer in zip(indices, told, said, strict=True):
        true = {(asked.text, asked.answer) for asked in true_questions(job.samples.conversations.scenes[int(i)])}
        assert (question.strip(), answer.strip()) in true
    assert batch["answer_mask"].any(dim=1).all()


def test_a_queue_that_the_batch_does_not_divide(world):
    options = TINY | {"data": world, "vision_from": "none", "model.vision.image_size": 32}
    with pytest.raises(
        UserError, match=r"a momentum queue of 20 is not a multiple of the batch of 8: choose another --model.mom"
    ):
        train.main(arguments("blip", **options, **{"model.momentum.queue": 20}))


def test_eyes_of_another_kind(world, built):
    with pytest.raises(UserError, match="holds a CLIP, but"):
        recipe_of("blip-capfilt", world, starts_from=str(built / "clip")).start(quiet=True)


# ---- CapFilt -----------------------------------------------------------------------------------------------------------


def test_a_blip_that_was_asked_nothing_answers_nothing(world):
    asked, silent = (recipe_of(name, world).start(quiet=True) for name in ("blip", "blip-noisy"))
    assert asked.model.config.answers and not silent.model.config.answers
    with pytest.raises(UserError, match=r"this BLIP cannot answer questions; it can .*describe images"):
        tasks.answer(np.zeros((32, 32, 3), np.uint8), "what is it?", silent.model, silent.processor)


def test_noisy_captions_are_those_of_the_web_and_their_negatives_are_guessed(world):
    job = recipe_of("blip-noisy", world, data=dict(wrong_captions=0.4, false_captions=1.0)).start(quiet=True)
    assert isinstance(job.samples.pairs, NoisyPairs) and job.samples.pairs.wrong.mean() == pytest.approx(0.4, abs=0.05)
    rng = np.random.default_rng(0)
    pairs = job.samples.pairs
    scenes = pairs.pairs.scenes.read(np.arange(48))
    for i, scene in enumerate(scenes):
        caption, false = job.samples.captions(i, rng)
        assert caption == pairs.all_captions(i)[0] and is_true(caption, scene) is not bool(pairs.wrong[i])
        assert false != caption and (pairs.wrong[i] or not is_true(false, scene))


def test_the_filter_is_told_apart_from_chance(built):
    scores = json.loads((built / "capfilt/metrics.json").read_text())
    for origin in (WEB, PROPOSED):
        assert {f"filter, {origin}, precision", f"filter, {origin}, recall"} <= set(scores)
    assert 0.4 < scores[f"filter, {WEB}, precision"]["chance"] < 0.8
    assert Image.open(built / "capfilt/picture.png").height > 400


def test_scores_of_a_filter():
    true, kept = np.array([1, 1, 1, 0, 0], dtype=bool), np.array([1, 1, 0, 1, 0], dtype=bool)
    scores = Judged(WEB, [""] * 5, kept.astype(float), kept, true).scores()
    assert scores[f"filter, {WEB}, precision"].value == pytest.approx(2 / 3)
    assert scores[f"filter, {WEB}, precision"].chance == pytest.approx(3 / 5)
    assert scores[f"filter, {WEB}, recall"].value == pytest.approx(2 / 3)


def test_what_is_kept_is_learnt(world):
    web = NoisyPairs(ShapesWorld(world, "train"), 0.5)
    captions = [web.all_captions(i)[0] for i in range(48)]
    recipe = recipe_of("blip-capfilt", world, data=dict(threshold=0.5))
    sure = judge(recipe, web, WEB, captions, 1.0 - web.wrong)  # a filter without a mistake
    none = judge(recipe, web, PROPOSED, captions, np.zeros(48))
    assert np.array_equal(sure.true, ~web.wrong) and np.array_equal(sure.kept, sure.true) and not none.kept.any()
    kept, rows = Bootstrapped(web, [sure, none]), np.flatnonzero(~web.wrong)
    assert len(kept) == len(rows)
    for j, i in enumerate(rows):
        assert kept.all_captions(j) == [captions[i]] and kept.key(j) == f"train/{i}"
        assert np.array_equal(kept.images([j])[0], web.images([i])[0])


def test_a_filter_that_drops_everything(world, built, tmp_path):
    options = TINY | {"data": world, "vision_from": built / "clip", "starts_from": built / "noisy"}
    with pytest.raises(
        UserError, match=r"the filter drops every caption: none matches with a probability of 1\.5 \(the"
    ):
        train.main(arguments("blip-capfilt", **options, data__threshold=1.5, out=tmp_path / "out"))


def test_what_it_builds_on(world):
    assert RECIPES["blip-capfilt"].needs() == {"clip": "out/clip", "blip-noisy": "out/blip-noisy"}
    assert recipe_of("blip", world).needs() == {}
    own = for_data(RECIPES["blip-capfilt"], "photos", "out/mine")
    assert (own.vision_from, own.starts_from) == ("out/photos-clip", "out/photos-blip-noisy")
