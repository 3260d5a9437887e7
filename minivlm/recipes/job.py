"""What train.py runs: a model, its processor, what a step is fed, and what judges it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minivlm.config import value_at
from minivlm.datasets.contents import leaks, stand_ins
from minivlm.datasets.order import Order
from minivlm.metrics import Score
from minivlm.processes import is_first_process
from minivlm.processor import Processor
from minivlm.recipes.trained_parts import choose_trained, told_of_lora

CHOSEN_ANEW = ("dropout", "label_smoothing", "caption_weight")  # of a model that is there: its weights stay as they are


@dataclass(frozen=True)
class Progress:
    """tell: the losses of a step by name → what the progress bar tells. chances: the same losses, as far as they are known, of
    a model that knows nothing."""

    tell: Callable[[Mapping[str, float]], str]
    chances: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, line: Mapping[str, float]) -> str:
        return self.tell(line)


@dataclass(eq=False)
class Job:
    """A recipe that was started.

    samples        what a step is fed (datasets/batches.py says what these have)
    scores         what judges it (see scores.py)
    progress       what the progress bar tells of the losses of the last step
    origins        part of the model (a dotted name) → where its weights come from, for the table of parts
    prepare        called once before the first step, with device, precision and the room for what is to be kept (see
                   vision_cache.py), when the model is on its device
    finish         called once after training with the run's directory, before the model is saved there
    endless        there are more samples than anyone will read: they are taken one after the other
    of_classes     it is judged by lessons about classes
    judges_start   the model is judged before the first step as well, since it could do something already
    """

    recipe: Any  # a `Recipe`
    model: nn.Module
    processor: Processor
    samples: Any
    scores: Any
    progress: Progress
    origins: dict[str, str] = field(default_factory=dict)
    prepare: Callable[..., Any] = lambda device, precision, room=None: None
    finish: Callable[[Path], Any] = lambda out: None
    endless: bool = False
    of_classes: bool = False
    judges_start: bool = False

    def __post_init__(self):
        r, samples = self.recipe, self.samples
        if r.continues and not self.origins:
            self.origins = dict.fromkeys((name for name, _ in self.model.named_children()), r.starts_from)
        choose_trained(self.model, r, self.origins)
        how = dict(batch_size=r.batch_size, seed=r.seed, bucket_steps=r.bucket_steps, endless=self.endless)
        self.order = Order(samples.__len__, samples.length, **how)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """The arguments of `model.losses`, for process `rank` of `world`."""
        indices, rngs = zip(*self.order.share(step, rank, world), strict=True)
        return self.samples.batch(indices, rngs, step)

    def ids(self, step: int) -> list[str]:
        """Names of the samples of a step, for messages."""
        return [self.samples.key(index) for index, _ in self.order.share(step)]

    def notes(self) -> list[str]:
        """What the user should know before the first step."""
        source = self.recipe.data.source
        shared = leaks(source) if is_first_process() and not self.of_classes else []
        told = [*self.chosen_anew(), *told_of_lora(self.model)]
        return [*self.samples.notes(), *self.stand_ins("val", "test"), *shared, *told]

    def chosen_anew(self) -> list[str]:
        """What --model.X makes another than it was in the model that is started from."""
        r = self.recipe
        names = [name for name in r.given if r.starts_from and name.rpartition(".")[2] in CHOSEN_ANEW]
        return [f"{name.removeprefix('model.')} is {value_at(r, name)} from now on, as asked for" for name in names]

    def stand_ins(self, *splits: str) -> list[str]:
        """Notes on splits that the data lack."""
        return stand_ins(self.recipe.data.source, *splits, few_shot=self.of_classes)

    def judged_on(self) -> str:
        """What `evaluate` judges on, in words."""
        told = self.stand_ins("test")
        return "held-out data:" if not told else f"what there is. {' '.join(told)}"

    def validate(self) -> float:
        return self.scores.validate(self.recipe.validate_on)

    def evaluate(self) -> dict[str, Score]:
        """All scores on held-out data."""
        return self.scores.evaluate()

    def figure(self, path: Path) -> None:
        """Draw what was learnt."""
        self.scores.figure(path)

    def next_commands(self, out: Path) -> list[str]:
        """What to try on the model in `out`."""
        return self.scores.next_commands(out)


def against(name: str, chance: float) -> Progress:
    """The loss, and what it would be of a model that knows nothing, by the name of that; 0: not known."""
    told = f"{name} {chance:.2f}" if chance else f"{name} unknown"
    return Progress(lambda line: f"loss {line['loss']:.3f} ({told})", {"loss": chance} if chance else {})


def each_against(chances: Mapping[str, float]) -> Progress:
    """These losses, each beside that of a model that knows nothing."""
    told = lambda line: (f"{name} {line[name]:.2f} (chance {chance:.2f})" for name, chance in chances.items())
    return Progress(lambda line: ", ".join(told(line)), chances)
