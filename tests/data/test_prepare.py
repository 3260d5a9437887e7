"""The scripts that turn a dataset's official files into a folder: small files of the same form, opened as datasets."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivlm.conversation import Turn
from minivlm.datasets import official, open_conversations
from minivlm.datasets.class_episodes import read_classes
from minivlm.datasets.interleaved import Interleaved
from minivlm.errors import UserError

ROOT = Path(__file__).parents[2]


def prepare(name, *argv):
    """data/<name>/prepare.py with these arguments."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(a) for a in argv])


def save(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), len(path.name), dtype=np.uint8)).save(path)


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("name", ["flickr8k", "interleaved", "llava", "omniglot"])
def test_a_script_explains_itself(name, capsys):
    with pytest.raises(SystemExit):
        prepare(name, "--help")
    shown = capsys.readouterr().out
    assert f"python data/{name}/prepare.py" in shown and f"(default: data/{name})" in " ".join(shown.split())


def test_a_script_works_from_anywhere_and_says_what_is_wrong(tmp_path):
    command = [
        sys.executable,
        ROOT / "data" / "flickr8k" / "prepare.py",
        "nowhere",
        "--images",
        "nowhere",
        "--out",
        "out",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: {Path('nowhere') / 'Flickr8k.token.txt'} is missing.\n"


# -------------------------------------------------------------------------------------------------------------- Flickr8k

PHOTOS = ("1000268201_693b08cb0e.jpg", "1001773457_577c3a7d70.jpg", "1002674143_1b742ab4b8.jpg")


@pytest.fixture
def flickr(tmp_path):
    """A photograph for each split; the captions hold one more, of which there is no photograph (as in the real file)."""
    lines = [f"{photo}#{k}\tA child , number {k} , on {photo[:4]} ." for photo in PHOTOS for k in range(5)]
    write(
        tmp_path / "text" / "Flickr8k.token.txt", "\n".join([*lines, "2258277193_586949ec62.jpg.1#0\tpeople ."]) + "\n"
    )
    for name, photo in zip(("train", "dev", "test"), PHOTOS, strict=True):
        write(tmp_path / "text" / f"Flickr_8k.{name}Images.txt", photo + "\n")
        save(tmp_path / "photos" / photo)
    return "flickr8k", tmp_path / "text", "--images", tmp_path / "photos", "--out", tmp_path / "out"


def test_flickr8k(flickr, tmp_path, capsys):
    prepare(*flickr)
    assert "3 images. Next: python train.py captioner" in capsys.readouterr().out
    for split, photo in zip(("train", "val", "test"), PHOTOS, strict=True):
        talk = open_conversations(tmp_path / "out", split, image_size=32)
        assert len(talk) == 1 and talk.key(0) == f"images/{photo}"
        assert talk.captions(0) == [f"A child , number {k} , on {photo[:4]} ." for k in range(5)]
    assert (tmp_path / "out" / "images").is_symlink()


def test_wrong_files_of_flickr8k_are_named(flickr, tmp_path):
    (tmp_path / "photos" / PHOTOS[1]).unlink()
    with pytest.raises(UserError, match=f"1 of 3 images are missing in .*photos; the first is {PHOTOS[1]}"):
        prepare(*flickr)
    write(tmp_path / "text" / "Flickr_8k.devImages.txt", "other.jpg\n")
    with pytest.raises(
        UserError, match=r"devImages\.txt names other\.jpg, of which Flickr8k\.token\.txt has no caption"
    ):
        prepare(*flickr)
    write(tmp_path / "text" / "Flickr8k.token.txt", f"{PHOTOS[0]}#0\ta child\n\n{PHOTOS[0]} a child\n")
    with pytest.raises(UserError, match=r"token\.txt, line 3 is not an image, #, a number, a tab and a caption"):
        prepare(*flickr)
    (tmp_path / "text" / "Flickr8k.token.txt").unlink()
    with pytest.raises(UserError, match=r"Flickr8k\.token\.txt is missing"):
        prepare(*flickr)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------- LLaVA


def llava_entry(*texts, **more):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "000000033471", **more, "conversations": turns}


@pytest.fixture
def llava(tmp_path):
    """As in llava_v1_5_mix665k.json: a picture, words alone, and an entry that begins with the assistant."""
    shown = llava_entry("<image>\nWhat colour?", "White.", image="coco/train2017/000000033471.jpg")
    begun = llava_entry("Hello", "Hi", id="wBbCKGD", model="")
    begun["conversations"].insert(0, {"from": "gpt", "value": "And on it goes."})
    save(tmp_path / "playground" / "coco" / "train2017" / "000000033471.jpg")
    write(tmp_path / "mix.json", [shown, begun])
    return "llava", tmp_path / "mix.json", "--images", tmp_path / "playground", "--out", tmp_path / "out"


def test_llava(llava, tmp_path, capsys):
    prepare(*llava)
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'out'}: 2 conversations. Next: python train.py llava --data {tmp_path / 'out'}"
    ]
    talk = open_conversations(tmp_path / "out", "train", image_size=32)
    said = {talk.key(i): talk.conversation(i, np.random.default_rng(0)) for i in range(len(talk))}
    assert said == {
        "images/coco/train2017/000000033471.jpg": [Turn("user", "<image>\nWhat colour?"), Turn("assistant", "White.")],
        "wBbCKGD": [Turn("user", "Hello"), Turn("assistant", "Hi")],
    }


def test_llava_leaves_out_what_cannot_be_learnt_from_and_says_so(llava, tmp_path, capsys):
    entries = json.loads((tmp_path / "mix.json").read_text())
    broken = [llava_entry("<image>", "no picture"), llava_entry("Hello", "")]
    write(tmp_path / "mix.json", [*entries, *broken])
    prepare(*llava)
    assert "2 entries cannot be learnt from and are left out; the first: entry 3: the number" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "conversations.json").read_text())) == 2
    write(tmp_path / "mix.json", broken)
    with pytest.raises(UserError, match=r"mix\.json has no entry that can be used: entry 1: the number"):
        prepare(*llava)


def test_llava_leaves_out_what_is_no_text_and_keeps_names_that_are_no_utf8(llava, tmp_path, capsys):
    entries = json.loads((tmp_path / "mix.json").read_text())
    name = os.fsdecode(b"caf\xe9.jpg")
    save(tmp_path / "playground" / name)
    (tmp_path / "mix.json").write_text(
        json.dumps([*entries, llava_entry("Hello", "half \ud83d"), llava_entry("<image>\nwhat?", "é", image=name)])
    )
    prepare(*llava)
    assert "1 entries cannot be learnt from and are left out; the first: entry 3: “half \\ud83d” is no valid text" in (
        capsys.readouterr().out
    )
    splits = [open_conversations(tmp_path / "out", split, image_size=32) for split in ("train", "val", "test")]
    assert f"images/{name}" in {talk.key(i) for talk in splits for i in range(len(talk))}


def test_llavas_missing_images_are_an_error_or_left_out(llava, tmp_path, capsys):
    (tmp_path / "playground" / "coco" / "train2017" / "000000033471.jpg").unlink()
    with pytest.raises(
        UserError, match=r"images of 1 of 2 entries are missing in .*; the first is coco/.*--skip_missing"
    ):
        prepare(*llava)
    prepare(*llava, "--skip_missing")
    assert "1 entries are left out because their image is missing" in capsys.readouterr().out
    assert len(open_conversations(tmp_path / "out", "train", image_size=32)) == 1


def test_wrong_files_of_llava_are_named(llava, tmp_path):
    write(tmp_path / "mix.json", {"images": []})
    with pytest.raises(UserError, match=r"mix\.json is another file than expected: it holds no list"):
        prepare(*llava)
    write(tmp_path / "mix.json", [llava_entry("a", "b")])
    (tmp_path / "playground").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"there is no folder .*playground with the images"):
        prepare(*llava)


# ---------------------------------------------------------------------------------------------------- images between texts


def mmc4(images, texts):
    """As in docs_no_face_shard_0_v2.jsonl; images: name → the sentence that it belongs to."""
    info = [
        {"image_name": name, "raw_url": f"http://a.b/{name}?w=1", "matched_text_index": at, "matched_sim": 0.3}
        for name, at in images.items()
    ]
    return {"url": "http://a.b", "text_list": texts, "image_info": info, "similarity_matrix": []}


def obelics(*pairs):
    texts, images = zip(*pairs, strict=True)
    return {"images": images, "texts": texts, "metadata": "[]", "general_metadata": "{}"}


@pytest.fixture
def pages(tmp_path):
    save(*(tmp_path / "web" / name for name in ("a.jpg", "b.png", "000000000.jpg")))
    write(tmp_path / "web" / "000000000.json", {"url": "http://x.y/z?id=7", "status": "success"})
    documents = [
        mmc4({"b.png": 1, "a.jpg": 0}, ["first.", "second <image> one."]),
        mmc4({}, ["no picture."]),
        obelics((None, "http://x.y/z?id=7"), ("a text", None), (None, "https://q.r/b.png?size=3"), ("its end", None)),
    ]
    write(tmp_path / "pages.jsonl", "\n".join(json.dumps(document) for document in documents))
    return "interleaved", tmp_path / "pages.jsonl", "--images", tmp_path / "web", "--out", tmp_path / "out"


def test_web_pages(pages, tmp_path, capsys):
    prepare(*pages)
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'out'}: 2 documents with 4 images",
        "1 of 3 documents have no image, or no text, and are left out",
    ]
    said = set()
    for split in ("train", "val", "test"):
        opened = Interleaved(tmp_path / "out", split, image_size=32)
        said |= {(opened.key(i), opened.text(i)) for i in range(len(opened))}
    assert said == {
        ("images/a.jpg", "<image>first.<image>second one."),
        ("images/000000000.jpg", "<image>a text<image>its end"),
    }


def test_missing_images_of_web_pages_are_an_error_or_left_out(pages, tmp_path, capsys):
    (tmp_path / "web" / "b.png").unlink()
    with pytest.raises(UserError, match=r"2 images are missing in .*web; the first is b\.png: .* --skip_missing"):
        prepare(*pages)
    prepare(*pages, "--skip_missing")
    assert "2 documents with 2 images" in (out := capsys.readouterr().out) and "2 images are left out because" in out


def test_wrong_files_of_web_pages_are_named(pages, tmp_path):
    for document, message in (
        ({"text": "a"}, "line 1: it is a document of neither kind"),
        ({**obelics(("a", None)), "images": []}, "line 1: it has 1 texts, but 0 images"),
        (
            {"text_list": ["a"], "image_info": [{"image_name": "a.jpg"}]},
            "one of its images has no 'matched_text_index'",
        ),
        (mmc4({}, ["a"]), "none of the 1 documents has a text and an image that is there"),
    ):
        write(tmp_path / "pages.jsonl", document)
        with pytest.raises(UserError, match=message):
            prepare(*pages)
    (tmp_path / "pages.jsonl").unlink()
    with pytest.raises(UserError, match=r"there is no file .*pages\.jsonl"):
        prepare(*pages)
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------- Omniglot


def save_omniglot(archive, alphabets, characters=2):
    """An archive with three drawings of every character: all white but for one pixel."""
    with zipfile.ZipFile(archive, "w") as file:
        for alphabet, character, drawing in product(alphabets, range(1, characters + 1), (1, 2, 3)):
            picture, png = Image.new("1", (105, 105), 1), io.BytesIO()
            picture.putpixel((drawing, character), 0)
            picture.save(png, "png")
            file.writestr(f"images_{archive.stem}/{alphabet}/character0{character}/{drawing}.png", png.getvalue())
    return archive


@pytest.fixture
def archives(tmp_path):
    """Two archives that overlap: Greek is in both."""
    one = save_omniglot(tmp_path / "one.zip", ("Greek", "Korean"))
    return one, save_omniglot(tmp_path / "two.zip", ("Greek", "Tagalog", "Japanese_(katakana)"))


def test_omniglot(archives, tmp_path, capsys):
    prepare("omniglot", *archives, "--out", tmp_path / "out", "--test", "Tagalog")
    assert "characters: 16 in train/, 2 in val/, 2 in test/" in capsys.readouterr().out
    classes = {split: read_classes(tmp_path / "out", split) for split in ("train", "val", "test")}
    assert [one.image for one in classes["test"]] == ["test/Tagalog_character01", "test/Tagalog_character02"]
    assert {one.image.split("_")[0] for one in classes["train"]} == {"train/Greek", "train/Japanese"}
    assert classes["train"][1].image == "train/Greek_character01_180"
    assert {len(one.images) for some in classes.values() for one in some} == {3}
    upright, turned = (
        np.array(Image.open(tmp_path / f"out/train/Greek_character02{turn}/3.png")) for turn in ("", "_90")
    )
    assert not upright[2, 3] and np.array_equal(np.rot90(upright), turned)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--test", "Latin"],
            "--test: there is no alphabet Latin; there are Greek, Japanese_katakana, Korean, Tagalog",
        ),
        (
            ["--val", "Greek", "Korean", "--test", "Tagalog", "Japanese_katakana"],
            "but there are 4, of which 0 are neither",
        ),
    ],
)
def test_wrong_alphabets_of_omniglot_are_named(archives, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        prepare("omniglot", *archives, "--out", tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


def test_wrong_files_of_omniglot_are_named(archives, tmp_path):
    write(tmp_path / "none.zip", "no zip file")
    with pytest.raises(UserError, match=r"none\.zip cannot be read as a zip file"):
        prepare("omniglot", tmp_path / "none.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme.txt", "words")
    with pytest.raises(UserError, match=r"no images_…/ALPHABET/CHARACTER/\*.png, as in Omniglot"):
        prepare("omniglot", tmp_path / "other.zip")


class Killed(BaseException):
    pass


def test_a_script_that_is_killed_leaves_nothing_that_passes_as_omniglot(archives, tmp_path, monkeypatch):
    rotate, turned = Image.Image.rotate, []

    def rotate_some(*arguments):
        turned.append(1)
        if len(turned) > 20:
            raise Killed
        return rotate(*arguments)

    monkeypatch.setattr(Image.Image, "rotate", rotate_some)
    with pytest.raises(Killed):
        prepare("omniglot", *archives, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".making"]
    save(tmp_path / "out" / ".partial" / "train" / "Greek_character01" / "9.png")  # as a kill -9 leaves it
    with pytest.raises(UserError, match="has no sub-folders of images"):
        read_classes(tmp_path / "out", "test")
    monkeypatch.setattr(Image.Image, "rotate", rotate)
    prepare("omniglot", *archives, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("9.png")) and len(read_classes(tmp_path / "out", "test")) == 2
    with pytest.raises(UserError, match=r"val is there already: remove it, or choose another folder with --out"):
        prepare("omniglot", *archives, "--out", tmp_path / "out", "--test", "Greek")


def test_a_copy_that_is_killed_leaves_whole_pictures_alone(tmp_path, monkeypatch):
    save(tmp_path / "source" / "1.png", tmp_path / "source" / "2.png")

    def stop_in_the_middle(source, target):
        Path(target).write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(official.shutil, "copy2", stop_in_the_middle)
    with pytest.raises(Killed):
        official.place(tmp_path / "source", tmp_path / "target", copy=True)
    assert not list((tmp_path / "target").glob("*.png"))


def test_a_note_beside_a_picture_that_is_none_is_named(pages, tmp_path):
    write(tmp_path / "web" / "b.json", "[1]")
    with pytest.raises(UserError, match=r"\.json notes no address of its picture"):
        prepare(*pages)
