"""Tar shards beside the `webdataset` package's own reading, and data sets of the `datasets` package through tar shards."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from minivlm.datasets import open_pairs
from minivlm.datasets.folder_entries import read_folder
from minivlm.datasets.images import read_image
from minivlm.datasets.source import Source


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def test_what_webdataset_writes_is_read_as_webdataset_reads_it(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(str(tmp_path / "shard-%03d.tar"), maxcount=7, verbose=0) as writer:
        for i in range(20):
            about = {"url": f"{i}", "caption": "from the web"}
            writer.write(
                {"__key__": f"a/{i:06d}", "png": picture(i), "txt": f"a kite {i}", "json": about, "cls": i % 3}
            )
    urls = sorted(str(path) for path in tmp_path.glob("*.tar"))
    theirs = list(wds.WebDataset(urls, shardshuffle=False).decode("pil"))
    ours = read_folder(tmp_path)
    assert len(ours) == len(theirs) == 20
    for item, sample in zip(ours, theirs, strict=True):
        assert item.captions == [sample["txt"]]
        assert os.path.splitext(item.image)[0] == f"{os.path.basename(sample['__url__'])}/{sample['__key__']}"
        assert np.array_equal(np.asarray(read_image(tmp_path / item.image)), np.asarray(sample["png"]))


def test_a_data_set_of_the_datasets_package_is_brought_once(tmp_path, monkeypatch):
    pytest.importorskip(
        "datasets.config", exc_type=ImportError
    )  # tests/datasets is a package of that name too, of nothing
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    for split, count in (("train", 12), ("validation", 3)):
        (tmp_path / "set" / split).mkdir(parents=True)
        lines = [{"file_name": f"{i}.jpg", "text": f"a kite {i}"} for i in range(count)]
        (tmp_path / "set" / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for i in range(count):
            picture(i).save(tmp_path / "set" / split / f"{i}.jpg")
    source = Source(f"hf:{tmp_path / 'set'}")
    assert sorted(path.name for path in source.path.glob("*.tar")) == ["train-00000.tar", "val-00000.tar"]
    train, val = (open_pairs(source, split, image_size=16) for split in ("train", "val"))
    assert len(train) == 12 and len(val) == 3
    for i in range(12):
        kite = int(train.all_captions(i)[0].removeprefix("a kite "))
        assert np.array_equal(
            np.asarray(read_image(source / train.key(i))),
            np.asarray(read_image(tmp_path / "set" / "train" / f"{kite}.jpg")),
        )
    monkeypatch.setattr(datasets, "load_dataset", None)  # nothing to call
    assert Source(f"hf:{tmp_path / 'set'}") == source
