"""Images that are trained on and judged by are told, by the check and before training."""

import json
import shutil

import numpy as np
from PIL import Image

from minivlm.datasets import duplicates
from minivlm.datasets.contents import leaks


def folder_of(path, n=12):
    """Images of one size in bytes, of which the last two are held out."""
    path.mkdir()
    split = lambda i: {n - 2: "val", n - 1: "test"}.get(i, "train")
    for i in range(n):
        Image.fromarray(np.full((4, 4, 3), i, dtype=np.uint8)).save(path / f"{i}.bmp")
    rows = [{"image": f"{i}.bmp", "caption": f"thing {i}", "split": split(i)} for i in range(n)]
    (path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_the_first_pair_of_identical_images_is_named_and_all_are_counted(tmp_path):
    folder = folder_of(tmp_path / "data")
    assert leaks(folder) == []
    shutil.copy(folder / "3.bmp", folder / "11.bmp")
    (folder / "captions.jsonl").touch()
    assert leaks(folder) == [
        "1 of the 1 test images are training images as well, byte by byte: 11.bmp is 3.bmp, for example."
    ]


def test_only_files_of_one_size_are_read_and_no_more_than_allowed(tmp_path, monkeypatch):
    folder, read = folder_of(tmp_path / "data"), []
    real = duplicates.open_anywhere
    monkeypatch.setattr(duplicates, "open_anywhere", lambda path: (read.append(path.name), real(path))[1])
    splits = {"train": [f"{i}.bmp" for i in range(10)], "test": ["11.bmp"]}
    Image.new("RGB", (5, 5)).save(folder / "2.bmp")
    duplicates.shared_images(folder, splits)
    assert len(read) == 10 and "2.bmp" not in read
    read.clear()
    duplicates.shared_images(folder, splits, most=4)
    assert read == ["0.bmp", "1.bmp", "11.bmp"]
    read.clear()
    Image.new("RGB", (9, 9)).save(folder / "11.bmp")
    duplicates.shared_images(folder, splits)
    assert read == []


def test_images_that_stand_in_are_no_news(tmp_path):
    folder = folder_of(tmp_path / "data")
    rows = [{"image": f"{i}.bmp", "caption": "x", "split": "train" if i else "val"} for i in range(12)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert leaks(folder) == []
