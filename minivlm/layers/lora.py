"""LoRA: a weight W that stays as it is, and beside it a product of two thin matrices that learns.

    x ─┬─→ W (frozen) ──────────────────────────────┬─ + ─→ y          W (O, I)   A (R, I)   B (O, R)
       └─→ dropout ─→ A ─→ · alpha/rank ─→ B ───────┘

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", §4.1. B starts at zero, so that a model with new
adapters is the model without them, to the bit; once trained, both become one weight again (`merge_lora`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minivlm.layers.autocast import meet


@dataclass(frozen=True)
class LoRAConfig:
    rank: int = 8
    alpha: float = 16.0  # the update counts alpha / rank times, so that another rank needs no other learning rate
    dropout: float = 0.0  # on what A reads
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")  # names of the linear layers that get one

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"the rank of LoRA is {self.rank}, but must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"the dropout of LoRA is {self.dropout}, but must be at least 0 and less than 1")


@dataclass(frozen=True)
class LoRAParts(LoRAConfig):
    parts: tuple[str, ...] = ()  # of a model, by dotted names ("language_model", "vision.transformer.blocks.0-5")


class LoRALinear(nn.Module):
    """base(x) + alpha/rank · B A x.  x (…, I) → (…, O).  Only A and B learn.

    It can stand where an nn.Linear stood: `weight` and `bias` are those of the layer that it would merge into.
    On a base in half precision A and B are in fp32, as all that learns (see `minivlm.precision`).
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig, *, generator: torch.Generator | None = None):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale = config.alpha / config.rank
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(config.dropout)
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        like = {"bias": False, "device": base.weight.device, "dtype": wide}
        self.lora_a = nn.utils.skip_init(nn.Linear, base.in_features, config.rank, **like)
        self.lora_b = nn.utils.skip_init(nn.Linear, config.rank, base.out_features, **like)
        nn.init.zeros_(self.lora_b.weight)
        if not base.weight.is_meta:  # drawn on the CPU: the same adapter on every device
            a = torch.empty(config.rank, base.in_features, device="cpu")
            self.lora_a.weight.data.copy_(nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.lora_b(self.scale * self.lora_a(meet(self.dropout(x), self.lora_a))).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """(O, I): W + alpha/rank · B A, computed anew each time it is asked for."""
        wide, thin = self.base.weight, (self.lora_b.weight, self.lora_a.weight)
        return torch.addmm(wide.to(thin[0].dtype), *thin, alpha=self.scale).to(wide.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


def add_lora(model: nn.Module, config: LoRAConfig, *, generator: torch.Generator | None = None) -> int:
    """Put a LoRALinear in the place of every nn.Linear of `model` that goes by one of config.targets; how many those are.

    Everything else in `model` is frozen. With `LoRAParts`, only layers within its parts get one, and what is frozen are the
    children of the model that these parts belong to. Raises ValueError for a part without layers that go by these names, and
    for one that shares its weight (a head tied to the embedding): the update would reach one of the two alone.
    """
    parts, chosen = getattr(config, "parts", ()), {}
    for part in parts or ("",):
        layers = linears_within(model, part)
        found = {name: m for name, m in layers.items() if name.rpartition(".")[2] in config.targets or name == part}
        if not found:
            names = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ValueError(
                f"{f'in {part} ' if part else ''}no linear layer is called {' or '.join(config.targets)}; "
                f"{f'there are {names}' if names else 'there is none at all'}"
            )
        chosen |= found
    tied = shared_weights(model, chosen)
    if parts and len(tied) < len(chosen):  # what an encoder and a decoder share stays as it is
        chosen, tied = {name: layer for name, layer in chosen.items() if name not in tied}, []
    if tied:
        raise ValueError(f"{', '.join(tied)} cannot have LoRA: the weight is another module's as well")
    for root in {part.partition(".")[0] for part in parts or ("",)}:
        model.get_submodule(root).requires_grad_(False)
    for name, layer in chosen.items():
        model.set_submodule(name, LoRALinear(layer, config, generator=generator))
    for parameter in lora_parameters(model):  # of earlier calls as well
        parameter.requires_grad_(True)
    return len(chosen)


def linears_within(model: nn.Module, part: str) -> dict[str, nn.Linear]:
    """By their names in `model`."""
    inside = model.get_submodule(part).named_modules(prefix=part)
    return {name: module for name, module in inside if isinstance(module, nn.Linear)}


def shared_weights(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the named layers whose weight is also in another place of `model`."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    layers = {name: model.get_submodule(name) for name in names}
    return [name for name, layer in layers.items() if uses[id(getattr(layer, "base", layer).weight)] > 1]


@torch.no_grad()
def merge_lora(model: nn.Module) -> int:
    """Every LoRALinear becomes the nn.Linear it was, with the update in its weight; how many. They stay frozen."""
    layers = lora_layers(model)
    for name, layer in layers.items():
        layer.base.weight.copy_(layer.weight)
        model.set_submodule(name, layer.base)
    return len(layers)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """By their names in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every LoRALinear in `model`: all that an optimiser needs."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_a.weight, layer.lora_b.weight)]
