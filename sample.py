"""Ask a trained model something: `python sample.py TASK MODEL …`. Without arguments it lists the tasks.

MODEL is a directory that train.py wrote, a published checkpoint, or a hub id such as openai/clip-vit-base-patch32.
Each task is one entry of TASKS: what it is, an example, its arguments, and the function that answers.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from minivlm.chat_templates import DESCRIBE
from minivlm.command_line import (
    Parser,
    bar,
    chat_arguments,
    check_picture_name,
    check_pictures,
    check_speaking,
    converse,
    positive,
    report_passed_over,
    report_skipped,
    save_sheet,
    speaking_arguments,
    write_picture,
)
from minivlm.errors import UserError, as_started, nearest, run_command_line


class Task(NamedTuple):
    summary: str
    example: str
    add_arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], None]


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
    TASKS[name].add_arguments(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    whose = "what an adapter, or [vision=] or [language_model=] of MODEL, was trained on: a directory or hub id"
    parser.add_argument("--base", metavar="DIR", action="append", help=f"{whose} (the one that it names)")
    TASKS[name].run(parser.parse_args(argv[1:]))


def overview() -> str:
    lines = ["usage: python sample.py TASK MODEL …      python sample.py TASK --help", ""]
    for name, task in TASKS.items():
        lines += [f"{name:10} {task.summary}", f"{'':10} {task.example}", ""]
    return as_started("\n".join(lines[:-1]))


# ------------------------------------------------------------------------------------------------------------ zero-shot


def zero_shot_arguments(parser: Parser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="one picture or more")
    parser.add_argument("--labels", nargs="+", required=True, help="what it may be, two or more")
    parser.add_argument(
        "--templates",
        nargs="+",
        default=["plain"],
        help='"plain" (the label alone), "photo" (nine sentences about photographs), or sentences of your own with {} '
        "for the label or {a} for the label with a or an (plain)",
    )
    parser.add_argument("--top", type=positive, default=5, help="how many labels to show (5)")


def zero_shot(options: argparse.Namespace) -> None:
    from minivlm.tasks import zero_shot as task

    task.check_labels(options.labels)  # what can be refused without the model is refused before it is loaded
    templates = task.check(task.TEMPLATE_SETS.get(options.templates[0], options.templates))
    check_pictures(options.images)
    model, processor = load_comparer(options)
    answers = task.zero_shot_classify(
        options.images, options.labels, model, processor, templates=templates, top_k=options.top
    )
    width = max(map(len, options.labels))
    for path, answer in zip(options.images, answers, strict=True):
        print(path)
        for label, probability in answer:
            print(f"  {label:{width}}  {bar(probability)}  {probability:6.1%}")


# --------------------------------------------------------------------------------------------------------------- search


def search_arguments(parser: Parser) -> None:
    parser.add_argument("directory", metavar="DIR", help="a folder of pictures, sub-folders included")
    parser.add_argument("query", metavar="QUERY", help="words, or the path of a picture")
    parser.add_argument("--top", type=positive, default=5, help="how many pictures to show (5)")
    parser.add_argument(
        "--rerank", metavar="K", type=positive, help="put the K closest in order by how well they match"
    )
    parser.add_argument("--save", metavar="FILE", help="draw the pictures found into one picture")


def search(options: argparse.Namespace) -> None:
    from minivlm import tasks
    from minivlm.datasets.class_folders import passed_over
    from minivlm.tasks.abilities import require
    from minivlm.tasks.image_index import list_files

    if options.save:
        check_picture_name(options.save)
    report_passed_over(passed_over([list_files(Path(options.directory))], irregular=False))
    named = os.path.exists(options.query) and not os.path.isdir(options.query)
    query = Path(options.query) if named else options.query
    if options.rerank and isinstance(query, Path):
        raise UserError("--rerank matches words with pictures, but the query is a picture: leave it out.")
    model, processor = load_comparer(options)
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


# ---------------------------------------------------------------------------------------------------------------- match


def match_arguments(parser: Parser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="one picture or more")
    parser.add_argument("text", metavar="TEXT", help="what may be in them")


def match(options: argparse.Namespace) -> None:
    from minivlm import tasks

    check_pictures(options.images)
    probabilities = tasks.match_all(options.images, [options.text], *load_model(options))[:, 0].tolist()
    width = max(map(len, options.images))
    for path, probability in zip(options.images, probabilities, strict=True):
        print(f"{path:{width}}  {bar(probability)}  {probability:6.1%}")


# --------------------------------------------------------------------------------------------------------------- attend


def attend_arguments(parser: Parser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="one picture or more")
    parser.add_argument("--prompt", help="what a model that answers is asked, or a text for BLIP to read")
    parser.add_argument("--save", metavar="FILE", default="maps.png", help="where the maps are drawn (%(default)s)")


def attend(options: argparse.Namespace) -> None:
    from minivlm import tasks

    check_picture_name(options.save)
    check_pictures(options.images)
    write_picture(tasks.attention_sheet(options.images, *load_model(options), prompt=options.prompt), options.save)


# -------------------------------------------------------------------------------------------- caption, answer, complete


def caption_arguments(parser: Parser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="one picture or more, each described by itself")
    parser.add_argument("--prompt", help=f"what it is asked ({DESCRIBE})")
    chat_arguments(parser)
    speaking_arguments(parser)


def caption(options: argparse.Namespace) -> None:
    from minivlm import tasks

    how = check_speaking(options)
    model, processor = load_speaker(options)
    said = tasks.caption_all([[path] for path in options.images], model, processor, prompt=options.prompt, **how)
    for path, text in zip(options.images, said, strict=True):
        print(text if len(said) == 1 else f"{path}: {text}")


def answer_arguments(parser: Parser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="the picture, or several that are shown together")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument(
        "--candidates", nargs="+", metavar="TEXT", help="what a BLIP puts in order instead of answering"
    )
    chat_arguments(parser)
    speaking_arguments(parser)


def answer(options: argparse.Namespace) -> None:
    from minivlm import tasks

    how, asked = check_speaking(options), (options.images, options.question)
    if options.candidates:
        if how:
            raise UserError(f"--candidates are put in order and not said: leave out --{', --'.join(how)}.")
        for text, score in tasks.rank_answers(*asked, options.candidates, *load_speaker(options)):
            print(f"{score:7.2f}  {text}")
    else:
        print(tasks.answer(*asked, *load_speaker(options), **how))


def complete_arguments(parser: Parser) -> None:
    parser.add_argument("text", metavar="TEXT", help="how it begins")
    speaking_arguments(parser)


def complete(options: argparse.Namespace) -> None:
    from minivlm import tasks

    how = check_speaking(options)
    print(tasks.complete(options.text, *load_speaker(options), **how))


# ------------------------------------------------------------------------------------------------------------- few-shot


def few_shot_arguments(parser: Parser) -> None:
    example = dict(nargs="*", default=[], metavar="IMAGE TEXT")
    parser.add_argument("--examples", **example, help='pictures, each with its text: a.png "this is a dax"')
    parser.add_argument(
        "--query", nargs=2, required=True, metavar=("IMAGE", "TEXT"), help='c.png "this is a", to be gone on from'
    )
    parser.add_argument("--candidates", nargs="+", metavar="TEXT", help="the answer is one of these")
    speaking_arguments(parser)


def few_shot(options: argparse.Namespace) -> None:
    from minivlm import tasks

    how = check_speaking(options)
    examples = tasks.pair_up(options.examples)
    check_pictures([image for image, _ in [*examples, options.query]])
    print(tasks.few_shot(*load_speaker(options), examples, options.query, candidates=options.candidates, **how))


# ----------------------------------------------------------------------------------------------------------------- chat


def talk_arguments(parser: Parser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="what the conversation begins with")
    chat_arguments(parser)
    speaking_arguments(parser)


def chat(options: argparse.Namespace) -> None:
    import minivlm

    how = check_speaking(options)
    converse(minivlm.chat(*load_speaker(options), *options.images, **how))


# --------------------------------------------------------------------------------------------------------------- shared


TASKS = {
    "zero-shot": Task(
        "which of these labels fits the picture?",
        'python sample.py zero-shot out/clip photo.png --labels "red circle" "blue square"',
        zero_shot_arguments,
        zero_shot,
    ),
    "search": Task(
        "which pictures of this folder fit the words (or the picture)?",
        'python sample.py search out/clip DIR "a small red circle at the top" --top 8 --save sheet.png',
        search_arguments,
        search,
    ),
    "match": Task(
        "how probably does the text belong to the picture?",
        'python sample.py match out/blip2-stage1 photo.png "a red circle and a blue star"',
        match_arguments,
        match,
    ),
    "caption": Task(
        "what is in the picture?",
        "python sample.py caption out/llava photo.png",
        caption_arguments,
        caption,
    ),
    "answer": Task(
        "the answer to a question about a picture, or about several",
        'python sample.py answer out/llava photo.png "how many red shapes are there?" --num_beams 3',
        answer_arguments,
        answer,
    ),
    "few-shot": Task(
        "how does the text go on, after examples of how it does?",
        'python sample.py few-shot out/flamingo --examples a.png "this is a dax" b.png "this is a wug" '
        '--query c.png "this is a"',
        few_shot_arguments,
        few_shot,
    ),
    "chat": Task(
        "a conversation about pictures, line by line",
        "python sample.py chat out/llava photo.png --temperature 0.7 --top_p 0.9",
        talk_arguments,
        chat,
    ),
    "attend": Task(
        "what does the model look at?",
        "python sample.py attend out/blip2 photo.png other.png --save maps.png",
        attend_arguments,
        attend,
    ),
    "complete": Task(
        "how does the text go on?",
        'python sample.py complete out/lm "is there a"',
        complete_arguments,
        complete,
    ),
}


SMALL = 10**9  # parameters: 4 GB in fp32


def load_model(options: argparse.Namespace, **settings) -> tuple:
    """The model and its processor, on the device asked for; the tasks say what it cannot do."""
    import minivlm
    from minivlm.training import choose_device

    if options.base:
        named = [re.fullmatch(r"(vision|language_model)=(.+)", base) for base in options.base]
        if len(named) > 1 and not (all(named) and len({match[1] for match in named}) == len(named)):
            raise UserError(
                "--base is given twice: say which part each is, as --base vision=A --base language_model=B."
            )
        settings["base"] = {match[1]: match[2] for match in named} if named[0] else options.base[0]
    return minivlm.load(options.model, device=choose_device(options.device), **settings)


def load_comparer(options: argparse.Namespace) -> tuple:
    """The same; UserError unless it turns images and texts into vectors."""
    from minivlm.tasks.abilities import require

    model, processor = load_model(options)
    require(model, processor, "encode")
    return model, processor


def load_speaker(options: argparse.Namespace) -> tuple:
    """The same, in the precision asked for, and asked in the way asked for.

    On a CPU a small model speaks in fp32 unless another precision is asked for: it costs little there, and in half
    precision the two likeliest words may come out equal, so that rounding chooses the answer.
    """
    import torch

    from minivlm.conversation import with_chat
    from minivlm.tasks.abilities import require_answers

    model, processor = load_model(options, dtype=getattr(torch, options.dtype) if options.dtype else None)
    if options.dtype is None and model.device.type == "cpu" and sum(p.numel() for p in model.parameters()) <= SMALL:
        model.float()
    chat, system = getattr(options, "chat", None), getattr(options, "system", None)
    if chat is not None or system is not None:
        require_answers(model, processor)  # a model that answers nothing has no turns
        processor = with_chat(processor, chat, system)
    return model, processor


if __name__ == "__main__":
    run_command_line(main)
