"""Your own module in a model of ours: a vision tower or a text encoder, ready, in place of the one that a config describes.

    model = LLaVA(config, vision=MyTower())               # config.vision: None, or any of the same image_size
    model.save_pretrained("out/mine")                     # its weights; config.json has its import name and its sizes
    LLaVA.from_pretrained("out/mine", vision=MyTower())   # the weights are put into the module that is given

What it must have, since that is all that is called:

    vision   features(images (M, 3, S, S), layer=…) → (M, N, C), all tokens or cells after a layer, counted as in Python
             image_size: S, pixels a side; leading: how many of the N stand before the grid, such as a class token (default 0)
             in CLIP a call, tower(images) → (M, E), in place of features
    text     encoder(tokens (B, T), mask (B, T)) → (B, T, D), as a tensor or as .last_hidden_state; in CLIP → (B, D)
    language a `LanguageModel`, which generates with a cache; no other does

Sizes are measured on an image of zeros, or a text of one token, when the model is built; the module is used as it is, neither
copied nor initialised. Nothing that is loaded imports it: a name in a file runs no code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from minivlm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OwnTower:
    """Stands in a config for a vision tower that was brought."""

    module: str  # its import name, "package.towers:MyTower"
    image_size: int
    layers: tuple[int, ...] = ()  # those that the model uses …
    counts: tuple[int, ...] = ()  # … their N, without what stands before the grid, and their C
    widths: tuple[int, ...] = ()
    output_width: int | None = None  # of the vector that CLIP uses

    def __post_init__(self):
        if not len(self.layers) == len(self.counts) == len(self.widths):
            raise ValueError("layers, counts and widths of a vision tower are not equally many")

    def features_at(self, layer: int) -> tuple[int, int]:
        if layer not in self.layers:
            raise ValueError(f"layer {layer} of {self.module} was not measured, but {self.layers}")
        i = self.layers.index(layer)
        return self.counts[i], self.widths[i]


@dataclass(frozen=True, kw_only=True)
class OwnText:
    """Stands in a config for a text encoder that was brought."""

    module: str
    width: int


class StandIn(nn.Module):
    """Takes the place of a module that was not brought where only names and shapes are asked for."""

    def __init__(self, config: OwnTower | OwnText):
        super().__init__()
        self.config, self.output_width = config, getattr(config, "output_width", None)


# ---- two lines of a model that takes them ----------------------------------------------------------------------------


def describe(config: Any, **modules: nn.Module | None) -> Any:
    """The config with what stands for these modules, by the names of their fields. UserError for a module that lacks what it
    must have, and for a config that needs one that is not given."""
    if "encoder" in {field.name for field in fields(config)}:
        return replace(config, encoder=describe(config.encoder, **modules))
    required = {field.name for field in fields(config) if field.default is MISSING}
    if any(module is None is getattr(config, name) and name in required for name, module in modules.items()):
        raise UserError(
            "the config describes neither this part nor was a module given for it, such as vision=my_tower."
        )
    if torch.empty(0).device.type == "meta":  # a skeleton: `fit` has measured them
        return config
    found = {}
    for name, module in modules.items():
        there = getattr(config, name)
        if module is not None:
            found[name] = measure(name, module, config)
        elif isinstance(there, (OwnTower, OwnText)):
            raise UserError(f"{name} of this {type(config).__name__} is {there.module}: give the module, as {name}=….")
    return replace(config, **found) if found else config


def either(module: nn.Module | None, make: Callable[..., nn.Module], config: Any, *args, **options) -> nn.Module:
    """The module that was brought, or what make(config, …) builds."""
    if module is not None:
        return module
    if isinstance(config, (OwnTower, OwnText)):
        return StandIn(config)
    return make(config, *args, **options)


def text_states(encoder: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The output of a text encoder, as a tensor. One of your own is given a mask in any case."""
    if mask is None and not is_ours(encoder):
        mask = torch.ones_like(tokens, dtype=torch.bool)
    output = encoder(tokens, mask)
    if torch.is_tensor(output):
        return output
    return output.hidden if hasattr(output, "hidden") else output.last_hidden_state


def is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("minivlm.layers.")


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(name: str, module: nn.Module, config: Any) -> Any:
    """The config of a module; a module of ours has its own."""
    if is_ours(module):
        hint = get_type_hints(type(config))[name]
        kinds = [kind for kind in get_args(hint) or (hint,) if is_dataclass(kind)]
        if type(own := getattr(module, "config", None)) in kinds:
            return own
        takes = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"a {type(module).__name__} cannot be the {name} of a model that takes {takes} for it.")
    if name == "language":
        raise UserError(
            f"this {type(module).__name__} is no LanguageModel of minivlm, which generates from embeddings and with a cache: "
            "describe one in the config, as language=LanguageModelConfig(…), or give one that was loaded."
        )
    layers = (config.vision_layer,) if hasattr(config, "vision_layer") else getattr(config, "vision_layers", ())
    if name == "text":
        return OwnText(module=import_name(module), width=text_width(module, vector=not layers))
    size = getattr(module, "image_size", getattr(config.vision, "image_size", None))
    return tower_config(module, size, layers)


def tower_config(module: nn.Module, image_size: int | None, layers: tuple[int, ...]) -> OwnTower:
    """layers: whose features are used; none: its vector is."""
    called = "features(images, layer=…) → (M, N, C)" if layers else "a call, tower(images) → (M, E)"
    needs = f"a vision tower has {called}, and image_size, pixels a side (see minivlm/models/own_modules.py)"
    kind = type(module).__name__
    if layers and not callable(getattr(module, "features", None)):
        raise UserError(f"this {kind} is no vision tower, as it has no features: {needs}.")
    if not isinstance(image_size, int):
        raise UserError(f"this {kind} does not name its image_size: {needs}.")
    with measuring(module, needs) as like:
        image = torch.zeros(1, 3, image_size, image_size, device=like.device, dtype=like.dtype)
        states = [check(module.features(image, layer=layer), 3, kind, needs) for layer in layers]
        vector = None if layers else check(module(image), 2, kind, needs)
    leading = getattr(module, "leading", 0)
    return OwnTower(
        module=import_name(module),
        image_size=image_size,
        layers=tuple(layers),
        counts=tuple(x.shape[1] - leading for x in states),
        widths=tuple(x.shape[2] for x in states),
        output_width=None if vector is None else vector.shape[1],
    )


def text_width(module: nn.Module, *, vector: bool) -> int:
    gives = "(B, D)" if vector else "(B, T, D)"
    needs = (
        f"a text encoder has a call, encoder(tokens (B, T), mask (B, T)) → {gives} (see minivlm/models/own_modules.py)"
    )
    with measuring(module, needs) as like:
        states = text_states(module, torch.zeros(1, 1, dtype=torch.long, device=like.device), None)
    return check(states, 2 if vector else 3, type(module).__name__, needs).shape[-1]


def check(x: Any, dims: int, kind: str, needs: str) -> Tensor:
    """UserError for what is no tensor of so many axes, of one sample."""
    if not torch.is_tensor(x) or x.dim() != dims or len(x) != 1:
        shape = tuple(x.shape) if torch.is_tensor(x) else f"a {type(x).__name__}"
        raise UserError(f"this {kind} gave {shape} for one sample, but {needs}.")
    return x


@contextmanager
def measuring(module: nn.Module, needs: str) -> Iterator[Tensor]:
    """In eval mode and without gradients; gives a tensor whose device and precision the input must have."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"this {type(module).__name__} could not be called ({why}): {needs}.") from error
    finally:
        for part, mode in modes.items():
            part.training = mode


def import_name(module: nn.Module) -> str:
    return f"{type(module).__module__}:{type(module).__qualname__}"


# ---- a directory -----------------------------------------------------------------------------------------------------


def brought(config: Any) -> dict[str, OwnTower | OwnText]:
    """The configs of modules that were brought, by the names that they are given by."""
    found = {}
    for field in fields(config) if is_dataclass(config) else ():
        value = getattr(config, field.name)
        found |= {field.name: value} if isinstance(value, (OwnTower, OwnText)) else brought(value)
    return found


def fit(config: Any, modules: Mapping[str, nn.Module], where: str) -> Any:
    """The config with the modules that are given in place of those that were saved. UserError for one that is missing, not
    needed, or of other sizes."""
    if not (saved := brought(config)) and not modules:
        return config
    for name, own in saved.items():
        if name not in modules:
            raise UserError(f"{where} was saved with a module of your own, {own.module}: give it, as {name}=….")
    if more := sorted(modules.keys() - saved.keys()):
        raise UserError(f"{where} was not saved with a module of your own as {more[0]}: leave out {more[0]}=….")
    try:
        now = describe(config, **modules)
    except ValueError as error:  # fields that do not fit the module
        raise UserError(f"{where}: {error}.") from None
    for name, own in brought(now).items():
        if replace(own, module=saved[name].module) != saved[name]:
            raise UserError(f"{where} was saved with {shown(saved[name])}, but {shown(own)} is given as {name}.")
    return now


def shown(own: OwnTower | OwnText) -> str:
    sizes = ", ".join(f"{f.name} {getattr(own, f.name)}" for f in fields(own) if f.name != "module")
    return f"{own.module} ({sizes})"
