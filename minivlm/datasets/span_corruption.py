"""Span corruption, which a T5 is trained with: sentinel tokens replace spans of a text (Raffel et al. 2020, §3.1.4).

    text     "three shapes. is there a red circle? yes where is it? top left"
    encoder  "three shapes. is there a red circle? <extra_id_0> where is it? <extra_id_1>"
    decoder  "<extra_id_0> yes <extra_id_1> top left"

Their T5 drops words at random. Here, what can be known goes first: answers, or the words of a lesson. One text then asks for
as many lookups as a decoder alone would learn from, where a text cut in two asks for one.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np

from minivlm.conversation import Turn
from minivlm.datasets.continuation import answers_in
from minivlm.processor import Processor

SENTINELS = tuple(f"<extra_id_{i}>" for i in range(12))  # as T5 calls them
ANSWERS, WORDS = 0.5, 0.15  # share of a text's answers that are dropped, and, where there are none, of its words


def drop(document: str | list[Turn], rng: np.random.Generator) -> list[str]:
    """Pieces of a text: what is kept and what is dropped by turns, kept first (or ""). At least one piece is dropped.

    Of a conversation all answers are, of a text with answers ("red: dax. blue: wug.") some of them, of any other some words.
    """
    if not isinstance(document, str):
        return [turn.text for turn in document]
    words = document.split()
    answers = answers_in(words)
    positions = np.array(answers or range(len(words)))
    dropped = positions[rng.random(len(positions)) < (ANSWERS if answers else WORDS)]
    dropped = set(dropped.tolist()) or {int(positions[rng.integers(len(positions))])}
    runs = groupby(range(len(words)), key=lambda i: i in dropped)
    pieces = [" ".join(words[i] for i in run) for _, run in runs]
    return ["", *pieces] if 0 in dropped else pieces


def with_sentinels(
    pieces: list[str], processor: Processor, *, context: int | None = None
) -> tuple[list[int], list[int]]:
    """Pieces as `drop` makes them → the tokens of the encoder, framed as a whole text, and those to be generated.

    context: no more tokens of either; None: the processor's. What comes after the last of the SENTINELS, or does not fit the
    context, is left out; a first piece that is too long loses its start.
    """
    ids = processor.encode(pieces, frame=False)
    sentinels = [processor.tokenizer.token_to_id(name) for name in SENTINELS]
    start, end = processor.frame
    starts, ends = [token for token in (start,) if token is not None], [token for token in (end,) if token is not None]
    context = processor.context if context is None else context
    room = context - len(starts) - len(ends)
    read, generated = ids[0][max(0, len(ids[0]) + 1 - room) :], []
    for sentinel, dropped, kept in zip(sentinels, ids[1::2], [*ids[2::2], []], strict=False):
        if len(read) >= room:
            break
        read, generated = [*read, sentinel, *kept], [*generated, sentinel, *dropped]
    return [*starts, *read[:room], *ends], generated[:context]
