"""A language model is judged by how well it expects texts that it has not read, and by what it picks up from its context.

perplexity   exp of the mean surprise per token; beside it, that of the best model that knows no context (unigrams).
             One with an encoder reads the beginning of each text and is judged by the rest
few-shot     words nobody has heard before are bound to looks by k examples each: is the right one said?
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from minivlm.conversation import IGNORED, Sample, collate
from minivlm.datasets.continuation import collate_pairs, split
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes_episodes import documents, few_shot
from minivlm.datasets.talk import open_talk
from minivlm.metrics import Score
from minivlm.tasks.features import inference
from minivlm.tasks.speak import beginning, has_encoder, model_inputs

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
    """exp of the mean cross-entropy per token that is foretold. chance: unigrams fitted to these very tokens."""
    batches = batches_with_encoder if has_encoder(model) else batches_of_texts
    total, counted = 0.0, []
    with inference(model):
        for batch, tokens in batches(processor, texts, batch_size):
            losses = model.losses(**{name: tensor.to(model.device) for name, tensor in batch.items()})
            total += len(tokens) * sum(losses.values()).item()
            counted += tokens
    return Score(math.exp(total / len(counted)), math.exp(entropy(counted)), share=False)


def batches_of_texts(processor, texts: Sequence[str], batch_size: int) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
    """The arguments of `model.losses`, and the tokens that it judges: all of a text but the first."""
    for i in range(0, len(texts), batch_size):
        rows = [processor.cut(row) for row in processor.encode(texts[i : i + batch_size])]
        yield collate([Sample(row, row, []) for row in rows], processor.pad_token), [t for row in rows for t in row[1:]]


def batches_with_encoder(
    processor, texts: Sequence[str], batch_size: int
) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
    """The same for texts that are cut in two, always at the same places: judged is what follows the cut."""
    rng = np.random.default_rng(0)
    for i in range(0, len(texts), batch_size):
        batch = collate_pairs([split(text, rng) for text in texts[i : i + batch_size]], processor)
        yield batch, batch["labels"][batch["labels"] != IGNORED].tolist()


def unigram_entropy(rows: Sequence[Sequence[int]]) -> float:
    """The loss (nats a token) of the best model of these very texts that knows no context, first tokens not counted."""
    return entropy([token for row in rows for token in row[1:]])


def entropy(tokens: Sequence[int]) -> float:
    counts = Counter(tokens)
    return -sum(c / counts.total() * math.log(c / counts.total()) for c in counts.values())


def new_words(model, processor, shots: int, *, ways: int = 2, batch_size: int = 100) -> Score:
    """Of episodes that end before a new word, how many are continued with the right one (greedy, the whole word)."""
    episodes, right = few_shot(EPISODES, shots=shots, ways=ways), 0
    with inference(model):
        for i in range(0, len(episodes), batch_size):
            part = episodes[i : i + batch_size]
            prompts = [beginning(e.text, model, processor) for e in part]
            said = model.generate(*model_inputs(prompts, None, model, processor), max_new_tokens=8)
            words = [text.split(".")[0].strip() for text in processor.decode(said.cpu())]
            right += sum(word == e.answer for word, e in zip(words, part, strict=True))
    return Score(right / len(episodes), 1 / ways)
