"""A Flamingo at work on documents of one's own, pictures between texts (datasets/interleaved.py)."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from torch import Tensor

from minivlm.conversation import IGNORED, Sample, collate
from minivlm.datasets.interleaved import Interleaved, document_problem, encode_document
from minivlm.errors import UserError
from minivlm.evaluate.language import entropy, learnt
from minivlm.losses import labelled
from minivlm.metrics import Score
from minivlm.models.flamingo import Flamingo
from minivlm.pictures import Row, sheet
from minivlm.processor import Processor
from minivlm.recipes.base import Recipe
from minivlm.recipes.frozen import measure_once
from minivlm.recipes.shared import check_fills_a_batch
from minivlm.recipes.work import Work
from minivlm.tasks.features import inference
from minivlm.training import is_first_process

PICTURED = 8  # documents


class InterleavedWork(Work):
    """Learnt is what follows the first picture of a document; judged is how well that of held-out ones is expected."""

    score_name = "1 / perplexity"

    def __init__(self, recipe: Recipe, model: Flamingo, processor: Processor):
        self.directory = recipe.data.directory
        self.train, self.val = (self.open(split, processor) for split in ("train", "val"))
        self.train.leave_out(processor)
        for held_out in (self.val, self.open("test", processor)) if is_first_process() else ():
            held_out.check_pictures()
            check_documents(held_out, processor)
        super().__init__(recipe, model, processor, len(self.train))
        check_fills_a_batch(self.n, recipe.batch_size, "training documents", self.directory)
        self.chance_text = f"uniform {math.log(processor.vocab_size):.2f}"

    def open(self, split: str, processor: Processor) -> Interleaved:
        return Interleaved(self.directory, split, image_size=processor.image_size)

    def notes(self) -> list[str]:
        return [f"{self.n} training documents in {self.directory}", *self.train.notes]

    def length(self, index: int, rng: np.random.Generator) -> int:
        return len(self.train.text(index, rng).split())

    def key(self, index: int) -> str:
        return self.train.key(index)

    def progress(self, line: dict[str, float]) -> str:
        return f"{super().progress(line)}, gates {gates_text(self.model)}"

    def prepare(self, device: torch.device, precision: torch.dtype) -> None:
        first = chain.from_iterable(self.train.images([i])[0] for i in range(self.n))
        measure_once(self.model, self.processor, first, device, precision)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """tokens and labels (B/W, T), and the images (M, 3, H, W) of all their marks, of process `rank` of W."""
        share = self.share(step, rank, world)
        batch = self.read(self.train, [index for index, _ in share], [self.train.text(*one) for one in share])
        return {**batch, "where": labelled(batch["labels"])}

    def read(self, documents: Interleaved, indices: list[int], texts: list[str]) -> dict[str, Tensor]:
        samples = [encode_document(text, self.processor, context=self.processor.context) for text in texts]
        shown = zip(documents.images(indices), samples, strict=True)
        pictures = list(chain.from_iterable(some[: self.marks(sample)] for some, sample in shown))
        return {**collate(samples, self.processor.pad_token), "images": self.processor.images(pictures)}

    def marks(self, sample: Sample) -> int:
        """How many pictures it has room for."""
        return sample.tokens.count(self.processor.image_token_id)

    def perplexity(self, documents: Interleaved) -> Score:
        """Of what follows the first picture. chance: unigrams fitted to these very tokens."""
        total, counted = 0.0, []
        B = self.recipe.batch_size
        with inference(self.model):
            for i in range(0, len(documents), B):
                indices = list(range(i, min(i + B, len(documents))))
                batch = self.read(documents, indices, [documents.text(index) for index in indices])
                tokens = learnt(batch["labels"])
                losses = self.model.losses(**{name: tensor.to(self.model.device) for name, tensor in batch.items()})
                total += len(tokens) * sum(losses.values()).item()
                counted += tokens
        return Score(math.exp(total / len(counted)), math.exp(entropy(counted)), share=False)

    def validate(self) -> float:
        return 1 / self.perplexity(self.val).value

    def evaluate(self) -> dict[str, Score]:
        return {"perplexity": self.perplexity(self.open("test", self.processor))}

    def picture(self, path: Path) -> None:
        """Held-out documents up to the last picture, and how the model goes on."""
        documents = self.open("test", self.processor)
        rows = []
        for index in range(min(PICTURED, len(documents))):
            text, pictures = documents.text(index), documents.images([index])[0]
            sample = encode_document(text, self.processor, context=self.processor.context)
            last = len(sample.tokens) - sample.tokens[::-1].index(self.processor.image_token_id)
            pictures = pictures[: self.marks(sample)]
            prompt = torch.tensor([sample.tokens[:last]], device=self.model.device)
            room = min(24, self.processor.context - last)
            seen = self.processor.images(pictures).to(self.model.device)[None]
            said = self.processor.decode(self.model.generate(seen, prompt, max_new_tokens=max(1, room)))[0]
            true = self.processor.decode([[t for t in sample.labels[last:] if t != IGNORED]])[0]
            rows.append(Row(true, pictures, detail="goes on: " + said))
        sheet(rows, title="Held-out documents: what stands behind the last picture, and how the model goes on").save(
            path
        )

    def next_commands(self, out: Path) -> list[str]:
        documents = self.open("test", self.processor)
        return [f"python sample.py caption {out} {quote(str(Path(self.directory) / documents.key(0)))}"]


def check_documents(documents: Interleaved, processor: Processor) -> None:
    """UserError where none of a held-out split's documents has anything that fits the context."""
    problem = document_problem(processor)
    if all(problem(documents.text(i)) for i in range(len(documents))):
        raise UserError(
            f"none of the {len(documents)} {documents.split} documents has any text behind its first image within the "
            f"context of {processor.context} tokens."
        )


def gates_text(model: Flamingo) -> str:
    """How far the gates are open, of attention and MLP together, layer by layer."""
    return " ".join(f"{gate:.2f}" for gate in model.gates().mean(dim=1).tolist())
