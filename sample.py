"""Ask a trained model something: `python sample.py TASK MODEL …`. Without arguments it lists the tasks.

MODEL is a directory that train.py wrote, a published checkpoint, or a hub id such as openai/clip-vit-base-patch32.
Each task is a function below, under its summary, an example, and its arguments.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from minivlm.chat_templates import DESCRIBE
from minivlm.command_line import (
    CHAT_ARGUMENTS,
    GENERATION_ARGUMENTS,
    Argument,
    Parser,
    argument,
    bar,
    check_generation,
    check_images,
    check_sheet_name,
    converse,
    load_generator,
    load_model,
    positive,
    report_passed_over,
    report_skipped,
    save_sheet,
    write_sheet,
)
from minivlm.errors import UserError, as_started, nearest, run_command_line


class Task(NamedTuple):
    summary: str
    example: str
    arguments: tuple[Argument, ...]
    run: Callable[[argparse.Namespace], None]


TASKS: dict[str, Task] = {}


def task(name: str, summary: str, example: str, *arguments: Argument) -> Callable:
    def add(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
        TASKS[name] = Task(summary, f"python sample.py {name} {example}", arguments, run)
        return run

    return add


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return
    name = argv[0]
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}.{nearest(name, TASKS)}")
    parser = Parser(
        prog=f"python sample.py {name}", description=TASKS[name].summary, epilog=f"e.g. {TASKS[name].example}"
    )
    parser.add_argument("model", metavar="MODEL", help="a directory of ours, a published one, or a hub id")
    for names, settings in TASKS[name].arguments:
        parser.add_argument(*names, **settings)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    whose = "what an adapter, or [vision=] or [language_model=] of MODEL, was trained on: a directory or hub id"
    parser.add_argument("--base", metavar="DIR", action="append", help=f"{whose} (the one that it names)")
    TASKS[name].run(parser.parse_args(argv[1:]))


def overview() -> str:
    lines = ["usage: python sample.py TASK MODEL …      python sample.py TASK --help", ""]
    for name, entry in TASKS.items():
        lines += [f"{name:10} {entry.summary}", f"{'':10} {entry.example}", ""]
    return as_started("\n".join(lines[:-1]))


IMAGES = argument("images", metavar="IMAGE", nargs="+", help="one image or more")
TOP = argument("--top", type=positive, default=5, help="how many to show (5)")


@task(
    "zero-shot",
    "which of these labels fits the image?",
    'out/clip photo.png --labels "red circle" "blue square"',
    IMAGES,
    argument("--labels", nargs="+", required=True, help="what it may be, two or more"),
    argument(
        "--templates",
        nargs="+",
        default=["plain"],
        help='"plain" (the label alone), "photo" (nine sentences about photographs), or sentences of your own with {} '
        "for the label or {a} for the label with a or an (plain)",
    ),
    TOP,
)
def zero_shot(options: argparse.Namespace) -> None:
    from minivlm.tasks.zero_shot import TEMPLATE_SETS, check, check_labels, zero_shot_classify

    check_labels(options.labels)  # what can be refused without the model is refused before it is loaded
    templates = check(TEMPLATE_SETS.get(options.templates[0], options.templates))
    check_images(options.images)
    model, processor = load_model(options)
    answers = zero_shot_classify(
        options.images, options.labels, model, processor, templates=templates, top_k=options.top
    )
    width = max(map(len, options.labels))
    for path, answer in zip(options.images, answers, strict=True):
        print(path)
        for label, probability in answer:
            print(f"  {label:{width}}  {bar(probability)}  {probability:6.1%}")


@task(
    "search",
    "which images of this folder fit the text (or the image)?",
    'out/clip DIR "a small red circle at the top" --top 8 --save sheet.png',
    argument("directory", metavar="DIR", help="a folder of images, sub-folders included"),
    argument("query", metavar="QUERY", help="a text, or the path of an image"),
    TOP,
    argument("--rerank", metavar="K", type=positive, help="put the K closest in order by how well they match"),
    argument("--save", metavar="FILE", help="draw the images that are found on one sheet"),
)
def search(options: argparse.Namespace) -> None:
    from minivlm import tasks
    from minivlm.datasets.class_folders import passed_over
    from minivlm.tasks.abilities import require
    from minivlm.tasks.image_index import list_files

    if options.save:
        check_sheet_name(options.save)
    report_passed_over(passed_over([list_files(Path(options.directory))], irregular=False))
    named = os.path.exists(options.query) and not os.path.isdir(options.query)
    query = Path(options.query) if named else options.query
    if options.rerank and isinstance(query, Path):
        raise UserError("--rerank matches texts with images, but the query is an image: leave it out.")
    model, processor = load_model(options)
    if options.rerank:
        require(model, processor, "match")
    # The index belongs to the model's folder; a hub id, or a folder that is read-only, has it in the user's cache.
    writable = Path(options.model).is_dir() and os.access(options.model, os.W_OK)
    place = tasks.index_path(options.directory, options.model) if writable else None
    index = tasks.build_image_index(options.directory, model, processor, path=place)
    report_skipped({name: why for name, (_, why) in index.skipped.items()})
    found = tasks.search_images(query, index, model, processor, top_k=max(options.top, options.rerank or 0))
    shown = [(path, f"{score:6.3f}") for path, score in found]
    if options.rerank:
        ordered = tasks.rerank(query, found, model, processor)
        shown = [(path, f"{probability:6.1%}  {score:6.3f}") for path, score, probability in ordered]
    for rank, (path, scores) in enumerate(shown[: options.top], start=1):
        print(f"{rank:3}  {scores}  {os.path.join(options.directory, path.relative_to(index.directory))}")
    if options.save:
        save_sheet(options.save, options.query, shown[: options.top])


@task(
    "match",
    "how probable is it that the text describes the image?",
    'out/blip2-stage1 photo.png "a red circle and a blue star"',
    IMAGES,
    argument("text", metavar="TEXT", help="what may be in them"),
)
def match(options: argparse.Namespace) -> None:
    from minivlm import tasks

    check_images(options.images)
    probabilities = tasks.match_all(options.images, [options.text], *load_model(options))[:, 0].tolist()
    width = max(map(len, options.images))
    for path, probability in zip(options.images, probabilities, strict=True):
        print(f"{path:{width}}  {bar(probability)}  {probability:6.1%}")


@task(
    "caption",
    "what is in the image?",
    "out/llava photo.png",
    argument("images", metavar="IMAGE", nargs="+", help="one image or more, each described by itself"),
    argument("--prompt", help=f"what the model is asked ({DESCRIBE})"),
    *CHAT_ARGUMENTS,
    *GENERATION_ARGUMENTS,
)
def caption(options: argparse.Namespace) -> None:
    from minivlm import tasks

    how = check_generation(options)
    model, processor = load_generator(options)
    texts = tasks.caption_all([[path] for path in options.images], model, processor, prompt=options.prompt, **how)
    for path, text in zip(options.images, texts, strict=True):
        print(text if len(texts) == 1 else f"{path}: {text}")


@task(
    "answer",
    "the answer to a question about an image, or about several",
    'out/llava photo.png "how many red shapes are there?" --num_beams 3',
    argument("images", metavar="IMAGE", nargs="+", help="the image, or several that belong to one question"),
    argument("question", metavar="QUESTION"),
    argument("--candidates", nargs="+", metavar="TEXT", help="answers that a BLIP ranks instead"),
    *CHAT_ARGUMENTS,
    *GENERATION_ARGUMENTS,
)
def answer(options: argparse.Namespace) -> None:
    from minivlm import tasks

    how, question = check_generation(options), (options.images, options.question)
    if options.candidates:
        if how:
            raise UserError(f"--candidates are ranked and not generated: leave out --{', --'.join(how)}.")
        for text, score in tasks.rank_answers(*question, options.candidates, *load_generator(options)):
            print(f"{score:7.2f}  {text}")
    else:
        print(tasks.answer(*question, *load_generator(options), **how))


@task(
    "few-shot",
    "how does the text continue, after examples of how it does?",
    'out/flamingo --examples a.png "this is a dax" b.png "this is a wug" --query c.png "this is a"',
    argument("--examples", nargs="*", default=[], metavar="IMAGE TEXT", help='such as a.png "this is a dax" …'),
    argument("--query", nargs=2, required=True, metavar=("IMAGE", "TEXT"), help='c.png "this is a", to be continued'),
    argument("--candidates", nargs="+", metavar="TEXT", help="the answer is one of these"),
    *GENERATION_ARGUMENTS,
)
def few_shot(options: argparse.Namespace) -> None:
    from minivlm.tasks.few_shot import few_shot, pair_up

    how = check_generation(options)
    examples = pair_up(options.examples)
    check_images([image for image, _ in [*examples, options.query]])
    print(few_shot(*load_generator(options), examples, options.query, candidates=options.candidates, **how))


@task(
    "chat",
    "a conversation about images, line by line",
    "out/llava photo.png --temperature 0.7 --top_p 0.9",
    argument("images", metavar="IMAGE", nargs="*", help="what the first question is about"),
    *CHAT_ARGUMENTS,
    *GENERATION_ARGUMENTS,
)
def chat(options: argparse.Namespace) -> None:
    from minivlm.tasks.chat import chat

    how = check_generation(options)
    converse(chat(*load_generator(options), *options.images, **how))


@task(
    "attend",
    "which parts of the image does the model attend to?",
    "out/blip2 photo.png other.png --save maps.png",
    IMAGES,
    argument("--prompt", help="what a model that answers is asked, or a text for BLIP"),
    argument("--save", metavar="FILE", default="maps.png", help="where the maps are drawn (%(default)s)"),
)
def attend(options: argparse.Namespace) -> None:
    from minivlm import tasks

    check_sheet_name(options.save)
    check_images(options.images)
    write_sheet(tasks.attention_sheet(options.images, *load_model(options), prompt=options.prompt), options.save)


@task(
    "complete",
    "how does the text continue?",
    'out/lm "is there a"',
    argument("text", metavar="TEXT", help="how it begins"),
    *GENERATION_ARGUMENTS,
)
def complete(options: argparse.Namespace) -> None:
    from minivlm import tasks

    how = check_generation(options)
    print(tasks.complete(options.text, *load_generator(options), **how))


if __name__ == "__main__":
    run_command_line(main)
