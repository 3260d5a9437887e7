"""Ask a trained model something: `python sample.py TASK MODEL …`. Without arguments it lists the tasks.

MODEL is a directory that train.py wrote, a published checkpoint, or a hub id such as openai/clip-vit-base-patch32.
Each task is a function below, under its summary, an example, and its arguments.
"""

from __future__ import annotations

import argparse

from minivlm.chat_templates import DESCRIBE
from minivlm.command_line import (
    CHAT_ARGUMENTS,
    GENERATION_ARGUMENTS,
    argument,
    bar,
    check_generation,
    check_images,
    converse,
    load_generator,
    load_model,
    positive,
)
from minivlm.command_line_files import run_attend, run_embed, run_search
from minivlm.command_line_rows import (
    IMAGES,
    QUESTION,
    ROW_ARGUMENTS,
    TEXT,
    read_rows,
    read_texts,
    run_rows,
    split_text,
)
from minivlm.command_line_tasks import TASKS, main, task
from minivlm.errors import UserError, run_command_line
from minivlm.tasks.templates import HELP as TEMPLATES

__all__ = ["TASKS", "main"]


TOP = argument("--top", type=positive, default=5, help="how many to show (5)")


@task(
    "zero-shot",
    "which of these labels fits the image?",
    'out/clip photo.png --labels "red circle" "blue square"',
    IMAGES,
    argument("--labels", nargs="+", required=True, help="what it may be, two or more; or a .txt with one a line"),
    argument(
        "--templates",
        nargs="+",
        default=["plain"],
        help=f"{TEMPLATES} (plain)",
    ),
    TOP,
    *ROW_ARGUMENTS,
)
def zero_shot(options: argparse.Namespace) -> None:
    from minivlm.tasks.row_tasks import label_task
    from minivlm.tasks.templates import read_templates
    from minivlm.tasks.zero_shot import check_labels, read_labels

    options.labels = read_labels(options.labels)
    check_labels(options.labels)  # what can be refused without the model is refused before it is loaded
    templates = read_templates(options.templates)
    inputs = read_rows(options)
    model, processor = load_model(options)
    classify = label_task(options.labels, model, processor, templates=templates, top_k=options.top)
    width = max(map(len, options.labels))
    bars = lambda shares: (f"  {label:{width}}  {bar(share)}  {share:6.1%}" for label, share in shares.items())
    show = lambda row, result: "\n".join([row.shown, *bars(result["labels"])])
    run_rows(inputs, classify, model, processor, options, ["label", "probability", "labels"], show)


@task(
    "search",
    "which images of this folder fit the text (or the image)?",
    'out/clip DIR "a small red circle at the top" --top 8 --save sheet.png',
    argument("directory", metavar="DIR", help="a folder of images, sub-folders included; or what embed wrote"),
    argument("query", metavar="QUERY", help="a text, or the path of an image"),
    TOP,
    argument("--rerank", metavar="K", type=positive, help="put the K closest in order by how well they match"),
    argument("--save", metavar="FILE", help="draw the images that are found on one sheet"),
)
def search(options: argparse.Namespace) -> None:
    run_search(options)


@task(
    "embed",
    "the vectors of images and texts, as .npy files",
    "out/clip my_photos --save embeddings",
    argument("images", metavar="IMAGE", nargs="*", help=IMAGES[1]["help"]),
    argument("--texts", metavar="FILE", help="texts to embed as well: a .txt with one a line, a .csv or .jsonl"),
    argument(
        "--save", metavar="DIR", required=True, help="a folder: img_emb/, metadata/, text_emb/; again: continue it"
    ),
    argument("--dtype", choices=["float32", "float16"], default="float32", help="of the vectors (%(default)s)"),
    argument("--part", metavar="N", type=positive, default=10_000, help="rows of a file (%(default)s)"),
    *ROW_ARGUMENTS[1:],
)
def embed(options: argparse.Namespace) -> None:
    run_embed(options)


@task(
    "match",
    "how probable is it that the text describes the image?",
    'out/blip2-stage1 photo.png "a red circle and a blue star"',
    argument(
        "images", metavar="IMAGE", nargs="+", help=IMAGES[1]["help"] + "; last the text, unless a list has one for each"
    ),
    *ROW_ARGUMENTS,
)
def match(options: argparse.Namespace) -> None:
    from minivlm.tasks.row_tasks import match_task

    inputs = read_rows(options, split_text(options, TEXT))
    model, processor = load_model(options)
    width = max(len(row.shown) for row in inputs.rows)
    show = lambda row, result: f"{row.shown:{width}}  {bar(p := result['probability'])}  {p:6.1%}"
    run_rows(inputs, match_task(model, processor), model, processor, options, ["probability"], show)


@task(
    "caption",
    "what is in the image?",
    "out/llava my_photos --save captions.jsonl",
    IMAGES,
    argument("--prompt", help=f"what the model is asked ({DESCRIBE})"),
    *ROW_ARGUMENTS,
    *CHAT_ARGUMENTS,
    *GENERATION_ARGUMENTS,
)
def caption(options: argparse.Namespace) -> None:
    from minivlm.tasks.row_tasks import caption_task

    how, inputs = check_generation(options), read_rows(options)
    model, processor = load_generator(options)
    task = caption_task(model, processor, how, prompt=options.prompt, alone=bool(options.save))
    one = len(inputs.rows) == 1
    show = lambda row, result: result["caption"] if one else f"{row.shown}: {result['caption']}"
    run_rows(inputs, task, model, processor, options, ["caption"], show)


@task(
    "answer",
    "the answer to a question about an image, or about several; to many questions",
    'out/llava photo.png "how many red shapes are there?" --num_beams 3',
    argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="the image, or several that belong to one question, and last the QUESTION; a folder or list of images, each asked "
        "by itself, as all are with --save; or, without a question, a list of questions (.jsonl, .csv, VQA's .json)",
    ),
    argument("--candidates", nargs="+", metavar="TEXT", help="answers that a BLIP ranks instead"),
    *ROW_ARGUMENTS,
    *CHAT_ARGUMENTS,
    *GENERATION_ARGUMENTS,
)
def answer(options: argparse.Namespace) -> None:
    from minivlm import tasks
    from minivlm.tasks.row_tasks import answer_task

    how, question = check_generation(options), split_text(options, QUESTION)
    if options.candidates and how:
        raise UserError(f"--candidates are ranked and not generated: leave out --{', --'.join(how)}.")
    inputs = read_rows(options, question)
    model, processor = load_generator(options)
    if options.save or not all(row.named for row in inputs.rows):
        task = answer_task(model, processor, how, candidates=options.candidates, alone=bool(options.save))
        show = lambda row, result: f"{row.shown}: {row.values['question']} {result['answer']}"
        run_rows(inputs, task, model, processor, options, ["answer"], show)
    elif options.candidates:
        ranked = tasks.rank_answers(options.images, question.given, options.candidates, model, processor)
        print("\n".join(f"{score:7.2f}  {text}" for text, score in ranked))
    else:
        print(tasks.answer(options.images, question.given, model, processor, **how))


@task(
    "few-shot",
    "how does the text continue, after examples of how it does?",
    'out/flamingo --examples a.png "this is a dax" b.png "this is a wug" --query c.png "this is a"',
    argument("--examples", nargs="*", default=[], metavar="IMAGE TEXT", help='such as a.png "this is a dax" …'),
    argument(
        "--query",
        nargs=2,
        required=True,
        metavar=("IMAGE", "TEXT"),
        help='c.png "this is a", to be continued; for IMAGE also a folder or list, each continued by itself',
    ),
    argument("--candidates", nargs="+", metavar="TEXT", help="the answer is one of these"),
    *ROW_ARGUMENTS,
    *GENERATION_ARGUMENTS,
)
def few_shot(options: argparse.Namespace) -> None:
    from minivlm.tasks.few_shot import pair_up
    from minivlm.tasks.row_tasks import few_shot_task

    how, examples = check_generation(options), pair_up(options.examples)
    check_images([image for image, _ in examples])
    options.images = options.query
    inputs = read_rows(options, split_text(options, TEXT))
    model, processor = load_generator(options)
    more = {"examples": examples, "candidates": options.candidates, "alone": bool(options.save)}
    show = lambda row, result: result["continuation"] if row.named else f"{row.shown}: {result['continuation']}"
    run_rows(inputs, few_shot_task(model, processor, how, **more), model, processor, options, ["continuation"], show)


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
    check_images(options.images)
    converse(chat(*load_generator(options), *options.images, **how))


@task(
    "attend",
    "which parts of the image does the model attend to?",
    "out/blip2 photo.png other.png --save maps.png",
    IMAGES,
    argument("--prompt", help="what a model that answers is asked, or a text for BLIP"),
    argument(
        "--save", metavar="FILE", default="maps.png", help="where the maps are drawn (%(default)s); DIR: a sheet each"
    ),
    *ROW_ARGUMENTS[2:],
)
def attend(options: argparse.Namespace) -> None:
    run_attend(options)


@task(
    "complete",
    "how does the text continue?",
    'out/lm "is there a"',
    argument(
        "text", metavar="TEXT", help="how it begins; or a .txt with one a line, a .jsonl or .csv with a column text"
    ),
    *ROW_ARGUMENTS[:2],
    *GENERATION_ARGUMENTS,
)
def complete(options: argparse.Namespace) -> None:
    from minivlm.tasks.row_tasks import complete_task

    how, inputs = check_generation(options), read_texts(options)
    model, processor = load_generator(options)
    task = complete_task(model, processor, how, alone=bool(options.save))
    run_rows(inputs, task, model, processor, options, ["completion"], lambda _, result: result["completion"])


if __name__ == "__main__":
    run_command_line(main)
