"""A recipe at work: what train.py asks of it, and what all recipes do alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minivlm.datasets.contents import stand_ins
from minivlm.metrics import Score
from minivlm.recipes.base import Recipe


class Work:
    """model, processor, and the n training samples of a recipe.

    score_name   what `validate` returns, in words
    chance_text  what the loss of a model that knows nothing would be
    origins      part of the model (a dotted name) → where its weights come from, for the table of parts
    """

    score_name: str
    chance_text: str
    few_shot = False  # it is judged by classes

    def __init__(self, recipe: Recipe, model: nn.Module, processor, n: int):
        self.recipe, self.model, self.processor, self.n = recipe, model, processor, n
        self.origins: dict[str, str] = {}
        self.window: tuple[int, list] = (-1, [])  # the last one that was sorted, see `bucketed`

    def indices(self, step: int) -> np.ndarray:
        """Which samples step `step` sees: each epoch is a permutation drawn from (seed, epoch)."""
        B = self.recipe.batch_size
        epoch, position = divmod(step, self.n // B)
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(self.n)
        return order[position * B : (position + 1) * B]

    def share(self, step: int, rank: int, world: int) -> list[tuple[int, np.random.Generator]]:
        """The samples of process `rank` of `world`, each with its own source of chance: a function of (seed, step) alone,
        so that runs resume and any number of processes share a batch."""
        drawn = self.drawn(step) if self.recipe.bucket_steps == 1 else self.bucketed(step)
        return [(index, np.random.default_rng(key)) for index, key in drawn[rank::world]]

    def drawn(self, step: int) -> list[tuple[int, tuple[int, int, int]]]:
        """The samples of a step, each with the seed of its chance."""
        return [(index, (self.recipe.seed, step, i)) for i, index in enumerate(self.indices(step).tolist())]

    def bucketed(self, step: int) -> list[tuple[int, tuple[int, int, int]]]:
        """As `drawn`, but the samples of `bucket_steps` steps in a row are sorted by length, and dealt out to these steps
        in an order drawn anew: each batch then has samples of like length, and little padding."""
        steps, B = self.recipe.bucket_steps, self.recipe.batch_size
        window, position = divmod(step, steps)
        number, batches = self.window  # taken at once: another thread may be making the next batch
        if number != window:
            drawn = [one for s in range(steps) for one in self.drawn(window * steps + s)]
            lengths = [self.length(index, np.random.default_rng(key)) for index, key in drawn]
            by_length = [drawn[i] for i in np.argsort(lengths, kind="stable")]
            turns = np.random.default_rng((self.recipe.seed, window)).permutation(steps)
            batches = [by_length[turn * B : (turn + 1) * B] for turn in turns]
            self.window = window, batches
        return batches[position]

    def length(self, index: int, rng: np.random.Generator) -> int:
        """About how long the text of a sample is, in any unit; its chance is drawn as `batch` draws it."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """The name of a sample, for messages."""
        raise NotImplementedError

    def ids(self, step: int) -> list[str]:
        """Names of the samples of a step, for messages."""
        return [self.key(index) for index, _ in self.share(step, 0, 1)]

    def prepare(self, device: torch.device, precision: torch.dtype) -> None:
        """Called once before the first step, when the model is on its device."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """The arguments of `model.losses`."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What the user should know before the first step."""
        return []

    def progress(self, line: dict[str, float]) -> str:
        """The losses of the last step, by name, as the progress bar tells them."""
        return f"loss {line['loss']:.3f} ({self.chance_text})"

    def validate(self) -> float:
        """One number between 0 and 1 to choose the best checkpoint by; higher is better."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, Score]:
        """All scores on held-out data."""
        raise NotImplementedError

    def judged_on(self) -> str:
        """What `evaluate` judges on, in words."""
        told = self.stand_ins("test")
        return "held-out data:" if not told else f"what there is. {' '.join(told)}"

    def stand_ins(self, *splits: str) -> list[str]:
        """Notes on splits that the data lack."""
        data = getattr(self.recipe, "data", self.recipe)
        return stand_ins(data.directory, *splits, few_shot=self.few_shot)

    def picture(self, path: Path) -> None:
        """What was learnt, to look at."""
        raise NotImplementedError

    def next_commands(self, out: Path) -> list[str]:
        """What to try on the model in `out`."""
        raise NotImplementedError

    def finish(self, out: Path) -> None:
        """Called once after training, before the model is evaluated and saved in `out`."""
