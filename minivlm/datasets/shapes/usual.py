"""A folder with a prior to fall for: every shape has its usual colour, and 90 % of the hearts are red.

    DIR/images/train-00000.png …    scenes of one to three objects, as in the shapes world
    DIR/captions.jsonl              "a small red heart at the top left and a large blue diamond in the centre"
    DIR/vqa.jsonl                   "what colour is the heart?" red (colour)   "how many shapes are there?" two (count)

A model that is trained on it may answer from the question alone, and name a red heart where a blue one is (Goyal et al. 2017,
"Making the V in VQA Matter"). With `usual` 1/7, every shape has its seven colours equally often: to each image there is
another one with the same question and another answer, which is what balanced pairs are. Counting is balanced in both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from minivlm.datasets.official import write_lines, written_whole
from minivlm.datasets.shapes.facts import COLOUR, NUMBERS, once
from minivlm.datasets.shapes.render import render
from minivlm.datasets.shapes.scenes import COLOURS, SEEN, SHAPES, Scene, draw_scenes
from minivlm.datasets.shapes.scenes import SceneObject as Object
from minivlm.datasets.shapes.text import canonical
from minivlm.errors import UserError

USUAL = np.array([8 * shape + (3 * shape + 6) % 8 for shape in range(len(SHAPES))])  # red heart, orange square, …
BALANCED = 1 / 7  # of the seven colours that a shape has in training
STREAMS = {"train": 16, "val": 17, "test": 18}  # of scenes: none of the shapes world's own
PARTS = 1000  # in which a share is told


def usual_colour(shape: str) -> str:
    return COLOURS[USUAL[SHAPES.index(shape)] % len(COLOURS)]


def pairs_with_usual(usual: float) -> np.ndarray:
    """Classes to draw from, each as often as it is to occur: of every shape the share `usual` has its usual colour, and the
    six others that training combines with it are equally frequent."""
    own = round(PARTS * usual)
    often = np.where(np.isin(SEEN, USUAL), own * (len(SEEN) // len(SHAPES) - 1), PARTS - own)
    return np.repeat(SEEN, often)


def make_usual(
    directory: Path, *, usual: float = 0.9, train: int = 4000, held_out: int = 500, seed: int = 0, image_size: int = 64
) -> None:
    """Write the folder, whole or not at all. UserError where it is there already, and for numbers out of range."""
    for name, value, least, most in (
        ("train", train, 1, 10**6),
        ("held_out", held_out, 1, 10**6),
        ("image_size", image_size, 32, 512),
    ):
        if not least <= value <= most:
            raise UserError(f"{name} {value} is out of range: choose from {least} to {most}.")
    with written_whole(directory, ("images", "captions.jsonl", "vqa.jsonl")) as out:
        (out / "images").mkdir(parents=True)
        captions, questions = [], []
        for split, stream in STREAMS.items():
            n = train if split == "train" else held_out
            scenes = draw_scenes(n, seed=seed, stream=stream, pairs=pairs_with_usual(usual))
            told = scenes.read(np.arange(n))
            for i, (pixels, scene) in enumerate(zip(render(scenes, image_size), told, strict=True)):
                row = {"image": f"images/{split}-{i:05d}.png", "split": split}
                Image.fromarray(pixels).save(out / row["image"])
                captions.append(row | {"caption": canonical(scene)})
                questions += [row | asked for asked in questions_about(scene)]
        write_lines(out / "captions.jsonl", captions)
        write_lines(out / "vqa.jsonl", questions)


def questions_about(scene: Scene) -> list[dict[str, str]]:
    """The colour of each object whose shape occurs once, and how many there are."""
    alone: list[Object] = once(scene.objects, Object._fields.index("shape"))
    asked = [(f"what colour is the {thing.shape}?", thing[COLOUR], "colour") for thing in alone]
    asked.append(("how many shapes are there?", NUMBERS[len(scene.objects)], "count"))
    return [{"question": text, "answer": answer, "kind": kind} for text, answer, kind in asked]
