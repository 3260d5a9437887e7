"""Matching and re-ranking, measured on a model whose right answers are known."""

import pytest
import torch

from minivlm.datasets.shapes import ShapesWorld, make_shapes
from minivlm.evaluate import match as evaluation
from minivlm.evaluate.match import closest, first_is_right, hard_negatives, matching, told_apart
from minivlm.metrics import Score
from minivlm.metrics.retrieval import by_lists
from tests.matchers import Oracle, WordProcessor

ATTRIBUTES = ("colour", "shape", "size", "place")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=16, image_size=32, progress=False)
    return directory


@pytest.fixture(scope="module")
def oracle(world):
    return Oracle([ShapesWorld(world, "test"), ShapesWorld(world, "unseen")], WordProcessor())


def test_who_matches_without_a_mistake_is_told_so(world, oracle):
    oracle.looked = oracle.matched = 0
    scores = matching(oracle, oracle.processor, world)
    keys = ["matching", *(f"matching, {a}" for a in ATTRIBUTES)]
    keys += [f"{way} R@1{after}" for way in ("text→image", "image→text") for after in ("", " re-ranked")]
    assert list(scores) == [f"{split}{key}" for split in ("", "never-seen pairs, ") for key in keys]
    for split in ("", "never-seen pairs, "):
        assert all(scores[f"{split}{key}"] == Score(1.0, 0.5) for key in keys[:5])
        for way in ("text→image", "image→text"):
            before, after = scores[f"{split}{way} R@1"], scores[f"{split}{way} R@1 re-ranked"]
            assert before.value < 0.5 < after.value  # colours alone leave several, of which matching finds the one
            assert before.chance == after.chance < 0.01
    assert oracle.looked == 1000  # each picture once
    assert oracle.matched < 2 * (500 * 5 + 2 * 500 * 16)  # what both directions ask for only once


def test_who_always_says_yes_is_right_half_of_the_time(world, oracle, monkeypatch):
    monkeypatch.setattr(oracle, "match", lambda images, tokens, m: torch.tensor([[0.0, 1.0]] * len(tokens)))
    test = ShapesWorld(world, "test")
    features = evaluation.features_of_split(oracle, oracle.processor, test)
    assert set(hard_negatives(oracle, oracle.processor, test, features).values()) == {Score(0.5, 0.5)}


def test_true_and_false_captions_count_alike():
    wrong = ["", "colour", "place", "", "colour"]
    scores = told_apart(
        wrong, torch.tensor([1.0, -1.0, 2.0, -0.1, -3.0]), "aabbb"
    )  # one of two true ones, two of three false
    assert scores["matching"].value == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores["matching, colour"].value == pytest.approx((1 / 2 + 1) / 2)
    assert scores["matching, place"].value == pytest.approx((1 / 2 + 0) / 2)


def test_what_is_beyond_the_first_k_is_not_found():
    similar = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.4]])
    right, _ = by_lists([[0], [0]], 3)
    score, best = closest(similar, torch.eye(3), right, torch.matmul, 2)
    assert best.tolist() == [[0, 1], [2, 1]] and score == Score(0.5, pytest.approx(1 / 3))
    matched = torch.tensor([[0.7, 0.1], [0.1, 0.2]])
    assert first_is_right(matched, best, right) == [True, False]
    tied = torch.tensor([[0.7, 0.7], [0.1, 0.2]])  # a wrong one that ties stands before
    assert first_is_right(tied, best, right) == [False, False]


def test_blocks_change_nothing(world, oracle, monkeypatch):
    whole = matching(oracle, oracle.processor, world)
    monkeypatch.setattr(evaluation, "AT_A_TIME", 7)
    assert matching(oracle, oracle.processor, world) == whole


def test_a_folder_without_scenes_is_judged_by_retrieval(world, oracle, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/captions.jsonl").write_text((world / "test/captions.jsonl").read_text())
    for picture in (world / "test").glob("*.png"):
        (tmp_path / "data" / picture.name).hardlink_to(picture)
    scores = matching(oracle, oracle.processor, tmp_path / "data")
    assert len(scores) == 4 and scores["text→image R@1 re-ranked"].value > 0.5
