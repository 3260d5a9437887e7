"""What judges by how well held-out texts are expected: of a language model, and of documents of images and texts.

The classes have what those of scores.py have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from shlex import quote

import numpy as np
import torch

from minivlm import evaluate
from minivlm.conversation import IGNORED
from minivlm.datasets.continuation import split
from minivlm.datasets.interleaved import Interleaved, document_problem, encode_document
from minivlm.datasets.sequence_batches import document_batch, placeholders
from minivlm.datasets.shapes.episodes import words
from minivlm.errors import UserError
from minivlm.evaluate.language import entropy, held_out_texts, learnt, perplexity, unigram_entropy
from minivlm.metrics import Samples, Score
from minivlm.pictures import Row, sheet
from minivlm.processes import each, is_first_process
from minivlm.processor import Processor
from minivlm.tasks.features import inference
from minivlm.tasks.generate import prompt_tokens

VALIDATED = 200  # texts that a checkpoint is judged by
PICTURED, SAID, SHOWN = (
    12,
    24,
    240,
)  # beginnings in a figure, tokens that each is continued by, characters that are shown
DOCUMENTS = 8  # in a figure


class Perplexity:
    """How well a language model expects texts that it has not read; on the shapes world, also what it knows of them."""

    name = "1 / perplexity"

    def __init__(self, model, processor: Processor, directory: str, more: Callable[[Path], list[str]]):
        self.model, self.processor, self.directory, self.more = model, processor, directory, more
        self.held_out = held_out_texts(directory)
        self.chance = unigram_entropy(self.held_out[:VALIDATED], processor)

    def validate(self, most: int) -> float:
        return 1 / perplexity(self.model, self.processor, self.held_out[: min(most, VALIDATED)]).value

    def evaluate(self) -> dict[str, Score]:
        return evaluate.language(self.model, self.processor, self.directory)

    def figure(self, path: Path) -> None:
        """How the model continues beginnings of held-out texts that its context has room for: of conversations, what it
        answers; and what the texts say."""
        rows = []
        for number, text in enumerate(self.held_out):
            begun, rest = split(text, np.random.default_rng(number))
            tokens = prompt_tokens(begun, self.model, self.processor)
            if len(tokens) + SAID > self.processor.context:
                continue
            if len(rows) == PICTURED:
                break
            tokens = torch.tensor([tokens], device=self.model.device)
            generated = self.processor.decode(self.model.generate(tokens, max_new_tokens=SAID))[0].strip()
            shown = begun if len(begun) <= SHOWN else "… " + begun[-SHOWN:].partition(" ")[2]
            truth = "as the text" if generated and rest.startswith(generated) else f"the text: {rest}"
            rows.append(Row(shown, [], detail=f"continues: {generated} ({truth})"))
        sheet(rows, title="Held-out beginnings, and how the model continues them").save(path)

    def next_commands(self, out: Path) -> list[str]:
        texts = [words(text) for text in self.held_out]
        question, mark, _ = next((text for text in texts if "?" in text), texts[0]).partition("?")
        return [f"python sample.py complete {out} {quote(question + mark)}", *self.more(out)]


class DocumentPerplexity:
    """How well the texts behind the first images of held-out documents are expected."""

    name = "1 / perplexity"

    def __init__(self, model, processor: Processor, directory: str, batch_size: int):
        self.model, self.processor, self.directory, self.batch_size = model, processor, directory, batch_size
        self.val = self.open("val")
        for held_out in (self.val, self.open("test")) if is_first_process() else ():
            held_out.check_images()
            check_documents(held_out, processor)

    def open(self, split: str) -> Interleaved:
        return Interleaved(self.directory, split, image_size=self.processor.image_size)

    def perplexity(self, documents: Interleaved, most: int | None = None) -> Score:
        """Of the first `most` documents. chance: unigrams fitted to these very tokens."""
        n = min(len(documents), most or len(documents))

        def expected(i: int) -> tuple[float, list[int]]:
            indices = list(range(i, min(i + self.batch_size, n)))
            batch = document_batch(documents, indices, [*map(documents.text, indices)], self.processor)
            tokens = learnt(batch["labels"])
            losses = self.model.losses(**{name: tensor.to(self.model.device) for name, tensor in batch.items()})
            return len(tokens) * sum(losses.values()).item(), tokens

        with inference(self.model):
            sums, tokens = zip(*each(expected, range(0, n, self.batch_size)), strict=True)
        samples = Samples("perplexity", np.stack([sums, [*map(len, tokens)]], axis=1))
        return Score.of(samples, math.exp(entropy([*chain.from_iterable(tokens)])), share=False)

    def validate(self, most: int) -> float:
        return 1 / self.perplexity(self.val, most).value

    def evaluate(self) -> dict[str, Score]:
        return {"perplexity": self.perplexity(self.open("test"))}

    def figure(self, path: Path) -> None:
        """Held-out documents up to the last image, and how the model continues them."""
        documents, context, rows = self.open("test"), self.processor.context, []
        for index in range(min(DOCUMENTS, len(documents))):
            text, pictures = documents.text(index), documents.images([index])[0]
            sample = encode_document(text, self.processor, context=context)
            last = len(sample.tokens) - sample.tokens[::-1].index(self.processor.image_token_id)
            pictures = pictures[: placeholders(sample, self.processor)]
            prompt = torch.tensor([sample.tokens[:last]], device=self.model.device)
            room = min(SAID, context - last)
            images = self.processor.images(pictures).to(self.model.device)[None]
            generated = self.processor.decode(self.model.generate(images, prompt, max_new_tokens=max(1, room)))[0]
            true = self.processor.decode([[t for t in sample.labels[last:] if t != IGNORED]])[0]
            rows.append(Row(true, pictures, detail="continues: " + generated))
        title = "Held-out documents: what follows the last image, and how the model continues"
        sheet(rows, title=title).save(path)

    def next_commands(self, out: Path) -> list[str]:
        return [f"python sample.py caption {out} {quote(str(Path(self.directory) / self.open('test').key(0)))}"]


def check_documents(documents: Interleaved, processor: Processor) -> None:
    """UserError where none of a held-out split's documents has anything that fits the context."""
    problem = document_problem(processor)
    if all(problem(documents.text(i)) for i in range(len(documents))):
        raise UserError(
            f"none of the {len(documents)} {documents.split} documents has any text behind its first image within the "
            f"context of {processor.context} tokens."
        )
