"""What a folder looks like that is of no form that is read here, and what to do with it."""

from __future__ import annotations

import os
from collections import Counter

from minivlm.datasets.class_folders import list_folder
from minivlm.datasets.source import Source

CSV = "a captions.csv with the columns filepath,title"
HINTS = {  # endings → what they are, and what to do
    (
        ".parquet",
    ): "parquet is not read: write its columns to a CSV (pandas: to_csv) beside the images, or download the "
    "images with img2dataset, as its files or as tar shards",
    (
        ".arrow",
    ): "a dataset of the `datasets` package is not read from disk: write it as an imagefolder, metadata.csv with "
    "file_name and text beside the images",
    (".zip", ".tgz", ".gz", ".7z", ".rar", ".bz2", ".xz"): "an archive is not read: unpack it here",
    (".xlsx", ".xls", ".ods"): "a spreadsheet is not read: save it as 'CSV UTF-8'",
    (".xml",): f"the boxes of an XML file are no captions: write {CSV}",
    (
        ".tfrecord",
        ".lmdb",
        ".mdb",
        ".h5",
        ".hdf5",
        ".npz",
        ".npy",
        ".pkl",
        ".pt",
        ".mat",
    ): f"arrays are not read: write the images as files, and {CSV}",
    (".mp4", ".avi", ".mov", ".mkv", ".webm"): f"videos are not read: write some of their images as files, and {CSV}",
}


def unknown(source: Source) -> str:
    """A sentence on what was looked for, and one on what is there."""
    directory = source.path
    return (
        f"{directory} is no dataset that is recognised: looked for world.json (the shapes world), conversations.json, "
        "vqa.jsonl, questions.jsonl, a table (CSV, TSV, JSON) of images and captions, COCO's, Karpathy's, LLaVA's and VQA's "
        "JSON under any name, a .txt or .json beside each image, captions.jsonl, and images in sub-folders, one a class "
        f"({directory.name}/cat/1.jpg or {directory.name}/train/cat/1.jpg).{seen(directory)}"
    )


def seen(directory: os.PathLike) -> str:
    found = list_folder(directory)
    counts = Counter(os.path.splitext(name)[1].lower() for name in found.others)
    first = {os.path.splitext(name)[1].lower(): name for name in reversed(found.others)}
    for endings, hint in HINTS.items():
        if there := [ending for ending in endings if counts[ending]]:
            return f" It holds {first[there[0]]}: {hint}."
    if n := len(found.images):
        one = "one image" if n == 1 else f"{n} images"
        return f" It holds {one}, but nothing that says what they show: write {CSV}, or a .txt beside each."
    return " It is empty." if not found.others else ""
