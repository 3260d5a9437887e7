"""A language model is judged by how well it expects texts that it has not read, and by what it picks up from its context.

perplexity   exp of the mean surprise per token; beside it, that of the best model that knows no context (unigrams)
few-shot     words nobody has heard before are bound to looks by k examples each: is the right one said?
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from minivlm.conversation import Sample, collate
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes_episodes import documents, few_shot
from minivlm.datasets.talk import open_talk
from minivlm.metrics import Score
from minivlm.tasks.features import inference

HELD_OUT = 500  # documents of the shapes world
EPISODES = 300
SHOTS = (1, 2, 4)  # examples of each word


def language(model, processor, directory: str | Path) -> dict[str, Score]:
    """All scores of a language model on held-out texts of a dataset."""
    scores = {"perplexity": perplexity(model, processor, held_out_texts(directory))}
    if is_world(directory):
        scores |= {f"new words, {k} shot{'s' * (k > 1)}": new_words(model, processor, k) for k in SHOTS}
    return scores


def held_out_texts(directory: str | Path) -> list[str]:
    if is_world(directory):
        return list(documents(0, "held out", HELD_OUT))
    return list(open_talk(directory, "test", image_size=None).texts())


def perplexity(model, processor, texts: Sequence[str], *, batch_size: int = 32) -> Score:
    """exp of the mean cross-entropy per token, first tokens not counted. chance: unigrams fitted to these very texts."""
    rows = [processor.cut(row) for row in processor.encode(texts)]
    total, count = 0.0, 0
    with inference(model):
        for i in range(0, len(rows), batch_size):
            part = rows[i : i + batch_size]
            batch = collate([Sample(row, row, []) for row in part], processor.pad_token)
            n = sum(len(row) - 1 for row in part)
            tokens, labels = batch["tokens"].to(model.device), batch["labels"].to(model.device)
            total += n * sum(model.losses(tokens, labels).values()).item()
            count += n
    return Score(math.exp(total / count), math.exp(unigram_entropy(rows)), share=False)


def unigram_entropy(rows: Sequence[Sequence[int]]) -> float:
    """The loss (nats a token) of the best model of these very texts that knows no context, first tokens not counted."""
    counts = Counter(token for row in rows for token in row[1:])
    return -sum(c / counts.total() * math.log(c / counts.total()) for c in counts.values())


def new_words(model, processor, shots: int, *, ways: int = 2, batch_size: int = 100) -> Score:
    """Of episodes that end before a new word, how many are continued with the right one (greedy, the whole word)."""
    episodes, right = few_shot(EPISODES, shots=shots, ways=ways), 0
    with inference(model):
        for i in range(0, len(episodes), batch_size):
            part = episodes[i : i + batch_size]
            rows = [[processor.start_token, *processor.ids(e.text)] for e in part]
            batch = collate([Sample(row, row, []) for row in rows], processor.pad_token)
            mask = torch.arange(batch["tokens"].shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
            said = model.generate(batch["tokens"].to(model.device), mask.to(model.device), max_new_tokens=8)
            words = [text.split(".")[0].strip() for text in processor.decode(said.cpu())]
            right += sum(word == e.answer for word, e in zip(words, part, strict=True))
    return Score(right / len(episodes), 1 / ways)
