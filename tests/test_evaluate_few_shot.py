"""Few-shot accuracy and its controls, measured on readers whose right answers are known, and once on a real model."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivlm.datasets.shapes.shots import Shot, ShotEpisode, shot_episodes
from minivlm.errors import UserError
from minivlm.evaluate import command as evaluate_command
from minivlm.metrics import Score
from minivlm.tasks.few_shot import LEAD
from tests.speakers import captioner, flamingo, processor

module = importlib.import_module("minivlm.evaluate.few_shot")  # as an attribute it is the function of that name
RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def colour_episodes(n, *, shots, ways=2, seed=0):
    """Words for colours: pictures are (2, 2, 3), of one colour each."""
    rng = np.random.default_rng(seed)
    episodes = []
    for _ in range(n):
        colours = rng.permutation(list(RGB))[:ways]
        words = [f"w{rng.integers(10**6)}" for _ in colours]
        shot = lambda i, colours=colours, words=words: Shot(
            np.full((2, 2, 3), RGB[colours[i]], dtype=np.uint8), words[i]
        )
        order = rng.permutation(np.arange(shots) % ways)
        episodes.append(ShotEpisode([shot(i) for i in order], shot(rng.integers(ways))))
    return episodes


def reader(model, processor, prompts, candidates):
    """Says what the examples of the query's colour are called most often; where none is shown, any of the others."""
    said = []
    for i, (prompt, some) in enumerate(zip(prompts, candidates, strict=True)):
        labels = re.findall(rf"<image>{LEAD} (\w+)\.", "".join(prompt.text))
        *shown, asked = [tuple(image[0, 0].tolist()) for image in prompt.images]
        votes = dict.fromkeys(some, 0.0)
        for colour, label in zip(shown, labels, strict=True):
            votes[label] += 1 if colour == asked else -0.5
        best = max(votes.values())
        likely = [word for word in some if votes[word] == best]
        said.append(likely[i % len(likely)])
    return said


@pytest.fixture
def read_by(monkeypatch):
    monkeypatch.setattr(module, "check_room", lambda *_: None)
    return lambda reader: monkeypatch.setattr(module, "likeliest", reader)


@pytest.mark.parametrize(("ways", "shots"), [(2, 2), (2, 8), (3, 3)])
def test_who_reads_is_right_and_follows_the_shuffled_labels(read_by, ways, shots):
    read_by(reader)
    scores = module.judge(None, processor(), colour_episodes(300, shots=shots, ways=ways), ways)
    assert scores[""] == Score(1.0, 1 / ways) and scores[", labels shuffled"] == Score(0.0, 1 / ways)
    assert scores[", shuffled label said"] == Score(1.0, 1 / ways)
    assert scores[", pictures shuffled"].value == pytest.approx(1 / ways, abs=0.08)


def test_who_guesses_is_at_chance_whatever_is_shuffled(read_by):
    rng = np.random.default_rng(0)
    read_by(lambda model, processor, prompts, candidates: [some[rng.integers(len(some))] for some in candidates])
    for shots in (0, 1, 4):
        scores = module.judge(None, processor(), colour_episodes(600, shots=shots), 2)
        assert len(scores) == {0: 1, 1: 3, 4: 4}[shots]
        assert all(score.value == pytest.approx(0.5, abs=0.07) for score in scores.values())


def test_words_are_there_to_choose_from_where_no_example_shows_them(read_by):
    read_by(reader)
    [episode] = colour_episodes(1, shots=0)
    some = module.choices(episode, 3, np.random.default_rng(0))
    assert len({*some}) == 3 and episode.query.label in some
    places = {module.choices(episode, 2, np.random.default_rng(i)).index(episode.query.label) for i in range(9)}
    assert places == {0, 1}
    assert module.few_shot_accuracy(None, processor(), colour_episodes(400, shots=1)).value == 1.0  # by elimination


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A model that has learnt nothing, and a world."""
    folder = tmp_path_factory.mktemp("desk")
    flamingo().save_pretrained(folder / "flamingo", processor=processor(image_tokens=1))
    captioner().save_pretrained(folder / "captioner", processor=processor(image_tokens=0))
    (folder / "world").mkdir()
    (folder / "world" / "world.json").touch()  # all that is looked for: episodes have pictures of their own
    return folder


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(module, "EPISODES", 12)
    monkeypatch.setattr(importlib.import_module("minivlm.evaluate.language"), "EPISODES", 6)


def test_the_command_tells_and_draws_the_curve(desk, tmp_path, monkeypatch, capsys, few):
    monkeypatch.chdir(tmp_path)
    options = ("--data", desk / "world", "--device", "cpu", "--save", "scores.json")
    evaluate_command.main([str(x) for x in (desk / "flamingo", "--shots", 0, 2, *options)])
    out = capsys.readouterr().out
    scores = json.loads(Path("scores.json").read_text())
    rows = ["", ", labels shuffled", ", shuffled label said", ", pictures shuffled", ", never-seen pairs"]
    assert list(scores) == [
        "0 shots",
        "0 shots, never-seen pairs",
        *(f"2 shots{r}" for r in [*rows, ", told in words"]),
    ]
    assert all(score["chance"] == 0.5 for score in scores.values())
    assert "wrote few-shot.png" in out and all(name in out for name in scores)
    assert Image.open("few-shot.png").width > 600
    model, words = flamingo(), processor(image_tokens=1)
    accuracy = module.few_shot_accuracy(model, words, shot_episodes(12, shots=2, image_size=16))
    assert scores["2 shots"]["value"] == accuracy.value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("captioner", "--shots", 2), "this ImageCaptioningModel cannot learn from examples"),
        (("flamingo", "--shots", 2, "--ways", 1), "--ways is 1, but to choose from one word is no choice"),
        (("flamingo", "--shots", 40), "40 examples .* cannot be drawn"),
        (
            ("flamingo", "--shots", 16),
            r"16 examples and the query have \d+ tokens .* at most \d+ of these examples fit",
        ),
        (("flamingo", "--shots", "two"), "'two' is not a number from 0 upwards"),
        (("flamingo", "--shots", 2, "--picture", "x.what"), "--picture x.what: the name has to end in .png"),
        (("flamingo", "--shot", 2), "unknown option --shot. Did you mean --shots"),
    ],
)
def test_mistakes_are_told(desk, monkeypatch, argv, message, few):
    monkeypatch.chdir(desk)
    with pytest.raises(UserError, match=message):
        evaluate_command.main([*map(str, argv), "--data", "world", "--device", "cpu"])
