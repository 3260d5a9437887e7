"""Is the answer right?  Exact match, or agreement with people where ten of them were asked (Antol et al. 2015, "VQA").

Answers are compared as the official evaluation of VQA v2 does it: without case, punctuation and articles, with numbers as
digits and apostrophes where they belong.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from minivlm.errors import UserError
from minivlm.metrics.samples import Samples
from minivlm.metrics.score import Score

if TYPE_CHECKING:
    from minivlm.datasets.conversations import Question

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(i) for i, word in enumerate(COUNTED)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
# What "dont" and "couldn'tve" are turned into: each of these is also known with any one of its apostrophes missing.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""
MISSPELT = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTIONS.split() for at, mark in enumerate(word) if mark == "'"
} | {"somebody'd": "somebodyd"}  # as it stands in the official table
PEOPLE = 10  # annotators of a question in VQA v2; so many agree by 3 of them
OFTEN = 20  # a text that is asked so often has a usual answer of its own


@lru_cache(maxsize=2**16)  # ten people mostly say the same few things
def normalise(answer: str) -> str:
    """ "At the top-left." → "at top left", "Two" → "2", "dont" → "don't".

    As the official script does it, whatever that makes of a word: a mark is dropped from the whole answer if it stands at the
    edge of a word anywhere in it, or if a number has a comma; else it becomes a space.
    """
    given = stripped(answer)
    number, text = re.search(r"\d,\d", given), given  # "1,000"
    for mark in PUNCTUATION:
        at_an_edge = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if at_an_edge or number else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # there, a flag stands where the count belongs
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(MISSPELT.get(word, word) for word in words if word not in ARTICLES)


def rightness(said: str, answers: Sequence[str]) -> float:
    """How right an answer is, from 0 to 1. As in the official evaluation, what ten people answer in the same way is compared as
    it is written, and all else normalised."""
    if len(answers) == PEOPLE and len({stripped(answer) for answer in answers}) == 1:
        return agreement(stripped(said), [stripped(answer) for answer in answers])
    return agreement(normalise(said), [normalise(answer) for answer in answers])


def stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Both normalised. With ten answers: min(1, matches / 3), averaged over all ways to leave one person out. Otherwise
    1 if it is one of the answers."""
    matches = sum(answer == prediction for answer in answers)
    if len(answers) != PEOPLE:
        return float(matches > 0)
    # Those who gave this answer leave one match fewer behind, the others all of them.
    return (matches * min(1, (matches - 1) / 3) + (PEOPLE - matches) * min(1, matches / 3)) / PEOPLE


def vqa_accuracy(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, Score]:
    """{"accuracy": Score, "accuracy, count": Score, …}: over all questions, and over those of each kind. Questions about one
    image (`index`) are one sample of the bootstrap.

    Chance is the score without any image, by one who knows these very questions: a text that is asked often gets its most
    frequent answer, others the most frequent answer of their kind (the prior of Antol et al. 2015, §4).

    Raises UserError where there are no questions; ValueError where there is not one prediction for each.
    """
    if len(predictions) != len(questions):
        raise ValueError(f"{len(questions)} questions, but {len(predictions)} predictions")
    if not questions:
        raise UserError("there are no questions to measure with.")
    answers = [[normalise(answer) for answer in question.answers] for question in questions]
    values = [rightness(said, question.answers) for said, question in zip(predictions, questions, strict=True)]
    chances = usual(questions, answers)
    kinds = {"accuracy": range(len(questions))}
    for kind in dict.fromkeys(question.kind for question in questions):
        kinds[f"accuracy, {kind}"] = [i for i, question in enumerate(questions) if question.kind == kind]
    return {
        name: Score.of(
            Samples.mean([values[i] for i in rows], [questions[i].index for i in rows]), mean(chances[i] for i in rows)
        )
        for name, rows in kinds.items()
    }


def usual(questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> list[float]:
    """For each question, how good its usual answer is on average."""
    asked = Counter((question.kind, question.text) for question in questions)
    groups = defaultdict(list)
    for i, question in enumerate(questions):
        text = question.text if asked[question.kind, question.text] >= OFTEN else None
        groups[question.kind, text].append(i)
    chances = [0.0] * len(questions)
    for rows in groups.values():
        totals = Counter()
        for i in rows:
            for answer in set(answers[i]):
                totals[answer] += agreement(answer, answers[i])
        best = max(totals.values()) / len(rows)
        for i in rows:
            chances[i] = best
    return chances


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
