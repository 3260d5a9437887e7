"""The command line → the recipes that are trained, in order: first what a recipe builds on and is not there yet."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path

from minivlm import trackers
from minivlm.config import value_at
from minivlm.datasets.source import Source
from minivlm.errors import UserError, nearest
from minivlm.recipes import RECIPES
from minivlm.recipes.folders import for_data
from minivlm.recipes.older_options import current_type, directory_of, read_recipe
from minivlm.recipes.options import Options, dotted_names, launcher, override, processes, split_arguments
from minivlm.recipes.recipe import Recipe
from minivlm.recipes.resuming import refuse_changes
from minivlm.run import Run, read_record
from minivlm.run_directory import check_out

DEFAULT = "clip"
STARTS = (
    "starts_from",
    "vision_from",
    "text_from",
    "language_from",
    "bert_from",
)  # the fields that name what a recipe starts from


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
    changes = {k: v for k, v in given.items() if k not in names}
    recipe = RECIPES[name]
    if options.resume:
        check_out(options.directory(name), {}, resume=True)
        return name, resumed_recipe(name, options.directory(name), changes, options), options
    if options.data:
        recipe = for_data(override(recipe, changes), options.data, options.directory(name))
    recipe = override(override(recipe, changes).as_chosen(), changes)
    return name, dataclasses.replace(recipe, given=remembered(changes)), options


def remembered(changes: dict[str, str | bool]) -> tuple[str, ...]:
    """Of the options that were given those of which `start` has to know that they were."""
    return tuple(name for name in changes if name.startswith("model.") or name == "optimiser.learning_rate")


def resumed_recipe(name: str, directory: str, changes: dict[str, str | bool], options: Options) -> Recipe:
    """The recipe that an interrupted run was started with, and those changes that may be made while it is under way."""
    base, record = RECIPES[name], read_record(latest := Run(directory).latest())
    kind = current_type(record["recipe"])
    if kind != type(base).__name__ or record.get("name", name) != name:
        raise UserError(
            f"{directory} holds a run of {record.get('name', kind)}, not of {name}: resume it as what it is."
        )
    recorded = read_recipe(base, record["recipe"], f"{latest / 'training.json'}: recipe")
    given = tuple(dict.fromkeys([*recorded.given, *remembered(changes)]))
    recipe = dataclasses.replace(override(recorded, changes), given=given)
    if options.data:
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, directory=options.data))
    refuse_changes(record, recorded, recipe)
    if options.stop_at is not None and options.stop_at <= record["step"] < recipe.steps:
        raise UserError(f"--stop_at {options.stop_at}: the run has done {record['step']} steps already.")
    return recipe


def chain(name: str, recipe: Recipe, options: Options) -> list[tuple[str, Recipe, Options]]:
    """What has to be trained, in order: first what the recipe builds on and is not there yet, last the recipe itself.

    Only the directories that a recipe itself proposes are filled; one that the user names has to be there.
    """
    todo, proposed = [], with_proposed_bases(name, recipe, options)
    for needed, directory in {} if options.resume else recipe.needs().items():
        refuse_others(recipe, directory)
        if directory != proposed.needs()[needed] or (Path(directory) / "config.json").exists():
            continue
        begun = bool(found := Run(directory).all())
        if begun and (was := read_record(found[-1]).get("name")) in RECIPES:
            needed = was  # the CLIP of a folder is clip to some recipes and clip-resnet to others
        part = dataclasses.replace(options, out=directory, resume=begun, stop_at=None)
        if begun:
            inner = resumed_recipe(needed, directory, {}, part)
        else:
            inner = for_data(RECIPES[needed], recipe.data.source, directory) if options.data else RECIPES[needed]
            share = max(1, inner.batch_size // processes())  # of a small folder, which processes may not divide
            inner = dataclasses.replace(inner, batch_size=share * processes(), **recipe.hands_on())
        todo += [one for one in chain(needed, inner, part) if one not in todo]
    return [*todo, (name, recipe, options)]


def refuse_others(recipe: Recipe, directory: str) -> None:
    """UserError where a model that is there was made of others than the recipe would hand on to its training."""
    if not (handed := recipe.hands_on()) or not Path(directory).exists():
        return
    was = read_record(found[-1])["recipe"] if (found := Run(directory).all()) else {}
    for option, source in handed.items():
        if (before := was.get(option)) != source:
            raise UserError(
                f"--{option} {source} is for a model that is trained first, but {directory} is there"
                f"{f', made from {before}' if before else ''}: leave --{option} out, or move {directory} away."
            )


def with_proposed_bases(name: str, recipe: Recipe, options: Options) -> Recipe:
    """The recipe, building on what it would if the user had named no directory."""
    if options.data:
        return for_data(recipe, options.data, options.directory(name))
    return dataclasses.replace(recipe, **{option: getattr(RECIPES[name], option) for option in recipe.builds_on()})


def check_places(plan: list[tuple[str, Recipe, Options]]) -> None:
    """UserError, before anything is done, where a part of the plan cannot go to its directory without harm."""
    for name, recipe, options in plan:
        check_out(options.directory(name), reads(recipe, options), resume=options.resume)
    places = [os.path.realpath(options.directory(name)) for name, _, options in plan]
    for i, (name, _, options) in enumerate(plan):
        if (j := places.index(places[i])) < i:
            where = f"{options.directory(name)} is where {plan[j][0]} goes, which {name} builds on"
            raise UserError(f"{where}: choose another --out.")


def reads(recipe: Recipe, options: Options) -> dict[str, str]:
    """The folders and models that a run of the recipe reads, by the options that name them."""
    named = {f"--{option}": getattr(recipe, option, None) for option in STARTS}
    named |= {f"the {name} at": directory for name, directory in recipe.needs().items()}
    return {"--data": options.data or recipe.data.directory, **{k: v for k, v in named.items() if v}}


def go_on(plan: list[tuple[str, Recipe, Options]], stopped: Options, argv: list[str]) -> str:
    """The command that resumes where a part of the plan was stopped; a chain finds by itself what it had begun."""
    name, _, options = plan[-1]
    return options.resume_command(name) if stopped is options else shlex.join([*launcher(), *argv])


def announcement(plan: list[tuple[str, Recipe, Options]]) -> str:
    """What `chain` found missing, and what is there but of other data; nothing if there is nothing to say."""
    *missing, (name, recipe, options) = plan
    first = ", ".join(f"{needed} ({part.out})" for needed, _, part in missing)
    told = [f"{name} builds on what is not there yet; trained first: {first}"] if missing else []
    for directory in recipe.needs().values() if options.data else ():
        run = Run(directory)
        made_on = directory_of(read_record(run.latest())["recipe"]) if directory and run.all() else options.data
        if os.path.realpath(made_on) != os.path.realpath(Source.of(options.data)):
            told.append(f"{directory}, which it builds on, was trained on {made_on}, not on {options.data}")
    return "\n".join(told)


def list_text() -> str:
    """Every recipe, a line each."""
    width = max(map(len, RECIPES))
    return "\n".join(f"{name:{width}}  {recipe.summary}; {recipe.measured}" for name, recipe in RECIPES.items())


def shown(recipe: Recipe, field: str) -> str:
    """An option of --help, with its value."""
    value = value_at(recipe, field)
    return f"--{field}.PART  {value or 'by origin'}" if isinstance(value, dict) else f"--{field}  {value}"


def help_text(name: str, recipe: Recipe) -> str:
    """The options, and every field of the recipe with its value."""
    fields = [f"  {shown(recipe, field)}" for field in dotted_names(recipe) if field not in ("summary", "measured")]
    return "\n".join(
        [
            f"usage: {' '.join(launcher())} [recipe] [--option value …]      recipes: " + ", ".join(RECIPES),
            "  --out DIR         where the run goes (out/<recipe>)",
            "  --data DIR        your own folder: a table, COCO's or LLaVA's JSON, one sub-folder a class, … (docs/data.md)",
            "  --resume          go on from the last checkpoint in --out",
            "  --device D        auto, cpu, cuda, mps",
            "  --precision P     auto, fp32, bf16, fp16",
            "  --compile         torch.compile the stacks of blocks",
            "  --activation_checkpointing   less memory, for one more forward pass a step",
            "  --feature_cache S how much of a frozen vision tower's features may be kept (4GB; off: none)",
            f"  --log NAMES       send the numbers of log.jsonl to {', '.join(trackers.NEEDS)} as well",
            "  --stop_at N       stop after step N as Ctrl-C does",
            "  --list            every recipe, a line each",
            f"fields of {name}, with their values:",
            *fields,
        ]
    )
