"""Matching pictures with texts, and searching with both: comparing first, matching the best."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minivlm
from minivlm import tasks
from minivlm.datasets.shapes import ShapesWorld, make_shapes
from minivlm.datasets.shapes.negatives import one_attribute_negatives
from minivlm.errors import UserError
from minivlm.tasks.match import features_of_all, match_pairs
from minivlm.tasks.search import best_rows
from tests.colours import ColourModel, ColourProcessor
from tests.matchers import Oracle, WordProcessor


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=16, image_size=32, progress=False)
    return ShapesWorld(directory, "test")


@pytest.fixture(scope="module")
def oracle(world):
    return Oracle([world], WordProcessor())


@pytest.fixture
def files(world, tmp_path):
    for i in range(40):
        Image.fromarray(world.pixels[i]).save(tmp_path / f"{i:02}.png")
    return tmp_path


def test_one_image_and_one_text_have_one_probability(world, oracle):
    text = world.all_captions(0)[0]
    [[expected]] = tasks.match_all([world.pixels[0]], [text], oracle, oracle.processor).tolist()
    assert minivlm.match(world.pixels[0], text, oracle, oracle.processor) == expected > 0.5


def test_the_right_text_is_likely_and_one_that_is_false_by_a_word_is_not(world, oracle):
    scene, picture = world.scenes[0], world.pixels[0]
    true = world.all_captions(0)[0]
    assert tasks.match_all([picture], [true], oracle, oracle.processor) == pytest.approx(1 / (1 + np.exp(-2)))
    for false, _ in one_attribute_negatives(scene, scene.objects, np.random.default_rng(0)):
        assert tasks.match_all([picture], [false], oracle, oracle.processor) < 0.5


def test_every_picture_with_every_text(world, oracle):
    texts = [world.all_captions(i)[0] for i in range(6)]  # of one to three objects: of very different lengths
    likely = tasks.match_all(list(world.pixels[:5]), texts, oracle, oracle.processor, batch_size=4)
    assert torch.equal(likely > 0.5, torch.eye(5, 6, dtype=torch.bool))


def test_pairs_come_back_in_their_order(world, oracle):
    features = features_of_all(list(world.pixels[:3]), oracle, oracle.processor, batch_size=2)
    tokens, mask = oracle.processor.text([world.all_captions(i)[0] for i in range(3)])
    pairs = torch.tensor([[2, 1], [0, 0], [1, 2], [2, 2], [1, 1]])
    odds = match_pairs(pairs, features, tokens, mask, oracle, batch_size=2)
    assert odds.tolist() == [-2, 2, -2, 2, 2]


def test_a_model_is_left_in_the_mode_it_was_in(world, oracle):
    oracle.train()
    tasks.match_all([world.pixels[0]], ["a red circle"], oracle, oracle.processor)
    assert oracle.training
    oracle.eval()


def test_a_search_is_put_in_order_by_matching(world, oracle, files):
    i = next(i for i in range(40) if len(world.scenes[i].objects) == 2)
    query = world.all_captions(i)[0]
    index = tasks.build_image_index(files, oracle, oracle.processor, path=files / "index", progress=False)
    assert index.features.shape == (40, 16)  # two queries, eight colours
    found = tasks.search_images(query, index, oracle, oracle.processor, top_k=8)
    again = tasks.rerank(query, found, oracle, oracle.processor)
    assert again[0][0] == files.resolve() / f"{i:02}.png" and again[0][2] > 0.5 > again[1][2]
    assert {(path, score) for path, score, _ in again} == set(found)
    assert [row[:2] for row in again[1:]] == [row for row in found if row[0] != again[0][0]]  # ties as they were


def test_a_picture_finds_itself_by_all_its_queries(oracle, files):
    index = tasks.build_image_index(files, oracle, oracle.processor, path=files / "index", progress=False)
    [(path, score)] = tasks.search_images(files / "07.png", index, oracle, oracle.processor, top_k=1)
    found, asked = (oracle.encode_image(oracle.processor.images([p])) for p in (path, files / "07.png"))
    assert score == pytest.approx(1) and torch.equal(found, asked)  # a picture of the same colours


def test_a_text_is_as_close_as_the_closest_query():
    features = np.array([[1, 0, 0, 1], [0, 0.6, 0.8, 0]], dtype=np.float32)  # two pictures of two queries
    scores, rows = best_rows(torch.tensor([0.0, 1.0]), features, 2, chunk=1)
    assert rows.tolist() == [0, 1] and scores.tolist() == pytest.approx([1, 0.6])
    scores, rows = best_rows(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), features, 2, chunk=5)
    assert rows.tolist() == [1, 0] and scores.tolist() == pytest.approx([0.7, 0])


def test_mistakes_are_one_sentence(world, oracle):
    with pytest.raises(
        UserError,
        match=r"^this ColourModel cannot match texts with images; it can compare texts and images as vectors\.$",
    ):
        tasks.match_all([world.pixels[0]], ["a red circle"], ColourModel(), ColourProcessor())
    with pytest.raises(UserError, match="no processor beside this Oracle"):
        tasks.match_all([world.pixels[0]], ["a red circle"], oracle, None)
    with pytest.raises(UserError, match="a text to match is empty"):
        tasks.match_all([world.pixels[0]], ["a red circle", " "], oracle, oracle.processor)
    with pytest.raises(UserError, match="has 70 tokens, but the model takes 64"):
        tasks.match_all([world.pixels[0]], ["red " * 70], oracle, oracle.processor)
    with pytest.raises(UserError, match="search with a text, or without re-ranking"):
        tasks.rerank(Path("red.png"), [], oracle, oracle.processor)
