"""Features of a frozen vision tower that are computed once, alone and by two processes which share them.

The processes are this file, run twice (see the end).
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minivlm import processes
from minivlm.errors import UserError
from minivlm.recipes import plan, vision_cache
from minivlm.recipes.options import Options
from minivlm.recipes.vision_cache import ROOM, Room, VisionCache
from minivlm.sizes import bytes_in, in_words
from tests.test_train_processes import two

N, CPU = 1100, torch.device("cpu")  # images: five batches, the last of them smaller


class Tower(nn.Module):
    """images (B, 3, 4, 4) → (B, 2, 24); it counts the images that it has seen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vision, self.seen = nn.Linear(24, 24).requires_grad_(False), 0

    def image_features(self, images):
        self.seen += len(images)
        return self.vision(images.flatten(1).unflatten(1, (2, 24)))


def make_cache(n: int = N) -> VisionCache:
    read = lambda indices: [torch.full((3, 4, 4), float(i)) for i in indices]
    return VisionCache(Tower(), SimpleNamespace(images=torch.stack, image_size=4), n, read)


def prepared(room: Room = ROOM, dtype: torch.dtype = torch.float32) -> VisionCache:
    cache = make_cache()
    cache.prepare(CPU, dtype, room)
    return cache


def test_features_are_kept_and_their_size_is_told():
    said = []
    cache = prepared(Room(say=said.append))
    assert cache.model.seen == N + 1 and cache([3, 1])["images"].tensor.shape == (2, 2, 24)
    assert said == [
        "the features of 1,100 images take 206.2 KB, and are kept in memory: the frozen vision tower runs once an image."
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_memory_should_hold_is_kept_in_a_file_that_leaves_nothing(tmp_path, monkeypatch, dtype):
    kept = prepared(dtype=dtype)
    monkeypatch.setattr(vision_cache, "LIMIT", 1000)
    said = []
    mapped = prepared(Room(limit=10**6, directory=tmp_path, say=said.append), dtype)
    assert torch.equal(mapped.features.tensor, kept.features.tensor) and mapped.features.tensor.dtype == dtype
    assert "one file" in said[0] and not [*tmp_path.iterdir()]


def test_more_than_was_allowed_is_told_and_computed_anew():
    said = []
    cache = prepared(Room(limit=bytes_in("100KB"), say=said.append))
    assert cache.features is None and cache.model.seen == 1
    assert "take 206.2 KB, more than --feature_cache 100.0KB lets it keep" in said[0]
    cache = prepared(Room(limit=bytes_in("off")))
    assert cache.features is None and cache.model.seen == 0


def test_a_full_disk_is_told_in_a_sentence_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(vision_cache, "LIMIT", 1000)
    monkeypatch.setattr(vision_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**16))
    cache = make_cache()
    with pytest.raises(UserError, match=r"has 64.0 KB left. Free some, .* --feature_cache off"):
        cache.prepare(CPU, torch.float32, Room(directory=tmp_path))
    assert cache.model.seen == 1 and not [*tmp_path.iterdir()]


def test_two_processes_share_the_work_and_the_features(tmp_path):
    expected = prepared().features.tensor
    for returncode, _, errors in two("share", tmp_path, script=__file__):
        assert returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["features"], expected) and torch.equal(second["features"], expected)
    assert (first["seen"], second["seen"]) == (1 + 600, 1 + 500)  # and one each, which tells the size
    assert first["said"] and first["left"] == second["left"] == []
    assert first["each"] == second["each"] == [i * i for i in range(7)] and (first["calls"], second["calls"]) == (4, 3)
    assert first["alone"] == list(range(3)) and torch.equal(second["tensors"], torch.arange(3.0))
    assert first["inner"] == second["inner"] == [[0, 10], [1, 11], [2, 12]]


def test_a_size_is_read_as_people_write_it():
    sizes = {
        "20GB": 20 * 2**30,
        "1.5 gb": 3 * 2**29,
        "500MB": 500 * 2**20,
        "2T": 2**41,
        "0": 0,
        "off": 0,
        "4GiB": 2**32,
    }
    assert {text: bytes_in(text) for text in sizes} == sizes
    assert [in_words(n) for n in (3.1 * 2**30, 12.4 * 2**20, 2**17)] == ["3.1 GB", "12 MB", "128.0 KB"]
    with pytest.raises(UserError, match="--feature_cache much: feature_cache is 'much', which is no size: write it as"):
        plan.command_line(["clip", "--feature_cache", "much"])
    assert "--feature_cache 20GB" in Options(feature_cache="20GB").resume_command("vqa")


# ---- the two processes -----------------------------------------------------------------------------------------------


def share(out: str) -> None:
    rank, _ = processes.start_processes(CPU)
    said, calls = [], []
    cache = prepared(Room(directory=Path(out), say=said.append))
    with processes.together():
        squares = processes.each(lambda i: calls.append(i) or i * i, range(7))
        inner = processes.each(
            lambda i: processes.each(lambda j: i + j, [0, 10]), range(3)
        )  # which is not shared again
        tensors = torch.stack(processes.each(lambda i: torch.tensor(float(i)), range(3)))
    alone = processes.each(lambda i: i, range(3)) if rank == 0 else []  # the other is not waited for
    found = {"features": cache.features.tensor.clone(), "seen": cache.model.seen, "said": said, "each": squares}
    found |= {"left": os.listdir(out), "calls": len(calls), "alone": alone, "tensors": tensors, "inner": inner}
    processes.meet()
    torch.save(found, f"{out}/{rank}.pt")
    processes.stop_processes()


if __name__ == "__main__":
    {"share": share}[sys.argv[1]](*sys.argv[2:])
