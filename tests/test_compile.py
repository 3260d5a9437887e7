"""--compile: in every recipe few graphs serve batches of any length, none is broken, and losses and gradients stay the same."""

import logging

import pytest
import torch
import torch._dynamo as dynamo

from minivlm import training
from minivlm.recipes import RECIPES
from minivlm.testing import assert_same
from tests.small_recipes import small_job, small_world

# The first length makes a graph, the second one another that serves all further ones; a text model has such a pair for each
# role that it plays. Convolutions have one a stage.
GRAPHS = {
    "clip": 2,
    "clip-resnet": 6,
    "align": 6,
    "lm": 3,
    "t5": 4,
    "llava-stage1": 2,
    "llava": 2,
    "vlm-stage1": 2,
    "vlm": 2,
    "blip": 8,
    "blip2-stage1": 6,
    "blip2": 3,
    "flamingo": 4,
    "visualbert": 2,
    "uniter": 2,
    "vilbert": 2,
    "vqa": 4,
    "multitask": 3,
    "captioner": 3,
    "coca": 4,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("small"))


def gradients(model, batch):
    """Losses and gradients, by name."""
    model.zero_grad()
    torch.manual_seed(0)
    losses = model.losses(**batch)
    sum(losses.values()).backward()
    return losses | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def no_trace(monkeypatch):
    """What the compiler tells of itself is written only if there is a reader, and pytest is one: half the time."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)


def test_all_recipes_are_held():
    assert {*GRAPHS, "blip-noisy", "blip-capfilt"} == {*RECIPES}  # these two learn as blip does, but for its questions


@pytest.mark.parametrize("name", GRAPHS)
def test_few_graphs_and_no_break_whatever_the_lengths(directory, name):
    work = small_job(name, directory)
    model, batches = work.model, [work.batch(step) for step in (0, 1, 3)]  # where there are questions, 3 is of captions
    assert len({batch["tokens"].shape[1] for batch in batches}) > 1
    plain = [gradients(model, batch) for batch in batches]
    dynamo.reset()
    dynamo.utils.counters.clear()
    training.compile_parts(model, backend="eager")
    for batch, expected in zip(batches, plain, strict=True):
        compiled = gradients(model, batch)
        assert compiled.keys() == expected.keys()
        for key, value in compiled.items():
            assert_same(value, expected[key], key)
    counters = dynamo.utils.counters
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= GRAPHS[name]
