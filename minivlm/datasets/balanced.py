"""Balanced pairs: one question about two images, with two answers (Goyal et al. 2017, "Making the V in VQA Matter", §3).

Whoever answers from the question alone is wrong about one image of each pair.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from minivlm.datasets.conversation_base import Question
from minivlm.metrics.vqa import agreement, normalise


def balanced_pairs(questions: Sequence[Question], *, most: int | None = None) -> list[tuple[int, int]]:
    """Indices of questions in pairs: the same text and kind, about two samples, and neither's answer is right for the other.

    Each question is in one pair at most. Of a text the two most frequent answers that are left are paired first, so that
    there are as many pairs as can be had. With `most`, texts take turns.
    """
    by_text: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, question in enumerate(questions):
        if question.answers:
            by_text[question.kind, normalise(question.text)][best_answer(question)].append(i)
    of_texts = [pairs_of(questions, groups) for groups in by_text.values() if len(groups) > 1]
    turns = max(map(len, of_texts), default=0)
    found = [pairs[turn] for turn in range(turns) for pairs in of_texts if turn < len(pairs)]
    return found[:most]


def best_answer(question: Question) -> str:
    """The answer that most of those who were asked gave, normalised."""
    given = [normalise(answer) for answer in question.answers]
    return max(given, key=lambda answer: (given.count(answer), -given.index(answer)))


def pairs_of(questions: Sequence[Question], groups: dict[str, list[int]]) -> list[tuple[int, int]]:
    left, pairs = [list(group) for group in groups.values()], []
    while len(left := sorted((group for group in left if group), key=len, reverse=True)) > 1:
        one, other = left[0].pop(0), left[1].pop(0)
        if apart(questions[one], questions[other]):
            pairs.append((one, other))
    return pairs


def apart(one: Question, other: Question) -> bool:
    """Whether no image is asked about twice, and neither best answer is right for the other question."""
    for a, b in ((one, other), (other, one)):
        if agreement(best_answer(a), [normalise(answer) for answer in b.answers]) > 0:
            return False
    return one.index != other.index
