"""Which parts of a model learn: --freeze, and --lora on parts of any model. A part goes by its dotted name, with ranges:
"vision", "text.blocks.0-5"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from minivlm.adapters import save_adapter
from minivlm.checkpoint import load
from minivlm.empty_model import empty_model
from minivlm.errors import UserError
from minivlm.layers.bert import BERT
from minivlm.layers.language_model import LanguageModel
from minivlm.layers.lora import add_lora, lora_layers, lora_parameters, shared_weights
from minivlm.layers.t5 import T5
from minivlm.origins import has_parameters

NONE = "none"  # the first of --freeze: what the recipe itself freezes learns
WRAPPER = "transformer."  # may be left out of a name: text.blocks.0
READS_TEXT = (  # the first that is there
    ("language_model",),
    ("text",),
    ("bert",),
    ("encoder", "decoder"),
    ("unimodal", "multimodal"),
    ("qformer",),
)
MOST = 10_000  # numbers in a range


def choose_trained(model: nn.Module, recipe: Any, origins: Mapping[str, str]) -> None:
    """Put LoRA where the recipe (a `Recipe`) has some and the model has none yet, and freeze what --freeze names. UserError for
    a name that is none, for LoRA that finds no layer, and where nothing is left to learn."""
    if recipe.freeze[:1] == (NONE,):
        unfreeze(model)
    if recipe.lora is not None:
        adapt(model, recipe, origins)
    for pattern in recipe.freeze:
        for name in names_of(model, pattern, "--freeze") if pattern != NONE else ():
            if isinstance(part := part_at(model, name), nn.Module):
                model.freeze(name)
            else:
                part.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--freeze {','.join(recipe.freeze)} leaves nothing to learn: freeze less.")
    for part, source in recipe.external_weights().items():
        if any(p.requires_grad for p in model.get_submodule(part).parameters()):
            raise UserError(
                f"{part} learns, so it cannot be left out of what is stored as that of {source}: leave out "
                f"--store_frozen false, or freeze {part}."
            )


def unfreeze(model: nn.Module) -> None:
    """What `model.freeze` was called for learns, but for what no such model lets learn."""
    fixed = {
        name for name, p in empty_model(type(model), model.config, model.lora).named_parameters() if not p.requires_grad
    }
    for part in model.frozen:
        for name, parameter in model.get_submodule(part).named_parameters():
            parameter.requires_grad_(f"{part}.{name}" not in fixed)
    model.frozen = ()


# ---- names -----------------------------------------------------------------------------------------------------------


def part_at(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    above, _, last = name.rpartition(".")
    return getattr(model.get_submodule(above), last)


def names_of(model: nn.Module, pattern: str, option: str) -> list[str]:
    """The dotted names of modules and parameters that a pattern names, in the model's order. UserError for what is none."""
    own = [name for name, _ in model.named_modules() if name]
    own += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    known: dict[str, str] = {}
    for name in own:
        known.setdefault(name, name)
        known.setdefault(name.replace(WRAPPER, ""), name)
    found = []
    for name in expand(pattern, option):
        if name not in known:
            told = "" if name == pattern else f" has {name}, which is none"
            raise UserError(
                f"{option} {pattern}{told or ' names no part of the model'}; {there_are(model, name, known)}."
            )
        found.append(known[name])
    return found


def expand(pattern: str, option: str) -> list[str]:
    """ "text.blocks.0-2" → text.blocks.0, text.blocks.1, text.blocks.2"""
    choices = []
    for word in pattern.split("."):
        ends = re.fullmatch(r"(\d{1,9})-(\d{1,9})", word)
        numbers = range(int(ends[1]), int(ends[2]) + 1) if ends else ()
        if ends and not 0 < len(numbers) <= MOST:
            raise UserError(
                f"{option} {pattern}: the range {word} has no beginning before its end, or too many numbers."
            )
        choices.append([str(number) for number in numbers] if ends else [word])
    return [".".join(words) for words in product(*choices)]


def there_are(model: nn.Module, name: str, known: dict[str, str]) -> str:
    """The parts beside the one that a wrong name was meant to be, in words."""
    words = name.split(".")
    while words and (
        known.get(".".join(words)) is None or not isinstance(part_at(model, known[".".join(words)]), nn.Module)
    ):
        words.pop()
    above = known[".".join(words)] if words else ""
    inside = [n for n, child in model.get_submodule(above).named_children() if has_parameters(child)]
    if len(inside) > 1 and all(n.isdecimal() for n in inside):
        inside = [f"{inside[0]} to {inside[-1]}"]
    inside = inside or [n for n, _ in model.get_submodule(above).named_parameters()]
    return f"{f'below {above} there are' if above else 'there are'} {', '.join(inside)}"


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def adapt(model: nn.Module, recipe: Any, origins: Mapping[str, str]) -> None:
    """LoRA on the recipe's parts, or on the part that reads text. Their base no longer learns, nor does what it belongs to."""
    whole = isinstance(model, (LanguageModel, T5, BERT))
    if not lora_layers(model):  # else it is that of a checkpoint
        put_lora(model, recipe, origins, whole=whole)
    if whole:
        model.requires_grad_(False)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)
    adapted = tuple(lora_layers(model))
    model.frozen = tuple(part for part in model.frozen if not any(name.startswith(f"{part}.") for name in adapted))
    roots = tuple({f"{name.partition('.')[0]}." for name in adapted})
    norms = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and (whole or n.startswith(roots))]
    model.freeze(*norms)  # whose statistics stay, as the weights do


def put_lora(model: nn.Module, recipe: Any, origins: Mapping[str, str], *, whole: bool) -> None:
    parts = [name for pattern in recipe.lora.parts for name in names_of(model, pattern, "--lora.parts")]
    if not parts and not whole:
        parts = list(next(filter(None, ([n for n in names if has(model, n)] for names in READS_TEXT))))
    for part in parts or [name for name, _ in model.named_children()][:1]:
        if origins.get(part.partition(".")[0], "new").startswith("new"):
            raise UserError(
                f"--lora: {part} is new, and adapters on it would learn nothing of use: give --starts_from."
            )
    lora = replace(recipe.lora, parts=tuple(dict.fromkeys(parts)))
    try:
        add_lora(model, lora, generator=torch.Generator().manual_seed(recipe.seed))
    except ValueError as error:
        raise UserError(f"--lora: {error}.") from None
    model.lora = lora


def has(model: nn.Module, name: str) -> bool:
    return isinstance(getattr(model, name, None), nn.Module)


def told_of_lora(model: nn.Module) -> list[str]:
    layers = lora_layers(model)
    on = f" of {', '.join(model.lora.parts)}" if model.lora is not None and model.lora.parts else ""
    return (
        [f"LoRA is on {len(layers)} linear layers{on}; their weights, and what is around them, stay"] if layers else []
    )


def leave_adapter(out: Path, model: nn.Module, recipe: Any) -> str:
    """Adapters are left twice: as part of the weights, and alone, in out/adapter, for the base that they belong to, where
    there is one of the same shape. Returns what the user is told."""
    config = model.lora or getattr(model.config, "lora", None)
    if config is None:
        return ""
    told = "LoRA is merged into the model that is left."
    if recipe.starts_from and fits_its_base(model, recipe.starts_from):
        save_adapter(out / "adapter", model, base=str(recipe.starts_from), config=config)
        told = f"LoRA is merged into the model that is left, and is in {out / 'adapter'} alone."
    model.merge_lora()
    return told


def fits_its_base(model: nn.Module, source: str) -> bool:
    """Whether the model has the shapes of the one in `source` (no new words, no answers of its own), and what learnt beside
    LoRA belongs to one module each, as an adapter's file wants it."""
    base, _ = load(source)
    learnt = [
        name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name
    ]
    if any(shared_weights(model, [name]) for name in learnt if hasattr(model.get_submodule(name), "weight")):
        return False
    shapes = lambda of: {
        name.replace(".base.", "."): p.shape for name, p in of.named_parameters() if "lora_" not in name
    }
    return shapes(base) == shapes(model)
