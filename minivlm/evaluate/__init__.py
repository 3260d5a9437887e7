"""Scores of a trained model on held-out images and texts: `python -m minivlm.evaluate MODEL [--data DIR]` (command.py)."""

from __future__ import annotations

from pathlib import Path

from minivlm.datasets.contents import contents, summary
from minivlm.datasets.shapes import is_world
from minivlm.errors import UserError
from minivlm.evaluate.compare import AS_EVER, How, contrast, retrieval, retrieval_sheet, shows, zero_shot
from minivlm.evaluate.expectation import text_perplexity
from minivlm.evaluate.few_shot import few_shot, few_shot_accuracy, few_shot_picture
from minivlm.evaluate.generation import (
    FREE_ANSWERS,
    answers_and_captions,
    answers_sheet,
    ask,
    captions,
    check_questions,
    words_right,
)
from minivlm.evaluate.language import language
from minivlm.evaluate.match import matching, matching_accuracy, matching_sheet
from minivlm.evaluate.predictions import Prediction
from minivlm.evaluate.probe import by_vectors
from minivlm.evaluate.table import table
from minivlm.metrics import Score

__all__ = [
    "FREE_ANSWERS",
    "How",
    "answers_and_captions",
    "answers_sheet",
    "ask",
    "by_vectors",
    "captions",
    "check_questions",
    "contrast",
    "evaluate",
    "few_shot",
    "few_shot_accuracy",
    "few_shot_picture",
    "language",
    "matching",
    "matching_accuracy",
    "matching_sheet",
    "retrieval",
    "retrieval_sheet",
    "shows",
    "table",
    "text_perplexity",
    "words_right",
    "zero_shot",
]


def evaluate(
    model, processor, directory: str | Path, kept: list[Prediction] | None = None, *, how: How = AS_EVER
) -> dict[str, Score]:
    """All scores of a model of any kind on the held-out part of a dataset; where `how` says something of vectors, those of its
    vectors. kept: gets what it generates for them. UserError where it has nothing to judge by."""
    if how != AS_EVER:
        return by_vectors(model, processor, directory, how)
    if scores := scores_of(model, processor, directory, kept):
        return scores
    held_out = summary(contents(directory)["test"])
    raise UserError(
        f"{directory} holds {held_out} to judge by, but a {type(model).__name__} is judged by none of these."
    )


def scores_of(model, processor, directory: str | Path, kept: list[Prediction] | None) -> dict[str, Score]:
    can = model.abilities
    if "choose" in can:
        scores = answers_and_captions(model, processor, directory, kept=kept)
        if "match" in can and is_world(directory):
            scores |= matching(model, processor, directory)
        return scores | (contrast(model, processor, directory) if "encode" in can else {})
    if "match" in can:
        scores = matching(model, processor, directory)
        return scores | (answers_and_captions(model, processor, directory, kept=kept) if "answer" in can else {})
    if "encode" in can:
        scores = contrast(model, processor, directory)
        generates = kept is not None and "caption" in can
        return scores | (answers_and_captions(model, processor, directory, kept=kept) if generates else {})
    if can & {"caption", "answer"}:
        if not model.takes_images:
            return language(model, processor, directory)
        return answers_and_captions(model, processor, directory, kept=kept)
    if "compare" in can:
        raise UserError(f"a {type(model).__name__} has vectors of images alone: judge them with --probe knn,linear.")
    raise UserError(f"a {type(model).__name__} has no ability that can be evaluated.")
