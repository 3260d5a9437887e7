"""Folders of pictures: what is recognised, how splits are drawn, and one sentence for every mistake."""

import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from minivlm.datasets import TEMPLATES, image_cache, images, open_pairs
from minivlm.datasets.folder_entries import read_folder
from minivlm.datasets.folder_files import hashed_split
from minivlm.datasets.source import Source
from minivlm.errors import UserError


def photo(height=40, width=60, seed=0):
    """A random image, (height, width, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, seed=0, size=(40, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(*size, seed=seed)).save(path)


def write_lines(folder, *lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def captions(tmp_path):
    """Two training images, one for val, one for test; labels on some."""
    for i in range(4):
        save(tmp_path / "images" / f"{i}.png", seed=i)
    write_lines(
        tmp_path,
        {"image": "images/0.png", "captions": ["a red rose", "a rose"], "split": "train", "label": "rose"},
        {"image": "1.png", "caption": "a tulip", "split": "train", "label": "tulip"},
        {"image": "2.png", "caption": "a lily", "split": "val", "label": "lily"},
        {"image": "images/3.png", "caption": "something", "split": "test"},
    )
    return tmp_path


@pytest.fixture
def classes(tmp_path):
    """Two classes, 60 images each, without splits."""
    for i in range(60):
        save(tmp_path / "water_lily" / f"{i:03}.png", seed=i, size=(8, 8))
        save(tmp_path / "Rose" / f"{i:03}.png", seed=i, size=(8, 8))
    return tmp_path


def pairs_of(folder, split="train", image_size=32):
    return open_pairs(folder, split, image_size=image_size)


def keys(pairs):
    return [pairs.key(i) for i in range(len(pairs))]


# ------------------------------------------------------------------------------------------------------- captions.jsonl


def test_captions_are_read(captions):
    train, val, test = (pairs_of(captions, split) for split in ("train", "val", "test"))
    assert keys(train) == ["images/0.png", "images/1.png"]
    assert [train.all_captions(i) for i in range(2)] == [["a red rose", "a rose"], ["a tulip"]]
    assert (keys(val), keys(test)) == (["images/2.png"], ["images/3.png"])
    for pairs in (train, val, test):
        assert pairs.classes == ["lily", "rose", "tulip"]  # the same in every split
        assert pairs.notes == []
    assert (train.labels.tolist(), val.labels.tolist(), test.labels.tolist()) == ([1, 2], [0], [-1])
    assert train.labels.dtype == np.int64
    assert list(train.texts()) == ["a red rose", "a rose", "a tulip"]


def test_training_images_are_cached_shrunk_and_evaluation_images_are_the_originals(captions):
    for i in range(4):
        save(captions / "images" / f"{i}.png", seed=i, size=(100, 200))
    (train,) = pairs_of(captions, "train").images([0])
    (val,) = pairs_of(captions, "val").images([0])
    assert train.shape == (40, 80, 3)  # the shorter side is 1.25 · 32
    assert np.array_equal(val, photo(100, 200, seed=2))
    assert val.flags.writeable  # torch warns of read-only arrays


def test_the_second_opening_decodes_nothing(captions, monkeypatch):
    first = pairs_of(captions).images([0, 1])
    monkeypatch.setattr(image_cache, "read_image", None)  # nothing to call: decoding would fail
    again = pairs_of(captions).images([0, 1])
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert (captions / ".minivlm_cache").is_dir()


def test_a_cache_folder_can_be_named(captions, tmp_path):
    open_pairs(captions, "train", image_size=32, cache=tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").glob("train-40*.bin"))
    assert not (captions / ".minivlm_cache").exists()


def test_rng_picks_among_the_captions(captions):
    pairs = pairs_of(captions)
    picked = {pairs.captions([0, 1], np.random.default_rng(seed))[0] for seed in range(20)}
    assert picked == {"a red rose", "a rose"}
    assert pairs.captions([0, 1], np.random.default_rng(3)) == pairs.captions([0, 1], np.random.default_rng(3))


def test_lines_about_one_image_are_one_image(captions):
    write_lines(captions, {"image": "0.png", "caption": "a"}, {"image": "images/0.png", "captions": ["b", "a"]})
    pairs = pairs_of(captions)
    assert [pairs.all_captions(i) for i in range(len(pairs))] == [["a", "b"]]
    assert pairs.classes is None and pairs.labels is None


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_fine(captions):
    lines = ["", json.dumps({"image": "0.png", "caption": " ein Röslein "}, ensure_ascii=False), ""]
    (captions / "captions.jsonl").write_bytes("\r\n".join(lines).encode("utf-8"))
    assert pairs_of(captions).all_captions(0) == ["ein Röslein"]
    (captions / "captions.jsonl").write_bytes("\ufeff".encode() + lines[1].encode())
    assert pairs_of(captions).all_captions(0) == ["ein Röslein"]


GOOD = {"image": "0.png", "caption": "a rose"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "0.png", ', r"it is not JSON \(.* at character 20\); a line looks like"),
        ("[1, 2]", 'it names no "image"'),
        ({"caption": "a rose"}, 'it names no "image"'),
        ({"image": "0.png"}, "it has no caption"),
        ({"image": "0.png", "captions": [1]}, "it has no caption"),
        ({"image": "0.png", "captions": []}, "its caption is empty"),
        ({"image": "0.png", "caption": "  "}, "its caption is empty"),
        ({"image": "0.png", "caption": "x", "label": " "}, "its label is empty: give it a name"),
        ({"image": "0.png", "caption": "x", "label": ["x"]}, r"its label is \['x'\], but must be a word or a number"),
        ({"image": "..\\0.png", "caption": "x"}, "the image .* lies outside the folder"),
        ({"image": "9.png", "caption": "x"}, "there is no image '9.png', neither in"),
        ({"image": "../0.png", "caption": "x"}, "the image '../0.png' lies outside the folder"),
        ({"image": "/etc/0.png", "caption": "x"}, "the image '/etc/0.png' lies outside the folder"),
        ({"image": "0.png", "caption": "x", "split": "tain"}, "its split is 'tain', but there are train, val and test"),
        (
            {"image": "0.png", "caption": "x", "split": "val"},
            "an earlier line gives 'images/0.png' another split or label",
        ),
    ],
)
def test_a_broken_line_is_named_by_its_number(captions, line, message):
    write_lines(captions, GOOD, "", line)
    with pytest.raises(UserError, match=r"captions\.jsonl, line 3: " + message):
        pairs_of(captions)


def test_all_captions_of_a_line_count_and_null_is_none_of_them(captions):
    write_lines(captions, {"image": "0.png", "captions": ["a"], "caption": "b"})
    assert pairs_of(captions).all_captions(0) == ["a", "b"]
    write_lines(captions, {"image": "0.png", "captions": None, "caption": "b", "label": None, "split": None})
    assert pairs_of(captions).all_captions(0) == ["b"]


def test_a_path_may_be_written_as_windows_does(captions):
    write_lines(captions, {"image": "images\\0.png", "caption": "a"})
    assert pairs_of(captions).key(0) == "images/0.png"


def test_a_line_that_is_not_utf8_is_named(captions):
    (captions / "captions.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"image": "0.png", "caption": "\xff"}')
    with pytest.raises(UserError, match="line 2: it is not UTF-8 text"):
        pairs_of(captions)


def test_a_caption_file_without_lines_is_an_error(captions):
    write_lines(captions)
    with pytest.raises(UserError, match=r"captions\.jsonl is empty: it needs one line an image"):
        pairs_of(captions)


# ---------------------------------------------------------------------------------------------------- class sub-folders


def test_class_folders_speak_in_templates(classes):
    train = pairs_of(classes)
    assert train.classes == ["Rose", "water lily"]
    lily = keys(train).index(next(key for key in keys(train) if key.startswith("water_lily")))
    assert train.labels[lily] == 1
    assert train.all_captions(lily) == [template.format("water lily") for template in TEMPLATES]
    assert "a photo of a water lily." in train.all_captions(lily)
    assert len(list(train.texts())) == 2 * len(TEMPLATES)


def test_what_is_no_image_is_ignored_in_class_folders(tmp_path):
    save(tmp_path / "cat" / "deep" / "1.PNG")
    save(tmp_path / "dog" / "1.png")
    save(tmp_path / ".minivlm_cache" / "1.png")
    (tmp_path / "dog" / "notes.txt").write_text("woof")
    (tmp_path / "dog" / "._1.png").write_text("what a Mac leaves behind")
    found = [key for split in ("train", "val", "test") for key in keys(pairs_of(tmp_path, split))]
    assert set(found) == {"cat/deep/1.PNG", "dog/1.png"}


def test_given_splits_are_kept(tmp_path):
    for name in ("train/cat/1", "train/dog/1", "validation/cat/2", "test/dog/2", "test/dog/3"):
        save(tmp_path / f"{name}.png")
    assert keys(pairs_of(tmp_path, "train")) == ["train/cat/1.png", "train/dog/1.png"]
    assert keys(pairs_of(tmp_path, "val")) == ["validation/cat/2.png"]
    assert keys(pairs_of(tmp_path, "test")) == ["test/dog/2.png", "test/dog/3.png"]
    assert pairs_of(tmp_path, "test").classes == ["cat", "dog"]


# --------------------------------------------------------------------------------------------------------------- splits


def test_drawn_splits_part_the_images_and_are_a_tenth_each(classes):
    parts = [set(keys(pairs_of(classes, split))) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 120
    assert all(4 <= len(part) <= 24 for part in parts[1:])
    assert pairs_of(classes, "val").notes == [
        "No val and test split are given: a tenth of the images each, by a hash of the file name."
    ]


def test_a_drawn_split_does_not_depend_on_the_other_files(classes):
    before = {split: set(keys(pairs_of(classes, split))) for split in ("train", "val", "test")}
    for i in range(0, 60, 2):
        (classes / "Rose" / f"{i:03}.png").unlink()
    save(classes / "Rose" / "aaa.png")
    for split, old in before.items():
        assert set(keys(pairs_of(classes, split))) & set.union(*before.values()) <= old


def test_the_hash_is_the_same_everywhere():
    assert [hashed_split(f"images/{i}.jpg") for i in range(12)] == [
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "test",
        "train",
        "train",
        "train",
        "train",
    ]
    counts = [sum(hashed_split(f"{i}.jpg") == split for i in range(10_000)) for split in ("train", "val", "test")]
    assert counts == [8026, 981, 993]


def test_a_missing_val_is_drawn_from_train_alone(tmp_path):
    for i in range(50):
        save(tmp_path / "train" / "cat" / f"{i}.png", size=(4, 4))
        save(tmp_path / "train" / "dog" / f"{i}.png", size=(4, 4))
    save(tmp_path / "test" / "dog" / "a.png")
    train, val, test = (keys(pairs_of(tmp_path, split)) for split in ("train", "val", "test"))
    assert test == ["test/dog/a.png"]
    assert len(train) + len(val) == 100 and not set(train) & set(val) and len(val) > 2
    assert pairs_of(tmp_path, "train").notes == [
        "No val split is given: a tenth of the training images, by a hash of the file name."
    ]


def test_val_stands_in_for_a_missing_test(captions):
    write_lines(captions, {**GOOD, "split": "train"}, {"image": "1.png", "caption": "x", "split": "val"})
    test = pairs_of(captions, "test")
    assert keys(test) == ["images/1.png"] and test.split == "test"
    assert test.notes == ["There are no test images: the val images stand in for them."]


def test_a_single_image_stands_in_for_every_split(captions):
    write_lines(captions, GOOD)
    for split in ("train", "val", "test"):
        assert keys(pairs_of(captions, split)) == ["images/0.png"]


def test_nothing_to_train_on_is_an_error(captions):
    write_lines(captions, {**GOOD, "split": "test"})
    assert keys(pairs_of(captions, "val")) == ["images/0.png"]
    with pytest.raises(UserError, match=r"names the splits test but has nothing to train on"):
        pairs_of(captions, "train")


def test_lines_without_a_split_are_training_where_others_have_one(captions):
    write_lines(captions, GOOD, {"image": "1.png", "caption": "x", "split": "test"})
    assert keys(pairs_of(captions, "train")) == ["images/0.png"]
    assert keys(pairs_of(captions, "test")) == ["images/1.png"]


def test_an_unknown_split_is_an_error(captions):
    with pytest.raises(UserError, match="no split 'dev': it is one of train, val, test"):
        pairs_of(captions, "dev")


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_folder_that_is_nothing_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"looked for world\.json .*captions\.jsonl, and images in sub-folders"):
        pairs_of(tmp_path)
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        pairs_of(tmp_path / "nowhere")


def test_splits_without_classes_are_not_taken_for_classes(tmp_path):
    save(tmp_path / "train" / "1.png")
    save(tmp_path / "test" / "1.png")
    with pytest.raises(UserError, match="is no dataset that is recognised"):
        pairs_of(tmp_path)


def test_one_class_alone_is_an_error(tmp_path):
    save(tmp_path / "cat" / "1.png")
    with pytest.raises(UserError, match="one class sub-folder only, 'cat': at least two are needed"):
        pairs_of(tmp_path)


def test_broken_images_are_counted_named_and_skipped_in_training(captions):
    (captions / "images" / "0.png").write_text("no image")
    train = pairs_of(captions)
    assert keys(train) == ["images/1.png"]
    assert train.labels.tolist() == [2] and len(train) == 1
    assert np.array_equal(train.images([0])[0], photo(seed=1))
    assert list(train.skipped) == ["images/0.png"]
    (note,) = train.notes
    assert note.startswith("1 of 2 training images are skipped. ") and "images/0.png cannot be read" in note

    (captions / "images" / "1.png").write_text("no image either")
    with pytest.raises(UserError, match=r"None of the 2 training images can be read; the first: .*0\.png"):
        pairs_of(captions)


def test_broken_images_are_errors_in_evaluation(captions):
    path = captions / "images" / "2.png"
    save(path, seed=2, size=(300, 300))
    path.write_bytes(path.read_bytes()[:2000])
    val = pairs_of(captions, "val")  # the header is whole; decoding tells
    with pytest.raises(UserError, match=r"2\.png cannot be read as an image: .*truncated"):
        val.images([0])
    path.write_text("no image")
    with pytest.raises(UserError, match=r"2\.png cannot be read as an image"):
        pairs_of(captions, "val")


def test_a_huge_image_is_skipped_in_training_and_an_error_in_evaluation(captions, monkeypatch):
    save(captions / "images" / "0.png", size=(100, 100))
    save(captions / "images" / "2.png", size=(100, 100))
    monkeypatch.setattr(images, "MAX_PIXELS", 9_999)
    assert list(pairs_of(captions).skipped) == ["images/0.png"]
    with pytest.raises(UserError, match=r"2\.png .* its header declares 100 x 100 pixels, more than the limit of 9999"):
        pairs_of(captions, "val")


# --------------------------------------------------------------------------------------------------- folders of strangers


def whole(folder):
    return {key for split in ("train", "val", "test") for key in keys(pairs_of(folder, split))}


def test_every_ending_that_pillow_reads_is_a_picture_and_the_rest_is_counted(tmp_path):
    for name in ("cat/1.jfif", "cat/2.JPE", "dog/1.Jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(photo()).save(tmp_path / name, format="JPEG")
    for name in ("dog/2.bmp", "dog/3.tga"):
        save(tmp_path / name)
    for name in ("cat/Thumbs.db", "cat/film.mp4", "dog/film.mp4", "dog/README", "dog/.hidden"):
        (tmp_path / name).write_text("x")
    (tmp_path / "dog" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "dog" / "up").symlink_to("..")
    (tmp_path / "dog" / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    assert whole(tmp_path) == {"cat/1.jfif", "cat/2.JPE", "dog/1.Jpeg", "dog/2.bmp", "dog/3.tga"}
    note = pairs_of(tmp_path).notes[0]
    assert note == (
        "8 files are passed over: 2 .mp4, 2 without an ending, 2 that are no regular files, 1 .db, 1 link to a folder."
    )


@pytest.mark.parametrize("names", [("c0", "c1", "c2"), ("1a", "1b", "2a"), ("0", "1", "10"), ("cafe", "dead")])
def test_classes_that_are_counted_are_no_first_digits_of_hashes(tmp_path, names):
    for name in names:
        for i in range(9):
            save(tmp_path / name / f"{i}.png", size=(4, 4))
    assert pairs_of(tmp_path).classes == sorted(names)


@pytest.mark.parametrize(
    ("names", "looks"),
    [
        (("2023", "2024"), "years or days"),
        (("2023", "2024", "best of"), "years or days"),
        (("2023-05-01 Oslo", "2023-06"), "years or days"),
        (("100CANON", "101CANON"), "the folders of a camera"),
        (("00000", "00001"), "the numbered parts of a download"),
        (("part-1", "part-2"), "the numbered parts of a download"),
        (("Photos from 2022", "Photos from 2023"), "years or days"),
        (("01 January", "02 February", "best"), "months"),
        (("9f3a77c0e1", "0b3a77c0e1"), "hashes"),
        (("0a", "07", "3f"), "months, or the first digits of hashes"),
        (("n01440764", "n01443537"), "WordNet's numbers"),
        (("train2017", "val2017"), "the splits of a dataset without classes"),
        (("images", "masks"), "parts of a dataset, not classes"),
    ],
)
def test_folders_that_are_no_classes_are_refused_until_their_classes_are_named(tmp_path, names, looks):
    for name in names:
        for i in range(3):
            save(tmp_path / name / f"{i}.png", size=(4, 4))
    with pytest.raises(UserError, match=rf"look like {looks}.*, so their names would .*class_names\.txt \(a line: "):
        pairs_of(tmp_path)
    lines = [f"{name}\tclass {i}" for i, name in enumerate(names)]
    (tmp_path / "class_names.txt").write_text("\n".join(lines[1:]), encoding="utf-8")
    with pytest.raises(UserError, match=rf"class_names\.txt does not name the class of the folder '{names[0]}'"):
        pairs_of(tmp_path)
    (tmp_path / "class_names.txt").write_text("\n".join(lines), encoding="utf-8")
    train = pairs_of(tmp_path)
    assert train.classes == [f"class {i}" for i in range(len(names))]
    assert train.all_captions(0)[0].startswith("a photo of a class ")


@pytest.mark.parametrize(
    "names", [tuple("0123456789"), ("10", "11"), ("cat", "2023"), ("cab", "bed"), ("747", "a380"), ("facade", "mayfly")]
)
def test_names_that_are_short_numbers_or_words_are_classes(tmp_path, names):
    for name in names if names != ("cat", "2023") else ("cat", "dog", "2023"):
        save(tmp_path / name / "1.png")
    assert set(names) <= set(pairs_of(tmp_path).classes)


def test_annotations_beside_the_pictures_are_no_class_folder(tmp_path):
    """As a tool for annotations leaves its boxes."""
    for folder in ("mine", "yours"):
        for i in range(3):
            save(tmp_path / folder / f"{i:09}.jpg")
            (tmp_path / folder / f"{i:09}.json").write_text('{"shapes": []}')
    with pytest.raises(
        UserError, match=r"mine/000000000\.json has the fields shapes, and none is known to hold a caption"
    ):
        pairs_of(tmp_path)
    for path in tmp_path.glob("*/*.json"):
        path.rename(path.with_suffix(".xml"))
    with pytest.raises(UserError, match=r"mine holds texts beside its images \(000000000\.xml\).* captions\.jsonl"):
        pairs_of(tmp_path)


def test_what_lies_beside_the_class_folders_is_told(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "train/loose.png", "top.png", "extra/1.png"):
        save(tmp_path / name)
    for name in ("labels.csv", "README.md", "class_names.txt.bak"):
        (tmp_path / name).write_text("x")
    (tmp_path / "train" / "cow").mkdir()
    assert pairs_of(tmp_path, "test").notes[:2] == [
        "1 sub-folder has no images: train/cow.",
        "5 files and folders are no classes, and not read: class_names.txt.bak, extra, labels.csv, top.png, "
        "train/loose.png.",
    ]


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name in ("test/1.png", "exam/1.png", "exam/2.png"):
        save(tmp_path / name)
    assert pairs_of(tmp_path).classes == ["exam", "test"]
    assert not any("no classes" in note for note in pairs_of(tmp_path).notes)


def test_class_names_that_cannot_be_read_are_told(tmp_path):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "b" / "1.png")
    for data, message in (
        (b"", "is empty: a line is a folder and"),
        (b"a cat\nb", "line 2: a line is a folder and"),
        (b"a caf\xe9", "is not UTF-8 text"),
    ):
        (tmp_path / "class_names.txt").write_bytes(data)
        with pytest.raises(UserError, match=message):
            pairs_of(tmp_path)


def test_file_names_need_not_be_utf8_but_class_names_do(tmp_path):
    for name in (b"cat/caf\xe9.png", b"cat/a\nb.png", b"dog/-x.png", "dog/кот 🐈.png".encode()):
        save(tmp_path / os.fsdecode(name))
    found = whole(tmp_path)
    assert {os.fsencode(key) for key in found} == {
        b"cat/caf\xe9.png",
        b"cat/a\nb.png",
        b"dog/-x.png",
        "dog/кот 🐈.png".encode(),
    }
    save(tmp_path / os.fsdecode(b"caf\xe9") / "1.png")
    with pytest.raises(UserError, match=r"a byte that is no UTF-8 \(\\udce9\)\. Rename its folder"):
        pairs_of(tmp_path)


@pytest.mark.parametrize(("disk", "told"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_is_the_same_however_it_is_spelt(captions, disk, told):
    save(captions / unicodedata.normalize(disk, "été") / unicodedata.normalize(disk, "café.png"))
    write_lines(captions, {**GOOD, "image": unicodedata.normalize(told, "été/café.png")})
    assert keys(pairs_of(captions)) == [unicodedata.normalize(disk, "été/café.png")]


def test_a_class_is_the_same_however_its_accent_is_spelt(tmp_path):
    for split, form in (("train", "NFC"), ("test", "NFD")):
        save(tmp_path / split / unicodedata.normalize(form, "café") / "1.png")
        save(tmp_path / split / "dog" / "1.png")
    test = pairs_of(tmp_path, "test")
    assert test.classes == [unicodedata.normalize("NFC", "café"), "dog"] and test.labels.tolist() == [0, 1]


@pytest.mark.parametrize("place", ["caption", "label", "split"])
def test_half_a_surrogate_pair_is_told_by_its_line(captions, place):
    write_lines(captions, GOOD, {**GOOD, place: "a \ud83d cat"})
    with pytest.raises(UserError, match=r"line 2: “a \\ud83d cat” is no valid text: it holds half a surrogate pair"):
        pairs_of(captions)


def test_a_file_list_that_is_no_file_is_told(captions):
    (captions / "captions.jsonl").unlink()
    os.mkfifo(captions / "captions.jsonl")
    with pytest.raises(UserError, match=r"captions\.jsonl is no regular file but a named pipe"):
        pairs_of(captions)


def test_json_without_end_is_one_sentence(captions):
    for line, message in (("[" * 100_000, "nested too deeply"), ('{"image": ' + "9" * 10_000 + "}", "line 1: ")):
        write_lines(captions, line)
        with pytest.raises(UserError, match=message):
            pairs_of(captions)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "golden retriever\ntabby cat\nzebra\n"),
        ("names.json", '["golden retriever", "tabby_cat", "zebra"]'),
        ("numbers.json", '{"0": "golden retriever", "1": "tabby cat", "2": "zebra"}'),
        ("folders.json", '{"n1": "golden retriever", "n10": "tabby cat", "n2": "zebra", "n3": "of no folder here"}'),
        ("folders.txt", "n1\tgolden retriever\nn10 tabby cat\nn2 zebra\nn3 of no folder here\n"),
    ],
)
def test_a_file_of_class_names_names_folders_or_is_in_their_order(tmp_path, name, text):
    """In the order in which torchvision's ImageFolder numbers them: n10 before n2."""
    for folder in ("n1", "n2", "n10"):
        save(tmp_path / "data" / folder / "1.png")
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = {
        item.image: item.label for item in read_folder(Source(tmp_path / "data", class_names=str(tmp_path / name)))
    }
    assert found == {"n1/1.png": "golden retriever", "n10/1.png": "tabby cat", "n2/1.png": "zebra"}


@pytest.mark.parametrize("lines", [["golden retriever"], ["golden retriever", "tabby cat", "zebra"]])
def test_fewer_or_more_names_than_folders_are_told(tmp_path, lines):
    for folder in ("n1", "n2"):
        save(tmp_path / "data" / folder / "1.png")
    (tmp_path / "names.txt").write_text("\n".join(lines), encoding="utf-8")
    n = len(lines)
    with pytest.raises(UserError, match=rf"names\.txt has {n} names?, but .*data has 2 folders of classes"):
        read_folder(Source(tmp_path / "data", class_names=str(tmp_path / "names.txt")))
