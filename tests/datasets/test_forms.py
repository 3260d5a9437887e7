"""Folders as people have them: each form is recognised by what the folder contains, with its captions, splits and keys."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from minivlm.datasets.entries import Conversation, Quiz
from minivlm.datasets.fingerprint import changes, fingerprint
from minivlm.datasets.folder_entries import read_entries, read_folder
from minivlm.datasets.folder_files import choose_split
from minivlm.datasets.forms import recognised
from minivlm.datasets.source import Source
from minivlm.errors import UserError


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


def images(folder, *names):
    for i, name in enumerate(names):
        save(folder / name, i)


def write(path, *rows):
    """Text as it is; objects as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    path.write_bytes(text.encode())


def read(folder, **options):
    """{image: (captions, label, split)} of a folder."""
    items = read_folder(Source(folder, **options))
    return {item.image: (list(item.captions), item.label, item.split) for item in items}


def plain(**captions):
    return {f"{name}.png": ([text], None, None) for name, text in captions.items()}


# ------------------------------------------------------------------------------------------------------- imagefolder


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_an_imagefolder_is_read_at_the_top(tmp_path, form):
    images(tmp_path, "a.png", "sub/b.png")
    rows = [("a.png", "a red kite, high up"), ("sub/b.png", "two dogs")]
    if form == "jsonl":
        write(tmp_path / "metadata.jsonl", *({"file_name": name, "text": text} for name, text in rows))
    else:
        write(tmp_path / "metadata.csv", "file_name,text", *(f'{name},"{text}"' for name, text in rows))
    assert read(tmp_path) == {name: ([text], None, None) for name, text in rows}
    (found,) = recognised(tmp_path)
    assert str(found).endswith(f"(metadata.{form}); image: file_name, caption: text")


def test_an_imagefolder_gives_its_splits_by_folder(tmp_path):
    for folder in ("train", "validation", "test"):
        images(tmp_path / folder, "1.png", "2.png")
        rows = [{"file_name": f"{i}.png", "text": f"{folder} {i}", "label": i} for i in (1, 2)]
        write(tmp_path / folder / "metadata.jsonl", *rows)
    found = read(tmp_path)
    assert found["validation/2.png"] == (["validation 2"], "2", "val") and len(found) == 6
    assert found["train/1.png"] == (["train 1"], "1", "train")


def test_a_dataset_in_data_is_found_and_one_in_another_folder_is_named(tmp_path):
    images(tmp_path / "data" / "train", "1.png", "2.png")
    write(tmp_path / "data" / "train" / "metadata.csv", "file_name,text", "1.png,x", "2.png,y")
    assert read(tmp_path)["data/train/1.png"] == (["x"], None, "train")
    images(tmp_path / "up" / "photos", "1.png")
    write(tmp_path / "up" / "photos" / "t.csv", "filepath,title", "1.png,x")
    with pytest.raises(
        UserError, match=r"up is no dataset, but its folder .*photos is one \(captions: CSV \(t\.csv\).*: name that"
    ):
        read(tmp_path / "up")


def test_labels_without_captions_are_put_into_sentences(tmp_path):
    images(tmp_path / "images", "1.png", "2.png")
    write(tmp_path / "train.csv", "Image Name,Label", "1.png,cat", "2.png,dog")
    found = read(tmp_path)
    assert found["images/1.png"][0][0] == "a photo of a cat." and found["images/2.png"][1] == "dog"
    write(tmp_path / "train.csv", "Image Name,Label", "1.png,7", "2.png,8")
    write(tmp_path / "names.txt", "7 great wave", "8 small wave")
    assert read(tmp_path, class_names="names.txt")["images/1.png"][:2] == (
        [t.format("great wave") for t in ("a photo of a {}.", "a picture of a {}.", "an image of a {}.")]
        + ["this is a great wave.", "a great wave."],
        "great wave",
    )


def test_a_table_of_labels_beside_class_folders_leaves_them_what_they_are(tmp_path):
    images(tmp_path, "cat/1.png", "dog/1.png")
    write(tmp_path / "labels.csv", "filepath,label", "cat/1.png,cat", "dog/1.png,dog")
    assert recognised(tmp_path) == [] and set(read(tmp_path)) == {"cat/1.png", "dog/1.png"}


# ------------------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("photos.csv", 'filepath,title\na.png,"red, and ""round"""\nb.png,"two\nlines"\n'),
        ("photos.tsv", 'filepath\ttitle\na.png\tred, and "round"\nb.png\t"two\nlines"\n'),
        ("excel.csv", '\ufefffilepath;title\r\na.png;"red, and ""round"""\r\nb.png;"two\nlines"\r\n;\r\n'),
        ("results.csv", 'image_name| comment\na.png| red, and "round"\nb.png|"two\nlines"\n'),
        ("captions.txt", 'image,caption\na.png,"red, and ""round"""\nb.png,"two\nlines"\n'),
        (
            "b.JSONL",
            '{"image_path": "a.png", "sentence": "red, and \\"round\\""}\n{"image_path": "b.png", "sentence": "two\\nlines"}',
        ),
        (
            "c.json",
            '[{"image": "a.png", "caption": "red, and \\"round\\""}, {"image": "b.png", "caption": "two\\nlines"}]',
        ),
        ("d.json", '{"a.png": "red, and \\"round\\"", "b.png": ["two\\nlines"]}'),
        ("e.json", '{"a.png": {"caption": "red, and \\"round\\"", "tags": "x"}, "b.png": {"caption": "two\\nlines"}}'),
        (
            "f.json",
            '{"version": 1, "data": [{"img": "a.png", "text": "red, and \\"round\\""}, {"img": "b.png", "text": "two\\nlines"}]}',
        ),
        (
            "g.json",
            '{"file_name": "a.png", "text": "red, and \\"round\\""}\n{"file_name": "b.png", "text": "two\\nlines"}\n',
        ),
    ],
)
def test_a_table_of_any_name_is_read_by_its_header(tmp_path, name, text):
    images(tmp_path, "images/a.png", "images/b.png")
    (tmp_path / name).write_bytes(text.encode())
    found = read(tmp_path)
    assert found == {"images/a.png": (['red, and "round"'], None, None), "images/b.png": (["two\nlines"], None, None)}


def test_several_rows_and_several_columns_are_captions_of_one_image(tmp_path):
    images(tmp_path / "Images", "a.png", "b.png")
    write(
        tmp_path / "captions.csv",
        "image,caption_0,caption_1,split",
        "a.png,one,two,train",
        "a.png,three,,train",
        "b.png,x,y,dev",
    )
    assert read(tmp_path) == {
        "Images/a.png": (["one", "two", "three"], None, "train"),
        "Images/b.png": (["x", "y"], None, "val"),
    }
    write(tmp_path / "captions.csv", "raw,filename", "\"['one', 'two']\",a.png", '"[""x"", ""y""]",b.png')
    assert [captions for captions, *_ in read(tmp_path).values()] == [["one", "two"], ["x", "y"]]


def test_keys_are_chosen_where_names_differ_or_several_match(tmp_path):
    images(tmp_path, "a.png", "b.png")
    write(tmp_path / "t.csv", "datei,titel,title,text", "a.png,ein Drache,t,a kite", "b.png,zwei Hunde,u,two dogs")
    with pytest.raises(
        UserError, match=r"t\.csv: it has the columns datei, titel, title, text, and none .*--data\.image_key"
    ):
        read(tmp_path)
    with pytest.raises(
        UserError, match=r"several of its columns may hold the caption, title, text: choose with --data\.cap"
    ):
        read(tmp_path, image_key="datei")
    assert read(tmp_path, image_key="datei", caption_key="titel") == plain(a="ein Drache", b="zwei Hunde")
    assert read(tmp_path, image_key="datei", caption_key="text, title")["a.png"][0] == ["a kite", "t"]
    with pytest.raises(
        UserError, match=r"it has no column 'name', as --data\.image_key says: there are datei, titel, title, t"
    ):
        read(tmp_path, image_key="name", caption_key="text")


def test_of_several_columns_with_images_the_one_whose_images_are_there_is_taken(tmp_path):
    images(tmp_path, "a.png")
    write(tmp_path / "t.csv", "image,file_name,caption", "http://x/1.png,a.png,a kite")
    assert read(tmp_path) == plain(a="a kite")
    write(tmp_path / "t.csv", "image,file_name,caption", "a.png,a.png,a kite")
    with pytest.raises(
        UserError, match=r"several of its columns may hold the image, image, file_name: choose with --data\.im"
    ):
        read(tmp_path)


def test_keys_are_chosen_in_files_of_our_own_names_as_well(tmp_path):
    images(tmp_path, "a.png")
    write(tmp_path / "captions.jsonl", {"image": "a.png", "caption": "x", "alt": "y"})
    assert read(tmp_path, caption_key="alt") == plain(a="y") and read(tmp_path) == plain(a="x")
    write(tmp_path / "captions.jsonl", {"file_name": "a.png", "text": "x"})
    assert read(tmp_path) == plain(a="x")


def test_images_are_found_where_the_table_of_another_machine_says(tmp_path):
    images(tmp_path, "photos/sea/1.png", "photos/hill/1.png", "photos/2.png")
    rows = ["/home/ann/photos/sea/1.png,sea", "C:\\me\\photos\\hill\\1.png,hill", f"{tmp_path}/photos/2.png,abs"]
    write(tmp_path / "t.csv", "filepath,title", *rows)
    assert {name: text for name, ([text], *_) in read(tmp_path).items()} == {
        "photos/sea/1.png": "sea",
        "photos/hill/1.png": "hill",
        "photos/2.png": "abs",
    }
    write(tmp_path / "t.csv", "filepath,title", "1.png,sea")
    with pytest.raises(
        UserError, match=r"line 2: there are several images '1\.png': photos/hill/1\.png and photos/sea/1\.png"
    ):
        read(tmp_path)
    write(tmp_path / "t.csv", "filepath,title", "a/2.png,sea", "b/2.png,hill")
    with pytest.raises(UserError, match=r"line 3: 'b/2\.png' and 'a/2\.png' would be the same file photos/2\.png"):
        read(tmp_path)


# -------------------------------------------------------------------------------------------------- beside each image


@pytest.mark.parametrize("ending", [".txt", ".caption", ".json"])
def test_a_text_beside_each_image_is_its_caption(tmp_path, ending):
    """As img2dataset leaves its files, in numbered folders, and kohya its images."""
    for name in ("00000/000000000", "00000/000000003", "00001/000010000"):
        save(tmp_path / f"{name}.png")
        text = json.dumps({"caption": f"image {name}", "url": "u"}) if ending == ".json" else f"image {name}\n"
        (tmp_path / f"{name}{ending}").write_text(text, encoding="utf-8")
    (tmp_path / "00000_stats.json").write_text('{"count": 3}', encoding="utf-8")
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    save(tmp_path / "00001" / "9.png")
    notes = []
    items = read_folder(tmp_path, notes=notes)
    assert [(item.image, item.captions) for item in items][:2] == [
        ("00000/000000000.png", ["image 00000/000000000"]),
        ("00000/000000003.png", ["image 00000/000000003"]),
    ]
    without = "1 of 4 images have no text beside them, and are not used (00001/9.png)."
    assert notes == ["00000.parquet is not read.", without]
    (tmp_path / "t.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    (tmp_path / "00001").rename(tmp_path / ".hidden")
    (tmp_path / "00000").rename(tmp_path / ".also")
    with pytest.raises(
        UserError, match=r"t\.csv: it has the columns a, b, .* 00000\.parquet is not read either: write the"
    ):
        read_folder(tmp_path)


def test_texts_beside_images_at_the_top_and_in_split_folders(tmp_path):
    images(tmp_path, "a.png", "b.png")
    write(tmp_path / "a.txt", "a kite")
    write(tmp_path / "b.png.txt", "a dog")
    assert read(tmp_path) == plain(a="a kite", b="a dog")
    images(tmp_path, "train/1.png", "test/2.png")
    write(tmp_path / "train" / "1.txt", "one")
    write(tmp_path / "test" / "2.txt", "two")
    assert [split for *_, split in read(tmp_path).values()] == [None, None, "test", "train"]


# ------------------------------------------------------------------------------------------------- COCO, Karpathy, VQA


def coco(*names, start=1, **more):
    known = [{"id": start + i, "file_name": name} for i, name in enumerate(names)]
    said = [
        {"image_id": start + i, "id": 10 * i + k, "caption": f"{name}  {k}\n"}
        for i, name in enumerate(names)
        for k in (1, 2)
    ]
    return {"info": {}, "images": known, "annotations": said, **more}


def test_coco_is_read_as_it_is_unpacked(tmp_path):
    images(tmp_path, "train2017/000000000009.png", "train2017/000000000010.png", "val2017/000000000011.png")
    write(tmp_path / "annotations" / "captions_train2017.json", coco("000000000009.png", "000000000010.png"))
    write(tmp_path / "annotations" / "captions_val2017.json", coco("000000000011.png"))
    boxes = {
        "images": [{"id": 1, "file_name": "000000000009.png"}],
        "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}],
    }
    write(tmp_path / "annotations" / "instances_train2017.json", boxes)
    found = read(tmp_path)
    assert found["train2017/000000000009.png"] == (["000000000009.png 1", "000000000009.png 2"], None, "train")
    assert found["val2017/000000000011.png"][2] == "val" and len(found) == 3
    (tmp_path / "annotations" / "captions_train2017.json").unlink()
    assert read(tmp_path)["val2017/000000000011.png"][2] is None  # of one part alone the splits are drawn


def test_a_split_of_coco_that_was_not_downloaded_is_left_out_and_told(tmp_path):
    images(tmp_path, "val2017/000000000011.png")
    for split, name in (("train", "000000000009.png"), ("val", "000000000011.png")):
        write(tmp_path / "annotations" / f"captions_{split}2017.json", coco(name))
    notes = []
    assert [item.image for item in read_folder(tmp_path, notes=notes)] == ["val2017/000000000011.png"]
    assert "captions_train2017.json is left out: none of its images is there." in notes[0] and len(notes) == 1
    (tmp_path / "val2017" / "000000000011.png").unlink()
    os.utime(tmp_path / "annotations" / "captions_val2017.json", (1, 1))
    with pytest.raises(UserError, match=r"captions_train2017\.json is left out: none of its images is there"):
        read_folder(tmp_path)


def test_what_is_wrong_in_lists_is_named_by_its_number(tmp_path):
    images(tmp_path, "a.png")
    for wrong, said in (
        ({"images": [{"id": 1, "file_name": "a.png"}, {"id": 2}]}, "image 2: it has no 'file_name'"),
        (
            {"annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 9, "caption": "x"}]},
            "annotation 2: there is no image of",
        ),
        (
            {"annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 1, "caption": 3}]},
            "annotation 2: it has other values",
        ),
        (
            {"annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 1, "caption": " "}]},
            "annotation 2: its caption is empty",
        ),
    ):
        write(tmp_path / "c.json", coco("a.png") | wrong)
        with pytest.raises(UserError, match=rf"c\.json, {said}"):
            read_folder(tmp_path)
        problems = []
        assert len(read_folder(tmp_path, problems)) == 1 and len(problems) == 1


def test_coco_under_another_name_with_images_without_captions(tmp_path):
    images(tmp_path, "img/a.png", "img/b.png")
    values = coco("a.png", "b.png")
    values["annotations"] = values["annotations"][:2]
    write(tmp_path / "my labels.json", values)
    notes = []
    assert [item.image for item in read_folder(tmp_path, notes=notes)] == ["img/a.png"]
    assert notes == ["1 of 2 images of my labels.json have no caption, and are not used."]


def test_karpathys_splits_are_his(tmp_path):
    images(tmp_path, "val2014/1.png", "val2014/2.png", "train2014/3.png")
    of = lambda name, folder, split: {
        "filename": name,
        "filepath": folder,
        "split": split,
        "sentences": [{"raw": f"{name} it is", "tokens": []}, {"tokens": ["a", "kite"]}],
    }
    listed = [of("1.png", "val2014", "restval"), of("2.png", "val2014", "test"), of("3.png", "train2014", "train")]
    write(tmp_path / "dataset_coco.json", {"images": listed, "dataset": "coco"})
    assert read(tmp_path) == {
        "val2014/1.png": (["1.png it is", "a kite"], None, "train"),
        "val2014/2.png": (["2.png it is", "a kite"], None, "test"),
        "train2014/3.png": (["3.png it is", "a kite"], None, "train"),
    }


def test_vqa2_is_read_from_its_pairs_of_files(tmp_path):
    for subset, i in (("train2014", 9), ("val2014", 11)):
        save(tmp_path / subset / f"COCO_{subset}_{i:012d}.jpg", i)
        question = {"image_id": i, "question": "how many?", "question_id": 10 * i}
        said = [{"answer": answer, "answer_id": k} for k, answer in enumerate(["2"] * 7 + ["two"] * 3)]
        answer = {"question_id": 10 * i, "image_id": i, "multiple_choice_answer": "2", "answers": said}
        answer |= {"answer_type": "number", "question_type": "how many"}
        write(
            tmp_path / f"v2_OpenEnded_mscoco_{subset}_questions.json", {"data_subtype": subset, "questions": [question]}
        )
        write(tmp_path / f"v2_mscoco_{subset}_annotations.json", {"annotations": [answer]})
    train, val = read_entries(tmp_path)
    assert isinstance(train, Quiz) and train.images == ["train2014/COCO_train2014_000000000009.jpg"]
    assert (train.split, val.split) == ("train", "val")
    (asked,) = train.asked
    assert (asked.text, asked.answer, len(asked.answers), asked.kind) == ("how many?", "2", 10, "number")
    write(tmp_path / "captions_train2014.json", coco("COCO_train2014_000000000009.jpg"))
    assert read_entries(tmp_path)[0].captions == [f"COCO_train2014_000000000009.jpg {k}" for k in (1, 2)]


def test_questions_are_read_from_a_table_of_any_name(tmp_path):
    images(tmp_path, "a.png")
    write(
        tmp_path / "train.json", '[{"image": "a.png", "question": "what?", "answer": ["kite", "kite", "kite", "toy"]}]'
    )
    (quiz,) = read_entries(tmp_path)
    assert quiz.asked[0][:3] == ("what?", "kite", ("kite", "kite", "kite", "toy"))
    (tmp_path / "train.json").unlink()
    write(tmp_path / "qa.csv", "image,question,answer", "a.png,what?,a kite", "a.png,where?,up")
    (quiz,) = read_entries(tmp_path)
    assert [asked.answer for asked in quiz.asked] == ["a kite", "up"]


# ----------------------------------------------------------------------------------------------------- conversations

TALK = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a kite"}]
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "what?"},
    {"role": "assistant", "content": "a kite"},
]
PARTS = [
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a kite"}]},
]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize(
    "entry",
    [
        {"image": "a.png", "conversations": TALK},
        {"images": ["a.png"], "messages": MESSAGES},
        {"messages": PARTS},
        {"image": "coco/a.png", "conversations": [{"from": "gpt", "value": "hello"}, *TALK]},
    ],
)
def test_conversations_under_any_name_in_llavas_words_and_openais(tmp_path, entry, lines):
    images(tmp_path, "a.png")
    rows = [{"id": 7, **entry}]
    write(tmp_path / ("my.jsonl" if lines else "my.json"), *(rows if lines else [json.dumps(rows)]))
    notes = []
    (talk,) = read_entries(tmp_path, notes=notes)
    assert isinstance(talk, Conversation) and talk.images == ["a.png"]
    assert [(turn.role, turn.text) for turn in talk.turns if turn.role != "system"] == [
        ("user", "<image>\nwhat?"),
        ("assistant", "a kite"),
    ]
    assert len(notes) == (entry.get("image") == "coco/a.png")


def test_splits_are_given_by_the_names_of_files(tmp_path):
    images(tmp_path, *(f"{i}.png" for i in range(3)))
    for i, split in enumerate(("train", "val", "test")):
        write(tmp_path / f"{split}.csv", "image,caption", f"{i}.png,x")
    assert [split for *_, split in read(tmp_path).values()] == ["test", "train", "val"]
    assert choose_split(read_folder(tmp_path), "train", tmp_path)[1] == []


# ------------------------------------------------------------------------------------------------------- class folders


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane, hoist\n"),
        ("names.json", '{"n01440764": "tench", "n02012849": "crane", "n03126707": "crane, hoist"}'),
        (
            "index.json",
            '{"0": ["n01440764", "tench"], "1": ["n02012849", "crane"], "2": ["n03126707", "crane, hoist"]}',
        ),
    ],
)
def test_synsets_get_their_names_from_a_file(tmp_path, name, text):
    for folder in ("n01440764", "n02012849", "n03126707"):
        save(tmp_path / "data" / "train" / folder / "1.png")
    with pytest.raises(UserError, match=r"look like WordNet's numbers.*--data\.class_names"):
        read(tmp_path / "data")
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = read(tmp_path / "data", class_names=str(tmp_path / name))
    assert [label for _, label, _ in found.values()] == ["tench", "crane", "crane, hoist"]


# -------------------------------------------------------------------------------------------------------------- speed


def test_no_image_is_asked_about_by_itself(tmp_path, monkeypatch):
    """A folder of 100,000 images is listed; the disk is not asked about each of them."""
    images(tmp_path, *(f"images/{i % 7}/{i}.png" for i in range(50)))
    write(tmp_path / "t.csv", "filepath,title", *(f"{i}.png,x" for i in range(50)))
    asked = []
    for name in ("stat", "lstat"):
        real = getattr(os, name)

        def counting(path, *rest, real=real, **named):
            asked.append(str(path))
            return real(path, *rest, **named)

        monkeypatch.setattr(os, name, counting)
    assert len(read_folder(tmp_path)) == 50
    assert not [path for path in asked if path.endswith(".png")]


def test_ids_without_an_ending_name_images_as_in_kaggles_tables(tmp_path):
    images(tmp_path, "train/0007.png", "train/12.png")
    write(tmp_path / "captions.csv", "id,caption", "0007,a kite", "12,a dog")
    assert {name: text for name, ([text], *_) in read(tmp_path).items()} == {
        "train/0007.png": "a kite",
        "train/12.png": "a dog",
    }


def test_a_file_of_class_names_is_part_of_what_a_run_was_trained_on(tmp_path):
    for folder in ("n01440764", "n02012849"):
        save(tmp_path / "data" / folder / "1.png")
    source = Source(tmp_path / "data", class_names=str(tmp_path / "names.txt"))
    write(tmp_path / "names.txt", "n01440764 tench", "n02012849 crane")
    before = fingerprint(source)
    write(tmp_path / "names.txt", "n01440764 tench", "n02012849 stork")
    assert changes(before, fingerprint(source)) == ["the names of classes: the names or the contents of its 1 files"]


def test_a_table_that_describes_class_folders_says_more_than_they_do(tmp_path):
    images(tmp_path, "cat/1.png", "dog/1.png")
    write(tmp_path / "t.csv", "filepath,caption,label", "cat/1.png,a cat asleep,cat", "dog/1.png,a dog,dog")
    assert read(tmp_path)["cat/1.png"] == (["a cat asleep"], "cat", None)


def test_captions_and_questions_in_files_of_other_names_belong_together(tmp_path):
    images(tmp_path, "a.png")
    write(tmp_path / "captions.csv", "image,caption", "a.png,a kite")
    write(tmp_path / "qa.csv", "image,question,answer", "a.png,what?,a kite")
    (quiz,) = read_entries(tmp_path)
    assert isinstance(quiz, Quiz) and list(quiz.captions) == ["a kite"]
