"""A recipe on a folder: it suits it, fills a batch from it, and on another folder a few things are another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

from minivlm.datasets.contents import FILES, KINDS, contents, summary
from minivlm.datasets.conversations import Conversations, open_conversations
from minivlm.datasets.folder import SPLITS, open_pairs
from minivlm.datasets.folder_conversations import read_entries
from minivlm.datasets.judge import Problem
from minivlm.datasets.shapes import is_world, make_shapes
from minivlm.datasets.source import Source
from minivlm.errors import UserError
from minivlm.processes import is_first_process
from minivlm.recipes.recipe import Recipe

SHAPES = Path("data/shapes")
ENDLESS = 10**6
VOCABULARY = 4096  # of a tokeniser that is trained on a folder of one's own
CALLED = {"clip-resnet": "clip"}  # the CLIP of a folder is clip to some recipes and clip-resnet to others
EPOCHS = 100  # the most that are proposed for a folder that is smaller than a batch, and soon known by heart


def for_data(recipe: Recipe, directory: str | Path | Source, out: str) -> Recipe:
    """The recipe on another folder: what it starts from is trained on that folder as well, beside `out`, and its batch is
    one that the folder can fill. UserError unless the folder has what the recipe learns from, and what it is judged by.

    How the folder is read is what the `Source` says or, where it is a path alone, what the recipe's data say.
    """
    if not isinstance(directory, Source):
        directory = replace(recipe.data.source, directory=str(directory))
    recipe = recipe.on(directory)
    changes: dict[str, Any] = asdict(directory)
    del changes["judged_split"]  # which is an evaluation's
    if not is_world(directory) and any(field.name == "vocab_size" for field in fields(recipe.data)):
        changes["vocab_size"] = VOCABULARY
    beside = f"{Path(out).parent / Path(directory).resolve().name}"
    places = {option: f"{beside}-{CALLED.get(base, base)}" for option, base in recipe.builds_on().items()}
    recipe = replace(recipe, data=replace(recipe.data, **changes), **places)
    n = check_suits(recipe, directory) if Path(directory).is_dir() else ENDLESS  # what is not there is told by `start`
    recipe = recipe.of_size(n) if n < ENDLESS else recipe
    if n >= recipe.batch_size:
        return recipe
    return replace(recipe, batch_size=n, steps=min(recipe.steps, EPOCHS))  # each of which sees all there is


def check_suits(recipe: Recipe, directory: str | Path) -> int:
    """How many samples the recipe can learn from. UserError: see `for_data`."""
    if Path(directory) == SHAPES and not is_world(directory):
        return ENDLESS  # it is made when training starts
    found = contents(directory)
    kind = next((kind for kind in recipe.learns_from if found["train"][kind]), None)
    if not found["train"] and (others := [split for split in SPLITS[1:] if found[split]]):
        raise UserError(
            f"{directory} holds {summary(found[others[0]])} in its {' and '.join(others)} split, and nothing to train on: "
            "give some of them the split 'train' in their files."
        )
    if kind is None and found["train"]["classes"]:
        read_entries(Path(directory))  # it may say why their names are none
    if kind is None:
        raise UserError(
            f"{directory} holds {summary(found['train'])} to train on, but {recipe.what} learns from "
            f"{' or '.join(KINDS[kind] for kind in recipe.learns_from)}{advice(recipe, directory)}."
        )
    wanted = recipe.judged_by or recipe.learns_from
    for split in SPLITS[1:]:
        if not any(found[split][kind] for kind in wanted):
            raise UserError(
                f"the {split} split of {directory} holds {summary(found[split])}, but {recipe.what} is judged by "
                f"{' or '.join(KINDS[kind] for kind in wanted)}: give some of them the split {split!r} in their files."
            )
    return ENDLESS if kind == "classes" else found["train"][kind]  # of lessons about classes there is no end


def advice(recipe: Recipe, directory: str | Path) -> str:
    """What to do instead: which recipes suit the folder, and what would make it suit this one."""
    from minivlm.recipes import RECIPES

    found = contents(directory)["train"]
    others = [name for name, one in RECIPES.items() if any(found[kind] for kind in one.learns_from)]
    files = [FILES[kind] for kind in recipe.learns_from if kind in FILES]
    told = [f"train {', '.join(others)} on it"] if others else []
    told += [f"add {files[0]}"] if files else []
    told += [f"name a trained model by {recipe.taken_by}"] if recipe.taken_by else []
    return ": " + ", or ".join(told)


def next_training(name: str, directory: str | Path, **taken: str | Path) -> list[str]:
    """The command that trains recipe `name` on the same folder next, or nothing where that, or what it builds on, is not to
    be had from it. taken: option → what is trained already, as starts_from="out/llava-stage1"."""
    if Path(directory) == SHAPES:
        return [f"python train.py {name}"]
    try:
        check_all_suit(name, directory, taken)
    except UserError:
        return []
    given = {"data": directory} | taken
    options = " ".join([f"python train.py {name}", *(f"--{key} {quote(str(value))}" for key, value in given.items())])
    return [options + Source.of(directory).flags()]


def check_all_suit(name: str, directory: str | Path, taken: Iterable[str]) -> None:
    """UserError unless the folder suits the recipe and all that would be trained for it."""
    from minivlm.recipes import RECIPES

    check_suits(RECIPES[name], directory)
    at_hand = {getattr(RECIPES[name], option) for option in taken}
    for part, where in RECIPES[name].needs().items():
        if where not in at_hand:
            check_all_suit(part, directory, ())


def make_world_if_missing(directory: str | Path, image_size: int, *, quiet: bool) -> None:
    """The embedded dataset needs no download: it is drawn the first time that it is asked for."""
    if Path(directory) == SHAPES and not is_world(directory):
        make_shapes(directory, image_size=image_size, progress=not quiet)


def open_world(recipe: Recipe, image_size: int, *, quiet: bool) -> None:
    """The recipe's folder is there and suits it; the shapes world is made if it is missing."""
    make_world_if_missing(recipe.data.source, image_size, quiet=quiet)
    check_suits(recipe, recipe.data.source)


def open_training_conversations(
    recipe: Recipe, image_size: int, *, quiet: bool, problem: Problem | None = None, captioned: bool = False
) -> Conversations:
    """The training split of the recipe's folder. UserError where it does not suit the recipe or fill a batch.

    problem: of a conversation from which nothing can be learnt (datasets/judge.py), which is left out. captioned: samples
    without captions are left out, or with `problem` what is learnt are captions.
    """
    directory = recipe.data.source
    open_world(recipe, image_size, quiet=quiet)
    conversations = open_conversations(directory, "train", image_size=image_size)
    if problem is not None:
        conversations.leave_out(problem, captions=captioned)
    elif captioned:
        conversations.keep_captioned()
    check_fills_a_batch(len(conversations), recipe.batch_size, "training samples", directory)
    return conversations


def check_fills_a_batch(n: int, batch_size: int, what: str, directory: str | Path) -> None:
    """UserError unless there are as many samples as a batch needs."""
    if n == 0:
        raise UserError(f"there are no {what} in {directory}.")
    if n < batch_size:
        raise UserError(
            f"a batch of {batch_size} cannot be filled from the {n} {what} in {directory}; "
            f"choose --batch_size {n} or less."
        )


def check_held_out(directory: str | Path, image_size: int) -> None:
    """UserError, before the first step, for a held-out picture that cannot be decoded."""
    for split in SPLITS[1:] if is_first_process() and not is_world(directory) else ():
        open_pairs(directory, split, image_size=image_size).check_images()
