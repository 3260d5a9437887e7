"""What train.py offers: every recipe by name, the command line over them, and what a finished run leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm import config
from minivlm.errors import UserError, as_started, nearest
from minivlm.recipes.base import Options, Recipe, dotted_names, launcher, override, processes, split_arguments
from minivlm.recipes.blip import BLIP_RECIPES
from minivlm.recipes.blip2 import BLIP2_RECIPES
from minivlm.recipes.capfilt import CAPFILT_RECIPES
from minivlm.recipes.captioner import CAPTIONER_RECIPES
from minivlm.recipes.clip import CONTRAST_RECIPES
from minivlm.recipes.flamingo import FLAMINGO_RECIPES
from minivlm.recipes.fusion import FUSION_RECIPES
from minivlm.recipes.language import LANGUAGE_RECIPES
from minivlm.recipes.llava import LLAVA_RECIPES
from minivlm.recipes.multitask import MULTITASK_RECIPES
from minivlm.recipes.resuming import data_directory, data_directory_of, refuse_changes, with_directory
from minivlm.recipes.t5 import T5_RECIPES
from minivlm.run_directory import check_out

if TYPE_CHECKING:
    from torch import nn

    from minivlm.run import Run

RECIPES = (
    CONTRAST_RECIPES
    | LANGUAGE_RECIPES
    | T5_RECIPES
    | LLAVA_RECIPES
    | BLIP_RECIPES
    | CAPFILT_RECIPES
    | BLIP2_RECIPES
    | FLAMINGO_RECIPES
    | FUSION_RECIPES
    | MULTITASK_RECIPES
    | CAPTIONER_RECIPES
)
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
    changes = {k: v for k, v in given.items() if k not in names}
    recipe = RECIPES[name]
    if options.resume:
        check_out(options.directory(name), {}, resume=True)
        return name, resumed_recipe(name, options.directory(name), changes, options), options
    if options.data:
        recipe = override(recipe, changes).for_data(options.data, options.directory(name))
    return name, override(recipe, changes), options


def chain(name: str, recipe: Recipe, options: Options) -> list[tuple[str, Recipe, Options]]:
    """What has to be trained, in order: first what the recipe builds on and is not there yet, last the recipe itself.

    Only the directories that a recipe itself proposes are filled; one that the user names has to be there.
    """
    from minivlm.run import Run, read_record

    todo, proposed = [], with_proposed_bases(name, recipe, options)
    for needed, directory in {} if options.resume else recipe.needs().items():
        if directory != proposed.needs()[needed] or (Path(directory) / "config.json").exists():
            continue
        begun = bool(found := Run(directory).all())
        if begun and (was := read_record(found[-1]).get("name")) in RECIPES:
            needed = was  # the CLIP of a folder is clip to some recipes and clip-resnet to others
        part = dataclasses.replace(options, out=directory, resume=begun, stop_at=None)
        if begun:
            inner = resumed_recipe(needed, directory, {}, part)
        else:
            inner = RECIPES[needed].for_data(options.data, directory) if options.data else RECIPES[needed]
            share = max(1, inner.batch_size // processes())  # of a small folder, which processes may not divide
            inner = dataclasses.replace(inner, batch_size=share * processes())
        todo += [one for one in chain(needed, inner, part) if one not in todo]
    return [*todo, (name, recipe, options)]


def with_proposed_bases(name: str, recipe: Recipe, options: Options) -> Recipe:
    """The recipe, building on what it would if the user had named no directory."""
    if options.data:
        return recipe.for_data(options.data, options.directory(name))
    places = [f.name for f in dataclasses.fields(recipe) if f.name.endswith("_from")]
    return dataclasses.replace(recipe, **{place: getattr(RECIPES[name], place) for place in places})


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
    values = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    named = {f"--{name}": value for name, value in values.items() if name.endswith("_from") and isinstance(value, str)}
    named |= {f"the {name} at": directory for name, directory in recipe.needs().items() if directory}
    return {"--data": options.data or data_directory(recipe), **named}


def go_on(plan: list[tuple[str, Recipe, Options]], stopped: Options, argv: list[str]) -> str:
    """The command that goes on where a part of the plan was stopped; a chain finds by itself what it had begun."""
    name, _, options = plan[-1]
    return options.resume_command(name) if stopped is options else shlex.join([*launcher(), *argv])


def announcement(plan: list[tuple[str, Recipe, Options]]) -> str:
    """What `chain` found missing, and what is there but of other data; nothing if there is nothing to say."""
    from minivlm.run import Run, read_record

    *missing, (name, recipe, options) = plan
    first = ", ".join(f"{needed} ({part.out})" for needed, _, part in missing)
    told = [f"{name} builds on what is not there yet; trained first: {first}"] if missing else []
    for directory in recipe.needs().values() if options.data else ():
        run = Run(directory)
        made_on = data_directory_of(read_record(run.latest())["recipe"]) if directory and run.all() else options.data
        if os.path.realpath(made_on) != os.path.realpath(options.data):
            told.append(f"{directory}, which it builds on, was trained on {made_on}, not on {options.data}")
    return "\n".join(told)


def parts_table(model: nn.Module, rate: float, origins: dict[str, str]) -> str:
    """part | parameters | frozen or trained | learning rate | starts from, read from the parameters themselves."""
    rows, seen = [], set()
    for name, part in model.named_children():
        adapters = {id(p) for key, p in part.named_parameters() if "lora_" in key}
        own = [p for p in part.parameters() if id(p) not in adapters | seen]  # a tied head is counted once
        seen |= {id(p) for p in own}
        rows.append((name, own))
        if adapters:
            rows.append((f"{name} LoRA", [p for p in part.parameters() if id(p) in adapters]))
    lines = [("part", "parameters", "frozen or trained", "learning rate", "starts from")]
    for name, parameters in rows:
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        if total:
            state = "trained" if trained == total else "frozen" if not trained else f"{trained:,} trained"
            lines.append((name, f"{total:,}", state, f"{rate:g}" if trained else "-", origins.get(name, "new")))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def resumed_recipe(name: str, directory: str, changes: dict[str, str | bool], options: Options) -> Recipe:
    """The recipe that an interrupted run was started with, and those changes that may be made while it is under way."""
    from minivlm.run import Run, read_record

    cls, record = type(RECIPES[name]), read_record(latest := Run(directory).latest())
    kind = record["recipe"].get("type")
    if kind != cls.__name__ or record.get("name", name) != name:
        raise UserError(
            f"{directory} holds a run of {record.get('name', kind)}, not of {name}: resume it as what it is."
        )
    recorded = config.from_dict(cls, config.complete(cls, record["recipe"]), f"{latest / 'training.json'}: recipe")
    recipe = override(recorded, changes)
    if options.data:
        recipe = with_directory(recipe, options.data)
    refuse_changes(record, recorded, recipe)
    if options.stop_at is not None and options.stop_at <= record["step"] < recipe.steps:
        raise UserError(f"--stop_at {options.stop_at}: the run has done {record['step']} steps already.")
    return recipe


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
            f"usage: {' '.join(launcher())} [recipe] [--option value …]      recipes: " + ", ".join(RECIPES),
            "  --out DIR         where the run goes (out/<recipe>)",
            "  --data DIR        your own folder: captions.jsonl, or one sub-folder a class",
            "  --resume          go on from the last checkpoint in --out",
            "  --device D        auto, cpu, cuda, mps",
            "  --precision P     auto, fp32, bf16",
            "  --compile         torch.compile the stacks of blocks",
            "  --stop_at N       stop after step N as Ctrl-C does",
            "  --list            every recipe, a line each",
            f"fields of {name}, with their values:",
            *fields,
        ]
    )


def value_at(value, dotted: str):
    for part in dotted.split("."):
        value = getattr(value, part, None)  # of a part that is left out
    return value


def finish(run: Run, work) -> None:
    """The best checkpoint becomes the run's model, which is saved before it is evaluated on held-out data and pictured."""
    from minivlm.atomic_writing import write_atomically
    from minivlm.checkpoint import save
    from minivlm.evaluate import table
    from minivlm.precision import cast
    from minivlm.run import read_record, restore_weights

    best, metrics, picture = run.best(), run.directory / "metrics.json", run.directory / "picture.png"
    step = read_record(best)["step"]
    restore_weights(best, work.model)
    for path in (metrics, picture):  # of what the run had come to before it was resumed
        path.unlink(missing_ok=True)
    work.finish(run.directory)
    cast(work.model, work.model.stored)  # so that what is evaluated is what is left
    save(run.directory, work.model, work.processor, base=work.recipe.base())
    try:
        scores = work.evaluate()
        print(f"\nthe best checkpoint (step {step}) on {work.judged_on()}\n\n{table(scores)}\n")
        values = {name: dataclasses.asdict(score) for name, score in scores.items()}
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        work.picture(picture)
        write_atomically(metrics, lambda path: path.write_text(text, encoding="utf-8"))
    except UserError as error:
        raise UserError(
            f"{error} The model, of step {step}, is in {run.directory} all the same: only its evaluation ended here."
        ) from error
    print(f"{run.directory}/ holds the model, metrics.json and picture.png. Try next:")
    out = f" {run.directory} "
    for command in work.next_commands(run.directory):
        print(f"  {as_started(no_options(command.replace(out, f' {shlex.quote(str(run.directory))} ')))}")


def no_options(command: str) -> str:
    """The command, in which a file that is called like an option, such as -o, is called ./-o."""
    words = shlex.split(command)
    files = [f"./{word}" if word.startswith("-") and os.path.exists(word) else word for word in words]
    return command if files == words else shlex.join(files)
