"""Each task as a function of a batch, for batches_to_files.py: prepared images and values of the rows → a result for each.

A row of a file has the random numbers that it would have alone (seed), whatever is beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from minivlm.tasks.abilities import require
from minivlm.tasks.batches_to_files import Images, Task
from minivlm.tasks.choose import rank_answers
from minivlm.tasks.features import encode_pixels, inference
from minivlm.tasks.few_shot import few_shot_all
from minivlm.tasks.generate import answer_all, caption_all, complete_all
from minivlm.tasks.match import match_each
from minivlm.tasks.zero_shot import class_features, likeliest_labels

Values = Sequence[Mapping[str, Any]]


def label_task(labels: Sequence[str], model, processor, *, templates: Sequence[str], top_k: int) -> Task:
    """The likeliest label of an image, how probable it is, and the `top_k` likeliest. The labels are encoded once."""
    require(model, processor, "encode")
    classes = class_features(labels, model, processor, templates)

    def classify(images: Images, _: Values) -> list[dict]:
        with inference(model):
            features = encode_pixels(torch.cat([image for [image] in images]), model)
        found = likeliest_labels(features, classes, labels, model, top_k)
        return [{"label": best[0][0], "probability": best[0][1], "labels": dict(best)} for best in found]

    return classify


def match_task(model, processor) -> Task:
    """The probability that a text describes an image."""
    require(model, processor, "match")

    def probabilities(images: Images, values: Values) -> list[dict]:
        texts = [one["text"] for one in values]
        return [{"probability": p} for p in match_each([image for [image] in images], texts, model, processor)]

    return probabilities


def caption_task(model, processor, how: dict[str, Any], *, prompt: str | None = None, alone: bool) -> Task:
    """A caption of an image. how: options of generation. alone: see `seeds`."""

    def captions(images: Images, _: Values) -> list[dict]:
        settings = {"prompt": prompt, "batch_size": len(images), **seeds(how, len(images), model, alone)}
        return [{"caption": text} for text in caption_all(images, model, processor, **settings)]

    return captions


def answer_task(model, processor, how: dict[str, Any], *, candidates: Sequence[str] | None = None, alone: bool) -> Task:
    """The answer to a question about images, generated, chosen by a model that chooses, or ranked first of `candidates`."""

    def answers(images: Images, values: Values) -> list[dict]:
        asked = [(some, one["question"]) for some, one in zip(images, values, strict=True)]
        if candidates:
            return [{"answer": rank_answers(*one, candidates, model, processor)[0][0]} for one in asked]
        settings = {"batch_size": len(asked), **seeds(how, len(asked), model, alone)}
        return [{"answer": text} for text in answer_all(asked, model, processor, **settings)]

    return answers


def few_shot_task(model, processor, how: dict[str, Any], *, examples, candidates=None, alone: bool) -> Task:
    """How the text of an image continues, after examples (image, text), whose images are prepared once."""
    examples = [(processor.images([image]), text) for image, text in examples]

    def continuations(images: Images, values: Values) -> list[dict]:
        queries = [(image, one["text"]) for [image], one in zip(images, values, strict=True)]
        settings = {"candidates": candidates, **seeds(how, len(queries), model, alone)}
        return [{"continuation": text} for text in few_shot_all(model, processor, examples, queries, **settings)]

    return continuations


def complete_task(model, processor, how: dict[str, Any], *, alone: bool) -> Task:
    """A text with its continuation."""

    def completions(_: Images, values: Values) -> list[dict]:
        texts = [one["text"] for one in values]
        return [
            {"completion": text}
            for text in complete_all(texts, model, processor, **seeds(how, len(texts), model, alone))
        ]

    return completions


def seeds(how: dict[str, Any], n: int, model, alone: bool) -> dict[str, Any]:
    """The options for n rows. alone: each has the random numbers that it has as the only one."""
    return {**how, "seed": [how.get("seed", 0)] * n} if alone and "choose" not in model.abilities else how
