"""Captions, answers and search by one encoder of words and regions (models/multitask.py): all three learn in every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import numpy as np
from torch import Tensor

from minivlm import evaluate
from minivlm.datasets.folder import open_pairs
from minivlm.models.multitask import MultitaskConfig, MultitaskVLM
from minivlm.models.visualbert import VisualBERTConfig
from minivlm.processor import Processor
from minivlm.recipes.fusion import COMMON, SMALL, WORDS, FusionRecipe, FusionWork, completed
from minivlm.recipes.shared import check_fills_a_batch


@dataclass(frozen=True, kw_only=True)
class MultitaskRecipe(FusionRecipe):
    what = "the multitask model"
    learns_from = ("captions and questions",)
    model: MultitaskConfig
    eyes = "encoder.vision"
    model_class = MultitaskVLM

    @property
    def encoder(self) -> VisualBERTConfig:
        return self.model.encoder

    def complete(self, vision, answers: tuple[str, ...], processor: Processor) -> MultitaskConfig:
        encoder = completed(self.encoder, vision, answers, processor)
        return replace(self.model, encoder=encoder, end_token=processor.end_token, pad_token=processor.pad_token)

    def work(self, *parts) -> MultitaskWork:
        return MultitaskWork(self, *parts)


class MultitaskWork(FusionWork):
    """A question and a caption about every picture."""

    def __init__(self, recipe: MultitaskRecipe, *parts):
        super().__init__(recipe, *parts)
        self.samples = self.captioned
        self.n = len(self.samples)
        check_fills_a_batch(self.n, recipe.batch_size, "images with captions and questions", recipe.data.directory)
        tasks = self.model.config.tasks  # the first of these is judged while it trains
        names = {"answer": "accuracy of answers", "caption": self.captions_name, "search": "text→image Recall@1"}
        self.judged = next(task for task in names if task in tasks)
        self.score_name = names[self.judged]

    def validate(self) -> float:
        if self.judged != "search":
            return self.answers_score() if self.judged == "answer" else self.captions_score()
        pairs = open_pairs(self.recipe.data.directory, "val", image_size=self.processor.image_size)
        return evaluate.retrieval(self.model, self.processor, pairs)["text→image R@1"].value

    def picture(self, path: Path) -> None:
        if self.judged != "search":
            super().picture(path)
        else:
            evaluate.picture(self.model, self.processor, self.recipe.data.directory, path)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        share = [(self.samples[i], rng) for i, rng in self.share(step, rank, world)]
        asked = self.questions(share)
        tokens, mask = self.processor.text([self.caption(index, rng) for index, rng in share], cut=True)
        question = {"question": asked["tokens"], "question_mask": asked["mask"], "answers": asked["answers"]}
        return {"tokens": tokens, "mask": mask, **question, **self.pictures([index for index, _ in share])}

    def length(self, index: int, rng: np.random.Generator) -> int:
        """Of the two, the caption is the longer one; it is drawn second."""
        self.question(self.samples[index], rng)
        return len(self.caption(self.samples[index], rng).split())

    def progress(self, line: dict[str, float]) -> str:
        """Each task's loss as a share of what knowing nothing costs."""
        shares = (f"{task} {line[task] / self.model.task_weight(task):.2f}" for task in self.model.config.tasks)
        return ", ".join(shares) + " (1: knows nothing)"

    def next_commands(self, out: Path) -> list[str]:
        pairs = open_pairs(self.recipe.data.directory, "test", image_size=self.processor.image_size)
        folder = quote(str((Path(self.recipe.data.directory) / pairs.key(0)).parent))
        wanted = quote(pairs.all_captions(0)[0])
        return [
            *super().next_commands(out),
            f"python sample.py caption {out} {self.held_out_picture()}",
            f"python sample.py search {out} {folder} {wanted} --top 8 --save sheet.png",
        ]


MULTITASK_RECIPES = {
    "multitask": MultitaskRecipe(
        summary="captions, answers and search by one encoder of words and regions",
        model=MultitaskConfig(
            encoder=VisualBERTConfig(
                **COMMON | {"text": replace(WORDS, context=96)}, region_positions=True, answer_at="first"
            ),
            end_token=0,
            caption_weight=4.0,
        ),
        measured="20 min on one busy core: 90 % of balanced questions, 93 % of scenes described (1 seed)",
        **SMALL | {"steps": 1700, "save_every": 425},
    ),
}
