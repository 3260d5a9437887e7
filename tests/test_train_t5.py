"""T5 through train.py: what it learns, leaves behind and says."""

import json
import math
import re

import numpy as np
import pytest
import torch

import minivlm
import train
from minivlm import tasks, training_log
from minivlm.conversation import IGNORED
from minivlm.datasets.shapes import make_shapes
from minivlm.datasets.shapes.episodes import words
from minivlm.datasets.span_corruption import SENTINELS
from minivlm.errors import UserError
from minivlm.evaluate import command
from minivlm.layers import T5
from minivlm.recipes import plan
from tests.test_train_captioner import LM, arguments

TEXTS = LM | {"optimiser.learning_rate": 0.03}  # four steps have to beat a guess


@pytest.fixture(scope="module")
def world(tmp_path_factory, little_to_judge_by):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=16, image_size=32, progress=False)
    return directory


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "t5"
    train.main(arguments("t5", **TEXTS | {"data": world, "out": out, "optimiser.warmup": 0}))
    return out


def losses(out):
    return [line["loss"] for line in training_log.read_log(out / "log.jsonl")]


def test_it_learns_and_leaves_its_metrics_and_a_picture(trained):
    assert losses(trained)[-1] < losses(trained)[0]
    metrics = json.loads((trained / "metrics.json").read_text())
    told = [name for name in metrics if name.startswith("told scenes, accuracy")]
    assert set(metrics) == {"perplexity", *(f"new words, {k}" for k in ("1 shot", "2 shots", "4 shots")), *told}
    assert len(told) == 7  # in all, and of every kind
    assert 1 < metrics["perplexity"]["value"] < 300 and 1 < metrics["perplexity"]["chance"] < 300
    assert (trained / "picture.png").stat().st_size > 5000


def test_what_it_leaves_is_loaded_and_goes_on_with_a_text(trained):
    model, processor = minivlm.load(trained)
    assert isinstance(model, T5) and model.config.end_tokens == (3,)
    said = tasks.complete("is there a red circle?", model, processor, max_new_tokens=3)
    tokens, mask = processor.text(["is there a red circle?"])
    rest = processor.decode(model.generate(tokens, mask, max_new_tokens=3))[0]
    assert said == f"is there a red circle? {rest}" and rest


def test_a_run_resumes_to_the_bit(trained, world, tmp_path):
    out = tmp_path / "t5"
    train.main(arguments("t5", **TEXTS | {"data": world, "out": out, "optimiser.warmup": 0, "stop_at": 2}))
    train.main(["t5", "--resume", "--out", str(out), "--device", "cpu", "--precision", "fp32"])
    assert losses(out) == losses(trained)
    once, twice = (minivlm.load(d)[0].state_dict() for d in (trained, out))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_batch_without_holes_is_texts_in_two_parts(world):
    work = plan.command_line(arguments("t5", data=world, batch_size=16, data__holes=0, bucket_steps=1))[1].start(
        quiet=True
    )
    batch, decode = work.batch(3), work.processor.decode
    texts = [work.samples.read(index) for index in work.order.indices(3).tolist()]
    assert any(isinstance(text, str) for text in texts) and not all(isinstance(text, str) for text in texts)
    said = batch["labels"].masked_fill(batch["labels"] == IGNORED, 0)
    whole = [f"{a} {b}".strip() for a, b in zip(decode(batch["tokens"]), decode(said), strict=True)]
    for text, parts in zip(texts, whole, strict=True):  # of a conversation, all up to one of its answers
        assert parts in ([text] if isinstance(text, str) else [words(text[: i + 2]) for i in range(0, len(text), 2)])
    ends = (batch["labels"] == work.processor.end_token).sum(dim=1)
    assert ends.tolist() == [1] * 16
    assert torch.equal(batch["mask"], batch["tokens"] != work.processor.pad_token)
    halves = [work.batch(3, rank, 2)["tokens"] for rank in range(2)]
    rows = [row[row != 0].tolist() for half in zip(*halves, strict=True) for row in half]
    assert rows == [row[row != 0].tolist() for row in batch["tokens"]]


def test_most_texts_are_read_with_holes_and_whole_with_what_is_said(world):
    work = plan.command_line(arguments("t5", data=world, batch_size=64, bucket_steps=1))[1].start(quiet=True)
    batch, spell = work.batch(3), work.processor.tokenizer.decode
    texts = [words(work.samples.read(index)) for index, _ in work.order.share(3)]
    holed = 0
    for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
        read, said = (spell([t for t in row if t > 1], skip_special_tokens=False) for row in (tokens, labels))
        if SENTINELS[0] in read:
            holed += 1
            answers = re.split("|".join(SENTINELS), said)[1:]
            for hole, answer in zip(SENTINELS, answers, strict=False):
                read = read.replace(hole, answer)
            whole = read.replace("<end>", "").strip()
            assert any(text.startswith(whole) for text in texts)  # all of it, but of a text with more holes than marks
        else:
            assert said.endswith("<end>")
    assert 36 <= holed <= 60  # three in four, of 64


def test_its_heads_are_given_before_the_first_step_and_need_room(world):
    two = {"model.depth": 2, "model.heads": 8, "model.width": 64, "data": world}
    given, plain = (
        plan.command_line(arguments("t5", **TEXTS | two | {"induction_heads": heads}))[1].start(quiet=True).model
        for heads in ("true", "false")
    )
    table = "encoder.relative.table.weight"
    assert not torch.equal(given.state_dict()[table], plain.state_dict()[table])
    with pytest.raises(UserError, match=r"need two blocks, 8 heads, .*; or .*--induction_heads false\.$"):
        options = TEXTS | two | {"model.heads": 4, "induction_heads": "true"}
        plan.command_line(arguments("t5", **options))[1].start(quiet=True)


def test_perplexity_is_that_of_the_second_parts(trained):
    from minivlm.datasets.continuation import split
    from minivlm.evaluate.language import perplexity

    model, processor = minivlm.load(trained)
    texts = ["is there a red circle? no", "red: dax. blue: wug. red: dax."]
    rng, surprises = np.random.default_rng(0), []
    for text in texts:
        first, second = split(text, rng)
        tokens, labels = processor.text([first])[0], torch.tensor([[*processor.ids(second), processor.end_token]])
        log_p = model(tokens, labels=labels).logits.log_softmax(dim=-1)
        surprises += (-log_p.gather(2, labels[..., None])).flatten().tolist()
    score = perplexity(model, processor, texts, batch_size=2)
    assert score.value == pytest.approx(math.exp(sum(surprises) / len(surprises)), rel=1e-4)
    assert score.value == pytest.approx(perplexity(model, processor, texts, batch_size=1).value, rel=1e-4)


def test_the_command_evaluates_it(trained, world, capsys):
    command.main([str(trained), "--data", str(world), "--device", "cpu"])
    assert "perplexity" in capsys.readouterr().out


def test_texts_of_your_own(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = [{"image": f"{i}.png", "caption": f"photo {i}"} for i in range(40)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for i in range(40):
        (folder / f"{i}.png").touch()
    _, recipe, _ = plan.command_line(["t5", "--data", str(folder)])
    assert recipe.summary == f"a small T5 on the texts of {folder}" and (recipe.batch_size, recipe.steps) == (35, 100)
    assert recipe.data.vocab_size == 4096
