"""Answers from a list: the fixed list of a model that chooses, or answers that are given, which a BLIP ranks.

question ─→ tokens ─┐
image    ─→ pixels ─┴─ answer ─→ logits (B, A) ─ argmax ─→ config.answers[i]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.image_preprocessing import Picture, as_list
from minivlm.tasks.abilities import require, require_answers
from minivlm.tasks.features import finite, image_inputs, inference, to_tokens


def choose_all(
    samples: Sequence[tuple[Sequence[Picture], str]], model, processor, *, batch_size: int = 64, **options
) -> list[str]:
    """The likeliest answer to each (images, question).

    UserError for samples that have not one image, an empty question or one beyond the context, and for options.
    """
    check_chooser(model, processor, options)
    logits = answer_logits(samples, model, processor, batch_size=batch_size)
    return [model.config.answers[best] for best in logits.argmax(dim=1).tolist()]


def answer_logits(
    samples: Sequence[tuple[Sequence[Picture], str]], model, processor, *, batch_size: int = 64
) -> Tensor:
    """The logits of all answers of a model that chooses, (N, A) on the CPU. Errors: see `choose_all`."""
    check_chooser(model, processor, {})
    found = [torch.empty(0, len(model.config.answers))]
    for i in range(0, len(samples), batch_size):
        images, questions = zip(*samples[i : i + batch_size], strict=True)
        if wrong := [len(some) for some in images if len(some) != 1]:
            raise UserError(
                f"{type(model).__name__} answers about one image at a time, but was given {wrong[0]} at once."
            )
        if not all(question.strip() for question in questions):
            raise UserError("the question is empty; say what you would like to know.")
        tokens, mask = to_tokens(questions, processor)
        with inference(model):
            shown = image_inputs([image for [image] in images], model, processor)
            logits = finite(model.answer(shown, tokens.to(model.device), mask.to(model.device)), model)
        found.append(logits.float().cpu())
    return torch.cat(found)


def check_chooser(model, processor, options: dict[str, Any]) -> None:
    require(model, processor, "choose")
    name = type(model).__name__
    if not model.takes_images:
        raise UserError(
            f"this {name} takes features of regions that a detector has found, not images: give them to "
            "`model.answer` in Python, as ImageFeatures of (B, R, C)."
        )
    if given := sorted(options.keys() - {"max_new_tokens"}):
        answers = len(model.config.answers)
        raise UserError(f"{name} chooses one of {answers} answers and generates none: leave out {', '.join(given)}.")


def rank_answers(
    images: Picture | Sequence[Picture], question: str, answers: Sequence[str], model, processor
) -> list[tuple[str, float]]:
    """Rank answers to a question about an image, likeliest first, each with its log-likelihood.  Li et al. 2022, §5.3.

    UserError: a model that ranks no answers, none to be ranked, and what `require_answers` and `to_tokens` refuse.
    """
    images = as_list(images)
    require_answers(model, processor, images=len(images), ability="rank")
    if len(images) != 1:
        raise UserError(f"{type(model).__name__} ranks answers about one image, but was given {len(images)}.")
    if not answers or not all(text.strip() for text in [question, *answers]):
        raise UserError("there is nothing to rank: give a question, and answers of at least one word.")
    texts = [(x.to(model.device) for x in to_tokens(some, processor)) for some in ([question], list(answers))]
    pixels = processor.images(images).to(model.device, model.dtype)
    with inference(model):
        [scores] = finite(model.rank(pixels, *texts[0], *texts[1]), model).tolist()
    return sorted(zip(answers, scores, strict=True), key=lambda pair: -pair[1])
