"""Folders that are refused, each with one sentence that says what is wrong and what to do: the second table of docs/data.md."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from minivlm.datasets.folder_entries import read_entries
from minivlm.datasets.source import Source
from minivlm.errors import UserError

CSV = "filepath,title\na.png,a kite\n"
COCO = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "a kite"}]}
BOXES = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}
ASKED = {"questions": [{"question_id": 1, "image_id": 1, "question": "what?"}]}
A, B = {"a.png": None}, {"a.png": None, "b.png": None}  # None: an image

REFUSED = {  # what it is → its files, the options, what is said
    "images and no word": (B, {}, r"It holds 2 images, but nothing that says what they show: write a captions\.csv"),
    "an empty folder": ({}, {}, r"no dataset that is recognised: .*It is empty\."),
    "a CSV without captions": (
        A | {"t.csv": "filepath,width\na.png,3\n"},
        {},
        r"t\.csv: it has the columns filepath, width, and none is known to hold a caption: choose it with --data\.caption_key",
    ),
    "a CSV without images": (
        A | {"t.csv": "datei,title\na.png,a kite\n"},
        {},
        r"has the columns datei, title, and none is known to name the image: choose it with --data\.image_key",
    ),
    "a CSV with two captions": (
        A | {"t.csv": "filepath,title,text\na.png,x,y\n"},
        {},
        r"several of its columns may hold the caption, title, text: choose with --data\.caption_key title, or with all",
    ),
    "a key that is not there": (
        A | {"t.csv": CSV},
        {"caption_key": "text"},
        r"no column 'text', as .* there are filepath, ti",
    ),
    "a key for class folders": (
        {"cat/1.png": None, "dog/1.png": None},
        {"caption_key": "text"},
        r"--data\.caption_key text: .* holds no table of images, and so no column to choose: leave it out",
    ),
    "a key for COCO's JSON": (
        A | {"c.json": json.dumps(COCO)},
        {"image_key": "x"},
        r"holds COCO's captions \(c\.json\), and so",
    ),
    "an image that is missing": (
        A | {"t.csv": CSV + "b.png,a dog\n"},
        {},
        r"t\.csv, line 3: there is no image 'b\.png', neither",
    ),
    "a CSV without a header": (
        A | {"t.csv": "a.png,a kite\n"},
        {},
        r"its first line, 'a\.png,a kite', is no line of names: put",
    ),
    "a CSV in Latin-1": (
        A | {"t.csv": "filepath,title\na.png,Röslein\n".encode("latin-1")},
        {},
        r"t\.csv: it is not UTF-8 text \(it may be Latin-1 or Windows-1252, as Excel writes it\): save it as 'CSV UTF-8'",
    ),
    "a comma too many": (
        A | {"t.csv": "filepath,title\na.png,a kite, high up\n"},
        {},
        r"line 2: it has 3 columns, but the first line names 2: a text that holds a ',' stands in \"quotes\"",
    ),
    "an empty caption": (
        A | {"t.csv": "filepath,title\na.png,\n"},
        {},
        r"t\.csv, line 2: it has no caption: its \"title\" is",
    ),
    "two captions files": (
        A | {"t.csv": CSV, "captions.json": json.dumps(COCO)},
        {},
        r"several files with captions, t\.csv, captions\.json: keep one of them",
    ),
    "two tables of one split": (
        A | {"a.csv": CSV, "b.csv": CSV},
        {},
        r"several files with captions, a\.csv, b\.csv: keep one",
    ),
    "a CSV and texts beside the images": (
        A | {"t.csv": CSV, "a.txt": "a toy"},
        {},
        r"has captions in t\.csv and in a text beside each image \(a\.txt\): keep one of the two there",
    ),
    "a CSV of addresses": (
        A | {"t.csv": "url,caption\nhttp://x/1.jpg,a kite\n"},
        {},
        r"t\.csv: its images are addresses of the internet \(in url\): download them, with img2dataset",
    ),
    "COCO's boxes alone": (
        A | {"instances.json": json.dumps(BOXES)},
        {},
        r"holds boxes or key points .*, and no captions",
    ),
    "questions without answers": (
        A | {"q.json": json.dumps(ASKED)},
        {},
        r"q\.json holds questions, but there is no file with",
    ),
    "YOLO's boxes": (
        B | {"a.txt": "0 0.5 0.5 0.1 0.1\n", "b.txt": "1 0.1 0.2 0.3 0.4\n"},
        {},
        r"hold the numbers of boxes, as YOLO",
    ),
    "an empty text beside an image": (B | {"a.txt": "x", "b.txt": ""}, {}, r"b\.txt: its caption is empty"),
    "parquet": (
        A | {"00000.parquet": b"PAR1"},
        {},
        r"It holds 00000\.parquet: parquet is not read: write its columns to a CSV",
    ),
    "an archive": ({"photos.zip": b"PK"}, {}, r"It holds photos\.zip: an archive is not read: unpack it here"),
    "a spreadsheet": (A | {"t.xlsx": b"PK"}, {}, r"a spreadsheet is not read: save it as 'CSV UTF-8'"),
    "years of photographs": (
        {"2023/1.png": None, "2024/1.png": None},
        {},
        r"look like years or days .*--data\.class_names",
    ),
    "numbered parts": ({"00000/1.png": None, "00001/1.png": None}, {}, r"look like the numbered parts of a download"),
    "ImageNet's numbers": (
        {"n01440764/1.png": None, "n01443537/1.png": None},
        {},
        r"look like WordNet's numbers, .*give each a class in .*class_names\.txt .* or in a file of --data\.class_names",
    ),
    "a class without a name": (
        {"n01440764/1.png": None, "n01443537/1.png": None, "names.txt": "n01440764 tench"},
        {"class_names": "names.txt"},
        r"names\.txt does not name the class of the folder 'n01443537'",
    ),
    "class names that are missing": (
        {"cat/1.png": None, "dog/1.png": None},
        {"class_names": "no.txt"},
        r"--data\.class_names no\.txt: there is no such file, neither here",
    ),
    "class names for captions": (
        A | {"t.csv": CSV},
        {"class_names": "t.csv"},
        r"has no classes, but captions: CSV \(t\.csv\)",
    ),
    "labels that are years": (
        A | {"t.csv": "filepath,label\na.png,2023\n"},
        {},
        r"labels .* look like years or days \('2023'\)",
    ),
    "JSON that is cut off": (
        A | {"c.json": '[{"image": "a.png", "caption": "x"}, {"im'},
        {},
        r"c\.json is not JSON|c\.json: it is not",
    ),
    "an image of the internet": (
        A
        | {
            "m.json": '[{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/1.jpg"}}]}]}]'
        },
        {},
        r"entry 1: a turn shows the image 'http://x/1\.jpg', but must name a file of the folder: download it",
    ),
    "placeholders without images": (
        A
        | {
            "m.json": '[{"image": "a.png", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]'
        },
        {},
        r"m\.json, entry 1: the number of <image> placeholders in the conversation is 0, but that of its images is 1",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_is_refused_in_a_sentence(tmp_path, what, monkeypatch):
    files, options, said = REFUSED[what]
    folder = tmp_path / "my photos"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if content is None:
            Image.new("RGB", (4, 4)).save(folder / name)
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as error:
        read_entries(Source(folder, **options))
    assert "\n" not in str(error.value) and str(folder) in str(error.value) and str(error.value).endswith(".")


def test_the_documentation_shows_these_folders():
    table = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    shown = {row.split("|")[1].strip() for row in re.findall(r"^\|[^|]+\|[^|]+\|$", table, flags=re.M)}
    assert shown >= set(REFUSED)
