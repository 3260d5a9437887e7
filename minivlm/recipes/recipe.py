"""A recipe is a value: model, data, optimiser, steps, and what it starts from. One file a family says how it is built."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, ClassVar

from minivlm.datasets.source import Source
from minivlm.layers.lora import LoRAParts
from minivlm.recipes.job import Job
from minivlm.training import OptimiserConfig


@dataclass(frozen=True, kw_only=True)
class FolderData:
    """A folder, and how it is read (datasets/source.py). The data of a recipe add what they make of it."""

    directory: str = "data/shapes"
    image_key: str | None = None  # the column or field that names the image; None: found by its name
    caption_key: str | None = None  # that holds the caption; several are separated by commas
    class_names: str | None = None  # a file that gives the folders of classes their names
    cache: str | None = None  # the most that decoded images may take on disk, as 20GB; or off
    shards: str | None = None  # the tar files that are meant, as shard-{000..099}.tar; None: all

    @property
    def source(self) -> Source:
        return Source(self.directory, self.image_key, self.caption_key, self.class_names, self.cache, self.shards)


FOLDER = FolderData()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every recipe has. A family adds what it starts from, and `start`, which opens the data and builds the model.

    what         it trains, in words
    learns_from  what a folder has to hold, one of them, and what it is judged by if not the same (datasets/contents.py)
    taken_by     the option by which other recipes take a model of this kind, if they do
    data         the directory, and what is made of it
    model        (of all but those that train what they start from as it is) its config or, where that follows from what it
                 starts from, the part that is left to choose
    """

    what: ClassVar[str]
    learns_from: ClassVar[tuple[str, ...]]
    judged_by: ClassVar[tuple[str, ...]] = ()
    taken_by: ClassVar[str] = ""
    summary: str
    measured: str = ""  # how long it took and what it reached, for --list
    data: Any
    steps: int
    batch_size: int  # of all processes together
    bucket_steps: int = 1  # the samples of so many steps are sorted by length, and each batch is of like length; 1: not
    micro_batch: int | None = None  # samples whose activations are held at a time; None: the whole batch
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    starts_from: str = ""  # a model of this kind: a directory of ours, a published one, or a hub id; "": a new one
    freeze: tuple[str, ...] = ()  # parts that do not learn, besides the recipe's own; "none" first: those do
    rates: dict[str, float] = field(default_factory=dict)  # part → its learning rate (see rates.py)
    lora: LoRAParts | None = None  # adapters on some parts, in place of their weights
    given: tuple[str, ...] = field(
        default=(), metadata={"option": False}
    )  # what the user has chosen, where that matters
    seed: int = 0
    save_every: int = 200  # steps between checkpoints, each with its score on the validation split
    keep: int = 2  # checkpoints kept besides the best
    validate_on: int = 1000  # validation images, at most, that a checkpoint is judged by

    def __post_init__(self):
        for name in ("steps", "batch_size", "bucket_steps", "save_every", "keep", "validate_on"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}, but must be at least 1, or none")
        for part, rate in self.rates.items():
            if not 0 <= rate < inf:
                raise ValueError(f"rates.{part} is {rate}, but must be a finite number from 0 upwards")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, but must be from 0 to {2**63 - 1}")

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        """Open the data (the shapes world is made if it is missing) and build the model, or take what a checkpoint has."""
        raise NotImplementedError

    def builds_on(self) -> dict[str, str]:
        """The fields that name what it starts from → the recipe that trains such a thing, if it is missing."""
        return {}

    def needs(self) -> dict[str, str]:
        """What it builds on: recipe → the directory where that recipe's model is looked for."""
        bases = self.builds_on()
        if self.continues:
            return {}
        return {base: getattr(self, option) or f"out/{base}" for option, base in bases.items()}

    def hands_on(self) -> dict[str, str]:
        """The options that are those of what it builds on, where that is trained first."""
        return {}

    @property
    def continues(self) -> bool:
        """Whether a whole model is there already, which a recipe that builds on nothing named starts_from was given."""
        return bool(self.starts_from) and not type(self).starts_from

    def external_weights(self) -> dict[str, str]:
        """Frozen parts that the model is stored without, and where they come from (see `minivlm.external_weights`)."""
        return {}

    def on(self, directory: str) -> Recipe:
        """What is another for another folder, besides what all have in common (see `for_data`)."""
        return replace(self, summary=f"{self.summary}, on {directory}")

    def as_chosen(self) -> Recipe:
        """What is another for the kind of model that the user has chosen; other options of theirs have the last word."""
        return self

    def of_size(self, n: int) -> Recipe:
        """What is another for a folder with so many samples to train on, besides a batch that it can fill."""
        return self

    def is_time_to_save(self, step: int) -> bool:
        """Every save_every steps, at the end, and once early, so that a run that dies young leaves something."""
        return step % self.save_every == 0 or step in (max(1, self.save_every // 4), self.steps)
