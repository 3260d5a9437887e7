"""What train.py offers: every recipe by name, the command line over them, and what a finished run leaves behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm import config
from minivlm.errors import UserError, nearest
from minivlm.recipes.base import Options, Recipe, dotted_names, override, split_arguments
from minivlm.recipes.contrast import RECIPES

if TYPE_CHECKING:
    from minivlm.run import Run

DEFAULT = "clip"


def command_line(argv: list[str]) -> tuple[str, Recipe, Options]:
    """["clip", "--steps", "500"] → the recipe's name, the recipe with its overrides, how to run it."""
    words, given = split_arguments(argv)
    if len(words) > 1:
        raise UserError(f"one recipe at a time: what is {words[1]!r} for? Options start with --.")
    name = words[0] if words else DEFAULT
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}.{nearest(name, RECIPES)}")
    names = dotted_names(Options())
    options = override(Options(), {k: v for k, v in given.items() if k in names})
    recipe = RECIPES[name]
    if options.resume:
        recipe = resumed_recipe(type(recipe), Path(options.out or f"out/{name}"))
    elif options.data:
        recipe = recipe.for_data(options.data)
    return name, override(recipe, {k: v for k, v in given.items() if k not in names}), options


def resumed_recipe(cls: type[Recipe], directory: Path) -> Recipe:
    """The recipe that an interrupted run was started with."""
    from minivlm.run import Run, read_record

    record = read_record(Run(directory).latest())
    return config.from_dict(cls, record["recipe"], "recipe")


def list_text() -> str:
    """Every recipe, a line each."""
    width = max(map(len, RECIPES))
    return "\n".join(f"{name:{width}}  {recipe.summary}; {recipe.measured}" for name, recipe in RECIPES.items())


def help_text(name: str, recipe: Recipe) -> str:
    """The options, and every field of the recipe with its value."""
    fields = [
        f"  --{field}  {value_at(recipe, field)}"
        for field in dotted_names(recipe)
        if field not in ("summary", "measured")
    ]
    return "\n".join(
        [
            "usage: python train.py [recipe] [--option value …]      recipes: " + ", ".join(RECIPES),
            "  --out DIR         where the run goes (out/<recipe>)",
            "  --data DIR        your own folder: captions.jsonl, or one sub-folder a class",
            "  --resume          go on from the last checkpoint in --out",
            "  --device D        auto, cpu, cuda, mps",
            "  --precision P     auto, fp32, bf16",
            "  --compile         torch.compile the towers",
            "  --stop_at N       stop after step N as Ctrl-C does",
            "  --list            every recipe, a line each",
            f"fields of {name}, with their values:",
            *fields,
        ]
    )


def value_at(value, dotted: str):
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def finish(run: Run, work) -> None:
    """The best checkpoint becomes the run's model: evaluated on held-out data, tabulated, pictured."""
    from minivlm import checkpoint
    from minivlm.evaluate import table
    from minivlm.run import read_record, restore_weights

    best = run.best()
    restore_weights(best, work.model)
    scores = work.evaluate()
    print(f"\nthe best checkpoint (step {read_record(best)['step']}) on held-out data:\n\n{table(scores)}\n")
    checkpoint.save(run.directory, work.model, work.processor)
    metrics = {name: dataclasses.asdict(score) for name, score in scores.items()}
    (run.directory / "metrics.json").write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
    work.picture(run.directory / "picture.png")
    print(f"{run.directory}/ holds the model, metrics.json and picture.png. Try next:")
    for command in work.next_commands(run.directory):
        print(f"  {command}")
