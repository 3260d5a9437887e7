"""Lessons in new words with images of the shapes world, for a model that is to learn from its prompt.

    <image>this is a dax.<image>this is a wug.<image>this is a wug.<image>this is a   →  dax

Every image shows one object, and an object's look is a colour and a shape ("red circle"); size and place mean nothing.
The words are new in every lesson, and every tenth is kept for held-out episodes (`episodes.is_held_out`), which
use images of their own. Looks are held out as well: the pairs of colour and shape that training never shows.

In the words of `episodes` the same lesson is "red circle: dax. blue star: wug. …".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minivlm.datasets.shapes.episodes import new_words
from minivlm.datasets.shapes.render import render
from minivlm.datasets.shapes.scenes import SEEN, UNSEEN, Scenes, draw_scenes

EPISODE_IMAGES = 1 << 50  # a stream of draws far from those that splits and texts use
OF_EACH_LOOK = 16  # images that held-out episodes are drawn from
MOST_WAYS = 4  # looks of a lesson
LEAD = "this is a"  # the text in front of a new word
END = "."  # of an example's text, and of an answer
LOOKS = {"seen": SEEN, "unseen": UNSEEN}


class Named(NamedTuple):
    image: int
    word: str


class Shot(NamedTuple):
    image: np.ndarray  # (S, S, 3) uint8
    label: str


class ShotEpisode(NamedTuple):
    examples: list[Shot]
    query: Shot  # its label is the answer


class Lessons:
    """Images of one object each, ready to be given new names. looks: of every image, its look as a number."""

    def __init__(self, looks: np.ndarray, images: np.ndarray | None = None):
        """images: their indices; None: 0, 1, 2 …"""
        images = np.arange(len(looks)) if images is None else images
        self.images = [images[looks == look] for look in np.unique(looks)]

    @classmethod
    def of_scenes(cls, scenes: Scenes) -> Lessons:
        """Lessons about the scenes that show one object."""
        alone = np.flatnonzero(scenes.count == 1)
        return cls(scenes.classes[alone, 0], alone)

    def draw(self, rng: np.random.Generator, order: np.ndarray, *, held_out: bool) -> list[Named]:
        """New words for as many looks as `order` names, and images of these looks in that order; none twice, as long as a
        look has enough."""
        ways = int(order.max()) + 1
        words = new_words(rng, ways, held_out=held_out)
        looks = [self.images[i] for i in rng.permutation(len(self.images))[:ways]]
        fresh = []
        for way, look in enumerate(looks):
            n = int((order == way).sum())
            fresh.append(iter(rng.choice(look, size=n, replace=n > len(look))))
        return [Named(int(next(fresh[way])), words[way]) for way in order.tolist()]

    def lesson(self, rng: np.random.Generator, *, most_ways: int = MOST_WAYS) -> list[Named]:
        """A lesson for training: four to nine images of two to `most_ways` looks, each as likely at each position."""
        ways = int(rng.integers(2, most_ways + 1))
        order = rng.integers(ways, size=rng.integers(ways + 2, 10))
        order[rng.choice(len(order), size=ways, replace=False)] = np.arange(ways)  # every look is there
        return self.draw(rng, order, held_out=False)

    def episode(self, rng: np.random.Generator, *, shots: int, ways: int, held_out: bool = True) -> list[Named]:
        """`shots` examples in random order, as many of each look as can be, and a query about any of them at the end."""
        every = np.tile(np.arange(ways), shots // ways)
        order = rng.permutation(np.concatenate([every, rng.permutation(ways)[: shots % ways]]))
        order = np.append(order, rng.integers(ways))
        return self.draw(rng, order, held_out=held_out)


def shot_episodes(
    n: int,
    *,
    shots: int,
    ways: int = 2,
    seed: int = 0,
    held_out: bool = True,
    looks: str = "seen",
    image_size: int = 64,
) -> list[ShotEpisode]:
    """`n` episodes with images that no split has. shots: examples in all. looks: those that training "seen" or "unseen".

    Raises ValueError for more words than there are looks, or examples than there are images of a look.
    """
    pairs = LOOKS[looks]
    if not 1 <= ways <= len(pairs) or shots // ways + 2 > OF_EACH_LOOK:
        raise ValueError(
            f"an episode of {shots} examples in {ways} words cannot be drawn: there are {len(pairs)} looks"
        )
    stream = EPISODE_IMAGES + sorted(LOOKS).index(looks)
    scenes = draw_scenes(OF_EACH_LOOK * len(pairs), seed=seed, stream=stream, pairs=pairs, most=1, balanced=True)
    pixels = render(scenes, image_size)
    lessons, rng = Lessons(scenes.classes[:, 0]), np.random.default_rng([seed, ways, shots])
    episodes = []
    for _ in range(n):
        *examples, query = (
            Shot(pixels[image], word) for image, word in lessons.episode(rng, shots=shots, ways=ways, held_out=held_out)
        )
        episodes.append(ShotEpisode(examples, query))
    return episodes
