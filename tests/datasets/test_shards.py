"""Tar shards in WebDataset's form: what is read from them, which shards are meant, and what keeps them from being read."""

import json
from collections import Counter

import numpy as np
import pytest
from tars import encoded, samples, write_tar

from minivlm.datasets import open_conversations, open_pairs, tar_index
from minivlm.datasets.contents import contents
from minivlm.datasets.fingerprint import fingerprint
from minivlm.datasets.folder_entries import read_entries, read_folder
from minivlm.datasets.forms import recognised
from minivlm.datasets.images import read_image
from minivlm.datasets.shard_names import expand, gaps, split_directory
from minivlm.datasets.source import Source
from minivlm.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Forty samples in two shards."""
    for shard in range(2):
        write_tar(tmp_path / f"shard-00{shard}.tar", samples(20, first=20 * shard, txt="a red kite {}"))
    return tmp_path


def one(tmp_path, *members, name="a.tar", **options):
    """The only sample of one shard."""
    write_tar(tmp_path / name, members)
    (found,) = read_folder(Source(str(tmp_path), **options))
    return found


def test_every_sample_is_an_image_in_its_tar_file_with_its_caption(folder):
    found = read_folder(folder)
    assert [item.image for item in found[19:21]] == ["shard-000.tar/000019.png", "shard-001.tar/000020.png"]
    assert found[7].captions == ["a red kite 7"]
    assert str(recognised(folder)[0]) == (
        "captions: WebDataset tar shards (shard-000.tar, shard-001.tar); image: image, caption: txt"
    )
    train = open_pairs(folder, "train", image_size=32)
    for i in range(len(train)):
        number = int(train.key(i)[-10:-4])
        want = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        assert np.array_equal(train.images([i])[0], want) and train.all_captions(i) == [f"a red kite {number}"]
    parts = {split: len(open_pairs(folder, split, image_size=32)) for split in ("train", "val", "test")}
    assert sum(parts.values()) == 40 and contents(folder)["train"]["captions"] == parts["train"]


@pytest.mark.parametrize("ending", ["txt", "text", "caption", "json", "JSON"])
def test_a_caption_is_found_in_any_of_its_places(tmp_path, ending):
    text = (
        json.dumps({"caption": "a kite", "url": "x", "key": "0", "width": 50})
        if ending.lower() == "json"
        else " a kite\n"
    )
    found = one(tmp_path, (f"0.{ending}", text), ("0.png", encoded()))
    assert found.captions == ["a kite"] and found.image == "a.tar/0.png"


def test_a_text_is_taken_before_what_a_json_repeats_and_a_key_chooses_another(tmp_path):
    about = json.dumps({"caption": "from the web", "title": "a title", "key": "000"})
    members = ("0.jpg", encoded(kind="JPEG")), ("0.json", about), ("0.txt", "a text")
    assert one(tmp_path, *members).captions == ["a text"]
    assert one(tmp_path, *members, caption_key="title").captions == ["a title"]
    assert one(tmp_path, *members, caption_key="txt,caption").captions == ["a text", "from the web"]
    with pytest.raises(
        UserError, match=r"has no column 'words', as --data\.caption_key says: there are image, caption"
    ):
        one(tmp_path, *members, caption_key="words")


def test_of_several_images_the_first_is_taken_and_told_or_one_is_chosen(tmp_path):
    members = ("0.jpg", encoded(kind="JPEG")), ("0.seg.png", encoded(1)), ("0.txt", "a text")
    notes = []
    write_tar(tmp_path / "a.tar", members)
    assert read_folder(tmp_path, notes=notes)[0].image == "a.tar/0.jpg"
    assert notes == ["1 samples have several images (jpg, seg.png), of which the first is taken: a.tar/0."]
    assert one(tmp_path, *members, image_key="seg.png").image == "a.tar/0.seg.png"
    with pytest.raises(UserError, match=r"holds no sample with an image .* have no image"):
        one(tmp_path, *members, image_key="webp")


def test_members_of_one_sample_need_not_follow_each_other_and_keys_keep_their_folders(tmp_path):
    members = (
        ("x/0.png", encoded()),
        ("y/0.png", encoded(1)),
        ("x/0.txt", "of x"),
        ("y/0.txt", "of y"),
        ("__info__.json", "{}"),
    )
    write_tar(tmp_path / "a.tar", members)
    assert {item.image: item.captions for item in read_folder(tmp_path)} == {
        "a.tar/x/0.png": ["of x"],
        "a.tar/y/0.png": ["of y"],
    }


def test_samples_without_image_or_caption_are_counted_and_named(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [*samples(3, txt="a kite"), ("7.txt", "no image"), ("8.png", encoded()), ("9.png", encoded()), ("9.txt", " ")],
    )
    notes = []
    assert len(read_folder(tmp_path, notes=notes)) == 3
    assert notes == ["1 samples have no image: a.tar/7.", "2 samples have no txt: a.tar/8, …."]


def test_questions_and_conversations_of_a_json_are_learned(tmp_path):
    asked = json.dumps({"question": "what is it?", "answer": "a kite"})
    said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a kite"}]
    for text, kind in (
        (asked, "Quiz"),
        (json.dumps({"id": 7, "image": "of before.jpg", "conversations": said}), "Conversation"),
    ):
        write_tar(tmp_path / kind / "a.tar", [("0.png", encoded()), ("0.json", text)])
        (entry,) = read_entries(tmp_path / kind)
        assert type(entry).__name__ == kind and entry.images == ["a.tar/0.png"]
        assert entry.questions()[0].answer == "a kite"
        assert len(open_conversations(tmp_path / kind, "train", image_size=32).images([0])[0]) == 1


# ------------------------------------------------------------------------------------------------------------- classes


def classes(tmp_path, *values):
    write_tar(
        tmp_path / "a.tar", [m for i, v in enumerate(values) for m in ((f"{i}.png", encoded(i)), (f"{i}.cls", v))]
    )
    return tmp_path


def test_classes_by_name_are_captioned_as_those_of_folders(tmp_path):
    found = read_folder(classes(tmp_path, "cat", "dog"))
    assert [item.label for item in found] == ["cat", "dog"] and "a photo of a cat." in found[0].captions


@pytest.mark.parametrize(
    "lines", ["tench\ngreat white shark\n", "0 tench\n1 great white shark\n", "0: tench\n1: great white shark\n"]
)
def test_numbers_of_classes_get_their_names_from_a_file(tmp_path, lines):
    classes(tmp_path, "1", "0")
    with pytest.raises(UserError, match=r"the classes of .* are numbers \(1\), .* give --data\.class_names a file"):
        read_folder(tmp_path)
    (tmp_path / "names.txt").write_text(lines)
    found = read_folder(Source(str(tmp_path), class_names="names.txt"))
    assert [item.label for item in found] == ["great white shark", "tench"]
    (tmp_path / "names.txt").rename(tmp_path / "classnames.txt")  # found by its name
    assert [item.label for item in read_folder(tmp_path)] == ["great white shark", "tench"]
    classes(tmp_path, "2")
    with pytest.raises(UserError, match=r"its class is '2', for which the file of class names has no name among 2"):
        read_folder(tmp_path)


# -------------------------------------------------------------------------------------------------------------- shards


def test_splits_come_from_folders_and_from_names(tmp_path):
    for name in ("train/000.tar", "val/000.tar", "test/000.tar"):
        write_tar(tmp_path / "a" / name, samples(2, txt="a kite"))
        write_tar(tmp_path / "b" / f"birds-{name.replace('/', '-')}", samples(2, txt="a kite"))
    for form in ("a", "b"):
        assert Counter(item.split for item in read_folder(tmp_path / form)) == {"train": 2, "val": 2, "test": 2}
        assert contents(tmp_path / form)["val"]["captions"] == 2


def test_braces_name_shards_of_which_none_may_be_missing(folder):
    assert len(read_folder(Source(f"{folder}/shard-{{000..001}}.tar"))) == 40
    first = Source(f"{folder}/shard-{{000..000}}.tar")
    assert (first.path, first.shards) == (folder, "shard-{000..000}.tar") and len(read_folder(first)) == 20
    assert len(read_folder(Source(f"{folder}/shard-001.tar"))) == len(read_folder(Source(f"{folder}/*1.tar"))) == 20
    with pytest.raises(
        UserError, match=r"lacks 2 of the 4 tar files that shard-\{000\.\.003\}\.tar names: shard-002\.tar, shard-003"
    ):
        read_folder(Source(f"{folder}/shard-{{000..003}}.tar"))
    with pytest.raises(UserError, match=r"holds none of the 3 tar files that b-\{0\.\.2\}\.tar names"):
        read_folder(Source(f"{folder}/b-{{0..2}}.tar"))
    with pytest.raises(UserError, match=r"holds no tar file that is called like x\*\.tar"):
        read_folder(Source(f"{folder}/x*.tar"))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{00..02}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{a,b}-{1..2}", ["a-1", "a-2", "b-1", "b-2"]),
        ("plain", ["plain"]),
        ("{2..0}", ["2", "1", "0"]),
    ],
)
def test_braces_are_what_a_shell_makes_of_them(pattern, names):
    assert expand(pattern) == names


def test_a_folder_and_its_shards_are_told_apart(tmp_path):
    assert split_directory("a/b") == ("a/b", None) and split_directory("a/x-{0..3}.tar") == ("a", "x-{0..3}.tar")
    assert split_directory("/x.tar") == ("/", "x.tar") and split_directory("x.tar") == (".", "x.tar")
    assert split_directory("a/{train,val}/0.tar") == ("a", "{train,val}/0.tar")
    (tmp_path / "folder.tar").mkdir()
    assert split_directory(str(tmp_path / "folder.tar")) == (str(tmp_path / "folder.tar"), None)


def test_a_gap_in_numbered_shards_is_told(folder):
    (folder / "shard-001.tar").rename(folder / "shard-003.tar")
    write_tar(folder / "shard-004.tar", samples(1, txt="a kite"))
    notes = []
    read_folder(folder, notes=notes)
    assert notes == ["By their numbers 2 tar files are missing: shard-001.tar, shard-002.tar."]
    assert gaps(["a.tar", "2019.tar", "2024.tar"]) == []


def test_a_tar_file_beside_images_is_what_they_came_from(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        (folder / name / "1.png").write_bytes(encoded())
    assert {item.label for item in read_folder(folder)} == {"cat", "dog"}
    assert len(read_folder(Source(f"{folder}/shard-000.tar"))) == 20  # unless it is named


def test_resuming_notices_a_shard_that_changed_and_counts_shards_alone(folder):
    before = fingerprint(folder)
    assert before.keys() == {"*.tar"} and before["*.tar"][0] == 2
    read_folder(folder)
    assert fingerprint(folder) == before  # the index is no data
    assert fingerprint(Source(f"{folder}/shard-000.tar"))["*.tar"][0] == 1
    write_tar(folder / "shard-001.tar", samples(20, first=20, txt="another {}"))
    assert fingerprint(folder) != before


# --------------------------------------------------------------------------------------------------------------- broken


def test_a_shard_that_is_cut_off_is_named(folder):
    whole = (folder / "shard-001.tar").read_bytes()
    (folder / "shard-001.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"shard-001\.tar is cut off: it ends within a file, behind \d+ whole samples"):
        open_pairs(folder, "train", image_size=32)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"{", r"its \.json is not JSON that can be read \("),
        (b"[1]", r"its \.json is not JSON that can be read \(it holds no object in braces\)"),
        (b'{"caption": 7}', "it has no caption"),
        (b'{"caption": "\\udc80"}', "“.*” is no valid text"),
    ],
)
def test_what_is_broken_in_a_text_is_named_with_its_sample(tmp_path, text, why):
    write_tar(tmp_path / "a.tar", [*samples(1, json='{{"caption": "a kite"}}'), ("1.png", encoded()), ("1.json", text)])
    with pytest.raises(UserError, match=rf"a\.tar/1: {why}"):
        read_folder(tmp_path)
    problems = []
    assert len(read_folder(tmp_path, problems)) == 1 and len(problems) == 1


def test_a_caption_that_is_no_text_is_named_with_its_sample(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", encoded()), ("0.txt", "ä".encode("latin-1"))])
    with pytest.raises(UserError, match=r"a\.tar/0: its \.txt is not UTF-8 text"):
        read_folder(tmp_path)


def test_an_image_of_no_bytes_is_skipped_and_told(folder):
    write_tar(folder / "shard-000.tar", [*samples(19, txt="a kite"), ("000019.png", b""), ("000019.txt", "nothing")])
    notes = open_pairs(folder, "train", image_size=32).notes
    assert any("1 of" in note and "shard-000.tar/000019.png cannot be read as an image" in note for note in notes)


def test_compressed_shards_and_shards_without_texts_are_refused(tmp_path):
    write_tar(tmp_path / "a" / "x-000.tar.gz", samples(2, txt="a kite"), mode="w:gz")
    for source in (tmp_path / "a", Source(f"{tmp_path}/a/x-000.tar.gz")):
        with pytest.raises(
            UserError, match=r"are compressed \(x-000\.tar\.gz\), .* decompress them \(gzip -d x-000\.tar\.gz\)"
        ):
            read_folder(source)
    write_tar(tmp_path / "b" / "x-000.tar", samples(2))
    with pytest.raises(UserError, match=r"its samples \(x-000\.tar, …\) have no text beside an image"):
        read_folder(tmp_path / "b")


def test_members_named_in_another_file_are_found(folder):
    line = {"image": "shard-000.tar/000003.png", "caption": "from a list"}
    (folder / "captions.jsonl").write_text(json.dumps(line))
    assert read_folder(folder)[0].captions == ["from a list"]
    assert read_image(folder / read_folder(folder)[0].image).size == (50, 40)


@pytest.fixture(autouse=True)
def forgotten():
    tar_index.indexed.cache_clear()
