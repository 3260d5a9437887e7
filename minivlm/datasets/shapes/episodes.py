"""Texts without images about the shapes world, for a language model: captions, questions, and lessons in new words.

    "red circle: dax. blue star: wug. blue star: wug. red circle: dax. blue star:"  →  "wug"

In a lesson, words that never occurred before are bound to looks. No weight can know what they mean: only a model that
copies from its context continues a lesson well (induction heads; Olsson et al. 2022, "In-context Learning and Induction
Heads"), and that is what few-shot learning from images needs later. Every tenth word is held out: it is never in a
training text, and the lessons that one is judged by use such words alone.

Document i of a stream is a pure function of (seed, stream, i). Pairs of colour and shape that training images never
show are never mentioned.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from minivlm.conversation import DESCRIBE, Turn
from minivlm.datasets.shapes.facts import SEEN_PAIRS
from minivlm.datasets.shapes.questions import DESCRIBED_SLOTS, DESCRIBED_TURNS, ask
from minivlm.datasets.shapes.scenes import COLOURS, SHAPES, Scene, draw_scenes
from minivlm.datasets.shapes.text import canonical, describe

STREAMS = ("train", "held out")
DOCUMENTS, SCENES = 1 << 48, 1 << 49  # far from the streams of draws that the splits use
BLOCK = 256  # scenes drawn at once

ONSETS, VOWELS, CODAS = "bdfgklmnpvwz", "aeiou", "bfgkmnpsx"  # "dax", "wug"; "red", "top" and "two" are not among them
SYLLABLES = [a + b + c for a in ONSETS for b in VOWELS for c in CODAS]  # 540, of which a word has one or two
LOOKS = (sorted(SEEN_PAIRS), COLOURS, SHAPES)  # what a lesson may be about: "red circle", "red" or "circle"


class Episode(NamedTuple):
    text: str  # ends where the answer starts: "… blue star:"
    answer: str


def is_held_out(word: str) -> bool:
    return zlib.crc32(word.encode()) % 10 == 0


def new_words(rng: np.random.Generator, n: int, *, held_out: bool) -> list[str]:
    """Different words of one or two syllables, all of them held out or none."""
    words = {}
    while len(words) < n:
        syllables = rng.integers(len(SYLLABLES), size=rng.integers(1, 3))
        word = "".join(SYLLABLES[i] for i in syllables)
        if is_held_out(word) == held_out:
            words[word] = None
    return list(words)


def new_meanings(rng: np.random.Generator, n: int, *, held_out: bool) -> list[str]:
    """["red circle: dax", "blue star: wug"]: n looks of one sort, each with a word of its own."""
    looks = LOOKS[rng.integers(len(LOOKS))]
    if not 1 <= n <= len(SHAPES):
        raise ValueError(f"a lesson has 1 to {len(SHAPES)} new words, not {n}")
    chosen = [looks[i] for i in rng.permutation(len(looks))[:n]]
    return [f"{look}: {word}" for look, word in zip(chosen, new_words(rng, n, held_out=held_out), strict=True)]


def episode(rng: np.random.Generator, *, ways: int = 2, shots: int = 1, held_out: bool = True) -> Episode:
    """`ways` new words, `shots` examples of each in random order, and one of the looks again, any of them.

    Neither the order of the examples nor the position of the right one gives the answer away.
    """
    meanings = new_meanings(rng, ways, held_out=held_out)
    examples = [meanings[i] for i in rng.permutation(np.repeat(np.arange(ways), shots))]
    look, word = meanings[rng.integers(ways)].split(": ")
    return Episode(" ".join([*(f"{example}." for example in examples), f"{look}:"]), word)


def few_shot(n: int, *, shots: int, ways: int = 2, seed: int = 0) -> list[Episode]:
    """`n` episodes in held-out words: a model gives the right word by chance 1 / ways of the time."""
    rng = np.random.default_rng([seed, ways, shots])
    return [episode(rng, ways=ways, shots=shots) for _ in range(n)]


def lesson(rng: np.random.Generator, *, held_out: bool) -> str:
    """Twelve to sixteen examples of two to four new words in random order; nearly all of them can be predicted."""
    meanings = new_meanings(rng, int(rng.integers(2, 5)), held_out=held_out)
    return " ".join(f"{meanings[i]}." for i in rng.integers(len(meanings), size=rng.integers(12, 17)))


# ---- documents -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2048)  # batches of like length read their texts twice
def document(seed: int, stream: str, index: int) -> str | list[Turn]:
    """A lesson (10 %), a caption (5 %), or a conversation, in nine of ten after the scene is described in words: a model
    answers that finds in its context what is asked for.

    The stream "held out" has scenes of its own, and in its lessons held-out words. Read them in order: scenes are drawn in
    blocks. Raises ValueError for an unknown stream.
    """
    number = STREAMS.index(stream) << 40
    rng = np.random.Generator(np.random.Philox(key=seed + ((DOCUMENTS + number + index) << 64)))
    sort = rng.random()
    if sort < 0.1:
        return lesson(rng, held_out=stream == "held out")
    scene = scene_block(seed, SCENES + number + index // BLOCK)[index % BLOCK]
    if sort < 0.15:
        return describe(scene, rng) if rng.random() < 0.5 else canonical(scene)
    first, *rest = conversation(scene, rng)
    return [first._replace(text=f"{canonical(scene)}. {first.text}") if sort < 0.93 else first, *rest]


def conversation(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Questions about a scene and their answers; sometimes it is to be described first."""
    questions = ask(scene, rng, slots=DESCRIBED_SLOTS, turns=DESCRIBED_TURNS)
    asked = [(question.text, question.answer) for question in questions]
    if rng.random() < 0.2:
        asked = [(DESCRIBE, canonical(scene)), *asked]
    return [Turn(role, text) for pair in asked for role, text in zip(("user", "assistant"), pair, strict=True)]


def words(document: str | list[Turn]) -> str:
    """All its turns as one text."""
    return document if isinstance(document, str) else " ".join(turn.text for turn in document)


def documents(seed: int, stream: str, n: int) -> Iterator[str]:
    """The first n documents, each as one text."""
    return (words(document(seed, stream, index)) for index in range(n))


def held_out_scenes(seed: int, n: int) -> list[Scene]:
    """The first n scenes of the held-out stream."""
    first = SCENES + (STREAMS.index("held out") << 40)
    return [scene for block in range(-(-n // BLOCK)) for scene in scene_block(seed, first + block)][:n]


@functools.lru_cache(maxsize=8)
def scene_block(seed: int, stream: int) -> list[Scene]:
    return draw_scenes(BLOCK, seed=seed, stream=stream).read(np.arange(BLOCK))
