"""A list of the most frequent answers to choose from (Antol et al. 2015, §4), and how right each of them is."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from minivlm.datasets.conversations import Question
from minivlm.metrics.vqa import agreement, normalise


def most_frequent(questions: Iterable[Question], most: int) -> tuple[str, ...]:
    """The `most` most frequent right answers, each in its most frequent spelling; "Yes" and "yes." are one answer."""
    spellings: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        for answer in question.answers:
            spellings[normalise(answer)][answer] += 1
    known = sorted(spellings, key=lambda answer: (-spellings[answer].total(), answer))[:most]
    return tuple(min(spellings[answer], key=lambda s: (-spellings[answer][s], s)) for answer in known)


class AnswerList:
    """Maps each answer of a list to its index."""

    def __init__(self, answers: Sequence[str]):
        self.answers = answers
        self.index = {normalise(answer): i for i, answer in enumerate(answers)}

    def knows(self, question: Question) -> bool:
        """Whether a right answer is on the list."""
        return any(normalise(answer) in self.index for answer in question.answers)

    def weights(self, question: Question) -> np.ndarray:
        """(A,) float32: of those who answered, the share that gave each answer; those not on the list count nowhere."""
        weights = np.zeros(len(self.answers), dtype=np.float32)
        for answer in question.answers:
            if (index := self.index.get(normalise(answer))) is not None:
                weights[index] += 1 / len(question.answers)
        return weights

    def scores(self, question: Question) -> np.ndarray:
        """(A,) float32: what each answer would score (see `agreement`): of ten people's, those of four or more are right."""
        given = [normalise(answer) for answer in question.answers]
        scores = np.zeros(len(self.answers), dtype=np.float32)
        for answer in set(given) & self.index.keys():
            scores[self.index[answer]] = agreement(answer, given)
        return scores
