"""The shapes world on disk: made whole or not at all, opened fast, and every damage named."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivlm.datasets import open_pairs
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes import SPLITS, ShapesWorld, make_shapes, split_scenes
from minivlm.datasets.shapes import world as module
from minivlm.datasets.shapes.render import render
from minivlm.datasets.shapes.scenes import CLASSES, SEEN, UNSEEN
from minivlm.datasets.shapes.text import canonical, parse
from minivlm.errors import UserError

SMALL = {"train": 600, "image_size": 32, "progress": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shapes")
    make_shapes(directory, seed=4, **SMALL)
    return directory


@pytest.fixture
def own(world, tmp_path):
    """A world that a test may spoil."""
    return Path(shutil.copytree(world, tmp_path / "own"))


@pytest.mark.parametrize(
    "split, n", [("train", 600), ("val", 500), ("test", 500), ("single_seen", 448), ("single_unseen", 448)]
)
def test_images_show_the_scenes(world, split, n):
    pairs = ShapesWorld(world, split)
    assert len(pairs) == n == len(pairs.scenes)
    indices = [3, n - 1, 0, 3]
    images = pairs.images(indices)
    assert np.array_equal(images, render(split_scenes(split, seed=4, train=600).take(indices), 32))
    images[:] = 0  # a copy: the world is not touched
    assert pairs.images([3]).any()


def test_a_world_with_small_objects_differs_in_their_sizes_alone(world, tmp_path):
    make_shapes(tmp_path / "small", seed=4, shrink=4, **SMALL)
    usual, small = ShapesWorld(world, "test").scenes, ShapesWorld(tmp_path / "small", "test").scenes
    assert np.array_equal(usual.x, small.x) and np.array_equal(usual.colour, small.colour)
    assert np.array_equal(small.radius, usual.radius // small.shrink[:, None])
    assert np.allclose(np.bincount(small.shrink, minlength=5)[1:] / 500, 1 / 4, atol=0.06)
    by_hand = [render(small.take([i]), 64) for i in range(20)]  # each alone, and among scenes of other sizes
    assert np.array_equal(np.concatenate(by_hand), render(small.take(slice(20)), 64))
    ink = (render(small, 64).astype(int) - small.ground[:, None, None]).std(axis=(1, 2, 3))
    assert all(ink[small.shrink == by].mean() > ink[small.shrink == by + 1].mean() for by in (1, 2, 3))


def test_the_usual_world_is_written_as_it_was_before_there_were_small_objects(world):
    assert json.loads((world / "world.json").read_text()).keys() == {"version", "seed", "train", "image_size"}


def test_training_captions_vary_and_the_others_are_canonical(world):
    train, val = ShapesWorld(world, "train"), ShapesWorld(world, "val")
    indices = np.arange(100)
    first, second = (train.captions(indices, np.random.default_rng(seed)) for seed in (0, 1))
    assert first == train.captions(indices, np.random.default_rng(0)) and first != second
    expected = [canonical(scene) for scene in val.scenes.read(indices)]
    assert val.captions(indices, np.random.default_rng(0)) == expected == [val.all_captions(i)[0] for i in indices]


def test_test_captions_are_all_different(world):
    pairs = ShapesWorld(world, "test")
    assert len({pairs.all_captions(i)[0] for i in range(500)}) == 500


def test_labels_of_the_single_splits(world):
    for split, pairs in (("single_seen", SEEN), ("single_unseen", UNSEEN)):
        data = ShapesWorld(world, split)
        assert data.classes == list(CLASSES) and set(data.labels) == set(pairs) and data.labels.dtype == np.int64
        thing = data.scenes[5].objects[0]
        assert data.classes[data.labels[5]] == f"{thing.colour} {thing.shape}"
    assert ShapesWorld(world, "test").labels is None


def test_texts_hold_every_word_once(world):
    texts = list(ShapesWorld(world, "train").texts())
    assert len(texts) == len(set(texts)) > 800
    words = set(" ".join(texts).replace(",", "").split())
    assert {
        "photo",
        "picture",
        "there",
        "corner",
        "near",
        "side",
        "middle",
        "centre",
        "an",
        "ring",
        "cyan",
        "large",
    } <= words


def test_the_test_folder_holds_the_same_pictures_as_files(world):
    pairs = ShapesWorld(world, "test")
    lines = [json.loads(line) for line in (world / "test" / "captions.jsonl").read_text().splitlines()]
    assert len(lines) == 500
    for i in (0, 250, 499):
        assert lines[i] == {"image": f"{i:03d}.png", "caption": pairs.all_captions(i)[0], "split": "test"}
        assert np.array_equal(np.asarray(Image.open(world / pairs.key(i))), pairs.images([i])[0])
    assert ShapesWorld(world, "val").key(7) == "val/7"


def test_open_pairs_recognises_a_world(world):
    assert isinstance(open_pairs(world, "val", image_size=32), ShapesWorld)


def test_the_same_seed_gives_the_same_bytes_and_more_images_the_same_first_ones(world, tmp_path):
    own = tmp_path / "again"
    make_shapes(own, seed=4, **SMALL)
    for name in ("train.npy", "world.json", "test/captions.jsonl"):
        assert (own / name).read_bytes() == (world / name).read_bytes()
    make_shapes(tmp_path / "more", seed=4, train=700, image_size=32, progress=False)
    assert np.array_equal(np.load(tmp_path / "more" / "train.npy")[:600], np.load(world / "train.npy"))


def test_the_same_world_is_left_and_another_replaces_it(own):
    before = (own / "train.npy").stat().st_ino
    make_shapes(own, seed=4, **SMALL)
    assert (own / "train.npy").stat().st_ino == before
    (own / "test" / "captions.jsonl").unlink()
    make_shapes(own, seed=4, **SMALL)
    assert (own / "test" / "captions.jsonl").is_file()
    make_shapes(own, seed=5, **SMALL)
    assert np.array_equal(
        ShapesWorld(own, "train").images([9]), render(split_scenes("train", seed=5, train=600).take([9]), 32)
    )


def interrupt_after(calls, error, monkeypatch):
    """Let `render` work this often and then raise."""

    def rendering(*arguments):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise error
        return render(*arguments)

    monkeypatch.setattr(module, "render", rendering)


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_killed_run_leaves_nothing_that_looks_complete(own, calls, monkeypatch):
    """Two calls make the training images, the third the test images; the world that stood there is given up first."""
    with monkeypatch.context() as patch:
        interrupt_after(calls, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            make_shapes(own, seed=5, **SMALL)
    with pytest.raises(UserError, match=r"no complete shapes world in .* make it with"):
        ShapesWorld(own, "val")
    make_shapes(own, seed=5, **SMALL)
    assert ShapesWorld(own, "train").images([599]).any()
    assert not list(own.rglob("*.partial"))


def test_a_full_disk_is_one_sentence_and_gives_its_space_back(tmp_path, monkeypatch):
    interrupt_after(1, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), monkeypatch)
    with pytest.raises(UserError, match=r"could not be written to .*: No space left on device"):
        make_shapes(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [".making"]


def test_two_processes_that_want_one_world_make_it_once(tmp_path, monkeypatch):
    made, write = [], module.write_train

    def write_slowly(*arguments):
        made.append(1)
        time.sleep(0.2)
        write(*arguments)

    monkeypatch.setattr(module, "write_train", write_slowly)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: make_shapes(tmp_path, seed=4, **SMALL), range(3)))
    assert made == [1] and len(ShapesWorld(tmp_path, "train")) == 600


@pytest.mark.parametrize("mine", ["train.npy", "test/000.png", "world.json"])
def test_files_of_somebody_else_are_not_written_over(tmp_path, mine):
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_text('{"planets": 8}')
    with pytest.raises(UserError, match=rf"holds a {mine.split('/')[0]} that belongs to no shapes world"):
        make_shapes(tmp_path, **SMALL)
    assert (tmp_path / mine).read_text() == '{"planets": 8}'


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="could not be written"):
        make_shapes(tmp_path / "file", **SMALL)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"train": 0}, {"image_size": 16}, {"image_size": 1000}])
def test_numbers_out_of_range(tmp_path, wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(UserError, match=f"{name} {value} .* out of range"):
        make_shapes(tmp_path, **{**SMALL, **wrong})
    assert not list(tmp_path.iterdir())


def test_an_unknown_split_and_a_missing_world(world, tmp_path):
    with pytest.raises(UserError, match=r"no split 'tset'\. Did you mean test"):
        ShapesWorld(world, "tset")
    with pytest.raises(UserError, match=r"prepare\.py --out"):
        ShapesWorld(tmp_path, "train")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "does not describe a shapes world"),
        ("[1]", "does not describe a shapes world"),
        ('{"version": 1, "seed": 4}', "does not describe a shapes world"),
        ('{"version": 0, "seed": 4, "old": true}', "has version 0, this program makes and reads 1"),
    ],
)
def test_a_stale_or_broken_world_json(own, text, message):
    (own / "world.json").write_text(text)
    with pytest.raises(UserError, match=message):
        ShapesWorld(own, "train")
    make_shapes(own, seed=4, **SMALL)  # the remedy
    assert len(ShapesWorld(own, "train")) == 600


@pytest.mark.parametrize("keep", [0, 50, 5000])
def test_truncated_training_images(own, keep):
    os.truncate(own / "train.npy", keep)
    with pytest.raises(UserError, match=r"train\.npy is missing or incomplete"):
        ShapesWorld(own, "train")
    make_shapes(own, seed=4, **SMALL)
    assert len(ShapesWorld(own, "train").images([599])) == 1


def test_training_images_of_another_world(own):
    np.save(own / "train.npy", np.zeros((599, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"holds \(599, 32, 32, 3\) uint8, but world.json promises \(600, 32, 32, 3\)"):
        ShapesWorld(own, "train")


def test_the_command_line_works_from_anywhere(tmp_path):
    script = Path(module.__file__).parents[3] / "data" / "shapes" / "prepare.py"
    command = [sys.executable, str(script), "--out", "here", "--train", "20", "--image_size", "32", "--seed"]
    done = subprocess.run([*command, "3"], cwd=tmp_path, capture_output=True, check=False, text=True)
    assert done.returncode == 0 and "20 training images" in done.stdout and "20/20" in done.stderr
    assert len(ShapesWorld(tmp_path / "here", "train")) == 20
    failed = subprocess.run([*command, "-3"], cwd=tmp_path, capture_output=True, check=False, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: seed -3") and "Traceback" not in failed.stderr


def test_every_split_has_draws_of_its_own():
    assert len({split.stream for split in SPLITS.values()}) == len(SPLITS)


def test_a_false_caption_is_the_canonical_one_with_one_thing_changed(world):
    split = ShapesWorld(world, "train")
    for index in range(50):
        false = split.false_caption(index, np.random.default_rng(index))
        said, true = parse(false), parse(split.all_captions(index)[0])
        assert len(said) == len(true)
        assert not all(any(thing[:4] == there[:4] for there in split.scenes[index].objects) for thing in said)
        assert false == split.false_caption(index, np.random.default_rng(index))  # `rng` alone decides


def test_other_data_know_no_false_captions():
    assert Pairs().false_caption(0, np.random.default_rng(0)) is None
