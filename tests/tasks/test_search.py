"""The image index and the search in it, with a model whose right answers are known."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm.datasets.class_folders import passed_over
from minivlm.errors import UserError
from minivlm.layers import TextConfig, VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor
from minivlm.tasks import build_image_index, index_path, open_image_index, search_images
from minivlm.tasks.image_index import fingerprint, list_files
from minivlm.tasks.search import best_rows
from tests.colours import ColourModel, ColourProcessor, paint


@pytest.fixture
def pictures(tmp_path):
    """Six pictures, in sub-folders, with what does not belong there."""
    folder = tmp_path / "pictures"
    for name, colour in {
        "red.png": "red",
        "b/blue.PNG": "blue",
        "a/green.jpg": "green",
        "a/darker.png": (120, 10, 10),
        "yellow.bmp": "yellow",
        "z.webp": "white",
    }.items():
        paint(folder / name, colour)
    (folder / "notes.txt").write_text("not a picture")
    paint(folder / ".thumbnails" / "red.png", "red")
    return folder


def build(folder, path, model=None, **options):
    options = {"batch_size": 2, "progress": False, **options}
    return build_image_index(folder, model or ColourModel(), ColourProcessor(), path=path, **options)


def found(query, index, **options):
    return [path.name for path, _ in search_images(query, index, ColourModel(), ColourProcessor(), **options)]


def test_words_and_pictures_find_their_pictures(pictures, tmp_path):
    index = build(pictures, tmp_path / "index")
    assert list(index.rows) == ["a/darker.png", "a/green.jpg", "b/blue.PNG", "red.png", "yellow.bmp", "z.webp"]
    assert found("a blue thing", index, top_k=1) == ["blue.PNG"]
    assert found("a red thing", index, top_k=2) == ["red.png", "darker.png"]
    assert found(pictures / "a/green.jpg", index, top_k=1) == ["green.jpg"]
    assert found(Image.new("RGB", (3, 3), "yellow"), index, top_k=1) == ["yellow.bmp"]
    path, score = search_images("blue", tmp_path / "index", ColourModel(), ColourProcessor())[
        0
    ]  # the index by its place
    assert path.is_file() and path.samefile(pictures / "b/blue.PNG")
    assert score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("opened", [False, True])
def test_the_index_of_a_list_is_a_tensor_and_a_search_in_it_finds_rows(pictures, tmp_path, opened):
    model, processor = ColourModel(), ColourProcessor()
    paths = [pictures / name for name in ("red.png", "a/green.jpg", "b/blue.PNG")]
    index = build_image_index([Image.open(path) for path in paths] if opened else paths, model, processor)
    assert torch.equal(index, model.encode_image(processor.images(paths)).detach())
    found = search_images("a blue thing", index, model, processor, top_k=2)
    of_folder = search_images("a blue thing", build(pictures, tmp_path / "index"), model, processor, top_k=1)
    assert found[0] == pytest.approx((2, of_folder[0][1])) and len(found) == 2
    assert search_images("a blue thing", 3 * index, model, processor, top_k=2)[0] == pytest.approx(found[0])  # cosines


def test_an_index_of_another_width_an_empty_list_and_a_place_for_a_list_are_refused(pictures, tmp_path):
    model, processor = ColourModel(), ColourProcessor()
    with pytest.raises(UserError, match=r"shape \(3, 5\), but the vectors of this model have width 4"):
        search_images("red", torch.ones(3, 5), model, processor)
    with pytest.raises(UserError, match="is empty"):
        build_image_index([], model, processor)
    with pytest.raises(UserError, match="leave out path"):
        build_image_index([pictures / "red.png"], model, processor, path=tmp_path / "index")


def test_the_index_is_a_plain_npy_of_unit_vectors_and_a_json(pictures, tmp_path):
    model = ColourModel()
    index = build(pictures, tmp_path / "index", model)
    record = json.loads((tmp_path / "index" / "index.json").read_text())
    features = np.load(tmp_path / "index" / record["features"], mmap_mode="r")
    want = model.encode_image(ColourProcessor().images([pictures / name for name, *_ in record["rows"]]))
    assert isinstance(index.features, np.memmap) and features.dtype == np.float32
    assert np.array_equal(features, want.detach().numpy()) and np.array_equal(features, index.features)
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == sorted([record["features"], "index.json", "lock"])


@pytest.mark.parametrize("k", [1, 7, 40, 60])
@pytest.mark.parametrize("chunk", [1, 9, 1000])
def test_top_k_equals_brute_force(k, chunk):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((50, 16)).astype(np.float32)
    features[[3, 20, 49]] = features[11]  # equal pictures: the earlier row first
    query = torch.from_numpy(features[11] + rng.standard_normal(16).astype(np.float32) / 4)
    scores, rows = best_rows(query, features, k, chunk=chunk)
    exact = features.astype(np.float64) @ query.double().numpy()
    want = sorted(range(50), key=lambda row: (-exact[row].astype(np.float32), row))[:k]
    assert rows.tolist() == want and rows[:4].tolist() == [3, 11, 20, 49][:k]
    assert np.allclose(scores, exact[want], rtol=1e-5)


def test_a_second_build_encodes_nothing(pictures, tmp_path):
    build(pictures, tmp_path / "index")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "index").iterdir()}
    model = ColourModel()
    build(pictures, tmp_path / "index", model)
    assert model.calls == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "index").iterdir()} == before


def test_new_changed_and_vanished_pictures(pictures, tmp_path):
    build(pictures, tmp_path / "index")
    (pictures / "a/green.jpg").unlink()
    paint(pictures / "a/new.png", "green")
    paint(pictures / "red.png", "blue", size=(20, 20))
    model = ColourModel()
    index = build(pictures, tmp_path / "index", model)
    assert model.calls == 2
    assert list(index.rows) == ["a/darker.png", "b/blue.PNG", "yellow.bmp", "z.webp", "a/new.png", "red.png"]
    fresh = build(pictures, tmp_path / "fresh")
    old = dict(zip(index.rows, index.features.tolist(), strict=True))
    assert old == dict(zip(fresh.rows, fresh.features.tolist(), strict=True))
    assert len(list((tmp_path / "index").glob("*.npy"))) == 1


class Killed(BaseException):
    pass


def stop_after(batches, then):
    model = ColourModel()
    encode = model.encode_image

    def encode_image(images):
        if model.calls >= 2 * batches:
            then()
        return encode(images)

    model.encode_image = encode_image
    return model


def test_a_build_that_is_interrupted_goes_on_where_it_stopped(pictures, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(pictures, tmp_path / "index", stop_after(2, interrupt))
    assert len(open_image_index(tmp_path / "index")) == 4
    model = ColourModel()
    index = build(pictures, tmp_path / "index", model)
    assert model.calls == 2 and len(index) == 6
    assert np.array_equal(index.features, build(pictures, tmp_path / "fresh").features)


def test_a_build_that_is_killed_keeps_what_was_saved(pictures, tmp_path):
    """What lies on disk in the middle of a build, some bytes of the next row included, is a valid index."""

    def copy():
        shutil.copytree(tmp_path / "index", tmp_path / "killed")
        with next((tmp_path / "killed").glob("*.npy")).open("ab") as file:
            file.write(b"part")
        raise Killed

    with pytest.raises(Killed):
        build(pictures, tmp_path / "index", stop_after(2, copy), save_every=0)
    model = ColourModel()
    index = build(pictures, tmp_path / "killed", model)
    assert model.calls == 2
    assert np.array_equal(index.features, build(pictures, tmp_path / "fresh").features)


def test_an_update_that_fails_at_once_leaves_the_old_index(pictures, tmp_path):
    resource = pytest.importorskip("resource")
    index = build(pictures, tmp_path / "index")
    before = sorted((tmp_path / "index").iterdir())
    paint(pictures / "new.png", "green")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, limit[1]))
        with pytest.raises(UserError, match="could not be written"):
            build(pictures, tmp_path / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted((tmp_path / "index").iterdir()) == before
    assert np.array_equal(open_image_index(tmp_path / "index").features, index.features)


def test_broken_pictures_are_named_and_skipped(pictures, tmp_path):
    whole = (pictures / "a/green.jpg").read_bytes()
    (pictures / "a/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "fake.png").write_text("no picture")
    (pictures / "nowhere.png").symlink_to(pictures / "gone.png")
    index = build(pictures, tmp_path / "index")
    assert len(index) == 6
    assert index.skipped.keys() == {"a/cut.jpg", "fake.png", "nowhere.png"}
    assert "fake.png cannot be read as an image" in index.skipped["fake.png"][1]
    again = build(pictures, tmp_path / "index", model := ColourModel())
    assert model.calls == 0 and again.skipped == index.skipped
    paint(pictures / "fake.png", "red")
    assert "fake.png" in build(pictures, tmp_path / "index").rows


def test_a_folder_without_a_readable_picture_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no images"):
        build(tmp_path / "empty", tmp_path / "index")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        build(tmp_path / "nowhere", tmp_path / "index")
    (tmp_path / "empty" / "fake.png").write_text("no picture")
    with pytest.raises(
        UserError, match=r"no image in .* can be read \(1 tried\); the first is fake.png: .*cannot be read"
    ):
        build(tmp_path / "empty", tmp_path / "index")


def other_model():
    model = ColourModel()
    model.turn.data[0, 0] = 0.5
    return model


def test_another_model_is_noticed(pictures, tmp_path):
    index = build(pictures, tmp_path / "index")
    with pytest.raises(UserError, match="was made with another model"):
        search_images("red", index, other_model(), ColourProcessor())
    with pytest.raises(UserError, match="was made with another model"):
        search_images("red", index, ColourModel(), ColourProcessor(16))
    model = other_model()
    assert build(pictures, tmp_path / "index", model).model == fingerprint(model, ColourProcessor())
    assert model.calls == 6  # a retrained model makes its index anew


def test_the_fingerprint_is_the_same_at_every_precision():
    assert fingerprint(ColourModel(), ColourProcessor()) == fingerprint(ColourModel().bfloat16(), ColourProcessor())
    assert fingerprint(ColourModel(), ColourProcessor()) != fingerprint(ColourModel("sigmoid"), ColourProcessor())


@pytest.mark.parametrize("damage", ["cut", "gone", "json"])
def test_a_damaged_index_is_made_anew_by_building_and_refused_by_searching(pictures, tmp_path, damage):
    build(pictures, tmp_path / "index")
    features = next((tmp_path / "index").glob("*.npy"))
    if damage == "cut":
        os.truncate(features, 150)
    elif damage == "gone":
        features.unlink()
    else:
        (tmp_path / "index" / "index.json").write_text('{"rows": [')
    with pytest.raises(UserError, match="holds no image index that can be read"):
        search_images("red", tmp_path / "index", ColourModel(), ColourProcessor())
    assert len(build(pictures, tmp_path / "index")) == 6


def test_the_default_place_is_the_cache_folder_and_never_the_pictures(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted(pictures.rglob("*"))
    index = build(pictures, None)
    assert index.path.is_relative_to(tmp_path / "cache" / "minivlm")
    assert sorted(pictures.rglob("*")) == before
    assert build(pictures, None, other_model()).path != index.path
    monkeypatch.chdir(pictures.parent)
    assert index_path("pictures", "out/clip") == index_path(pictures, "out/clip") != index_path("elsewhere", "out/clip")
    assert str(index_path(pictures, "out/clip")).startswith(os.path.join("out", "clip", "index"))


def test_a_full_disk_is_one_sentence_and_keeps_what_was_saved(pictures, tmp_path):
    resource = pytest.importorskip("resource")  # a limit on the size of files stands in for the disk
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 4 * 16, limit[1]))  # room for the four rows that are written

    try:
        with pytest.raises(UserError, match="could not be written"):
            build(pictures, tmp_path / "index", stop_after(2, fill_the_disk), save_every=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(open_image_index(tmp_path / "index")) == 4


def test_the_index_cannot_lie_in_a_file(pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        build(pictures, tmp_path / "file" / "index")


def test_queries_that_make_no_sense_are_refused(pictures, tmp_path):
    index = build(pictures, tmp_path / "index")
    for query, options, message in (
        (" ", {}, "query is empty"),
        ("red", {"top_k": 0}, "top_k is 0"),
        ("red " * 50, {}, "has 50 tokens, but the model takes 12"),
        (pictures / "gone.png", {}, "gone.png is missing"),
    ):
        with pytest.raises(UserError, match=message):
            search_images(query, index, ColourModel(), ColourProcessor(), **options)


def test_the_progress_bar_counts_every_picture(pictures, tmp_path, capsys):
    build(pictures, tmp_path / "index", progress=True)
    assert "6/6" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- indexes of strangers


@pytest.mark.parametrize("name", ["../diary.npy", "{}/diary.npy", "diary.npy", "features-1-1.npy"])
def test_an_index_that_names_another_file_does_it_no_harm(pictures, tmp_path, name):
    """features-1-1.npy is called like one of ours, but is a link."""
    index = build(pictures, tmp_path / "index")
    diary = tmp_path / "diary.npy"
    diary.write_bytes(b"dear diary" * 1000)
    (tmp_path / "index" / "diary.npy").write_bytes(diary.read_bytes())
    (tmp_path / "index" / "features-1-1.npy").symlink_to(diary)
    record = json.loads((tmp_path / "index" / "index.json").read_text())
    record["features"] = name.format(tmp_path)
    (tmp_path / "index" / "index.json").write_text(json.dumps(record))
    paint(pictures / "new.png", "red")  # so that there is something to do
    again = build(pictures, tmp_path / "index")
    assert len(again) == len(index) + 1
    for kept in (diary, tmp_path / "index" / "diary.npy", tmp_path / "index" / "features-1-1.npy"):
        assert kept.read_bytes() == b"dear diary" * 1000


STRANGE = [None, -1, 2**70, 1.5, float("nan"), "7", "../../red.png", "/etc/passwd", [], {}, True, [[]], [["a", 1]]]


@pytest.mark.parametrize("key", ["directory", "model", "features", "width", "rows", "skipped", "name", "size", "why"])
def test_whatever_an_index_says_the_pictures_are_found(pictures, tmp_path, key):
    (pictures / "broken.png").write_text("no picture")
    build(pictures, tmp_path / "index")
    whole = (tmp_path / "index" / "index.json").read_text()
    for value in STRANGE:
        record = json.loads(whole)
        row, place = {"name": ("rows", 0), "size": ("rows", 1), "why": ("skipped", 3)}.get(key, (None, None))
        if row:
            record[row][0][place] = value
        else:
            record[key] = value
        (tmp_path / "index" / "index.json").write_text(json.dumps(record))
        index = build(pictures, tmp_path / "index")
        assert len(index) == 6 and found("a blue thing", index, top_k=1) == ["blue.PNG"]
    for text in ("[]", "null", "[" * 100_000, "9" * 10_000, "\0"):
        (tmp_path / "index" / "index.json").write_text(text)
        assert len(build(pictures, tmp_path / "index")) == 6


def test_an_index_json_of_somebody_else_is_put_aside(pictures, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.json").write_text('{"pages": 7}')
    assert len(build(pictures, tmp_path / "site")) == 6
    assert (tmp_path / "site" / "index.json.unreadable").read_text() == '{"pages": 7}'


def test_a_pipe_among_the_pictures_is_named_and_what_is_no_picture_is_counted(pictures, tmp_path):
    os.mkfifo(pictures / "pipe.png")
    paint(pictures / "a.jfif", "red")
    (pictures / "film.mp4").write_text("x")
    index = build(pictures, tmp_path / "index")
    assert "a.jfif" in index.rows and "is no regular file but a named pipe" in index.skipped["pipe.png"][1]
    assert passed_over([list_files(pictures)], irregular=False) == "2 files are passed over: 1 .mp4, 1 .txt."


def test_names_that_are_no_utf8_are_found(pictures, tmp_path):
    paint(pictures / os.fsdecode(b"caf\xe9.png"), "blue")
    paint(pictures / "a\nb.png", "red")
    for _ in range(2):
        index = build(pictures, tmp_path / "index")
        assert {os.fsdecode(b"caf\xe9.png"), "a\nb.png"} <= index.rows.keys()


def test_two_builds_of_one_index_wait_for_each_other(pictures, tmp_path):
    models = [ColourModel(), ColourModel()]
    with ThreadPoolExecutor() as pool:
        indexes = list(pool.map(lambda model: build(pictures, tmp_path / "index", model), models))
    assert [len(index) for index in indexes] == [6, 6] and sorted(model.calls for model in models) == [0, 6]


def test_pictures_that_are_not_cropped_are_encoded_by_their_size_and_told_where_none_is_read(tmp_path):
    vision = VisionConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2)
    text = TextConfig(width=16, depth=1, heads=2, vocab_size=300, context=8, end_token=3)
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(vision=vision, text=text, embed_width=8)).eval()
    processor = Processor.train(["a"], vocab_size=300, image_size=16, context=8)
    processor.config = replace(processor.config, crop="none")
    for name, size in {"a": (32, 16), "b": (16, 16), "c": (32, 16), "d": (45, 20)}.items():
        paint(tmp_path / "pictures" / f"{name}.png", "red", size=size)
    index = build_image_index(tmp_path / "pictures", model, processor, path=tmp_path / "index", progress=False)
    assert set(index.rows) == {"a.png", "b.png", "c.png"}
    assert "multiples of the patch size 8: without a centre crop (do_center_crop" in index.skipped["d.png"][1]
