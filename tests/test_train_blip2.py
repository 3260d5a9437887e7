"""BLIP-2 through train.py: a chain of tiny runs on frozen eyes and frozen language models, and what each may change."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import minivlm
import train
from minivlm import evaluate, tasks, training_log
from minivlm.datasets.shapes import ShapesWorld, make_shapes
from minivlm.datasets.shapes.conversations import ShapesConversations
from minivlm.datasets.span_corruption import SENTINELS
from minivlm.errors import UserError
from minivlm.layers import LanguageModel, LanguageModelConfig, TextConfig, VisionConfig
from minivlm.layers.bert import BERT, BERTConfig
from minivlm.layers.t5 import T5, T5Config
from minivlm.layers.vocabulary import with_vocabulary
from minivlm.models.blip2 import BLIP2
from minivlm.models.blip2_stage1 import BLIP2Stage1
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor
from minivlm.recipes import plan
from minivlm.recipes.job import Job
from tests.test_train_captioner import SHORT, arguments, weights

QFORMER = {f"model.qformer.{k}": v for k, v in dict(width=16, depth=2, heads=2, queries=3).items()}
STAGE1 = SHORT | QFORMER | {"model.embed_width": 8, "optimiser.warmup": 0}
STAGE2 = SHORT | {"optimiser.warmup": 0}
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "black": (0, 0, 0)}


@pytest.fixture(scope="module")
def world(tmp_path_factory, little_to_judge_by):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=32, image_size=32, progress=False)
    return directory


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of plain pictures with captions, and another one of the same pictures with questions."""
    folders = tmp_path_factory.mktemp("photos") / "captions", tmp_path_factory.mktemp("photos") / "questions"
    for i in range(40):
        name = list(COLOURS)[i % 4]
        picture = np.full((32, 32, 3), COLOURS[name], dtype=np.uint8)
        picture[: i // 4] = 128
        split = "test" if i >= 36 else "val" if i >= 32 else "train"
        here = {"image": f"{i}.png", "split": split}
        for folder, file, said in (
            (folders[0], "captions.jsonl", {"caption": f"a picture that is {name}"}),
            (folders[1], "vqa.jsonl", {"question": "what colour is it?", "answer": name}),
        ):
            folder.mkdir(exist_ok=True)
            Image.fromarray(picture).save(folder / f"{i}.png")
            with (folder / file).open("a") as lines:
                lines.write(json.dumps(here | said) + "\n")
    return folders


@pytest.fixture(scope="module")
def bases(world, tmp_path_factory):
    """Eyes and two language models as they are born, each in a directory of its own."""
    out = tmp_path_factory.mktemp("bases")
    words = list(ShapesConversations(world, "train").texts())
    ids = Processor.train(words, vocab_size=400, image_size=32, context=40)
    vision = VisionConfig(image_size=32, patch_size=16, width=12, depth=2, heads=2)
    text = TextConfig(width=16, depth=1, heads=2, vocab_size=ids.vocab_size, context=40, end_token=ids.end_token)
    CLIP(CLIPConfig(vision=vision, text=text, embed_width=16), seed=1).save_pretrained(out / "clip", processor=ids)
    spoken = dict(width=16, heads=2, vocab_size=ids.vocab_size, context=224, end_tokens=(ids.end_token,))
    speaks = Processor.train(words, vocab_size=400, image_size=32, context=224)
    lm = LanguageModel(LanguageModelConfig(**spoken, depth=1, pad_token=ids.pad_token), seed=2)
    lm.save_pretrained(out / "lm", processor=speaks)
    t5 = T5(T5Config(**spoken, depth=1, pad_token=ids.pad_token), seed=3)
    t5.save_pretrained(out / "t5", processor=speaks)
    bert = BERT(BERTConfig(width=16, depth=2, heads=2, vocab_size=ids.vocab_size), seed=4)
    bert.save_pretrained(out / "bert", processor=ids)
    return out


def from_stage1(built, lm):
    return {"lm": lm, "starts_from": built / "stage1", "language_from": built / lm}


@pytest.fixture(scope="module")
def built(bases, world):
    """Stage 1, and stage 2 with either language model, beside what they were built from."""
    train.main(arguments("blip2-stage1", **STAGE1, data=world, vision_from=bases / "clip", out=bases / "stage1"))
    for lm in ("lm", "t5"):
        options = STAGE2 | from_stage1(bases, lm)
        train.main(arguments("blip2", **options, data=world, out=bases / f"blip2-{lm}"))
    return bases


@pytest.fixture
def unjudged(monkeypatch):
    """Runs end with their last checkpoint: what they would score is not asked."""
    monkeypatch.setattr(train, "finish", lambda run, job: None)
    monkeypatch.setattr(Job, "validate", lambda job: 0.5)


def last(directory, step=4):
    return weights(directory / f"checkpoints/step-{step:06d}")


def losses(directory):
    return [line["loss"] for line in training_log.read_log(directory / "log.jsonl")]


def parts(said):
    return {line.split("  ")[0].strip(): line for line in said.splitlines() if "  " in line}


def part(state, name):
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def the_same(some, others):
    return all(torch.equal(value, others[name]) for name, value in some.items())


# ---- what learns, and what does not ----------------------------------------------------------------------------------


def test_stage_one_leaves_the_eyes_as_they_were_and_trains_all_else(built):
    clip, stage1 = weights(built / "clip"), weights(built / "stage1")
    assert len(part(stage1, "vision")) > 20 and the_same(part(stage1, "vision"), part(clip, "vision"))
    optimised = load_file(built / "stage1/checkpoints/step-000004/training.safetensors")
    learnt = {name.split(".")[1] for name in optimised if name.startswith("optimiser.")}
    heads = {"vision_projection", "text_projection", "match_head", "text_head"}
    assert learnt == {"qformer", "logit_scale", *heads}
    early, late = last(built / "stage1", 1), last(built / "stage1")
    for name in learnt:
        assert not the_same({k: v for k, v in early.items() if k.startswith(name)}, late), name


@pytest.mark.parametrize("lm", ["lm", "t5"])
def test_stage_two_trains_qformer_and_projection_alone(built, lm):
    stage1, base, blip2 = weights(built / "stage1"), weights(built / lm), weights(built / f"blip2-{lm}")
    assert the_same(part(blip2, "vision"), part(stage1, "vision"))
    speaker = part(blip2, "language_model")
    assert speaker.keys() == base.keys()
    assert the_same(base, speaker)
    optimised = load_file(built / f"blip2-{lm}/checkpoints/step-000004/training.safetensors")
    assert {name.split(".")[1] for name in optimised if name.startswith("optimiser.")} == {"qformer", "projection"}
    early, late = last(built / f"blip2-{lm}", 1), last(built / f"blip2-{lm}")
    for name in ("qformer", "projection"):
        assert not the_same(part(early, name), part(late, name)), name


def test_the_qformer_goes_on_where_stage_one_left_it_without_the_half_that_reads(built, world):
    options = STAGE2 | from_stage1(built, "lm") | {"data": world}
    work = plan.command_line(arguments("blip2", **options))[1].start(quiet=True)
    stage1, mine = weights(built / "stage1"), work.model.state_dict()
    assert the_same(part(mine, "qformer"), part(stage1, "qformer"))
    left = part(stage1, "qformer").keys() - part(mine, "qformer").keys()
    assert {name.split(".")[-2] for name in left} >= {"token_embedding", "position_embedding", "mlp_norm"}
    assert not any("query" in name or "attention" in name for name in left)
    image = torch.randn(2, 3, 32, 32)
    before, _ = minivlm.load(built / "stage1")
    torch.testing.assert_close(
        *(model.qformer(model.image_features(image)).queries for model in (work.model.eval(), before))
    )


@pytest.mark.parametrize("lm", ["lm", "t5"])
def test_the_table_of_parts_is_read_from_the_parameters(built, photos, tmp_path, capsys, unjudged, lm):
    options = STAGE2 | from_stage1(built, lm) | {"data": photos[0], "out": tmp_path, "steps": 1}
    train.main(arguments("blip2", **options))
    rows = parts(capsys.readouterr().out)
    for name, source in (("vision", "stage1"), ("language_model", lm)):
        assert " frozen " in rows[name] and rows[name].rstrip().endswith(str(built / source))
    assert " trained " in rows["qformer"] and rows["qformer"].rstrip().endswith(str(built / "stage1"))
    assert " trained " in rows["projection"] and rows["projection"].rstrip().endswith("new")
    model, _ = minivlm.load(built / lm)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in rows["language_model"]


def test_stage_one_tells_its_parts_and_its_three_losses_beside_their_chances(built, photos, tmp_path, capsys, unjudged):
    options = STAGE1 | {"data": photos[0], "out": tmp_path, "steps": 2, "vision_from": built / "clip"}
    train.main(arguments("blip2-stage1", **options))
    said = capsys.readouterr()
    rows = parts(said.out)
    assert " frozen " in rows["vision"] and rows["vision"].rstrip().endswith(str(built / "clip"))
    for name in ("qformer", "match_head", "text_head"):
        assert " trained " in rows[name] and rows[name].rstrip().endswith("new")
    told = re.findall(
        r"contrast (\S+) \(chance (\S+)\), matching (\S+) \(chance (\S+)\), generation (\S+) \(chance (\S+)\)", said.err
    )
    vocabulary = minivlm.load(tmp_path / "checkpoints/step-000002")[0].config.qformer.vocab_size
    third = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3  # one pair in three belongs together
    for found in {row[1::2] for row in told}:
        assert [float(x) for x in found] == pytest.approx([math.log(8), third, math.log(vocabulary)], abs=0.005)
    line = training_log.read_log(tmp_path / "log.jsonl")[-1]
    assert [float(x) for x in told[-1][::2]] == pytest.approx(
        [line["contrast"], line["matching"], line["generation"]], abs=0.005
    )


# ---- what is left ----------------------------------------------------------------------------------------------------


def test_stage_one_compares_matches_and_describes(built, world):
    model, processor = minivlm.load(built / "stage1")
    assert isinstance(model, BLIP2Stage1) and model.config.qformer.queries == 3 and processor.context == 40
    test = ShapesWorld(world, "test")
    pictures = list(test.images([0, 1, 2]))
    likely = tasks.match_all(pictures, ["a red circle", "two shapes"], model, processor)
    tokens, mask = processor.text(["a red circle", "two shapes"])
    for j in range(2):
        logits = model.match(processor.images(pictures), *(x[j : j + 1].expand(3, -1) for x in (tokens, mask)))
        torch.testing.assert_close(likely[:, j], logits.softmax(dim=1)[:, 1])
    metrics = json.loads((built / "stage1/metrics.json").read_text())
    names = {"matching", "matching, colour", "text→image R@1", "text→image R@1 re-ranked", "image→text R@1 re-ranked"}
    assert names | {f"never-seen pairs, {name}" for name in names} <= set(metrics)
    assert (built / "stage1/picture.png").stat().st_size > 5000


@pytest.mark.parametrize("lm", ["lm", "t5"])
def test_stage_two_answers_and_captions(built, world, lm):
    model, processor = minivlm.load(built / f"blip2-{lm}")
    assert isinstance(model, BLIP2) and processor.config.image_tokens == 3
    [picture] = ShapesWorld(world, "test").images([0])
    for said in (
        tasks.answer(picture, "is there a red circle?", model, processor, max_new_tokens=3),
        tasks.caption(picture, model, processor, max_new_tokens=3),
    ):
        assert isinstance(said, str)
    metrics = json.loads((built / f"blip2-{lm}/metrics.json").read_text())
    assert {"accuracy", "accuracy, count", "accuracy, blind", "never-seen pairs, accuracy"} <= set(metrics)
    assert (built / f"blip2-{lm}/picture.png").stat().st_size > 5000


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lm", ["stage1", "blip2-lm", "blip2-t5"])
def test_a_run_resumes_to_the_bit(built, world, tmp_path, unjudged, lm):
    if lm == "stage1":
        name, options = "blip2-stage1", STAGE1 | {"vision_from": built / "clip"}
    else:
        name, options = "blip2", STAGE2 | from_stage1(built, lm.removeprefix("blip2-"))
    train.main(arguments(name, **options, data=world, out=tmp_path, stop_at=2))
    train.main([name, "--resume", "--out", str(tmp_path), "--device", "cpu", "--precision", "fp32"])
    assert losses(tmp_path) == losses(built / lm) and len(losses(tmp_path)) == 4
    once, again = last(built / lm), last(tmp_path)
    assert once.keys() == again.keys() and the_same(once, again)


def test_captions_beyond_the_context_are_cut_when_they_are_judged_and_pictured(built, world, tmp_path):
    """A run that has trained for an hour must not end in an error because of one long caption."""
    model, processor = minivlm.load(built / "stage1")
    short = Processor(processor.tokenizer, replace(processor.config, context=8))
    assert short.too_long(list(ShapesWorld(world, "test").texts())) > 0
    evaluate.matching_sheet(model, short, world, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
    assert 0 <= evaluate.matching_accuracy(model, short, world) <= 1


# ---- other ways to begin ---------------------------------------------------------------------------------------------


def test_from_scratch_the_qformer_is_new_on_the_eyes_of_a_clip(built, photos, tmp_path, capsys, unjudged):
    base = {"vision_from": built / "clip", "language_from": built / "lm", "starts_from": "nowhere"}
    options = STAGE2 | QFORMER | base | {"data": photos[0], "out": tmp_path}
    train.main([*arguments("blip2", **options), "--from_scratch"])
    rows = parts(capsys.readouterr().out)
    assert rows["vision"].rstrip().endswith(str(built / "clip"))
    assert " trained " in rows["qformer"] and rows["qformer"].rstrip().endswith("new")
    model, _ = minivlm.load(tmp_path / "checkpoints/step-000004")
    assert the_same(model.vision.state_dict(), part(weights(built / "clip"), "vision"))
    assert model.qformer.token_embedding is None and model.config.qformer.queries == 3
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_the_qformer_may_start_from_bert(built, world):
    options = STAGE1 | {"data": world, "vision_from": built / "clip", "bert_from": built / "bert"}
    work = plan.command_line(arguments("blip2-stage1", **options))[1].start(quiet=True)
    bert, _ = minivlm.load(built / "bert")
    ours, theirs = work.model.qformer.state_dict(), bert.state_dict()
    words = theirs["token_embedding.weight"]
    assert torch.equal(ours["token_embedding.weight"][: len(words)], words)
    for part in ("attention.q_proj.weight", "mlp.up_proj.weight"):
        assert torch.equal(ours[f"blocks.1.{part}"], theirs[f"transformer.blocks.1.{part}"])
    assert work.origins["qformer"] == str(built / "bert")


def test_what_is_missing_is_planned_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def planned(*words):
        return [(name, options.out) for name, _, options in plan.chain(*plan.command_line([*words]))]

    eyes, stage1, lm, t5, last = (
        *((name, f"out/{name}") for name in ("clip-resnet", "blip2-stage1", "lm", "t5")),
        ("blip2", None),
    )
    assert planned("blip2") == [eyes, stage1, lm, last]
    assert planned("blip2", "--lm", "t5") == [eyes, stage1, t5, last]
    assert planned("blip2", "--from_scratch") == [eyes, lm, last]
    assert planned("blip2-stage1") == [eyes, ("blip2-stage1", None)]
    mine = [("clip-resnet", "clip"), ("blip2-stage1", "blip2-stage1"), ("t5", "t5")]
    wanted = [(name, f"out/photos-{directory}") for name, directory in mine]
    assert planned("blip2", "--lm", "t5", "--data", "photos") == [*wanted, last]
    assert plan.chain(*plan.command_line(["blip2", "--data", "photos"]))[1][1].vision_from == "out/photos-clip"


@pytest.mark.parametrize("lm", ["lm", "t5"])
def test_a_t5_is_asked_one_question_and_a_decoder_all(built, world, lm):
    options = STAGE2 | from_stage1(built, lm) | {"data": world}
    work = plan.command_line(arguments("blip2", **options))[1].start(quiet=True)
    batch, decode, mark = work.batch(2), work.processor.decode, work.processor.image_token_id
    assert (batch["tokens"] == mark).sum(dim=1).tolist() == [3] * 8
    share = work.order.share(2)
    for row, (index, rng) in enumerate(share):
        labels = batch["labels"][row]
        said = decode([labels[(labels >= 0) & (labels != work.processor.end_token)].tolist()])[0]
        turns = [turn.text for turn in work.samples.turns(index, rng)]
        answers, questions = turns[1::2], [text.replace("<image>", "").strip() for text in turns[::2]]
        if lm == "t5":
            asked = decode([batch["tokens"][row][batch["mask"][row]].tolist()])[0].strip()
            assert asked in questions and said in [a for q, a in zip(questions, answers, strict=True) if q == asked]
        else:
            assert "".join(said.split()) == "".join("".join(answers).split())
    halves = [work.batch(2, rank, 2)["labels"] for rank in range(2)]
    rows = [row[row >= 0].tolist() for half in zip(*halves, strict=True) for row in half]
    assert rows == [row[row >= 0].tolist() for row in batch["labels"]]


@pytest.mark.parametrize("holes", [0.0, 1.0])
def test_a_t5_that_knows_holes_is_asked_all_at_once(built, world, tmp_path, holes):
    t5, speaks = minivlm.load(built / "t5")
    speaks.tokenizer.add_special_tokens(list(SENTINELS))
    with_vocabulary(t5, speaks.tokenizer.get_vocab_size()).save_pretrained(tmp_path, processor=speaks)
    options = STAGE2 | from_stage1(built, "t5") | {"data": world, "language_from": tmp_path, "data.holes": holes}
    work = plan.command_line(arguments("blip2", **options))[1].start(quiet=True)
    batch, ids = work.batch(2), work.processor
    marks = [ids.tokenizer.token_to_id(hole) for hole in SENTINELS]
    for row, (index, rng) in enumerate(work.order.share(2)):
        rng.random()  # whether all are asked is drawn first
        turns = [turn.text.replace("<image>", "").strip() for turn in work.samples.turns(index, rng)]
        read = batch["tokens"][row][batch["mask"][row]].tolist()
        said = [label for label in batch["labels"][row].tolist() if label >= 0]
        if holes:
            n = len(turns) // 2
            assert read[:3] == [ids.image_token_id] * 3 and [t for t in read if t in marks] == marks[:n]
            assert ids.decode([read])[0].split() == " ".join(turns[::2]).split()
            assert [t for t in said if t in marks] == marks[:n]
            assert ids.decode([said])[0].split() == " ".join(turns[1::2]).split()
        else:
            assert not set(marks) & {*read, *said} and ids.decode([said])[0].strip() in turns[1::2]
    loss = sum(work.model.losses(**batch).values())
    assert loss.isfinite()


# ---- folders of your own ---------------------------------------------------------------------------------------------


def test_a_folder_with_captions_goes_through_both_stages(built, photos, tmp_path, capsys):
    options = STAGE1 | {"data": photos[0], "vision_from": built / "clip", "out": tmp_path / "stage1"}
    train.main(arguments("blip2-stage1", **options))
    metrics = json.loads((tmp_path / "stage1/metrics.json").read_text())
    assert set(metrics) == {f"{a} R@1{b}" for a in ("text→image", "image→text") for b in ("", " re-ranked")}
    base = {"starts_from": tmp_path / "stage1", "language_from": built / "lm"}
    train.main(arguments("blip2", **STAGE2 | base | {"data": photos[0], "out": tmp_path / "blip2"}))
    assert "words in common" in capsys.readouterr().out  # there are no questions to be judged by
    model, processor = minivlm.load(tmp_path / "blip2")
    assert isinstance(tasks.caption(photos[0] / "0.png", model, processor, max_new_tokens=3), str)


def test_a_folder_with_questions_is_answered(built, photos, tmp_path, capsys):
    options = STAGE2 | from_stage1(built, "t5") | {"data": photos[1], "out": tmp_path}
    train.main(arguments("blip2", **options))
    assert "accuracy of answers" in capsys.readouterr().out
    assert {"accuracy", "accuracy, blind"} <= set(json.loads((tmp_path / "metrics.json").read_text()))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        (
            "blip2",
            {"language_from": "t5"},
            r"--lm lm wants a LanguageModel, but \S+ holds a T5; take it with --lm t5\.",
        ),
        (
            "blip2",
            {"lm": "t5", "language_from": "lm"},
            r"--lm t5 wants a T5, .* a LanguageModel; take it with --lm lm\.",
        ),
        ("blip2", {"language_from": "clip"}, r"--lm lm wants a LanguageModel, but \S+ holds a CLIP\.$"),
        (
            "blip2",
            {"starts_from": "lm"},
            r"--starts_from \S+ holds a LanguageModel, but stage 1 of a BLIP-2 is wanted: ",
        ),
        (
            "blip2-stage1",
            {"vision_from": "lm"},
            r"--vision_from \S+ holds a LanguageModel, which has no vision tower: ",
        ),
        ("blip2-stage1", {"vision_from": "bert"}, r"--vision_from \S+ holds a BERT, which has no vision tower: "),
        (
            "blip2",
            {"vision_from": "t5", "from_scratch": "true"},
            r"--vision_from \S+ holds a T5, which has no vision tower: ",
        ),
        ("blip2-stage1", {"bert_from": "lm"}, r"--bert_from \S+ holds a LanguageModel, but a BERT is wanted\."),
        (
            "blip2-stage1",
            {"bert_from": "bert", "model.qformer.depth": 3},
            r"--bert_from \S+ .*depth of the Q-Former is 3, but BERT's is 2\.",
        ),
        (
            "blip2-stage1",
            {"model.qformer.heads": 3},
            r"the model cannot be built: width 16 is not a multiple of 3 heads",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(built, world, recipe, given, message):
    places = {"vision_from", "language_from", "starts_from", "bert_from"}
    given = {name: built / value if name in places else value for name, value in given.items()}
    base = {"vision_from": built / "clip"} if recipe == "blip2-stage1" else from_stage1(built, "lm")
    options = (STAGE1 if recipe == "blip2-stage1" else STAGE2) | base | {"data": world} | given
    with pytest.raises(UserError, match=message):
        plan.command_line(arguments(recipe, **options))[1].start(quiet=True)


def test_a_base_that_is_not_there_is_an_error_and_not_trained(built, world, tmp_path):
    options = STAGE2 | from_stage1(built, "lm") | {"data": world, "out": tmp_path, "starts_from": "nowhere"}
    with pytest.raises(UserError, match="nowhere"):
        train.main(arguments("blip2", **options))


def test_eyes_that_do_not_fit_the_qformer_beside_them(built, tmp_path):
    texts = json.loads((built / "stage1/config.json").read_text())
    texts["config"]["vision"]["width"] = 20
    (tmp_path / "config.json").write_text(json.dumps(texts))
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((built / "stage1" / name).read_bytes())
    with pytest.raises(UserError, match="features of width 20, but the Q-Former reads features of width 12"):
        minivlm.load(tmp_path)
    texts["config"]["qformer"]["context_width"] = 20  # consistent, but the weights are of another tower
    (tmp_path / "config.json").write_text(json.dumps(texts))
    with pytest.raises(UserError, match=r"vision\."):
        minivlm.load(tmp_path)


def test_a_text_longer_than_the_context_of_the_qformer(built, world):
    model, processor = minivlm.load(built / "stage1")
    [picture] = ShapesWorld(world, "test").images([0])
    with pytest.raises(
        UserError, match=r"the text 'red circle .*…' has \d+ tokens, but the model takes 40; make it shorter"
    ):
        tasks.match_all([picture], ["a red circle", "red circle " * 60], model, processor)
    with pytest.raises(UserError, match=r"the prompt of \d+ tokens does not fit the context of 224"):
        tasks.answer(picture, "red circle " * 160, *minivlm.load(built / "blip2-lm"))
