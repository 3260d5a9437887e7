"""Answers from the question alone: what an image adds has to be more than this.

usual answer   the most frequent training answer to this text, else to its kind, else to any (Antol et al. 2015, §4)
its words      a linear classifier of its words and first two words together (Zhou et al. 2015, "Simple Baseline for Visual
               Question Answering", without its image)
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from minivlm.datasets.answers import AnswerList, most_frequent
from minivlm.datasets.conversations import Conversations, Question, open_conversations
from minivlm.errors import UserError
from minivlm.evaluate.expectation import some_of
from minivlm.metrics.vqa import normalise

MOST = 10_000  # questions to learn from
OFTEN = 5  # a text that training asks so often has a usual answer of its own
ANSWERS = 1000  # the most frequent ones are told apart by words
STEPS, BATCH, LEARNING_RATE = 300, 256, 0.05
FOLDS = 5

Baseline = Callable[[Sequence[Question]], list[str]]  # questions → an answer to each, normalised


def question_only(
    data, conversations: Conversations, questions: Sequence[Question]
) -> tuple[dict[str, list[str]], str]:
    """{"usual answer": an answer to each question, "its words": …}, and what they were learned from: the training split, or
    where there is none, in turns from four fifths of the images that are judged (cross-validation)."""
    train = training_questions(data, conversations, questions)
    makers = {"usual answer": usual_answers, "its words": answers_by_words}
    if train:
        return {name: make(train)(questions) for name, make in makers.items()}, "the training split"
    fold = {index: i % FOLDS for i, index in enumerate(dict.fromkeys(q.index for q in questions))}
    found = {name: [""] * len(questions) for name in makers}
    for k in range(FOLDS):
        known = [q for q in questions if fold[q.index] != k]
        asked = [i for i, q in enumerate(questions) if fold[q.index] == k]
        for name, make in makers.items() if known and asked else ():
            for i, answer in zip(asked, make(known)([questions[i] for i in asked]), strict=True):
                found[name][i] = answer
    return found, "the other images of the split itself"


def training_questions(data, conversations: Conversations, questions: Sequence[Question]) -> list[Question]:
    """Some of the training questions; none where the folder has none, or the same ones as are judged."""
    try:
        train = open_conversations(data, "train", image_size=None)
    except UserError:  # it names splits, and has nothing to train on: the baselines are cross-validated
        return []
    judged = {(conversations.key(q.index), q.text) for q in questions}
    samples = some_of(len(train), MOST)
    asked = [q for i in samples for q in train.asked(i, np.random.default_rng(i))]
    asked = [asked[i] for i in some_of(len(asked), MOST)]
    return [q for q in asked if (train.key(q.index), q.text) not in judged]


def usual_answers(train: Sequence[Question]) -> Baseline:
    counts: defaultdict[tuple, Counter[str]] = defaultdict(Counter)
    for question in train:
        for answer in question.answers:
            for key in ((question.kind, as_text(question)), (question.kind, None), (None, None)):
                counts[key][normalise(answer)] += 1 / len(question.answers)

    def usual(question: Question) -> str:
        keys = ((question.kind, as_text(question)), (question.kind, None), (None, None))
        [known, *_] = (counts[key] for key in keys if key[1:] == (None,) or counts[key].total() >= OFTEN)
        return max(known, key=lambda answer: (known[answer], answer), default="")

    return lambda questions: [usual(question) for question in questions]


def as_text(question: Question) -> str:
    return normalise(question.text)


def answers_by_words(train: Sequence[Question], *, seed: int = 0) -> Baseline:
    """Softmax regression, trained for `STEPS` steps of Adam; deterministic."""
    answers = AnswerList(most_frequent(train, ANSWERS))
    known = [question for question in train if answers.knows(question)]
    seen = Counter(word for question in known for word in features(question))
    place = {word: i for i, (word, _) in enumerate(seen.most_common())}
    weights = torch.zeros(len(place) + 1, len(answers.answers), requires_grad=True)  # the last row: the bias
    optimiser = torch.optim.Adam([weights], lr=LEARNING_RATE)
    rng = np.random.default_rng(seed)
    numbers = lambda question: [*(place[w] for w in features(question) if w in place), len(place)]

    def logits(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        starts = np.cumsum([0, *map(len, rows)])[:-1]
        flat = torch.tensor([i for row in rows for i in row])
        return F.embedding_bag(flat, weights, torch.from_numpy(starts), mode="sum")  # (B, A)

    rows, targets = [*map(numbers, known)], np.stack([answers.weights(question) for question in known])
    for _ in range(STEPS):
        some = rng.integers(0, len(known), min(BATCH, len(known)))
        loss = F.cross_entropy(logits([rows[i] for i in some]), torch.from_numpy(targets[some]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def best(questions: Sequence[Question]) -> list[str]:
        with torch.no_grad():
            return [normalise(answers.answers[i]) for i in logits([*map(numbers, questions)]).argmax(dim=1).tolist()]

    return best


def features(question: Question) -> list[str]:
    words = re.findall(r"\w+", question.text.lower())
    return [*dict.fromkeys(words), " ".join(words[:2]), f"kind {question.kind}"]
