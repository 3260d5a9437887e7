"""Every recipe of train.py, small and untrained: on a small world, and on the untrained models of those it builds on."""

from pathlib import Path

import torch

from minivlm import checkpoint
from minivlm.datasets.shapes import make_shapes
from minivlm.recipes import plan
from minivlm.recipes.recipe import Recipe

BATCH = 4
RUN = {"steps": 8, "batch_size": BATCH, "bucket_steps": 1, "seed": 3}
SIZE = {"width": 16, "depth": 2, "heads": 2}
CLIP = {"model.embed_width": 16, "data.vocab_size": 300}
SPEAKS = {"data.vocab_size": 300, "model.context": 400, "induction_heads": "false"}


def under(part: str, **sizes) -> dict:
    return {f"{part}.{name}": value for name, value in sizes.items()}


TEXT, ENCODER, QFORMER = (
    under("model.text", **SIZE),
    under("model.text", **SIZE),
    under("model.qformer", queries=3, **SIZE),
)
RESNET = under("model.vision", width=4, output_width=16, heads=2, image_size=32)
EFFICIENT = under(
    "model.vision", image_size=32, stem_channels=8, channels="8,8,16,16", blocks="1,1,1,1", expansions="1,2,2,2"
)
BLIP = {"vision_from": "clip", "model.embed_width": 8, "data.vocab_size": 300} | ENCODER | {"model.text.depth": 1}
ON_RESNET = {"vision_from": "clip-resnet"}
FUSION = ON_RESNET | {"data.vocab_size": 300}
SIZES = {
    "clip": CLIP | TEXT | under("model.vision", image_size=32, **SIZE),
    "clip-resnet": CLIP | TEXT | RESNET,
    "align": CLIP | TEXT | EFFICIENT,
    "coca": {"data.vocab_size": 300, "model.embed_width": 16, "model.image_queries": 3, "model.multimodal_depth": 1}
    | under("model.text", **SIZE)
    | under("model.vision", image_size=32, **SIZE),
    "lm": SPEAKS | under("model", **SIZE),
    "t5": SPEAKS | under("model", **SIZE),
    "llava-stage1": ON_RESNET | {"language_from": "lm"},
    "llava": {"starts_from": "llava-stage1"},
    "vlm-stage1": {"vision_from": "clip", "language_from": "lm"},
    "vlm": {"starts_from": "vlm-stage1"},
    "blip": BLIP,
    "blip-noisy": BLIP,
    "blip-capfilt": BLIP | {"starts_from": "blip-noisy", "data.threshold": 0},
    "blip2-stage1": ON_RESNET | QFORMER | {"model.embed_width": 8},
    "blip2": {"starts_from": "blip2-stage1", "language_from": "lm"} | QFORMER,
    "flamingo": ON_RESNET
    | {"language_from": "lm", "data.lessons": 0.5}
    | under("model.resampler", width=16, depth=1, heads=2, latents=3),
    "visualbert": FUSION | TEXT,
    "uniter": FUSION | TEXT,
    "vilbert": FUSION | TEXT | under("model.regions", **SIZE) | {"model.joint_width": 16, "model.joint_heads": 2},
    "vqa": FUSION | TEXT | under("model.fusion", **SIZE),
    "multitask": FUSION | under("model.encoder.text", **SIZE),
    "captioner": {"data.vocab_size": 300}
    | under("model.language", context=160, **SIZE)
    | under("model.vision", image_size=32, **SIZE),
}
FOLDERS = ("vision_from", "language_from", "starts_from")  # what a recipe builds on, beside the world


def small_world(directory: Path, train: int = 1000) -> Path:
    make_shapes(directory / "world", train=train, image_size=32, progress=False)
    return directory


def small_recipe(name: str, directory: Path, **changes) -> Recipe:
    """Of those in `directory`, which holds a world; what it builds on is made there where it is missing."""
    given = RUN | SIZES[name] | {key.replace("__", "."): value for key, value in changes.items()}
    for place in FOLDERS:
        if (base := given.get(place)) in SIZES:
            given[place] = directory / base
            if not given[place].exists():
                job = small_recipe(base, directory).start(quiet=True)
                checkpoint.save(given[place], job.model, job.processor)
    given["data.directory"] = directory / "world"
    words = [str(word) for option, value in given.items() for word in (f"--{option}", value)]
    return plan.command_line([name, *words])[1]


def small_job(name: str, directory: Path, **changes):
    """Its job, ready for the first step; the model in train mode."""
    job = small_recipe(name, directory, **changes).start(quiet=True)
    job.prepare(torch.device("cpu"), torch.float32)
    job.model.train()
    return job
