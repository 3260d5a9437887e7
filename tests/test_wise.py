"""WiSE-FT: models between a start and what was fine-tuned from it, judged and saved; and the table of several columns."""

import json
from dataclasses import replace

import pytest
import torch

import minivlm
from minivlm import evaluate
from minivlm.datasets.shapes import ShapesWorld, make_shapes
from minivlm.errors import UserError
from minivlm.evaluate import command as evaluate_command
from minivlm.evaluate.averaged import Averaged
from minivlm.layers import TextConfig, VisionConfig
from minivlm.metrics import Score
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor

VISION = VisionConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A world of little to judge by, and two models of one shape that differ in their weights."""
    place = tmp_path_factory.mktemp("wise")
    make_shapes(place / "world", train=16, image_size=32, progress=False)
    processor = Processor.train(
        ShapesWorld(place / "world", "train").texts(), vocab_size=300, image_size=16, context=96
    )
    text = TextConfig(
        width=16, depth=1, heads=2, context=96, vocab_size=processor.vocab_size, end_token=processor.end_token
    )
    config = CLIPConfig(vision=VISION, text=text, embed_width=16)
    for seed, name in enumerate(("start", "tuned")):
        CLIP(config, seed=seed).save_pretrained(place / name, processor=processor)
    wider = CLIP(replace(config, embed_width=8))
    wider.save_pretrained(place / "wider", processor=processor)
    return place


def test_the_weights_lie_between_those_of_the_start_and_the_fine_tuned(places):
    (start, _), (tuned, _) = minivlm.load(places / "start"), minivlm.load(places / "tuned")
    a, b = ({name: t.clone() for name, t in model.state_dict().items()} for model in (start, tuned))
    averaged = Averaged(tuned, start, names=("tuned", "start"))
    for share in (0.25, 1.0, 0.0):
        found = averaged.at(share).state_dict()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, (1 - share) * a[name] + share * b[name])
    assert all(torch.equal(tensor, a[name]) for name, tensor in averaged.at(0.0).state_dict().items())
    assert all(torch.equal(tensor, b[name]) for name, tensor in averaged.at(1.0).state_dict().items())


def test_in_half_precision_the_average_is_rounded_once(places):
    half = [minivlm.load(places / name, dtype=torch.bfloat16)[0] for name in ("start", "tuned")]
    wide = [{name: t.float() for name, t in model.state_dict().items()} for model in half]
    averaged = Averaged(half[1], half[0], names=("tuned", "start")).at(0.5)
    for name, tensor in averaged.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, torch.lerp(wide[0][name], wide[1][name], 0.5).bfloat16())


def run(places, *words):
    evaluate_command.main([str(places / "tuned"), "--data", str(places / "world"), "--device", "cpu", *map(str, words)])


def test_the_command_shows_a_column_for_each_average_and_leaves_one(places, tmp_path, monkeypatch, capsys):
    lengths = lambda model, processor, data, how: {"length": Score(model.loss.logit_scale.item() / 9, 0.5)}
    monkeypatch.setattr(evaluate_command, "evaluate", lengths)
    run(places, "--start", places / "start", "--wise", 0, 0.5, 1, "--save", tmp_path / "scores.json")
    head, row = capsys.readouterr().out.rstrip().splitlines()
    assert head.split() == ["0", "(start)", "0.5", "1", "(tuned)", "chance"] and row.split()[0] == "length"
    assert list(json.loads((tmp_path / "scores.json").read_text())) == ["0 (start)", "0.5", "1 (tuned)"]

    run(places, "--start", places / "start", "--wise", 0.5, "--save_model", tmp_path / "half")
    weights = [minivlm.load(place)[0].image_projection.weight for place in (places / "start", places / "tuned")]
    model, processor = minivlm.load(tmp_path / "half")
    torch.testing.assert_close(model.image_projection.weight, sum(weights) / 2)
    assert processor is not None


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--wise", "0.5"], "no checkpoint that says what it was fine-tuned from"),
        (["--wise", "0.5", "--start", "wider"], r"image_projection.weight is \(8, 16\) there and \(16, 16\) here"),
        (["--wise", "1.5"], "not a number from 0 to 1"),
        (["--wise", "0", "1", "--start", "start", "--save_model", "new"], "leaves one average"),
        (["--wise", "0", "--start", "start", "--save_model", "start"], "is there already"),
        (["--start", "start"], "belongs to --wise"),
        (["--wise", "0", "--shots", "0"], "tables of their own"),
    ],
)
def test_what_cannot_be_averaged_is_refused_in_one_sentence(places, words, why, monkeypatch):
    monkeypatch.chdir(places)
    with pytest.raises(UserError, match=why):
        run(places, *words)
    assert not (places / "new").exists()


def test_scores_before_stand_in_front_of_those_after():
    after = {"top-1": Score(0.5, 0.1), "perplexity": Score(3.0, 9.0, share=False)}
    lines = evaluate.table(after, {"top-1": Score(0.25, 0.1)}).splitlines()
    assert lines[0].split() == ["before", "after", "chance"]
    assert lines[1].split() == ["top-1", "25.0%", "50.0%", "10.0%"] and lines[2].split() == [
        "perplexity",
        "3.00",
        "9.00",
    ]
    assert evaluate.table(after).splitlines()[0] == f"{'':10}  score  chance"
