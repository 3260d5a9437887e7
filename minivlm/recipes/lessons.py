"""A Flamingo at work on lessons about one's own pictures: a folder with a sub-folder a class (datasets/class_episodes.py)."""

from __future__ import annotations

import math
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from torch import Tensor

from minivlm import evaluate
from minivlm.conversation import IGNORED, PLACEHOLDER, Sample, collate
from minivlm.datasets.class_episodes import class_episodes, class_lessons, read_classes
from minivlm.datasets.shapes.shots import Named
from minivlm.errors import UserError
from minivlm.layers.tower import ImageFeatures
from minivlm.losses import labelled
from minivlm.metrics import Score
from minivlm.models.flamingo import Flamingo
from minivlm.processor import Processor
from minivlm.recipes.base import Recipe
from minivlm.recipes.frozen import CACHE_LIMIT, compute_features_once, measure_once
from minivlm.recipes.interleaved import gates_text
from minivlm.recipes.work import Work
from minivlm.special_tokens import as_text
from minivlm.tasks.few_shot import END, LEAD

VALIDATED = 200  # episodes
WAYS = 5  # words to choose from, with an example of each
EPOCH = 10_000  # lessons; there is no end of them


class LessonsWork(Work):
    """Learnt are the names of classes, new in every lesson; judged are classes held out, one example each."""

    few_shot = True
    score_name = f"new words, {WAYS} ways, an example each"

    def __init__(self, recipe: Recipe, model: Flamingo, processor: Processor):
        super().__init__(recipe, model, processor, EPOCH)
        self.directory = recipe.data.directory
        self.chance_text = f"uniform {math.log(processor.vocab_size):.2f}"
        classes = read_classes(Path(self.directory), "train")
        if len(classes) < WAYS:
            raise UserError(
                f"{self.directory} has {len(classes)} training classes, but a lesson has up to {WAYS}: add some, or give "
                "a folder with interleaved.jsonl or conversations."
            )
        self.classes = len(classes)
        self.lessons, self.paths = class_lessons(classes)
        self.pixels: Tensor | None = None
        self.features: Tensor | None = None
        self.scores: dict[str, Score] = {}  # once it has been judged

    def notes(self) -> list[str]:
        return [f"lessons about {len(self.paths)} pictures of {self.classes} classes in {self.directory}"]

    def progress(self, line: dict[str, float]) -> str:
        return f"{super().progress(line)}, gates {gates_text(self.model)}"

    def prepare(self, device: torch.device, precision: torch.dtype) -> None:
        """A frozen tower sees every picture once; one that learns is given pixels, which are read once. Both if they fit into
        memory."""
        measure_once(self.model, self.processor, self.paths, device, precision)
        if self.recipe.freeze_vision:
            pictures = lambda indices: [self.paths[i] for i in indices]
            self.features = compute_features_once(
                self.model, self.processor, len(self.paths), pictures, device, precision
            )
        elif 4 * 3 * len(self.paths) * self.processor.image_size**2 <= CACHE_LIMIT:
            self.pixels = self.processor.images(self.paths)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """tokens and labels (B/W, T), and the images (M, 3, H, W) of all their marks, or their features, of process `rank` of
        W."""
        lessons = [self.lessons.lesson(rng, most_ways=WAYS) for _, rng in self.share(step, rank, world)]
        batch = collate([lesson_sample(lesson, self.processor) for lesson in lessons], self.processor.pad_token)
        batch["where"] = labelled(batch["labels"])
        return batch | self.pictures([picture for lesson in lessons for picture, _ in lesson])

    def pictures(self, indices: list[int]) -> dict[str, Tensor]:
        if self.features is not None:
            return {"images": ImageFeatures(self.features[torch.tensor(indices)])}
        if self.pixels is not None:
            return {"images": self.pixels[torch.tensor(indices)]}
        return {"images": self.processor.images([self.paths[i] for i in indices])}

    def length(self, index: int, rng: np.random.Generator) -> int:
        return len(self.lessons.lesson(rng, most_ways=WAYS))

    def key(self, index: int) -> str:
        return f"lesson {index}"

    def validate(self) -> float:
        episodes = class_episodes(self.directory, VALIDATED, shots=WAYS, ways=WAYS, split="val")
        return evaluate.few_shot_accuracy(self.model, self.processor, episodes, ways=WAYS).value

    def evaluate(self) -> dict[str, Score]:
        self.scores = evaluate.few_shot(self.model, self.processor, self.directory, shots=(0, WAYS), ways=WAYS)
        return self.scores

    def picture(self, path: Path) -> None:
        evaluate.few_shot_picture(self.scores or self.evaluate(), path)

    def next_commands(self, out: Path) -> list[str]:
        return [f"python -m minivlm.evaluate {out} --data {quote(str(self.directory))} --ways {WAYS} --shots 0 {WAYS}"]


def lesson_sample(lesson: list[Named], processor: Processor) -> Sample:
    """A picture and what it is called, one after the other. Learnt is every word that was heard before in the lesson."""
    tokens = [] if processor.start_token is None else [processor.start_token]
    labels, heard = [IGNORED] * len(tokens), set()
    given = processor.ids(f"{PLACEHOLDER}{LEAD}")
    for _, word in lesson:
        whole = processor.ids(f"{PLACEHOLDER}{LEAD} {as_text(word)}{END}")
        said = whole[len(given) :]
        tokens += whole
        labels += [IGNORED] * len(given) + (said if word in heard else [IGNORED] * len(said))
        heard.add(word)
    return Sample(tokens, labels, [])
