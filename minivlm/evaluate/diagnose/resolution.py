"""Resolution: of what is small in an image too few pixels are left once it has the model's size, and it cannot be named.

    figure   accuracy by the size of the object that a sample is about, in pixels of what the model is given; where sizes are
             not known, what is lost when the images are reduced to 1/2 and 1/4 of the model's size and enlarged again
    remedy   more pixels: tiles, and larger images with interpolated position embeddings (finer.py)

Tong et al. 2024, "Eyes Wide Shut?", and Liu et al. 2024, LLaVA-NeXT, on what a vision-language model of 224 or 336 pixels
misses; Lin et al. 2014 (COCO) on accuracy by the size of objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from minivlm.errors import UserError
from minivlm.evaluate.diagnose.finer import variants
from minivlm.evaluate.diagnose.pitfall import Pitfall
from minivlm.evaluate.diagnose.sized_samples import Coarser, Task, task_of
from minivlm.metrics import Samples, Score
from minivlm.pictures import chart

EDGES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # pixels
LEAST = 30  # samples of a range of sizes; a smaller one is joined with the next
FALL = "fall from the largest to the smallest objects"
SYMPTOM = (
    "an object of which few pixels are left once the image has the model's {size} a side, or fewer than training ever showed, "
    "is not told from others."
)


class Range(NamedTuple):
    """Sizes from `low` up to `high` pixels, and which samples are about objects of such a size."""

    low: float
    high: float
    rows: np.ndarray  # indices of samples

    @property
    def name(self) -> str:
        if self.low == 0:
            return f"under {self.high:g} pixels"
        return f"{self.low:g} pixels or more" if self.high == np.inf else f"{self.low:g} to {self.high:g} pixels"


def left_out(model, processor, data) -> str:
    if task_of(model, processor, data) is None:
        return f"this {type(model).__name__} can be asked for nothing that {data} holds, answer by answer."
    return ""


def diagnose(model, processor, data) -> Pitfall:
    task = task_of(model, processor, data)()
    if len(set(task.ids)) < 2:
        why = f"{data} has one image to judge by, but a figure with its interval needs at least two of them."
        return Pitfall("resolution", left_out=why)
    right = task.right(model, processor, task.split)
    ranges = ranges_of(task.pixels)
    by_size = len(ranges) > 1
    finer, problems = try_finer(model, processor, task)
    figures = {task.name: score(task, right)}
    if by_size:
        figures |= {f"{task.name}, {one.name}": score(task, right, one.rows) for one in ranges}
        figures[FALL] = fall(task, right, ranges)
        told = judged_by_size(figures, ranges, task)
    else:
        coarse = {by: task.right(model, processor, Coarser(task.split, processor.image_size // by)) for by in (2, 4)}
        figures |= {f"{task.name}, at 1/{by} of the pixels a side": score(task, coarse[by]) for by in coarse}
        told = judged_by_loss(figures[task.name], score(task, coarse[2]))
    parts = {f", {(small := smaller_half(ranges)).name}": small.rows, "": None} if by_size else {"": None}
    effect = {
        f"{name}: {task.name}{part}": (score(task, right, rows), score(task, values, rows))
        for name, values in finer.items()
        for part, rows in parts.items()
    }
    return Pitfall(
        name="resolution",
        symptom=SYMPTOM.format(size=processor.image_size),
        verdict=knows_nothing(figures[task.name]) or told,
        figures=figures,
        remedy=remedy(model, processor, problems),
        effect=effect,
        image=curves(task, {"as it is": right} | finer, ranges) if by_size else None,
    )


def try_finer(model, processor, task: Task) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What was tried → how right the model is about each sample; and what could not be → why."""
    found, problems = {}, {}
    for name, finer in variants(model, processor).items():
        try:
            with finer(model, processor) as prepared:
                found[name] = task.right(model, prepared, task.split)
        except UserError as error:
            problems[name] = str(error)
    return found, problems


def remedy(model, processor, problems: Mapping[str, str]) -> str:
    size, kind = processor.image_size, type(model).__name__
    told = [
        "more pixels, tried here on the model as it is: tiles (the image whole and again in n × n parts, of which the closest "
        "counts where images are compared) and larger images with interpolated position embeddings, for which no weight was "
        "trained."
    ]
    told += [f"Not tried, {name}: {why}" for name, why in problems.items()]
    commands = {
        "LLaVA": "python train.py llava-stage1 --model.tiles 2, and llava after it",
        "CLIP": f"python train.py clip --model.vision.image_size {2 * size}",
        "VQAModel": f"python train.py vqa with a --vision_from that was trained on images of {2 * size} pixels",
    }
    told.append(f"Trained for it, a model gains more: {commands.get(kind, f'a vision tower for {2 * size} pixels')}.")
    return " ".join(told)


# ---- figures ---------------------------------------------------------------------------------------------------------


def ranges_of(pixels: np.ndarray) -> list[Range]:
    """Ranges of sizes with enough samples each, smallest first; none where sizes are not known."""
    known = np.flatnonzero(~np.isnan(pixels))
    places = np.searchsorted(EDGES, pixels[known], side="right")  # 0: below the first
    bounds = (0, *EDGES, np.inf)
    ranges: list[Range] = []
    for place in np.unique(places):
        rows = known[places == place]
        if ranges and min(len(rows), len(ranges[-1].rows)) < LEAST:
            low, _, before = ranges.pop()
            ranges.append(Range(low, bounds[place + 1], np.concatenate([before, rows])))
        else:
            ranges.append(Range(bounds[place], bounds[place + 1], rows))
    return ranges if all(len(one.rows) >= LEAST for one in ranges) else []


def smaller_half(ranges: list[Range]) -> Range:
    """The ranges of the smallest objects, up to the half of all samples, but at least one."""
    counts = np.cumsum([len(one.rows) for one in ranges])
    some = ranges[: max(1, int((counts <= counts[-1] / 2).sum()))]
    return Range(0, some[-1].high, np.concatenate([one.rows for one in some]))


def score(task: Task, right: np.ndarray, rows: np.ndarray | None = None) -> Score:
    rows = np.arange(len(right)) if rows is None else rows
    chance = None if task.chance is None else float(task.chance[rows].mean())
    return Score.of(Samples.mean(right[rows], [task.ids[i] for i in rows]), chance)


def fall(task: Task, right: np.ndarray, ranges: list[Range]) -> Score:
    """How much more often it is right about the largest objects than about the smallest."""
    rows = np.concatenate([ranges[-1].rows, ranges[0].rows])
    large = np.arange(len(rows)) < len(ranges[-1].rows)
    columns = np.stack([right[rows] * large, large, right[rows] * ~large, ~large], axis=1)
    return Score.of(Samples.summed("contrast", columns, [task.ids[i] for i in rows]), 0.0)


def knows_nothing(own: Score) -> str:
    if own.chance is None or own.interval[0] > own.chance:
        return ""
    return f"not found: the model is right in {own.value:.1%}, by chance it would be {own.chance:.1%}: it has nothing to lose."


def judged_by_size(figures: Mapping[str, Score], ranges: list[Range], task: Task) -> str:
    low, high = figures[FALL].interval
    small, large = (figures[f"{task.name}, {ranges[i].name}"] for i in (0, -1))
    told = f"{small.value:.0%} right about objects {ranges[0].name}, {large.value:.0%} about those of {ranges[-1].name}"
    if low > 0:
        return f"found: {told}; that is a fall of {figures[FALL].value:.0%} ({low:.0%} to {high:.0%})."
    return f"not found: {told}."


def judged_by_loss(own: Score, half: Score) -> str:
    lost = own.samples.paired(half.samples)
    told = f"{100 * lost.value:+.1f} points ({100 * lost.low:+.1f} to {100 * lost.high:+.1f}) by the finer half of the pixels"
    if lost.low > 0:
        return f"found: the model lives on fine detail, {told}; it may gain by more of it."
    return f"not found: half the pixels a side would do, {told}."


def curves(task: Task, values: Mapping[str, np.ndarray], ranges: list[Range]) -> Image.Image:
    """By the middle of each range."""
    places = [round(float(np.median(task.pixels[one.rows])), 1) for one in ranges]
    lines = {
        name: {x: float(right[one.rows].mean()) for x, one in zip(places, ranges, strict=True)}
        for name, right in values.items()
    }
    across = "side of the object in pixels of what the model is given (median)"
    chance = None if task.chance is None else float(task.chance.mean())
    return chart(lines, title=f"{task.name} by the size of the object", across=across, chance=chance)
