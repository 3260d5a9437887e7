"""Other images for a question: of other samples, or a grey one; and how likely a model that chooses finds answers then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from minivlm.datasets.conversations import Conversations, Question
from minivlm.evaluate.expectation import some_of
from minivlm.evaluate.generation import by_image
from minivlm.tasks.choose import answer_logits


class Grey:
    """The same samples, with images of one colour: the mean of some of them."""

    def __init__(self, conversations: Conversations):
        self.conversations = conversations
        some = some_of(len(conversations), 64)
        means = [image.mean(axis=(0, 1)) for images in conversations.images(some) for image in images]
        self.colour = np.mean(means, axis=0).round().astype(np.uint8)

    def __getattr__(self, name: str):
        return getattr(self.conversations, name)

    def images(self, indices: Sequence[int]) -> list[list[np.ndarray]]:
        return [
            [np.broadcast_to(self.colour, image.shape).copy() for image in images]
            for images in self.conversations.images(indices)
        ]


def exchanged(indices: Sequence[int], n: int) -> list[list[int]]:
    """n times for each index another one of them, always the same; fewer times where there are fewer."""
    distinct = list(dict.fromkeys(indices))
    order = np.random.default_rng(0).permutation(len(distinct)).tolist()
    turn = {distinct[i]: k for k, i in enumerate(order)}
    at = lambda k: distinct[order[k % len(order)]]
    return [[at(turn[i] + shift) for i in indices] for shift in range(1, min(n, len(distinct) - 1) + 1)]


def log_odds(model, processor, conversations, asked: Sequence[tuple[int, Question]]) -> torch.Tensor:
    """The log-probabilities of all answers, (N, A). Each image is encoded once, however often it is asked about."""
    odds = torch.empty(len(asked), len(model.config.answers))
    for part in by_image([index for index, _ in asked]):
        indices = list(dict.fromkeys(asked[i][0] for i in part))
        images = dict(zip(indices, conversations.images(indices), strict=True))
        samples = [(images[asked[i][0]], asked[i][1].text) for i in part]
        odds[part] = answer_logits(samples, model, processor, batch_size=len(part)).log_softmax(dim=-1)
    return odds
