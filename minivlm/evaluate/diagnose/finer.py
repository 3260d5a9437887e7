"""More pixels of the same images for a model that is trained already: tiles, and a tower for larger images.

tiles          the image whole, and again n times as large in n × n tiles (Liu et al. 2024, LLaVA-NeXT's "AnyRes"); of a
               model that compares, the view that is closest to a text counts
larger images  more patches of the same size, with interpolated position embeddings (Dosovitskiy et al. 2021, §3.2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

from torch import nn

from minivlm.errors import UserError
from minivlm.layers.position import resize_position_table
from minivlm.layers.vit import VisionConfig
from minivlm.models.own_modules import OwnTower
from minivlm.models.vqa import VQAModel
from minivlm.processor import Processor

Finer = Callable[[Any, Processor], AbstractContextManager[Processor]]  # inside, the model takes what it prepares


def variants(model, processor: Processor) -> dict[str, Finer]:
    """What can be tried with this kind of model, by name."""
    tiles = "encode" in model.abilities or "tiles" in (field.name for field in fields(model.config))
    tried = {f"{n}x{n} tiles": partial(tiled, n=n) for n in (2, 3) if tiles and n != processor.config.tiles}
    return tried | {f"images {times:g} times as large": partial(larger, times=times) for times in (1.5, 2)}


@contextmanager
def tiled(model, processor: Processor, *, n: int) -> Iterator[Processor]:
    """With n × n tiles. UserError where images cannot be cut into tiles."""
    config = model.config
    if "tiles" in (field.name for field in fields(config)):
        model.config = replace(config, tiles=n)
    try:
        yield changed(processor, tiles=n, **placeholders(model))
    finally:
        model.config = config


@contextmanager
def larger(model, processor: Processor, *, times: float) -> Iterator[Processor]:
    """With images so many times as large. UserError for a model that takes one size alone."""
    config, c = model.config, processor.config
    vision = model.vision.config
    if isinstance(vision, OwnTower):
        raise UserError("its vision tower is a module of its own, of which only its maker knows what sizes it takes.")
    step = vision.patch_size if isinstance(vision, VisionConfig) else 32  # of a CNN's grid
    size = round(c.image_size * times / step) * step
    resized = {} if c.resize_to is None else {"resize_to": round(c.resize_to * size / c.image_size)}
    tables = position_tables(model)
    try:
        model.config = with_vision(config, image_size=size)
        for module, name, table in tables:
            grids = [round(side**0.5) for side in (len(table), len(table) * (size / c.image_size) ** 2)]
            with_grid = resize_position_table(table.detach(), (grids[1], grids[1]))
            setattr(module, name, nn.Parameter(with_grid, table.requires_grad))
        yield changed(processor, image_size=size, **resized, **placeholders(model))
    except ValueError as error:
        raise UserError(f"{error}.") from None
    finally:
        model.config = config
        for module, name, table in tables:
            setattr(module, name, table)


def with_vision(config: Any, **fields) -> Any:
    """The config of a model with another of its vision tower."""
    if hasattr(config, "vision"):
        return replace(config, vision=replace(config.vision, **fields))
    return replace(config, encoder=with_vision(config.encoder, **fields))


def position_tables(model) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Those that a connector adds to the features of an image; a tower interpolates its own."""
    own = [(model, "position_embedding")] if isinstance(model, VQAModel) else []
    named = [*own, *((module, "image_position_embedding") for module in model.modules())]
    tables = [(module, name, getattr(module, name, None)) for module, name in named]
    return [(module, name, table) for module, name, table in tables if isinstance(table, nn.Parameter)]


def placeholders(model) -> dict[str, int]:
    return {} if model.image_placeholders is None else {"image_tokens": model.image_placeholders}


def changed(processor: Processor, **fields) -> Processor:
    try:
        return Processor(processor.source, replace(processor.config, **fields))
    except ValueError as error:
        raise UserError(f"{error}.") from None
