"""Scores of a language model: how well it predicts held-out texts, and what it learns from its context.

perplexity   exp of the mean surprise per token; beside it, that of the best model that knows no context (unigrams).
             One with an encoder is given the beginning of each text and judged by the rest
told scenes  questions about scenes that a text describes: are they answered?
few-shot     new words, each explained by k examples: is the right one generated?
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from torch import Tensor

from minivlm.conversation import IGNORED, collate
from minivlm.datasets.continuation import collate_pairs, split, tokens_of
from minivlm.datasets.conversations import Question, open_texts
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.episodes import document, few_shot, held_out_scenes
from minivlm.datasets.shapes.questions import judge
from minivlm.datasets.shapes.text import canonical
from minivlm.datasets.source import judged
from minivlm.datasets.text_batches import Document, text_sample
from minivlm.errors import UserError
from minivlm.metrics import Samples, Score, vqa_accuracy
from minivlm.processes import each
from minivlm.tasks.features import inference
from minivlm.tasks.generate import model_inputs, prompt_tokens

HELD_OUT = 500  # documents of the shapes world
EPISODES = 300
TOLD, QUESTIONS = 500, 100  # scenes that a text describes, and questions about them of each kind
SHOTS = (1, 2, 4)  # examples of each word


def language(model, processor, directory: str | Path) -> dict[str, Score]:
    """All scores of a language model on held-out texts of a dataset."""
    scores = {"perplexity": perplexity(model, processor, held_out_texts(directory))}
    if is_world(directory):
        scores |= {f"new words, {k} shot{'s' * (k > 1)}": new_words(model, processor, k) for k in SHOTS}
        scores |= told_scenes(model, processor)
    return scores


def held_out_texts(directory: str | Path) -> list[Document]:
    if is_world(directory):
        if (split := judged(directory, "test")) != "test":
            raise UserError(f"--split {split}: the texts of the shapes world are of no split; leave it out.")
        return [document(0, "held out", i) for i in range(HELD_OUT)]
    return open_texts(directory, "test")


def perplexity(model, processor, documents: Sequence[Document], *, batch_size: int = 32) -> Score:
    """exp of the mean cross-entropy per token that is learnt. chance: unigrams fitted to these very tokens."""
    batches = batches_of_texts if model.continues_prompt else batches_with_encoder

    def expected(batch: dict[str, Tensor]) -> tuple[float, list[int]]:
        tokens = learnt(batch["labels"])
        losses = model.losses(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        return len(tokens) * sum(losses.values()).item(), tokens

    with inference(model):
        sums, tokens = zip(*each(expected, [*batches(processor, documents, batch_size)]), strict=True)
    samples = Samples("perplexity", np.stack([sums, [*map(len, tokens)]], axis=1))
    return Score.of(samples, math.exp(entropy([*chain.from_iterable(tokens)])), share=False)


def batches_of_texts(processor, documents: Sequence[Document], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The arguments of `model.losses`."""
    for i in range(0, len(documents), batch_size):
        yield collate([text_sample(text, processor) for text in documents[i : i + batch_size]], processor.pad_token)


def batches_with_encoder(processor, documents: Sequence[Document], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """The same for texts that are cut in two, always at the same places: judged is what follows the cut."""
    rng = np.random.default_rng(0)
    for i in range(0, len(documents), batch_size):
        pairs = [tokens_of(split(text, rng), processor) for text in documents[i : i + batch_size]]
        yield collate_pairs(pairs, processor)


def learnt(labels: Tensor) -> list[int]:
    """The tokens that a loss judges."""
    return labels[labels != IGNORED].tolist()


def unigram_entropy(documents: Sequence[Document], processor) -> float:
    """The loss (nats a token) of the best model of these very texts that knows no context."""
    return entropy([t for text in documents for t in text_sample(text, processor).labels if t != IGNORED])


def entropy(tokens: Sequence[int]) -> float:
    counts = Counter(tokens)
    return -sum(c / counts.total() * math.log(c / counts.total()) for c in counts.values())


def new_words(model, processor, shots: int, *, ways: int = 2) -> Score:
    """Of episodes that end before a new word, how many are continued with the right one (greedy, the whole word)."""
    episodes = few_shot(EPISODES, shots=shots, ways=ways)
    texts = continue_all(model, processor, [e.text for e in episodes])
    right = [text.split(".")[0].strip() == e.answer for text, e in zip(texts, episodes, strict=True)]
    return Score.of(Samples.mean(right), 1 / ways)


def told_scenes(model, processor) -> dict[str, Score]:
    """Accuracy on questions behind the description of a held-out scene, by kind of question: what a model that is to answer
    about images can do once it knows what they show. Chance: see `vqa_accuracy`."""
    scenes = held_out_scenes(0, TOLD)
    asked = judge(scenes, QUESTIONS)
    answers = continue_all(model, processor, [f"{canonical(scenes[i])}. {question.text}" for i, question in asked])
    questions = [Question(i, question.text, (question.answer,), question.kind) for i, question in asked]
    return {f"told scenes, {name}": score for name, score in vqa_accuracy(questions, answers).items()}


def continue_all(model, processor, texts: Sequence[str], *, batch_size: int = 100) -> list[str]:
    """A few tokens that the model generates next, greedily."""

    def generate(i: int) -> list[list[int]]:
        prompts = [prompt_tokens(text, model, processor) for text in texts[i : i + batch_size]]
        return model.generate(*model_inputs(prompts, None, model, processor), max_new_tokens=8).tolist()

    with inference(model):
        rows = each(generate, range(0, len(texts), batch_size))
    return processor.decode([*chain.from_iterable(rows)])
