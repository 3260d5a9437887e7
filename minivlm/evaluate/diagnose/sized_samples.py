"""What a model gets right, sample by sample, each beside the size of the object that it is about: classes, captions to be
found, questions, captions to be generated.

    task_of(model, processor, data)() ──→ task: right(model, processor) → (n,) in [0, 1];  pixels (n,) of the object, or NaN
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minivlm.conversation import as_text
from minivlm.datasets.boxes import Boxes, boxes_in, named_size
from minivlm.datasets.conversations import Conversations, Question, open_conversations
from minivlm.datasets.folder import TEMPLATES, open_pairs
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes import ShapesWorld, is_world
from minivlm.datasets.shapes.conversations import QUESTIONS, ShapesConversations
from minivlm.datasets.shapes.questions import FORMS, Asked, judge
from minivlm.datasets.shapes.scenes import Scene
from minivlm.datasets.shapes.text import parse
from minivlm.evaluate.compare import AT_A_TIME, distinct_captions
from minivlm.evaluate.expectation import some_of
from minivlm.evaluate.generation import answers_questions, ask, captioned, check_questions, describe_all
from minivlm.metrics.vqa import agreement, normalise, usual
from minivlm.processor import Processor
from minivlm.tasks.features import encode_images, encode_texts
from minivlm.tasks.zero_shot import PLAIN, class_features

MOST = 500  # samples, of which each is judged anew for everything that is tried


@dataclass(frozen=True)
class Task:
    """name: of the score. ids: the image of each sample. pixels (n,): the side of the object that a sample is about, in pixels
    of what the model is given; NaN where it is not known. chance (n,): of a guess; None where that means nothing.
    right(model, processor, split) → (n,): how right the model is about each sample, 0 to 1."""

    name: str
    split: Pairs | Conversations
    ids: tuple[str, ...]
    pixels: np.ndarray
    chance: np.ndarray | None
    right: Callable[[Any, Processor, Any], np.ndarray]


class Coarser:
    """A split whose images are reduced to a shorter side of so many pixels, and enlarged again: what it has of detail is
    gone, and all else is as it was."""

    def __init__(self, split: Pairs | Conversations, side: int):
        self.split, self.side = split, side

    def __len__(self) -> int:
        return len(self.split)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.split, name)

    def images(self, indices: Sequence[int]) -> list:
        found = self.split.images(indices)
        of_conversations = bool(len(found)) and isinstance(found[0], list)
        return [[self.reduced(one) for one in some] if of_conversations else self.reduced(some) for some in found]

    def reduced(self, image: np.ndarray) -> np.ndarray:
        whole = Image.fromarray(image)
        by = min(1.0, self.side / min(whole.size))
        small = whole.resize([max(1, round(side * by)) for side in whole.size], Image.Resampling.BICUBIC)
        return np.asarray(small.resize(whole.size, Image.Resampling.BICUBIC))


def task_of(model, processor: Processor, data) -> Callable[[], Task] | None:
    """Makes what this model is judged by on this folder; None where there is nothing."""
    size = processor.image_size
    if "encode" in model.abilities:
        world = is_world(data)
        pairs = ShapesWorld(data, "single_seen") if world else open_pairs(data, "test", image_size=size)
        return partial(classes if pairs.classes else finding, pairs, data, size)
    if not model.takes_images:
        return None
    conversations = open_conversations(data, "test", image_size=size)
    if answers_questions(model, processor) and (is_world(data) or conversations.questions()):
        return partial(questions, conversations, data, size)
    describes = "caption" in model.abilities and captioned(conversations)
    return partial(descriptions, conversations, data, size) if describes else None


# ---- a model that compares -------------------------------------------------------------------------------------------


def encode_views(model, processor: Processor, split: Pairs, indices: Sequence[int]) -> Tensor:
    """(N, V, D): the vectors of each image; of its tiles, and of several queries, one each."""
    parts = []
    for start in range(0, len(indices), AT_A_TIME):
        images = list(split.images(indices[start : start + AT_A_TIME]))
        pixels = processor.images(images)  # (n, [V,] 3, S, S)
        views = [*pixels.flatten(0, -4)[:, None]] if processor.config.tiles > 1 else [*pixels.split(1)]
        parts.append(encode_images(views, model, processor).unflatten(0, (len(images), -1)).flatten(1, -2))
    return torch.cat(parts)


def closest(views: Tensor, texts: Tensor) -> np.ndarray:
    """(N, V, D), (M, D) → (N, M): the cosine of the view that is closest to each text."""
    return torch.stack([(some @ texts.T).amax(dim=0) for some in views.cpu().double()]).numpy()


def classes(pairs: Pairs, data, size: int) -> Task:
    """Does an image find its class among all classes?"""
    indices = np.flatnonzero(pairs.labels >= 0)
    indices = indices[list(some_of(len(indices), MOST))]
    labels = pairs.labels[indices]
    world = isinstance(pairs, ShapesWorld)
    names = [name.replace("_", " ") for name in pairs.classes]

    def right(model, processor: Processor, split: Pairs) -> np.ndarray:
        found = class_features(names, model, processor, PLAIN if world else TEMPLATES).cpu().double()
        return is_first(closest(encode_views(model, processor, split, indices), found), labels[:, None])

    if world:
        pixels = np.array([side(scene.objects, size) for scene in pairs.scenes.read(indices)])
    else:
        pixels = sizes_in(boxes_in(data), [(pairs.key(i), names[pairs.labels[i]]) for i in indices], size)
    ids = tuple(map(pairs.key, indices))
    return Task("zero-shot", pairs, ids, pixels, np.full(len(ids), 1 / len(names)), right)


def finding(pairs: Pairs, data, size: int) -> Task:
    """Does an image find one of its captions among those of all?"""
    indices = [i for i in range(len(pairs)) if pairs.all_captions(i)]
    indices = [indices[i] for i in some_of(len(indices), MOST)]
    texts, relevant = distinct_captions(pairs, indices)

    def right(model, processor: Processor, split: Pairs) -> np.ndarray:
        found = encode_texts(texts, model, processor, cut=True).cpu().double()
        return is_first(closest(encode_views(model, processor, split, indices), found), relevant)

    ids = tuple(map(pairs.key, indices))
    about = [(key, " ".join(pairs.all_captions(i))) for key, i in zip(ids, indices, strict=True)]
    chance = np.array([len(known) / len(texts) for known in relevant])
    return Task("image→text R@1", pairs, ids, sizes_in(boxes_in(data), about, size), chance, right)


def is_first(scores: np.ndarray, right: Sequence[Sequence[int]]) -> np.ndarray:
    """(N, M) → (N,): whether the highest score is one of those that are right, and no wrong one is as high."""
    found = []
    for row, known in zip(scores, right, strict=True):
        wrong = np.delete(row, known)
        found.append(row[known].max() > wrong.max(initial=-np.inf))
    return np.array(found, dtype=float)


# ---- a model that answers or describes -------------------------------------------------------------------------------


def questions(conversations: Conversations, data, size: int) -> Task:
    """Are questions answered? Those whose answers are sentences: the words that the answers have in common with them."""
    if isinstance(conversations, ShapesConversations):
        known = judge(conversations.scenes, QUESTIONS[conversations.split])
        known = [known[i] for i in some_of(len(known), MOST)]
        asked = [Question(i, one.text, (one.answer,), one.kind) for i, one in known]
        pixels = np.array([side(about(conversations.scenes[i], one), size) for i, one in known])
    else:
        asked = conversations.questions()
        asked = [asked[i] for i in some_of(len(asked), MOST)]
        pixels = sizes_in(boxes_in(data), [(conversations.key(one.index), one.text) for one in asked], size)
    free = conversations.free_answers
    value = common_words if free else lambda text, answers: agreement(normalise(text), [*map(normalise, answers)])

    def right(model, processor: Processor, split: Conversations) -> np.ndarray:
        check_questions(model, processor, split, asked)
        texts = ask(model, processor, split, asked)
        return np.array([value(text, question.answers) for text, question in zip(texts, asked, strict=True)])

    ids = tuple(conversations.key(question.index) for question in asked)
    if free:
        return Task("answers, words in common", conversations, ids, pixels, None, right)
    chance = usual(asked, [[*map(normalise, question.answers)] for question in asked])
    return Task("accuracy", conversations, ids, pixels, np.array(chance), right)


def about(scene: Scene, asked: Asked) -> tuple:
    """The objects that a question of the shapes world is about; none where it asks for what is not there."""
    facts = FORMS[asked.form].facts(scene.objects)
    return next((fact.about for fact in facts if fact.words == asked.words and fact.answer == asked.answer), ())


def descriptions(conversations: Conversations, data, size: int) -> Task:
    """Of the shapes world: is each object named with its colour and shape? Else the words in common with a reference."""
    known = captioned(conversations)
    indices = [known[i] for i in some_of(len(known), MOST)]
    if isinstance(conversations, ShapesConversations):
        return objects_named(conversations, indices, size)
    references = [conversations.captions(i) for i in indices]

    def right(model, processor: Processor, split: Conversations) -> np.ndarray:
        texts = describe_all(model, processor, split, indices)
        return np.array([common_words(text, known) for text, known in zip(texts, references, strict=True)])

    ids = tuple(map(conversations.key, indices))
    told = [(key, " ".join(map(as_text, some))) for key, some in zip(ids, references, strict=True)]
    return Task("captions, words in common", conversations, ids, sizes_in(boxes_in(data), told, size), None, right)


def objects_named(conversations: ShapesConversations, indices: Sequence[int], size: int) -> Task:
    """A sample is an object of a scene."""
    objects = [(i, thing) for i in indices for thing in conversations.scenes[i].objects]

    def right(model, processor: Processor, split: Conversations) -> np.ndarray:
        texts = dict(zip(indices, describe_all(model, processor, split, indices), strict=True))
        named = {i: [thing[:2] for thing in parse(text)] for i, text in texts.items()}
        found = []
        for i, thing in objects:
            found.append(thing[:2] in named[i])
            if found[-1]:
                named[i].remove(thing[:2])  # two red circles are named twice
        return np.array(found, dtype=float)

    pixels = np.array([side([thing], size) for _, thing in objects])
    ids = tuple(conversations.key(i) for i, _ in objects)
    return Task("objects named in captions", conversations, ids, pixels, None, right)


def common_words(text: str, references: Sequence[str]) -> float:
    """F1 of the distinct words of a text and its best reference."""
    own, best = {*normalise(text).split()}, 0.0
    for reference in references:
        theirs = {*normalise(reference).split()}
        best = max(best, 2 * len(own & theirs) / max(1, len(own) + len(theirs)))
    return best


# ---- sizes -----------------------------------------------------------------------------------------------------------


def side(objects: Sequence, size: int) -> float:
    """Of the smallest of these objects of a scene, in pixels of an image of so many; NaN where there are none."""
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (thing.box for thing in objects)]
    return size * min(areas) ** 0.5 if areas else np.nan


def sizes_in(boxes: Boxes, about: Sequence[tuple[str, str]], size: int) -> np.ndarray:
    """about: the image and the text of each sample → the side of the smallest object that the text names, in pixels."""
    return np.array([named_size(boxes, key, text, size) for key, text in about])
