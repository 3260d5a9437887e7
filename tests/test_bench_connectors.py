"""Connectors side by side: what is counted, what is shown to them, and trained ones with their accuracy."""

import argparse
import json

import pytest
import torch
from PIL import Image

from minivlm.bench import connectors, main
from minivlm.errors import UserError
from minivlm.layers import QFormerConfig, T5Config
from minivlm.losses import next_token_loss
from minivlm.metrics import Score
from minivlm.models.blip2 import BLIP2, BLIP2Config
from tests.speakers import COLOURS, VISION, captioner, colour_llava, language, llava, plain, processor

QFORMER = QFormerConfig(width=16, depth=2, heads=2, queries=3)
T5 = T5Config(width=16, depth=2, heads=2, vocab_size=70, context=40)


def blip2(**changes):
    fields = dict(vision=VISION, qformer=QFORMER, language=language(), image_token=processor().image_token_id)
    return BLIP2(BLIP2Config(**{**fields, **changes})).eval()


MODELS = {
    "llava": llava,
    "tiles": lambda: llava(tiles=2),
    "blip2": blip2,
    "queries in front": lambda: blip2(image_token=None),
    "t5": lambda: blip2(language=T5, image_token=69),
}


def test_all_stand_between_the_same_tower_and_language_model(capsys):
    rows = {name: connectors.Sizes.of(build(*arguments)) for name, (build, arguments) in connectors.CONNECTORS.items()}
    assert [row.image_tokens for row in rows.values()] == [256, 256, 16, 8, 16]
    linear, mlp, _, few, more = (row.parameters for row in rows.values())
    assert linear == 385 * 512 and mlp == linear + 513 * 512 and more - few == 8 * 384
    connectors.note_other_differences(rows)
    assert capsys.readouterr().out == ""
    model = blip2()
    expected = sum(p.numel() for part in (model.qformer, model.projection) for p in part.parameters())
    assert connectors.Sizes.of(model).parameters == expected
    connectors.note_other_differences({"a": connectors.Sizes.of(model), "b": connectors.Sizes.of(MODELS["t5"]())})
    assert "b and a differ in their language model as well" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODELS)
def test_a_step_teaches_all_but_the_tower(name):
    made = []
    step = connectors.train(lambda: made.append(MODELS[name]()) or made[0], (), "fp32", 2, 5)
    [model] = made
    images, tokens = connectors.prompt(model, 2, 5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    if name == "llava":
        assert (tokens == model.config.image_token).sum() == 2 * model.config.image_tokens
        hidden = model.language_model.states(model.embed(images, tokens))
        labels = tokens.masked_fill(tokens == model.config.image_token, -100)
        expected = next_token_loss(hidden, labels, model.language_model.head.weight).item()
        assert step() == pytest.approx(expected, rel=1e-5)
    else:
        step()
    learnt = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert learnt == {name for name, _ in model.named_children()} - {"vision"}


@pytest.mark.parametrize("name", MODELS)
def test_all_generate(name):
    model = MODELS[name]()
    new = connectors.generate(MODELS[name], (), torch.float32, 5, 4)()
    images, tokens = connectors.prompt(model, 1, 5)
    assert new["tokens"] == model.generate(images, tokens, max_new_tokens=4, end_tokens=()).tolist()


def test_as_many_tokens_as_all_have_room_for():
    assert connectors.lengths([1000, 96]) == (32, 64)
    assert connectors.lengths([1000, 30]) == (10, 20)
    with pytest.raises(UserError, match="has room for 2 tokens beside an image"):
        connectors.lengths([2, 96])


def test_the_table(capsys):
    turn = dict(first=0.005, step=0.002)
    rows = {"linear": connectors.Sizes(16, 1234567, 80, ()), "out/a": connectors.Sizes(8, 10, 80, (), Score(0.92, 0.3))}
    steps = {name: dict(median=0.1, memory=3 * 2**20) for name in rows}
    spoken = {name: dict(values=(turn, turn), memory=2**20) for name in rows}
    connectors.print_connectors({"linear": rows["linear"]}, steps, spoken, 8)
    header, line = capsys.readouterr().out.splitlines()
    assert "accuracy" not in header and line.split() == (
        ["linear", "16", "1,234,567", "80.0", "samples/s", "500.0", "tokens/s", "5.0", "ms", "3", "1"]
    )
    connectors.print_connectors({"out/a": rows["out/a"]}, steps, spoken, 8)
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["accuracy", "chance"] and line.split()[-2:] == ["92.0%", "30.0%"]
    assert len(header) == len(line)


class TestTrained:
    @pytest.fixture
    def data(self, tmp_path):
        """What colour is it? Three times out of four the truth is known."""
        (folder := tmp_path / "data").mkdir()
        lines = []
        for i in range(4):
            colour = COLOURS[i % 3]
            Image.fromarray(plain(colour)).save(folder / f"{i}.png")
            answer = "mauve" if i == 3 else colour
            lines.append({"image": f"{i}.png", "question": "which colours?", "answer": answer, "split": "test"})
        train = {**lines[0], "split": "train"}
        (folder / "vqa.jsonl").write_text("\n".join(map(json.dumps, [*lines, train])))
        return str(folder)

    def test_stand_beside_their_accuracy(self, data, tmp_path, capsys):
        colour_llava().save_pretrained(tmp_path / "llava", processor=processor())
        main(
            ["connectors", "--models", str(tmp_path / "llava"), "--data", data, "--rounds", "1", "--precision", "fp32"]
        )
        *_, line = capsys.readouterr().out.splitlines()
        assert line.startswith(str(tmp_path / "llava")) and line.split()[-2] == "75.0%"

    def test_others_are_refused(self, data, tmp_path):
        from minivlm.layers import LanguageModel

        LanguageModel(language()).save_pretrained(tmp_path / "lm", processor=processor())
        with pytest.raises(UserError, match="this LanguageModel takes text alone, and no image"):
            connectors.examine(str(tmp_path / "lm"), data)
        captioner().save_pretrained(tmp_path / "captioner", processor=processor(image_tokens=0))
        with pytest.raises(UserError, match="cannot answer questions"):
            connectors.examine(str(tmp_path / "captioner"), data)

    def test_data_without_questions(self, tmp_path):
        llava().save_pretrained(tmp_path / "llava", processor=processor())
        (folder := tmp_path / "data").mkdir()
        Image.fromarray(plain("red")).save(folder / "a.png")
        (folder / "captions.jsonl").write_text(json.dumps({"image": "a.png", "caption": "red", "split": "test"}))
        with pytest.raises(UserError, match="holds no questions to judge by"):
            connectors.bench_connectors(argparse.Namespace(models=[str(tmp_path / "llava")], data=str(folder)))
