"""What judges a model while it trains and afterwards: the functions of minivlm/evaluate, each kind with its data at hand.

Every class has

    name                 of what `validate` returns, in words
    validate()           one number from 0 to 1 to choose the best checkpoint by; higher is better
    evaluate()           all scores on held-out data
    figure(path)         draws what was learnt
    next_commands(out)   what to try on the model in `out`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from shlex import quote

import numpy as np
import torch

from minivlm import evaluate
from minivlm.conversation import IGNORED
from minivlm.datasets.class_episodes import class_episodes
from minivlm.datasets.continuation import split
from minivlm.datasets.conversations import Conversations, open_conversations
from minivlm.datasets.folder import open_pairs
from minivlm.datasets.interleaved import Interleaved, document_problem, encode_document
from minivlm.datasets.sequence_batches import document_batch, placeholders
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.episodes import words
from minivlm.errors import UserError
from minivlm.evaluate.language import entropy, held_out_texts, learnt, perplexity, unigram_entropy
from minivlm.metrics import Score, vqa_accuracy
from minivlm.pictures import Row, sheet
from minivlm.processes import is_first_process
from minivlm.processor import Processor
from minivlm.tasks.features import inference
from minivlm.tasks.generate import beginning

VALIDATED = 200  # texts, captions, episodes, or answers in whole sentences, that a checkpoint is judged by
PICTURED, SAID, SHOWN = 12, 24, 240  # beginnings in a figure, tokens that each goes on for, characters that are shown
DOCUMENTS = 8  # in a figure

Commands = Callable[[Path], list[str]]


class Retrieval:
    """Does an image find its caption, and a caption its image? And, where there are labels, an image its class?"""

    name = "text→image Recall@1"

    def __init__(self, model, processor: Processor, directory: str):
        self.model, self.processor, self.directory = model, processor, directory

    def validate(self) -> float:
        pairs = open_pairs(self.directory, "val", image_size=self.processor.image_size)
        return evaluate.retrieval(self.model, self.processor, pairs)["text→image R@1"].value

    def evaluate(self) -> dict[str, Score]:
        return evaluate.contrast(self.model, self.processor, self.directory)

    def figure(self, path: Path) -> None:
        evaluate.picture(self.model, self.processor, self.directory, path)

    def next_commands(self, out: Path) -> list[str]:
        """Two commands, about the held-out images that take the fewest words."""
        test = open_pairs(self.directory, "test", image_size=self.processor.image_size)
        first = {test.all_captions(i)[0]: i for i in reversed(range(len(test)))}  # the first image of each caption
        captions = sorted(first, key=len)[:3]
        picture = Path(self.directory) / test.key(first[captions[0]])
        labels = " ".join(map(quote, captions))
        folder, picture = quote(str(picture.parent)), quote(str(picture))
        some = [f"python sample.py zero-shot {out} {picture} --labels {labels}"] if len(captions) > 1 else []
        return [*some, f"python sample.py search {out} {folder} {quote(captions[0])} --top 8 --save sheet.png"]


class Matching:
    """Are true captions told from nearly true ones? Is a search better once the best few are put in order by matching?"""

    name = "matching accuracy"

    def __init__(self, model, processor: Processor, directory: str, commands: Commands):
        self.model, self.processor, self.directory, self.next_commands = model, processor, directory, commands

    def validate(self) -> float:
        return evaluate.matching_accuracy(self.model, self.processor, self.directory)

    def evaluate(self) -> dict[str, Score]:
        return evaluate.matching(self.model, self.processor, self.directory)

    def figure(self, path: Path) -> None:
        evaluate.matching_picture(self.model, self.processor, self.directory, path)


class Generated:
    """Captions or, where questions are to be answered, answers; on held-out images.

    ask: questions are asked where the data have some. False: only where the data have no captions.
    """

    def __init__(self, model, processor: Processor, directory: str, commands: Commands, *, ask: bool):
        self.model, self.processor, self.directory, self.next_commands = model, processor, directory, commands
        self.val = self.open("val")
        self.questions = self.val.questions()
        self.captions_name = "captions, object recall" if is_world(directory) else "captions, words in common"
        described = any(map(self.val.captions, range(len(self.val))))
        self.answers = bool(self.questions) and (ask or not described)
        self.answers_name = evaluate.FREE_ANSWERS if self.val.free_answers else "accuracy of answers"
        self.name = self.answers_name if self.answers else self.captions_name
        self.check_held_out()

    def open(self, split: str) -> Conversations:
        return open_conversations(self.directory, split, image_size=self.processor.image_size)

    def check_held_out(self) -> None:
        """UserError for what would end the first evaluation: it is told before the first step."""
        if is_first_process() and not is_world(self.directory):
            for talk in (self.val, self.test):
                talk.check_pictures()
                if self.answers:
                    evaluate.check_questions(self.model, self.processor, talk)

    def validate(self) -> float:
        return self.answers_score() if self.answers else self.captions_score()

    def captions_score(self) -> float:
        """Of 200 validation images."""
        scores = evaluate.captions(self.model, self.processor, self.val, self.directory, most=VALIDATED)
        return scores[self.captions_name].value

    def answers_score(self) -> float:
        """Of the validation questions; of those in conversations, 200."""
        free = self.val.free_answers
        questions = self.questions[: VALIDATED if free else None]
        said = evaluate.ask(self.model, self.processor, self.val, questions)
        return (evaluate.words_right(questions, said) if free else vqa_accuracy(questions, said)["accuracy"]).value

    def evaluate(self) -> dict[str, Score]:
        return evaluate.speech(self.model, self.processor, self.directory, ask_questions=self.answers)

    def figure(self, path: Path) -> None:
        evaluate.speech_picture(self.model, self.processor, self.directory, path, ask_questions=self.answers)

    # ---- for commands ----

    @cached_property
    def test(self) -> Conversations:
        return self.open("test")

    def path(self, index: int) -> str:
        """An image of the test split, as a word of a command."""
        return quote(str(Path(self.directory) / self.test.key(index)))

    def picture(self) -> str:
        return self.path(next(i for i in range(len(self.test)) if self.test.images([i])[0]))

    def question(self) -> str:
        """An image and a question, as words of a command; nothing where there are no questions."""
        if is_world(self.directory):
            return f'{self.picture()} "how many red shapes are there?"'
        asked = next((q for q in self.test.questions() if len(self.test.images([q.index])[0]) == 1), None)
        return f"{self.path(asked.index)} {quote(asked.text)}" if asked else ""


class Perplexity:
    """How well a language model expects texts that it has not read; on the shapes world, also what it knows of them."""

    name = "1 / perplexity"

    def __init__(self, model, processor: Processor, directory: str, more: Commands):
        self.model, self.processor, self.directory, self.more = model, processor, directory, more
        self.held_out = held_out_texts(directory)
        self.chance = unigram_entropy(self.held_out[:VALIDATED], processor)

    def validate(self) -> float:
        return 1 / perplexity(self.model, self.processor, self.held_out[:VALIDATED]).value

    def evaluate(self) -> dict[str, Score]:
        return evaluate.language(self.model, self.processor, self.directory)

    def figure(self, path: Path) -> None:
        """How the model goes on with beginnings of held-out texts that its context has room for: of conversations, what it
        answers; and what the texts say."""
        rows = []
        for number, text in enumerate(self.held_out):
            begun, rest = split(text, np.random.default_rng(number))
            tokens = beginning(begun, self.model, self.processor)
            if len(tokens) + SAID > self.processor.context:
                continue
            if len(rows) == PICTURED:
                break
            tokens = torch.tensor([tokens], device=self.model.device)
            said = self.processor.decode(self.model.generate(tokens, max_new_tokens=SAID))[0].strip()
            shown = begun if len(begun) <= SHOWN else "… " + begun[-SHOWN:].partition(" ")[2]
            truth = "as the text" if said and rest.startswith(said) else f"the text: {rest}"
            rows.append(Row(shown, [], detail=f"goes on: {said} ({truth})"))
        sheet(rows, title="Held-out beginnings, and how the model goes on").save(path)

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
            held_out.check_pictures()
            check_documents(held_out, processor)

    def open(self, split: str) -> Interleaved:
        return Interleaved(self.directory, split, image_size=self.processor.image_size)

    def perplexity(self, documents: Interleaved) -> Score:
        """chance: unigrams fitted to these very tokens."""
        total, counted = 0.0, []
        with inference(self.model):
            for i in range(0, len(documents), self.batch_size):
                indices = list(range(i, min(i + self.batch_size, len(documents))))
                batch = document_batch(documents, indices, [*map(documents.text, indices)], self.processor)
                tokens = learnt(batch["labels"])
                losses = self.model.losses(**{name: tensor.to(self.model.device) for name, tensor in batch.items()})
                total += len(tokens) * sum(losses.values()).item()
                counted += tokens
        return Score(math.exp(total / len(counted)), math.exp(entropy(counted)), share=False)

    def validate(self) -> float:
        return 1 / self.perplexity(self.val).value

    def evaluate(self) -> dict[str, Score]:
        return {"perplexity": self.perplexity(self.open("test"))}

    def figure(self, path: Path) -> None:
        """Held-out documents up to the last image, and how the model goes on."""
        documents, context, rows = self.open("test"), self.processor.context, []
        for index in range(min(DOCUMENTS, len(documents))):
            text, pictures = documents.text(index), documents.images([index])[0]
            sample = encode_document(text, self.processor, context=context)
            last = len(sample.tokens) - sample.tokens[::-1].index(self.processor.image_token_id)
            pictures = pictures[: placeholders(sample, self.processor)]
            prompt = torch.tensor([sample.tokens[:last]], device=self.model.device)
            room = min(SAID, context - last)
            images = self.processor.images(pictures).to(self.model.device)[None]
            said = self.processor.decode(self.model.generate(images, prompt, max_new_tokens=max(1, room)))[0]
            true = self.processor.decode([[t for t in sample.labels[last:] if t != IGNORED]])[0]
            rows.append(Row(true, pictures, detail="goes on: " + said))
        title = "Held-out documents: what stands behind the last picture, and how the model goes on"
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


class NewClasses:
    """Are classes that were held out told apart by an example of each?"""

    def __init__(self, model, processor: Processor, directory: str, *, ways: int):
        self.model, self.processor, self.directory, self.ways = model, processor, directory, ways
        self.name = f"new words, {ways} ways, an example each"
        self.scores: dict[str, Score] = {}  # once it has been judged

    def validate(self) -> float:
        episodes = class_episodes(self.directory, VALIDATED, shots=self.ways, ways=self.ways, split="val")
        return evaluate.few_shot_accuracy(self.model, self.processor, episodes, ways=self.ways).value

    def evaluate(self) -> dict[str, Score]:
        shots = (0, self.ways)
        self.scores = evaluate.few_shot(self.model, self.processor, self.directory, shots=shots, ways=self.ways)
        return self.scores

    def figure(self, path: Path) -> None:
        evaluate.few_shot_picture(self.scores or self.evaluate(), path)

    def next_commands(self, out: Path) -> list[str]:
        where, ways = quote(str(self.directory)), self.ways
        return [f"python -m minivlm.evaluate {out} --data {where} --ways {ways} --shots 0 {ways}"]
