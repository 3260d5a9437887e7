"""Captions, answers and search by one encoder of text and regions (models/multitask.py): all three learn in every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from minivlm.datasets.folder import open_pairs
from minivlm.datasets.question_batches import QuestionsAndCaptions
from minivlm.metrics import Score
from minivlm.models.multitask import MultitaskConfig, MultitaskVLM
from minivlm.models.visualbert import VisualBERTConfig
from minivlm.recipes.folders import check_fills_a_batch
from minivlm.recipes.fuse import COMMON, SMALL, TEXT, Chosen, completed, list_questions, open_parts
from minivlm.recipes.job import Job, Progress
from minivlm.recipes.recipe import FolderData, Recipe
from minivlm.recipes.scores import Generated, Retrieval
from minivlm.recipes.vision_cache import VisionCache


@dataclass(frozen=True, kw_only=True)
class MultitaskData(FolderData):
    vocab_size: int = 512  # of the byte-level BPE that is trained on questions, answers and captions
    most_answers: int = 3000  # the most frequent ones are to choose from


@dataclass(frozen=True, kw_only=True)
class MultitaskRecipe(Recipe):
    what = "the multitask model"
    learns_from = ("captions and questions",)
    vision_from: str = "out/clip-resnet"  # a CLIP or a tower alone (DINOv2), ours, published or a hub id
    model: MultitaskConfig  # tower, vocabulary and answers follow from vision_from and the data
    data: MultitaskData = MultitaskData()

    def builds_on(self) -> dict[str, str]:
        return {"vision_from": "clip-resnet"}

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        model, processor, conversations, asked = open_parts(
            self, self.model.encoder, MultitaskVLM, checkpoint, quiet=quiet
        )
        model.freeze("encoder.vision")
        directory = self.data.source
        scores = Tasks(Generated(model, processor, directory, ask=True))
        cache = VisionCache.of_conversations(model, processor, conversations)
        questions = list_questions(self, model.config.encoder, processor, conversations, asked, cache)
        questions.samples = [i for i in questions.samples if conversations.captions(i)]
        n = len(questions.samples)
        check_fills_a_batch(n, self.batch_size, "images with captions and questions", directory)

        def tell(line: Mapping[str, float]) -> str:
            """Each task's loss as a share of what knowing nothing costs."""
            shares = (f"{task} {line[task] / model.task_weight(task):.2f}" for task in model.config.tasks)
            return ", ".join(shares) + " (1: knows nothing)"

        samples = QuestionsAndCaptions(questions)
        origins = {} if self.continues else {"vision": self.vision_from, "encoder": f"new, tower {self.vision_from}"}
        return Job(self, model, processor, samples, scores, Progress(tell), origins, cache.prepare)

    def complete(self, vision, answers, processor, conversations) -> MultitaskConfig:
        encoder = completed(self.model.encoder, vision, answers, processor)
        return replace(self.model, encoder=encoder, end_token=processor.end_token, pad_token=processor.pad_token)


class Tasks:
    """All that the model can do; the first of answers, captions and search that it learns is judged while it trains."""

    def __init__(self, generated: Generated):
        self.generated, self.chosen = generated, Chosen(generated)
        search = Retrieval(generated.model, generated.processor, generated.directory)
        known = {
            "answer": ("accuracy of answers", generated.answers_score, generated.figure),
            "caption": (generated.captions_name, generated.captions_score, generated.figure),
            "search": (search.name, search.validate, search.figure),
        }
        judged = next(task for task in known if task in generated.model.config.tasks)
        self.name, self.validate, self.figure = known[judged]

    def evaluate(self) -> dict[str, Score]:
        return self.chosen.evaluate()

    def next_commands(self, out: Path) -> list[str]:
        of = self.generated
        pairs = open_pairs(of.directory, "test", image_size=of.processor.image_size)
        folder, wanted = quote(str((Path(of.directory) / pairs.key(0)).parent)), quote(pairs.all_captions(0)[0])
        return [
            *self.chosen.next_commands(out),
            f"python sample.py caption {out} {of.image()}",
            f"python sample.py search {out} {folder} {wanted} --top 8 --save sheet.png",
        ]


MULTITASK_RECIPES = {
    "multitask": MultitaskRecipe(
        summary="captions, answers and search by one encoder of text and regions",
        model=MultitaskConfig(
            encoder=VisualBERTConfig(
                **COMMON | {"text": replace(TEXT, context=96)}, region_positions=True, answer_at="first"
            ),
            end_token=0,
            caption_weight=4.0,
        ),
        measured="20 min on one busy core: 90 % of balanced questions, 93 % of scenes described (1 seed)",
        **SMALL | {"steps": 1700, "save_every": 425},
    ),
}
