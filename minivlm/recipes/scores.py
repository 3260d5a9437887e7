"""What judges a model while it trains and afterwards: the functions of minivlm/evaluate, each kind with its data at hand.

Every class has

    name                 of what `validate` returns, in words
    validate(most)       one number from 0 to 1 to choose the best checkpoint by, of so many images; higher is better
    evaluate()           all scores on held-out data
    figure(path)         draws what was learnt
    next_commands(out)   what to try on the model in `out`
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from shlex import quote

from minivlm import evaluate
from minivlm.datasets.class_episodes import class_episodes
from minivlm.datasets.conversations import Conversations, open_conversations
from minivlm.datasets.folder import open_pairs
from minivlm.datasets.shapes import is_world
from minivlm.datasets.source import Source
from minivlm.evaluate.expectation import some_of
from minivlm.metrics import Score, vqa_accuracy
from minivlm.processes import is_first_process
from minivlm.processor import Processor

VALIDATED = 200  # captions, episodes, or answers in whole sentences, that a checkpoint is judged by

EXPECTED = "1 / perplexity"

Commands = Callable[[Path, str], list[str]]  # of the run's directory and an image


def nothing(out: Path, image: str) -> list[str]:
    return []


class Retrieval:
    """Does an image find its caption, and a caption its image? And, where there are labels, an image its class?"""

    name = "text→image Recall@1"

    def __init__(self, model, processor: Processor, directory: str):
        self.model, self.processor, self.directory = model, processor, directory

    def validate(self, most: int) -> float:
        pairs = open_pairs(self.directory, "val", image_size=self.processor.image_size)
        return evaluate.retrieval(self.model, self.processor, pairs, most=most)["text→image R@1"].value

    def evaluate(self) -> dict[str, Score]:
        return evaluate.contrast(self.model, self.processor, self.directory)

    def figure(self, path: Path) -> None:
        evaluate.retrieval_sheet(self.model, self.processor, self.directory, path)

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
    """Are nearly true captions detected? Is a search better once the best few are put in order by matching?"""

    name = "matching accuracy"

    def __init__(self, model, processor: Processor, directory: str, more: Commands):
        """more: commands besides those that match and search, for the run's directory and an image."""
        self.model, self.processor, self.directory, self.more = model, processor, directory, more

    def validate(self, most: int) -> float:
        return evaluate.matching_accuracy(self.model, self.processor, self.directory, most=most)

    def evaluate(self) -> dict[str, Score]:
        return evaluate.matching(self.model, self.processor, self.directory)

    def figure(self, path: Path) -> None:
        evaluate.matching_sheet(self.model, self.processor, self.directory, path)

    def next_commands(self, out: Path) -> list[str]:
        test = open_pairs(self.directory, "test", image_size=self.processor.image_size)
        picture = Path(self.directory) / test.key(0)
        folder, picture, text = quote(str(picture.parent)), quote(str(picture)), quote(test.all_captions(0)[0])
        return [
            f"python sample.py match {out} {picture} {text}",
            f"python sample.py search {out} {folder} {text} --rerank 16 --save sheet.png",
            *self.more(out, picture),
        ]


class Generated:
    """Captions or, where questions are to be answered, answers; on held-out images.

    ask: questions are asked where the data have some. False: only where the data have no captions. more: commands besides
    those that caption, with these options, and with `ask` answer.
    """

    def __init__(
        self, model, processor: Processor, directory: str, more: Commands = nothing, *, ask: bool, options: str = ""
    ):
        self.model, self.processor, self.directory, self.more = model, processor, directory, more
        self.ask, self.options = ask, options
        self.val = self.open("val")
        self.questions = self.val.questions()
        own = "captions, object recall" if is_world(directory) else "captions, words in common"
        expected = model.predicts_text and not is_world(directory)
        self.captions_name = EXPECTED if expected else own
        described = any(map(self.val.captions, range(len(self.val))))
        self.answers = bool(self.questions) and (ask or not described)
        self.answers_name = "accuracy of answers"
        if self.val.free_answers:
            self.answers_name = EXPECTED if expected else evaluate.FREE_ANSWERS
        self.name = self.answers_name if self.answers else self.captions_name
        self.check_held_out()

    def open(self, split: str) -> Conversations:
        return open_conversations(self.directory, split, image_size=self.processor.image_size)

    def check_held_out(self) -> None:
        """UserError, before the first step, for what would end the first evaluation."""
        if is_first_process() and not is_world(self.directory):
            for conversations in (self.val, self.test):
                conversations.check_images()
                if self.answers:
                    evaluate.check_questions(self.model, self.processor, conversations)

    def validate(self, most: int) -> float:
        return self.answers_score(most) if self.answers else self.captions_score(most)

    def captions_score(self, most: int) -> float:
        """On the shapes world, and of a model whose loss is not that of the text alone, of 200 validation images."""
        if self.captions_name == EXPECTED:
            return self.expected(most, captions=True)
        scores = evaluate.captions(self.model, self.processor, self.val, self.directory, most=min(most, VALIDATED))
        return scores[self.captions_name].value

    def answers_score(self, most: int) -> float:
        """Of the questions about `most` validation images; of those in conversations, 200, unless they are expected."""
        if self.answers_name == EXPECTED:
            return self.expected(most, captions=False)
        known = {*some_of(len(self.val), most)}
        questions = [question for question in self.questions if question.index in known]
        if self.val.free_answers:
            questions = questions[:VALIDATED]
            return evaluate.words_right(questions, evaluate.ask(self.model, self.processor, self.val, questions)).value
        answers = evaluate.ask(self.model, self.processor, self.val, questions)
        return vqa_accuracy(questions, answers)["accuracy"].value

    def expected(self, most: int, *, captions: bool) -> float:
        return 1 / evaluate.text_perplexity(self.model, self.processor, self.val, captions=captions, most=most).value

    def evaluate(self) -> dict[str, Score]:
        return evaluate.answers_and_captions(self.model, self.processor, self.directory, ask_questions=self.answers)

    def figure(self, path: Path) -> None:
        evaluate.answers_sheet(self.model, self.processor, self.directory, path, ask_questions=self.answers)

    def next_commands(self, out: Path) -> list[str]:
        image, asked = self.image(), self.question() if self.ask else ""
        answer = [f"python sample.py answer {out} {asked}"] if asked else []
        return [f"python sample.py caption {out} {image}{self.options}", *answer, *self.more(out, image)]

    @cached_property
    def test(self) -> Conversations:
        return self.open("test")

    def path(self, index: int) -> str:
        """An image of the test split, as a word of a command."""
        return quote(str(Path(self.directory) / self.test.key(index)))

    def image(self) -> str:
        return self.path(next(i for i in range(len(self.test)) if self.test.images([i])[0]))

    def question(self) -> str:
        """An image and a question, as words of a command; nothing where there are no questions."""
        if is_world(self.directory):
            return f'{self.image()} "how many red shapes are there?"'
        asked = next((q for q in self.test.questions() if len(self.test.images([q.index])[0]) == 1), None)
        return f"{self.path(asked.index)} {quote(asked.text)}" if asked else ""


class NewClasses:
    """Are held-out classes recognised by an example of each?"""

    def __init__(self, model, processor: Processor, directory: str, *, ways: int):
        self.model, self.processor, self.directory, self.ways = model, processor, directory, ways
        self.name = f"new words, {ways} ways, an example each"
        self.scores: dict[str, Score] = {}  # once it has been judged

    def validate(self, most: int) -> float:
        episodes = class_episodes(self.directory, min(most, VALIDATED), shots=self.ways, ways=self.ways, split="val")
        return evaluate.few_shot_accuracy(self.model, self.processor, episodes, ways=self.ways).value

    def evaluate(self) -> dict[str, Score]:
        shots = (0, self.ways)
        self.scores = evaluate.few_shot(self.model, self.processor, self.directory, shots=shots, ways=self.ways)
        return self.scores

    def figure(self, path: Path) -> None:
        evaluate.few_shot_picture(self.scores or self.evaluate(), path)

    def next_commands(self, out: Path) -> list[str]:
        where, ways = quote(str(self.directory)), self.ways
        options = Source.of(self.directory).flags()
        return [f"python -m minivlm.evaluate {out} --data {where}{options} --ways {ways} --shots 0 {ways}"]
