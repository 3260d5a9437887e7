from copy import deepcopy

import pytest
import torch
from torch import nn

from minivlm.empty_model import empty_model
from minivlm.layers import LanguageModel, LanguageModelConfig
from minivlm.layers.lora import LoRAConfig, LoRALinear, add_lora, lora_layers, lora_parameters, merge_lora
from minivlm.testing import (
    assert_gradient_does_not_reach,
    assert_gradient_reaches,
    assert_same,
    assert_same_gradients,
)

CONFIG = LanguageModelConfig(width=16, depth=2, heads=2, kv_heads=1, vocab_size=30, context=12)
TOKENS = torch.arange(18).view(2, 9)


def trained(model: nn.Module) -> nn.Module:
    """As after some steps: B is not zero any more."""
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_b.weight)
    return model


def test_the_sum_is_what_the_paper_says():
    base = nn.Linear(6, 5)
    layer = trained(nn.Sequential(LoRALinear(base, LoRAConfig(rank=2, alpha=3))))[0]
    x = torch.randn(2, 4, 6)
    a, b = layer.lora_a.weight, layer.lora_b.weight
    expected = lambda x: x @ base.weight.T + base.bias + 3 / 2 * (x @ a.T) @ b.T
    assert_same_gradients(layer, expected, [x], [a, b])
    assert_same(x @ layer.weight.T + layer.bias, expected(x))
    assert (layer.in_features, layer.out_features) == (6, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_new_adapters_change_nothing_to_the_bit(dtype):
    model = LanguageModel(CONFIG).to(dtype)
    before = model(TOKENS).logits
    assert add_lora(model, LoRAConfig(dropout=0.3)) == 8
    assert_same(model(TOKENS).logits, before, tolerance=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merged_equals_unmerged(dtype):
    model = LanguageModel(CONFIG).to(dtype).eval()
    base, names = model(TOKENS).logits, list(model.state_dict())
    add_lora(model, LoRAConfig(rank=3, targets=("q_proj", "out_proj", "up_proj")))
    with torch.no_grad():
        for p in lora_parameters(model):
            p.normal_(std=0.3)
    unmerged = model(TOKENS).logits
    assert (unmerged - base).abs().max() > 0.1
    assert merge_lora(model) == 6 and list(model.state_dict()) == names
    assert all(type(m) is not LoRALinear for m in model.modules()) and lora_parameters(model) == []
    assert_same(model(TOKENS).logits, unmerged)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_and_b_learn_and_nothing_else():
    model = LanguageModel(CONFIG)
    add_lora(model, LoRAConfig())
    loss = model(TOKENS, labels=TOKENS).loss
    layers = lora_layers(model)
    assert_gradient_reaches(loss, [layer.lora_b.weight for layer in layers.values()])
    assert_gradient_does_not_reach(loss, [layer.lora_a.weight for layer in layers.values()])  # B is still zero
    trained(model)
    assert_gradient_reaches(model(TOKENS, labels=TOKENS).loss, lora_parameters(model))
    asks = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(asks) == len(lora_parameters(model)) == 16
    assert asks == {f"{name}.lora_{part}.weight" for name in layers for part in "ab"}


def test_a_step_moves_the_adapters_alone():
    model = LanguageModel(CONFIG)
    add_lora(model, LoRAConfig())
    before = deepcopy(model.state_dict())
    optimiser = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        model.losses(TOKENS, TOKENS)["next token"].backward()
        optimiser.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{name}.lora_{part}.weight" for name in lora_layers(model) for part in "ab"}


def test_names_in_the_state():
    model = LanguageModel(CONFIG)
    add_lora(model, LoRAConfig(targets=("k_proj",)))
    names = [n.rpartition("blocks.1.attention.")[2] for n in model.state_dict() if "blocks.1.attention.k_proj" in n]
    assert names == ["k_proj.base.weight", "k_proj.base.bias", "k_proj.lora_a.weight", "k_proj.lora_b.weight"]


def test_where_a_starts():
    """Kaiming-uniform with a = √5, as linear layers do: within 1/√inputs, and the same for the same seed."""
    models = [LanguageModel(CONFIG) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        add_lora(model, LoRAConfig(rank=64), generator=torch.Generator().manual_seed(seed))
    same, again, other = (torch.stack([lora_parameters(m)[i] for i in (0, 2)]) for m in models)
    assert_same(same, again, tolerance=0.0)
    assert not torch.equal(same, other) and not torch.equal(same[0], same[1])
    assert 0.24 < same.abs().max() <= 0.25
    assert_same(same.std(), torch.tensor(0.25 / 3**0.5), tolerance=0.05)


def test_the_global_random_numbers_are_left_alone():
    model = LanguageModel(CONFIG)
    state = torch.get_rng_state()
    add_lora(model, LoRAConfig(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_on_the_input_of_a_alone():
    base = nn.Linear(6, 6)
    layer = trained(nn.Sequential(LoRALinear(base, LoRAConfig(rank=2, dropout=0.5))))[0].train()
    x = torch.zeros(1000, 6)
    x[:, 2] = 3.0  # an input of one feature: it is dropped, or counts twice
    update, full = layer(x) - base(x), 2 * (x @ (layer.weight - base.weight).T)
    dropped = update[:, 0].abs() < 1e-5
    assert 400 < dropped.sum() < 600
    assert_same(update, full.masked_fill(dropped[:, None], 0.0))


def test_a_model_in_eval_mode_stays_there():
    model = LanguageModel(CONFIG).eval()
    add_lora(model, LoRAConfig(dropout=0.5))
    assert not any(m.training for m in model.modules())


def test_adapters_are_added_to_those_that_are_there():
    model = LanguageModel(CONFIG)
    add_lora(model, LoRAConfig(targets=("q_proj",)))
    first = lora_parameters(model)
    add_lora(model, LoRAConfig(targets=("down_proj",)))
    assert len(lora_parameters(model)) == 8 and all(p.requires_grad for p in lora_parameters(model))
    assert {id(p) for p in first} <= {id(p) for p in lora_parameters(model)}


def test_a_head_of_its_own_can_learn_too():
    model = LanguageModel(LanguageModelConfig(width=16, depth=1, heads=2, vocab_size=30, context=12, tie_head=False))
    add_lora(model, LoRAConfig(targets=("head",)))
    trained(model)
    assert_gradient_reaches(model.losses(TOKENS, TOKENS)["next token"], lora_parameters(model))


def test_on_the_meta_device():
    class Adapted(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.model = LanguageModel(config)
            add_lora(self.model, LoRAConfig(), generator=torch.Generator().manual_seed(0))

    model = empty_model(Adapted, CONFIG)
    assert all(p.is_meta for p in model.parameters()) and len(lora_parameters(model)) == 16


def test_a_name_that_no_layer_has():
    model = LanguageModel(CONFIG)
    with pytest.raises(ValueError, match=r"no linear layer is called o_proj; there are down_proj, .*, q_proj, up_proj"):
        add_lora(model, LoRAConfig(targets=("o_proj",)))
    assert all(p.requires_grad for p in model.parameters())


def test_a_weight_that_two_modules_share():
    with pytest.raises(ValueError, match="head cannot have LoRA: the weight is another module's as well"):
        add_lora(LanguageModel(CONFIG), LoRAConfig(targets=("q_proj", "head")))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_numbers_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} of LoRA is"):
        LoRAConfig(**wrong)
