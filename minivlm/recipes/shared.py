"""What the recipes' `start` methods have in common: the data are there, they fill a batch, and the model can be built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from minivlm.datasets.shapes import is_world, make_shapes
from minivlm.errors import UserError
from minivlm.layers.language_model import LanguageModelConfig
from minivlm.processor import Processor

SHAPES = Path("data/shapes")


def make_world_if_missing(directory: str | Path, image_size: int, *, quiet: bool) -> None:
    """The embedded dataset needs no download: it is drawn the first time that it is asked for."""
    if Path(directory) == SHAPES and not is_world(directory):
        make_shapes(directory, image_size=image_size, progress=not quiet)


def check_fills_a_batch(n: int, batch_size: int, what: str, directory: str | Path) -> None:
    """UserError unless there are as many samples as a batch needs."""
    if n < batch_size:
        raise UserError(
            f"a batch of {batch_size} cannot be filled from the {n} {what} in {directory}; "
            f"choose --batch_size {n} or less."
        )


def build(model_class: type[nn.Module], config: Any, *, seed: int) -> nn.Module:
    """The model of a config; sizes that do not fit each other are a UserError."""
    try:
        return model_class(config, seed=seed)
    except ValueError as error:
        raise UserError(f"the model cannot be built: {error}.") from None


def speaking(config: LanguageModelConfig, processor: Processor) -> LanguageModelConfig:
    """The config with what follows from the tokeniser."""
    return replace(
        config, vocab_size=processor.vocab_size, end_tokens=(processor.end_token,), pad_token=processor.pad_token
    )
