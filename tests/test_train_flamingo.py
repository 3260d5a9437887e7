"""Flamingo through train.py: only what is new learns, its gates are told, and lessons are learnt where they can be."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import minivlm
import train
from minivlm.conversation import IGNORED
from minivlm.datasets.sequence_batches import ConversationTurns, document_batch, lesson_sample
from minivlm.datasets.shapes import make_shapes
from minivlm.datasets.shapes.shots import Named
from minivlm.errors import UserError
from minivlm.layers import TextConfig
from minivlm.layers.resnet import ResNetConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.recipes import plan
from minivlm.recipes.job import Job
from minivlm.run_directory import foreign
from minivlm.testing import assert_same
from tests.test_train_blip2 import bases, losses, part, parts, the_same  # noqa: F401
from tests.test_train_captioner import SHORT, arguments, weights

RESAMPLER = {f"model.resampler.{k}": v for k, v in dict(width=16, depth=1, heads=2, latents=3).items()}
FLAMINGO = SHORT | RESAMPLER | {"optimiser.warmup": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory, little_to_judge_by):
    """With enough pictures of each look for a lesson."""
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=3000, image_size=32, progress=False)
    return directory


@pytest.fixture(scope="module")
def built(bases, world):  # noqa: F811
    ours = {"data": world, "vision_from": bases / "clip", "language_from": bases / "lm", "out": bases / "flamingo"}
    train.main(arguments("flamingo", **FLAMINGO, **ours, data__lessons=0.5))
    return bases


def work_of(built, data, **options):
    given = {"data": data, "vision_from": built / "clip", "language_from": built / "lm"}
    return plan.command_line(arguments("flamingo", **FLAMINGO | given | options))[1].start(quiet=True)


def test_resampler_and_gated_layers_learn_and_nothing_else(built):
    flamingo = weights(built / "flamingo")
    assert the_same(part(flamingo, "vision"), part(weights(built / "clip"), "vision"))
    base, speaker = weights(built / "lm"), part(flamingo, "language_model")
    for name, tensor in base.items():
        assert torch.equal(speaker[name][: len(tensor)], tensor), name  # the mark <image> may have a row of its own
    optimised = load_file(built / "flamingo/checkpoints/step-000004/training.safetensors")
    assert {name.split(".")[1] for name in optimised if name.startswith("optimiser.")} == {"resampler", "gated"}
    assert all(
        tensor.any() for name, tensor in flamingo.items() if name.endswith("_gate")
    )  # zero before the first step


def test_the_scores_have_answers_and_words_from_examples_with_both_controls(built):
    scores = json.loads((built / "flamingo/metrics.json").read_text())
    assert {"accuracy", "accuracy, blind", "0 shots", "2 shots", "8 shots, labels shuffled"} <= scores.keys()
    assert {"2 shots, pictures shuffled", "2 shots, told in words"} <= scores.keys()
    assert (built / "flamingo/picture.png").exists() and (built / "flamingo/few-shot.png").exists()
    assert not foreign(built / "flamingo")  # so that the next run moves it aside


def test_it_starts_as_the_language_model_and_tells_how_far_its_gates_are_open(built, world):
    work = work_of(built, world)
    assert "gates 0.00" in work.progress({"loss": 1.0})
    with torch.no_grad():
        work.model.gated[0].attention_gate.fill_(1.0)
    assert "gates 0.38" in work.progress({"loss": 1.0})  # tanh(1) of one of two


def test_a_batch_has_conversations_and_lessons_each_picture_for_its_mark(built, world):
    work = work_of(built, world, data__lessons=0.5)
    work.prepare(torch.device("cpu"), torch.float32)
    batch = work.batch(0)
    marks = (batch["tokens"] == work.model.config.image_token).sum(dim=1)
    assert 1 in marks and marks.max() > 3
    assert len(batch["images"]) == marks.sum()
    assert (batch["labels"] != work.model.config.image_token).all()
    again = work.batch(0)
    assert torch.equal(batch.pop("images").tensor, again.pop("images").tensor)
    assert all(torch.equal(a, b) for a, b in zip(batch.values(), again.values(), strict=True))
    batch = work.batch(0)
    loss = work.model.losses(**batch)["next token"]
    assert loss.isfinite()


def test_without_lessons_every_sample_is_about_one_picture(built, world):
    work = work_of(built, world, data__lessons=0.0)
    tokens = work.batch(0)["tokens"]
    assert ((tokens == work.model.config.image_token).sum(dim=1) == 1).all()


def test_of_a_lesson_a_word_is_learnt_once_it_was_heard(built, world):
    processor = work_of(built, world).processor
    sample = lesson_sample([Named(0, "dax"), Named(1, "wug"), Named(2, "dax"), Named(3, "wug")], processor)
    said = [label for label in sample.labels if label != IGNORED]
    assert processor.decode([said]) == ["dax. wug."]
    whole = processor.ids("".join(f"<image>this is a {word}." for word in ("dax", "wug", "dax", "wug")))
    assert sample.tokens == [processor.start_token, *whole]
    assert all(label in (IGNORED, token) for label, token in zip(sample.labels, sample.tokens, strict=True))


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(built, world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "finish", lambda run, job: None)
    monkeypatch.setattr(Job, "validate", lambda job: 0.5)
    given = {"data": world, "vision_from": built / "clip", "language_from": built / "lm", "data.lessons": 0.5}
    train.main(arguments("flamingo", **FLAMINGO | given, out=tmp_path, stop_at=2))
    train.main(["flamingo", "--out", str(tmp_path), "--resume", "--device", "cpu", "--precision", "fp32"])
    assert losses(tmp_path) == losses(built / "flamingo")


def test_only_what_is_new_is_stored_where_that_is_wanted(built, world, tmp_path):
    given = {"data": world, "vision_from": built / "clip", "language_from": built / "lm", "data.lessons": 0.5}
    train.main(arguments("flamingo", **FLAMINGO | given, out=tmp_path / "new", store_frozen=False))
    stored, whole = weights(tmp_path / "new"), weights(built / "flamingo")
    assert {name.partition(".")[0] for name in stored} == {"resampler", "gated"}
    back, _ = minivlm.load(tmp_path / "new")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in back.state_dict().items() if name in whole)


class TestBadInput:
    def test_a_t5_cannot_be_read_between(self, built, world):
        with pytest.raises(UserError, match="holds a T5, no language model"):
            work_of(built, world, language_from=built / "t5")

    def test_eyes_that_are_none(self, built, world):
        with pytest.raises(UserError, match="holds a LanguageModel, which has no vision tower"):
            work_of(built, world, vision_from=built / "lm")

    def test_a_start_that_is_none(self, built, world):
        with pytest.raises(UserError, match=r"--starts_from \S+ holds a CLIP, but a Flamingo is wanted"):
            work_of(built, world, starts_from=built / "clip")

    def test_a_world_of_too_few_looks(self, built, tmp_path):
        make_shapes(tmp_path / "few", seed=1, train=8, image_size=32, progress=False)
        with pytest.raises(
            UserError, match=r"shows only \d looks alone, but a lesson has up to 4: make a world with more"
        ):
            work_of(built, tmp_path / "few")
        assert isinstance(work_of(built, tmp_path / "few", data__lessons=0.0).samples, ConversationTurns)

    def test_lessons_are_read_in_parts_each_picture_with_its_mark(self, built, world):
        work = work_of(built, world, data__lessons=0.7, micro_batch=3)
        work.prepare(torch.device("cpu"), torch.float32)
        batch, mark = work.batch(0), work.processor.image_token_id
        parts = list(work.model.cut(batch, 3))
        assert [len(cut["tokens"]) for cut in parts] == [3, 3, 2]
        for cut in parts:
            assert len(cut["images"]) == (cut["tokens"] == mark).sum() and "where" not in cut
        assert torch.equal(torch.cat([cut["images"].tensor for cut in parts]), batch["images"].tensor)


class TestInterleaved:
    @pytest.fixture
    def pages(self, tmp_path):
        (folder := tmp_path / "pages").mkdir()
        write_pages(folder)
        return folder

    def test_a_folder_of_pages_is_learnt_and_judged_by_pages_held_out(self, built, pages, tmp_path, capsys):
        given = {"data": pages, "vision_from": built / "clip", "language_from": built / "lm", "out": tmp_path / "out"}
        train.main(arguments("flamingo", **FLAMINGO | given))
        said = capsys.readouterr().out
        assert re.search(r"training documents in", said) and "trained" in parts(said)["gated"]
        scores = json.loads((tmp_path / "out/metrics.json").read_text())
        assert 1 < scores["perplexity"]["value"] < scores["perplexity"]["chance"] * 100
        assert (tmp_path / "out/picture.png").exists()
        assert type(minivlm.load(tmp_path / "out")[0]).__name__ == "Flamingo"

    def test_perplexity_is_of_what_follows_the_first_picture(self, built, pages):
        work = work_of(built, pages, batch_size=4)
        val = work.scores.val
        work.model.eval()
        with torch.no_grad():
            for gate in (layer.attention_gate for layer in work.model.gated):
                gate.fill_(1.0)
        surprise = []
        for i in range(len(val)):
            batch = document_batch(val, [i], [val.text(i)], work.processor)
            with torch.no_grad():
                log_p = work.model(batch["images"][None], batch["tokens"]).logits[0, :-1].log_softmax(dim=-1)
            labels = batch["labels"][0, 1:]
            surprise += [-log_p[t, label].item() for t, label in enumerate(labels.tolist()) if label != IGNORED]
        assert len(val) > 1
        assert work.scores.perplexity(val).value == pytest.approx(np.exp(np.mean(surprise)), rel=1e-4)

    def test_every_mark_of_a_batch_has_its_picture(self, built, pages):
        batch = (work := work_of(built, pages, bucket_steps=2)).batch(0)
        assert len(batch["images"]) == (batch["tokens"] == work.model.config.image_token).sum() == 16


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Eighteen classes of eight drawings: bars of different places and lengths, and noise."""
    folder, rng = tmp_path_factory.mktemp("drawings"), np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 6), ("test", 6)):
        for i in range(n):
            (folder / split / f"bars_{split}_{i}").mkdir(parents=True)
            for k in range(8):
                pixels = rng.integers(200, 256, (32, 32, 3), dtype=np.uint8)
                pixels[4 * i : 4 * i + 3, 4 : 12 + 2 * i] = 0
                Image.fromarray(pixels).save(folder / split / f"bars_{split}_{i}/{k}.png")
    return folder


@pytest.fixture(scope="module")
def resnet(bases, tmp_path_factory):  # noqa: F811
    """Eyes whose features come out of no norm."""
    out, [_, words] = tmp_path_factory.mktemp("eyes"), minivlm.load(bases / "clip")
    vision = ResNetConfig(blocks=(1, 1, 1, 1), width=4, output_width=16, heads=2, image_size=32)
    text = TextConfig(width=16, depth=1, heads=2, vocab_size=words.vocab_size, context=40, end_token=words.end_token)
    clip = CLIP(CLIPConfig(vision=vision, text=text, embed_width=16, image_projection=False), seed=5)
    clip.save_pretrained(out, processor=words)
    return out


@pytest.mark.parametrize("name", ["blip2-stage1", "blip2", "flamingo"])
@pytest.mark.parametrize("eyes", ["resnet", "vit"])
def test_what_a_resnet_sees_is_measured_before_the_first_step(name, eyes, resnet, bases, world):  # noqa: F811
    given = {"data": world, "vision_from": resnet if eyes == "resnet" else bases / "clip", "batch_size": 4}
    given |= {} if name == "blip2-stage1" else {"language_from": bases / "lm"}
    given |= {"from_scratch": "true"} if name == "blip2" else {}
    work = plan.command_line(arguments(name, **given))[1].start(quiet=True)
    standardise = work.model.standardise
    assert work.model.config.standardise == (standardise is not None) == (eyes == "resnet")
    assert standardise is None or not standardise.measured
    work.prepare(torch.device("cpu"), torch.float32)
    assert standardise is None or standardise.measured
    if eyes == "resnet":
        assert_same(
            work.samples.images.features.tensor[:1000].std(dim=(0, 1), correction=0).max(),
            torch.tensor(1.0),
            tolerance=1e-4,
        )


@pytest.mark.parametrize("freeze", ["true", "false"])
@pytest.mark.parametrize("kind", ["pages", "classes"])
def test_in_pages_and_in_classes_as_well(kind, freeze, resnet, built, drawings, tmp_path):
    if kind == "pages":
        write_pages(tmp_path)
    work = work_of(built, tmp_path if kind == "pages" else drawings, vision_from=resnet, freeze_vision=freeze)
    assert not work.model.standardise.measured
    work.prepare(torch.device("cpu"), torch.float32)
    assert work.model.standardise.measured


def write_pages(folder):
    for i in range(30):
        for name, colour in (("a", (220, 20, 20)), ("b", (20, 20, 220))):
            Image.fromarray(np.full((32, 32, 3), colour, dtype=np.uint8)).save(folder / f"{i}{name}.png")
    pages = [
        [{"image": f"{i}a.png"}, {"text": "a red wall"}, {"image": f"{i}b.png"}, {"text": "and the sky"}]
        for i in range(30)
    ]
    (folder / "interleaved.jsonl").write_text("\n".join(map(json.dumps, pages)) + "\n")


class TestClasses:
    def test_a_folder_of_classes_is_learnt_in_lessons_and_judged_by_classes_held_out(self, built, drawings, tmp_path):
        given = {"data": drawings, "vision_from": built / "clip", "language_from": built / "lm", "out": tmp_path}
        train.main(arguments("flamingo", **FLAMINGO | given, freeze_vision="false"))
        scores = json.loads((tmp_path / "metrics.json").read_text())
        assert scores["5 shots"]["chance"] == 0.2 and {"0 shots", "5 shots, labels shuffled"} <= scores.keys()
        before, after = weights(built / "clip"), weights(tmp_path)
        assert not the_same(part(after, "vision"), part(before, "vision"))  # the tower learnt too
        assert (tmp_path / "picture.png").exists()

    def test_what_a_flamingo_has_learnt_goes_on_with_other_pictures(self, built, drawings, tmp_path, capsys):
        begun, given = weights(built / "flamingo"), {"data": drawings, "starts_from": built / "flamingo"}
        work = plan.command_line(arguments("flamingo", **FLAMINGO | given))[1].start(quiet=True)
        start = work.model.state_dict()
        assert all(torch.equal(start[name], tensor) for name, tensor in begun.items())
        train.main(arguments("flamingo", **FLAMINGO | given, out=tmp_path, store_frozen=False))
        parts = re.findall(r"^(vision|resampler|gated|language_model) .* (\S+)$", capsys.readouterr().out, re.MULTILINE)
        assert len(parts) == 4 and {source for _, source in parts} == {str(built / "flamingo")}
        back, _ = minivlm.load(tmp_path)
        learnt = back.state_dict()
        assert {name.partition(".")[0] for name in weights(tmp_path)} == {"resampler", "gated"}
        assert not the_same(part(learnt, "gated"), part(begun, "gated"))
        assert the_same(part(learnt, "vision"), part(begun, "vision"))

    def test_lessons_show_five_looks_and_each_mark_has_its_picture(self, built, drawings):
        work = work_of(built, drawings, bucket_steps=2)
        batch = work.batch(0)
        assert len(batch["images"]) == (batch["tokens"] == work.model.config.image_token).sum()
        work.prepare(torch.device("cpu"), torch.float32)
        seen = work.batch(0)
        assert torch.equal(seen["tokens"], batch["tokens"])
        assert_same(seen["images"].tensor, work.model.image_features(batch["images"]))
        loss, again = (sum(work.model.losses(**given).values()) for given in (batch, seen))
        assert_same(loss, again)

    def test_a_tower_that_learns_is_given_pixels(self, built, drawings):
        work = work_of(built, drawings, freeze_vision="false")
        batch = work.batch(0)
        work.prepare(torch.device("cpu"), torch.float32)
        assert work.samples.images.pixels is not None and "images" in batch
        assert all(torch.equal(a, b) for a, b in zip(batch.values(), work.batch(0).values(), strict=True))

    def test_too_few_classes(self, built, tmp_path):
        for i in range(3):
            (tmp_path / f"train/{i}").mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / f"train/{i}/a.png")
        with pytest.raises(UserError, match=r"has \d training classes, but a lesson has up to 5: add some"):
            work_of(built, tmp_path)
