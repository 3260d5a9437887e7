"""Answers of a model that does not speak but chooses: every question gets one of a fixed list.

question ─→ tokens ─┐
picture ──→ pixels ─┴─ answer ─→ logits (B, A) ─ argmax ─→ config.answers[i]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minivlm.errors import UserError
from minivlm.tasks.features import finite, inference, to_tokens


def chooses(model) -> bool:
    """Are its answers those of a list?"""
    answers = getattr(getattr(model, "config", None), "answers", None)
    return isinstance(answers, tuple) and bool(answers)


def choose_all(
    samples: Sequence[tuple[Sequence[Any], str]], model, processor, *, batch_size: int = 64, **options
) -> list[str]:
    """The likeliest answer to each (pictures, question).

    UserError for samples without just one picture, an empty question or one beyond the context, and for options.
    """
    check_chooser(model, processor, options)
    said = []
    for i in range(0, len(samples), batch_size):
        pictures, questions = zip(*samples[i : i + batch_size], strict=True)
        if wrong := [len(some) for some in pictures if len(some) != 1]:
            raise UserError(
                f"{type(model).__name__} answers about one picture at a time, but was given {wrong[0]} at once."
            )
        if not all(question.strip() for question in questions):
            raise UserError("the question is empty; say what you would like to know.")
        tokens, mask = to_tokens(questions, processor)
        pixels = processor.images([image for [image] in pictures]).to(model.device, model.dtype)
        with inference(model):
            logits = finite(model.answer(pixels, tokens.to(model.device), mask.to(model.device)), model)
        said += [model.config.answers[best] for best in logits.argmax(dim=1).tolist()]
    return said


def check_chooser(model, processor, options: dict[str, Any]) -> None:
    name = type(model).__name__
    if processor is None:
        raise UserError(f"there is no processor beside this {name}, so it can neither be shown nor told anything.")
    if getattr(model, "vision", None) is None:
        raise UserError(
            f"this {name} reads features of regions that a detector has found, not pictures: give them to "
            "`model.answer` in Python, as ImageFeatures of (B, R, C)."
        )
    if given := sorted(options.keys() - {"max_new_tokens"}):
        answers = len(model.config.answers)
        raise UserError(f"{name} chooses one of {answers} answers and does not speak: leave out {', '.join(given)}.")


def rank_answers(
    images: Any | Sequence[Any], question: str, answers: Sequence[str], model, processor
) -> list[tuple[str, float]]:
    """What a BLIP finds likely of these answers about a picture, best first, each with its log-likelihood.  Li et al.
    2022, §5.3.

    UserError: a model that ranks no answers, none to be ranked, and what `check_answerer` and `to_tokens` refuse.
    """
    from minivlm.tasks.generate import check_answerer

    if not hasattr(model, "rank") or not model.config.answers:
        raise UserError(f"{type(model).__name__} ranks no answers; that needs a BLIP that was trained on questions.")
    images = images if isinstance(images, (list, tuple)) else [images]
    check_answerer(model, processor, images=len(images))
    if len(images) != 1:
        raise UserError(f"{type(model).__name__} ranks answers about one picture, but was given {len(images)}.")
    if not answers or not all(text.strip() for text in [question, *answers]):
        raise UserError("there is nothing to rank: give a question, and answers of at least one word.")
    texts = [(x.to(model.device) for x in to_tokens(some, processor)) for some in ([question], list(answers))]
    pixels = processor.images(images).to(model.device, model.dtype)
    with inference(model):
        [scores] = finite(model.rank(pixels, *texts[0], *texts[1]), model).tolist()
    return sorted(zip(answers, scores, strict=True), key=lambda pair: -pair[1])
