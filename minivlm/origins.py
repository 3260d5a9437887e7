"""Where the weights of a model's parts come from: a published checkpoint, directly or over runs of ours, or not.

A part that is published learns at a lower rate than what is new (see recipes/rates.py), so the mark stays with its module:
when a model takes it over (`copy_marks`), and in config.json ("pretrained").
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def is_published(module: nn.Module) -> bool:
    return getattr(module, "published", False)


def mark_published(model: nn.Module, parts: Iterable[str] | None = None) -> None:
    """Mark these parts (dotted names), None: all there are; and the whole, once all of its parts are. Raises AttributeError
    for a name that is none."""
    children = [name for name, child in model.named_children() if has_parameters(child)]
    for name in children if parts is None else parts:
        model.get_submodule(name).published = True
    model.published = bool(children) and all(is_published(model.get_submodule(name)) for name in children)


def published_parts(model: nn.Module) -> frozenset[str]:
    """The dotted names of the outermost marked modules below the model itself."""
    found: set[str] = set()
    for name, child in model.named_children():
        found |= {name} if is_published(child) else {f"{name}.{inner}" for inner in published_parts(child)}
    return frozenset(found)


def copy_marks(source: nn.Module, part: nn.Module) -> None:
    """A part that has taken the weights of `source` is as published as that."""
    for name, module in source.named_modules():
        if is_published(module):
            part.get_submodule(name).published = True
