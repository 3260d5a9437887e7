"""Models without numbers, which cost no memory, and how they get their tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm import pretrained
from minivlm.errors import UserError
from minivlm.layers.lora import LoRAConfig, add_lora, lora_layers
from minivlm.precision import kept_in_fp32
from minivlm.pretrained.names import tied

DEEP = 100  # layers that are built without checking that the file has so many


def empty_model(cls: type[nn.Module], config: Any, lora: LoRAConfig | None = None, **modules: nn.Module) -> nn.Module:
    """cls(config) on the meta device: all names and shapes, and no memory. lora: of `Model.lora`. modules: those of a user's
    own, as they are."""
    with torch.device("meta"), Unfilled():
        model = cls(config, **modules)
        if lora is not None:
            add_lora(model, lora)
            model.lora = lora
        return model


class Unfilled(torch.overrides.TorchFunctionMode):
    """Inside, new tensors are not given their initial values: they will be overwritten.

    On the meta device they have no values anyway, but the attempt costs a second, in which torch imports what it needs.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "fill_", "zero_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def skeleton(
    directory: Path, described: pretrained.Published, count: Callable[[], int], **modules: nn.Module
) -> nn.Module:
    """The model without its numbers. count: how many tensors there are, to judge a config by that asks for very many layers.

    UserError for a config that no model follows.
    """
    if (depth := pretrained.depth_of(described.config)) > DEEP and depth > (tensors := count()):
        raise UserError(
            f"the config in {directory} asks for {depth} layers, but the file has {tensors} tensors in all."
        )
    try:
        return empty_model(described.model_class, described.config, described.lora, **modules)
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"the config in {directory} describes no model that can be built: {why}.") from None


def fill(model: nn.Module, tensors: Mapping[str, Tensor], *, device: str | torch.device, dtype: torch.dtype) -> None:
    """Put `tensors` where `empty_model` left nothing. Tied parameters stay one, frozen ones frozen."""
    state = model.state_dict(keep_vars=True)
    wide = kept_in_fp32(model) if dtype == torch.float16 else ()
    for names in tied(state):
        old, new = state[names[0]], tensors[names[0]]
        held = torch.float32 if id(old) in wide else dtype
        new = new.to(device=device, dtype=held if new.is_floating_point() else None)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)  # one for all its names; it will learn if the old one did
        state.update(dict.fromkeys(names, new))
    model.load_state_dict(state, assign=True)


def config_describes_lora(model: nn.Module) -> bool:
    """Would the config alone bring back all layers of LoRA, and no others?"""
    shape = lambda model: {n: (layer.lora_a.out_features, layer.scale) for n, layer in lora_layers(model).items()}
    return (
        not (has := shape(model)) or shape(empty_model(type(model), model.config, getattr(model, "lora", None))) == has
    )
