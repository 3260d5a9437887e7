"""--activation_checkpointing: every recipe's losses, gradients and random numbers stay the same, and less memory is held."""

import copy

import pytest
import torch
import torch._dynamo as dynamo

from minivlm import training
from minivlm.activation_checkpointing import checkpoint_activations
from minivlm.errors import UserError
from minivlm.layers import Transformer, TransformerConfig
from minivlm.layers.lora import LoRAConfig, add_lora
from minivlm.recipes import RECIPES, plan
from tests.small_recipes import small_job, small_world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("small"), train=64)


def with_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


def step(model, batch, *, precision=torch.float32, micro_batch=None):
    """Losses, gradients, buffers and the next random number after a step."""
    model.zero_grad()
    torch.manual_seed(0)
    with training.autocast(CPU, precision):
        losses = model.losses(**batch) if micro_batch is None else model.backward_in_parts(batch, micro_batch)
        if micro_batch is None:
            sum(losses.values()).backward()
    found = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {**losses, **found, **buffers, "random": torch.rand(1)}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", sorted({*RECIPES} - {"blip-noisy", "blip-capfilt"}))
def test_every_recipe_learns_the_same_to_the_bit(directory, name):
    work = small_job(name, directory)
    model, batch = with_dropout(work.model), work.batch(0)
    kept = copy.deepcopy(model)
    assert checkpoint_activations(model) > 0
    assert_equal(step(model, batch), step(kept, batch))


@pytest.mark.parametrize("how", [{"precision": torch.bfloat16}, {"micro_batch": 2}])
@pytest.mark.parametrize("name", ["clip", "llava", "blip2-stage1"])
def test_under_autocast_and_in_parts_as_well(directory, name, how):
    work = small_job(name, directory)
    model, batch = with_dropout(work.model), work.batch(0)
    kept = copy.deepcopy(model)
    checkpoint_activations(model)
    assert_equal(step(model, batch, **how), step(kept, batch, **how))


def test_with_lora_and_on_frozen_lower_parts(directory):
    work = small_job("llava", directory)
    model, batch = work.model, work.batch(0)
    add_lora(model.language_model, LoRAConfig(rank=2, dropout=0.1), generator=torch.Generator().manual_seed(0))
    model.freeze("projector")
    kept = copy.deepcopy(model.train())
    checkpoint_activations(model)
    found = step(model, batch)
    assert any("lora_a" in name for name in found) and not any("projector" in name for name in found)
    assert_equal(found, step(kept, batch))


def test_a_deep_copy_runs_its_own_blocks():
    model = Transformer(TransformerConfig(width=8, depth=1, heads=2))
    checkpoint_activations(model)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.zero_()
    x = torch.rand(1, 2, 8)
    assert torch.equal(other(x), x) and not torch.equal(model(x), x)


def test_activations_of_the_blocks_are_not_held():
    model = Transformer(TransformerConfig(width=32, depth=6, heads=2))
    x = torch.rand(4, 16, 32)

    def held() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            model(x)
        return sum(sizes)

    whole = held()
    checkpoint_activations(model)
    assert held() < whole / 10


def test_batch_norm_that_is_trained_is_not_compiled_as_well(directory):
    model = small_job("clip-resnet", directory).model
    with pytest.raises(UserError, match=r"--compile do not go together for batch norm \(.*\) that is trained"):
        checkpoint_activations(model, compiled=True)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="a Linear of these parts has no blocks"):
        checkpoint_activations(torch.nn.Linear(2, 2))


def test_the_command_line_takes_it_and_a_resumed_run_keeps_it():
    _, _, options = plan.command_line(["lm", "--activation_checkpointing"])
    assert options.activation_checkpointing and "--activation_checkpointing" in options.resume_command("lm")


@pytest.mark.parametrize("name", ["lm"])
def test_compiled_it_learns_the_same(directory, name):
    work = small_job(name, directory)
    model, batch = work.model, work.batch(0)
    kept = copy.deepcopy(model)
    dynamo.reset()
    checkpoint_activations(model, compiled=True)
    training.compile_parts(model, backend="aot_eager")
    found, expected = step(model, batch), step(kept, batch)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)
