import importlib

import pytest
import torch

# Tensors are tiny here, so a second thread gains nothing, and on a busy machine threads that spin at each other's barriers
# cost a lot: a test of 1.3 s was seen to take 139 s.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def the_same_random_numbers():
    """Every test starts from one random state, so that none depends on which ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def little_to_judge_by():
    """Runs of a few steps are judged by a few samples of the shapes world."""
    from minivlm.datasets.shapes import conversations, world

    language, few_shot = (importlib.import_module(f"minivlm.evaluate.{name}") for name in ("language", "few_shot"))
    with pytest.MonkeyPatch.context() as patch:
        few = {name: split._replace(n=split.n and min(split.n, 64)) for name, split in world.SPLITS.items()}
        patch.setattr(world, "SPLITS", few)
        patch.setattr(conversations, "QUESTIONS", {"train": 0, "val": 6, "test": 12, "unseen": 6})
        for name, most in (("HELD_OUT", 60), ("EPISODES", 20), ("TOLD", 300), ("QUESTIONS", 40)):
            patch.setattr(language, name, most)
        patch.setattr(few_shot, "EPISODES", 6)
        yield
