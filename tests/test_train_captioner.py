"""Language model, captioner and LLaVA through train.py: a chain of tiny runs, and what each stage may change."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import minivlm
import train
from minivlm import training_log
from minivlm.conversation import IGNORED
from minivlm.datasets.continuation import split
from minivlm.datasets.shapes import make_shapes
from minivlm.datasets.shapes.episodes import words
from minivlm.errors import UserError
from minivlm.recipes import plan, text_scores
from tests.test_train import TINY

SHORT = {"steps": 4, "batch_size": 8, "save_every": 4, "seed": 3, "device": "cpu", "precision": "fp32"}
TEXTS = SHORT | {"model.width": 16, "model.depth": 1, "model.heads": 2, "data.vocab_size": 300}
LM = TEXTS | {"induction_heads": "false"}


def arguments(recipe, **options):
    named = {k.replace("__", "."): v for k, v in options.items()}
    return [recipe, *(str(x) for name, value in named.items() for x in (f"--{name}", value))]


@pytest.fixture(scope="module")
def world(tmp_path_factory, little_to_judge_by):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=64, image_size=32, progress=False)
    return directory


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    """The four runs of LLaVA's chain, and what they printed."""
    out = tmp_path_factory.mktemp("out")
    data = {"data": world}
    train.main(arguments("clip", **TINY | data, out=out / "clip"))
    train.main(arguments("lm", **LM | data, out=out / "lm"))
    base = {"vision_from": out / "clip", "language_from": out / "lm"}
    train.main(arguments("llava-stage1", **SHORT | data | base, out=out / "stage1"))
    lora = {"lora.rank": 2, "lora.alpha": 4}
    train.main(arguments("llava", **SHORT | data | lora, starts_from=out / "stage1", out=out / "llava"))
    return out


def weights(directory):
    return load_file(directory / "model.safetensors")


def test_stage_one_trains_the_projector_alone(built):
    clip, lm, stage1 = weights(built / "clip"), weights(built / "lm"), weights(built / "stage1")
    for name, tensor in stage1.items():
        if name.startswith("vision."):
            assert torch.equal(tensor, clip[name]), name
        elif name.startswith("language_model."):
            assert torch.equal(tensor, lm[name.removeprefix("language_model.")]), name
    optimised = load_file(built / "stage1/checkpoints/step-000004/training.safetensors")
    assert {k.split(".")[1] for k in optimised if k.startswith("optimiser.")} == {"projector"}


def test_a_resampler_may_stand_in_the_projectors_place(built, world, tmp_path):
    base = {"data": world, "vision_from": built / "clip", "language_from": built / "lm"}
    sizes = {f"model.resampler.{k}": v for k, v in dict(latents=3, width=16, depth=1, heads=2).items()}
    train.main(
        arguments("llava-stage1", **SHORT | base | sizes, model__projector="resampler", out=tmp_path / "aligned")
    )
    model, processor = minivlm.load(tmp_path / "aligned")
    assert model.config.image_tokens == processor.config.image_tokens == 3
    train.main(arguments("llava", **SHORT, data=world, starts_from=tmp_path / "aligned", out=tmp_path / "out"))
    before, after = weights(tmp_path / "aligned"), weights(tmp_path / "out")
    assert not torch.equal(before["projector.resampler.latents"], after["projector.resampler.latents"])
    assert isinstance(minivlm.caption(world / "test/000.png", *minivlm.load(tmp_path / "out")), str)


def test_stage_two_trains_projector_and_adapters_and_leaves_them_merged(built):
    stage1, llava = weights(built / "stage1"), weights(built / "llava")
    assert stage1.keys() == llava.keys()  # no adapters left
    changed = {name for name in llava if not torch.equal(llava[name], stage1[name])}
    kinds = {name.split(".")[-2] for name in changed if name.startswith("language_model.")}
    assert kinds == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert not any(name.startswith("vision.") for name in changed)
    assert any(name.startswith("projector.") for name in changed)


def test_the_adapter_alone_gives_the_same_answers_on_its_base(built):
    merged, processor = minivlm.load(built / "llava")
    alone, _ = minivlm.load(built / "llava/adapter")
    tokens, mask = processor.text(["<image> is there a red circle?"], expand=True)
    images = torch.randn(1, 3, 32, 32)
    assert alone.config.lora is not None
    torch.testing.assert_close(alone(images, tokens, mask).logits, merged(images, tokens, mask).logits)


def test_every_stage_leaves_its_metrics_and_a_picture(built):
    metrics = {name: json.loads((built / name / "metrics.json").read_text()) for name in ("lm", "stage1", "llava")}
    assert 1 < metrics["lm"]["perplexity"]["value"] < 300  # the size of the vocabulary
    assert {"accuracy", "accuracy, count", "accuracy, blind", "never-seen pairs, accuracy"} <= set(metrics["llava"])
    assert {name.split(", ")[-1] for name in metrics["stage1"]} == {
        *(
            "exact scene match",
            "object precision",
            "object recall",
            "SPICE",
        )  # it is not asked what it has not been taught
    }
    assert all((built / name / "picture.png").stat().st_size > 5000 for name in metrics)


def test_the_table_of_parts_is_read_from_the_parameters(built, world, tmp_path, capsys):
    options = SHORT | {"data": world, "starts_from": built / "stage1", "out": tmp_path / "llava", "steps": 1}
    train.main(arguments("llava", **options | {"lora.rank": 2}))
    said = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line for line in said.splitlines()}
    assert "frozen" in rows["vision"] and "-" in rows["vision"] and str(built / "stage1") in rows["vision"]
    assert "trained" in rows["projector"] and "frozen" in rows["language_model"]
    assert "trained" in rows["language_model LoRA"]
    model, _ = minivlm.load(built / "stage1")
    assert f"{sum(p.numel() for p in model.vision.parameters()):,}" in rows["vision"]


def test_lora_none_trains_the_language_model_itself(built, world, tmp_path):
    options = SHORT | {"data": world, "starts_from": built / "stage1", "out": tmp_path / "llava", "lora": "none"}
    train.main(arguments("llava", **options))
    before, after = weights(built / "stage1"), weights(tmp_path / "llava")
    assert not torch.equal(
        before["language_model.token_embedding.weight"], after["language_model.token_embedding.weight"]
    )
    assert torch.equal(before["vision.position_embedding"], after["vision.position_embedding"])


def test_a_stage_resumes_to_the_bit(built, world, tmp_path):
    options = SHORT | {"data": world, "starts_from": built / "stage1", "out": tmp_path / "llava"}
    train.main(arguments("llava", **options | {"lora.rank": 2, "lora.alpha": 4}, stop_at=2))
    train.main(["llava", "--resume", "--out", str(tmp_path / "llava"), "--device", "cpu", "--precision", "fp32"])
    losses = [
        [line["loss"] for line in training_log.read_log(d / "log.jsonl")] for d in (tmp_path / "llava", built / "llava")
    ]
    assert losses[0] == losses[1]
    once, twice = weights(built / "llava"), weights(tmp_path / "llava")
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_what_is_missing_is_planned_first_and_what_is_there_is_used(tmp_path, monkeypatch, built):
    monkeypatch.chdir(tmp_path)
    todo = plan.chain(*plan.command_line(["llava"]))
    assert [(name, options.out) for name, _, options in todo] == [
        ("clip-resnet", "out/clip-resnet"),
        ("lm", "out/lm"),
        ("llava-stage1", "out/llava-stage1"),
        ("llava", None),
    ]
    said = plan.announcement(todo)
    assert said == (
        "llava builds on what is not there yet; trained first: "
        "clip-resnet (out/clip-resnet), lm (out/lm), llava-stage1 (out/llava-stage1)"
    )
    todo = plan.chain(*plan.command_line(["llava", "--data", "photos", "--device", "cpu"]))
    names = ["out/photos-clip", "out/photos-lm", "out/photos-llava-stage1", None]
    assert [options.out for *_, options in todo] == names
    assert todo[2][1].vision_from == "out/photos-clip" and todo[3][1].starts_from == "out/photos-llava-stage1"
    assert all(options.data == "photos" and options.device == "cpu" for *_, options in todo)
    todo = plan.chain(*plan.command_line(["llava", "--starts_from", str(built / "stage1")]))
    assert [name for name, *_ in todo] == ["llava"] and plan.announcement(todo) == ""


def test_a_base_of_the_wrong_kind_is_refused(built, world, tmp_path):
    swapped = {"vision_from": built / "lm", "language_from": built / "clip"}
    with pytest.raises(UserError, match=r"--vision_from .* holds a LanguageModel, which has no vision tower"):
        train.main(arguments("llava-stage1", **SHORT | {"data": world, "out": tmp_path / "x"} | swapped))
    with pytest.raises(UserError, match=r"--starts_from .* holds a LanguageModel, but a LLaVA is wanted"):
        train.main(arguments("llava", **SHORT | {"data": world, "out": tmp_path / "x"}, starts_from=built / "lm"))


def test_a_named_base_that_is_not_there_is_an_error_and_not_trained(world, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        train.main(arguments("llava", **SHORT | {"data": world, "out": tmp_path / "x"}, starts_from="nowhere"))


def test_induction_heads_are_there_before_the_first_step(world):
    two = {"model.depth": 2, "model.heads": 4, "data": world}
    given, plain = (
        plan.command_line(arguments("lm", **TEXTS | two, induction_heads=heads))[1].start(quiet=True).model
        for heads in ("true", "false")
    )
    unlike = [name for name, p in plain.state_dict().items() if not torch.equal(p, given.state_dict()[name])]
    assert {name.split(".")[2] for name in unlike if ".blocks." in name} == {"0", "1"}
    assert any("blocks.0.attention.q_proj" in name for name in unlike)
    assert not any("mlp" in name or "norm" in name for name in unlike)


@pytest.mark.parametrize("wrong", [{"model.heads": 2}, {"model.depth": 1}, {"model.rope_theta": "none"}])
def test_a_model_too_small_for_induction_heads_says_how_to_do_without(world, wrong):
    options = TEXTS | {"model.depth": 2, "model.heads": 4, "data": world} | wrong
    with pytest.raises(UserError, match=r"need rotary positions, two blocks, .*; or .*--induction_heads false\.$"):
        plan.command_line(arguments("lm", **options))[1].start(quiet=True)


def test_a_language_model_learns_the_answers_of_conversations_and_the_whole_of_texts(world):
    options = LM | {"data": world, "batch_size": 16, "model.context": 400}  # nothing is cut
    work = plan.command_line(arguments("lm", **options))[1].start(quiet=True)
    batch, end = work.batch(0), work.processor.end_token
    read = [index for index, _ in work.order.share(0)]
    for row, labels, index in zip(batch["tokens"], batch["labels"], read, strict=True):
        document = work.samples.read(int(index))
        learnt = labels[labels != IGNORED].tolist()
        assert torch.equal(labels[labels != IGNORED], row[labels != IGNORED])
        if isinstance(document, str):
            said = work.processor.decode([learnt])[0]
            assert (document == said and learnt[-1] == end) or (document.startswith(said) and len(learnt) == 191)
        else:
            answers = [turn.text for turn in document[1::2]]
            said = "".join(work.processor.decode([[t for t in learnt if t != end]]))
            assert learnt.count(end) == len(answers) and said.split() == " ".join(answers).split()


def test_its_picture_goes_on_where_a_conversation_is_answered_and_tells_what_is_right(world, tmp_path, monkeypatch):
    options = LM | {"data": world, "model.context": 400}  # all texts fit
    work = plan.command_line(arguments("lm", **options))[1].start(quiet=True)
    right, drawn = [], []
    for number, document in enumerate(work.scores.held_out[:12]):
        begun, rest = split(document, np.random.default_rng(number))
        right.append(rest)
        assert isinstance(document, str) or begun.endswith(("?", "."))
    said = iter([right[0], "zebra", *right[2:]])
    monkeypatch.setattr(work.processor, "decode", lambda tokens: [" " + next(said)])
    monkeypatch.setattr(text_scores, "sheet", lambda rows, **_: drawn.extend(rows) or Image.new("RGB", (1, 1)))
    work.figure(tmp_path / "picture.png")
    assert len(drawn) == 12 and [row.detail.endswith(" (as the text)") for row in drawn] == [True, False] + [True] * 10
    assert drawn[1].detail == f"continues: zebra (the text: {right[1]})"
    assert all(
        row.text.removeprefix("… ") in words(text) for row, text in zip(drawn, work.scores.held_out, strict=False)
    )
    assert any(row.text.startswith("… ") for row in drawn)
    assert re.fullmatch(r"python sample.py complete out/lm '.*\?'", work.next_commands("out/lm")[0])


def test_the_captioner_learns_to_caption(world, tmp_path):
    vision = {f"model.vision.{k}": v for k, v in dict(image_size=32, width=16, depth=1, heads=2).items()}
    language = {f"model.language.{k}": v for k, v in dict(width=16, depth=1, heads=2).items()}
    options = SHORT | vision | language | {"data": world, "out": tmp_path / "captioner", "data.vocab_size": 300}
    train.main(arguments("captioner", **options))
    metrics = json.loads((tmp_path / "captioner/metrics.json").read_text())
    assert {"captions, exact scene match", "never-seen pairs, captions, exact scene match"} <= set(metrics)
    losses = [line["loss"] for line in training_log.read_log(tmp_path / "captioner/log.jsonl")]
    assert losses[-1] < losses[0]
    model, processor = minivlm.load(tmp_path / "captioner")
    images = torch.zeros(2, 3, 32, 32)
    start = torch.full((2, 1), processor.start_token)
    assert torch.equal(model(images), model.generate(images, start))  # it knows its start token


def test_stage_two_in_parts_takes_the_steps_of_the_whole_batch(built, world, tmp_path):
    options = SHORT | {"data": world, "starts_from": built / "stage1"}
    for name, extra in (("whole", {}), ("parts", {"micro_batch": 3})):
        train.main(arguments("llava", **options | extra, out=tmp_path / name))
    losses = [[line["loss"] for line in training_log.read_log(tmp_path / n / "log.jsonl")] for n in ("whole", "parts")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
