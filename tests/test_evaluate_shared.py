"""Validation and evaluation that two processes share: each looks at its part, and the scores are those of one to the bit.

The processes are this file, run twice (see the end).
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from minivlm import processes
from minivlm.tasks import features, generate
from tests.small_recipes import small_job, small_world
from tests.test_train_processes import two

NAMES = ("clip", "llava-stage1", "vqa")  # retrieval, captions, answers


def judged(name: str, directory: Path) -> float:
    return small_job(name, directory).scores.validate(130)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = small_world(tmp_path_factory.mktemp("small"), train=64)
    for name in NAMES:
        small_job(name, place)  # what it builds on is made
    return place


def test_scores_of_two_are_those_of_one_and_each_did_half_of_the_work(directory):
    for returncode, _, errors in two("judge", directory, script=__file__):
        assert returncode == 0, errors
    first, second = (json.loads((directory / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    for name in NAMES:
        assert first["scores"][name] == second["scores"][name] == judged(name, directory), name
    assert abs(first["images"] - second["images"]) < 0.3 * first["images"]


# ---- the two processes -----------------------------------------------------------------------------------------------


def judge(directory: str) -> None:
    rank, _ = processes.start_processes(torch.device("cpu"))
    seen = [0]
    encode, generated = features.encode_pixels, generate.generate_tokens

    def count(pixels, model):
        seen[0] += len(pixels)
        return encode(pixels, model)

    def count_rows(prompts, *rest):
        seen[0] += len(prompts)
        return generated(prompts, *rest)

    features.encode_pixels, generate.generate_tokens = count, count_rows
    with processes.together():
        scores = {name: judged(name, Path(directory)) for name in NAMES}
    Path(directory, f"{rank}.json").write_text(json.dumps({"scores": scores, "images": seen[0]}), encoding="utf-8")
    processes.meet()
    processes.stop_processes()


if __name__ == "__main__":
    {"judge": judge}[sys.argv[1]](*sys.argv[2:])
