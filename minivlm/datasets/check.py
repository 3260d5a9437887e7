"""python -m minivlm.datasets.check DIR: reads a whole folder before training, and shows the model's input.

    python -m minivlm.datasets.check photos                        counts, classes, caption lengths, problems, samples
    python -m minivlm.datasets.check photos --model out/clip       with that model's tokeniser, context and image size
    python -m minivlm.datasets.check photos --context 96           with such a context, without a model
    python -m minivlm.datasets.check photos --caption_key title    where several columns may hold the caption (--image_key)
    python -m minivlm.datasets.check photos --save sheet.png       an image: the evaluation view beside augmented views

A sample that training leaves out is a problem, and so is one on which evaluation would stop: both by the same judgement
(judge.py). Nothing is written into DIR. The exit code is 1 if there are problems, and 2 if DIR is no dataset at all.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from minivlm.command_line import Parser
from minivlm.datasets.check_sheet import Reader, draw_sheet, save_sheet
from minivlm.datasets.class_folders import list_folder
from minivlm.datasets.contents import available, stands_in
from minivlm.datasets.conversations import has_conversations
from minivlm.datasets.duplicates import shared_images
from minivlm.datasets.entries import Item
from minivlm.datasets.folder_entries import has_captions, has_questions, read_entries, read_folder
from minivlm.datasets.folder_files import SPLITS, choose_split
from minivlm.datasets.folder_view import Found
from minivlm.datasets.forms import recognised
from minivlm.datasets.images import read_image
from minivlm.datasets.interleaved import document_problem, is_interleaved, read_documents
from minivlm.datasets.judge import conversation_problem, question_problem
from minivlm.datasets.parallel import in_parallel
from minivlm.datasets.shapes import is_world
from minivlm.datasets.source import Source, add_options, source_of
from minivlm.errors import UserError, run_command_line
from minivlm.files import readable

SHORT_CONTEXT, CONTEXT, IMAGE_TOKENS = 32, 192, 36  # what is assumed; the last two are those of `train.py llava`


def main(argv: list[str]) -> None:
    args = parse(argv)
    problems: list[str] = []
    notes: list[str] = []
    if is_world(args.directory):
        items, read = read_world(args.directory)
    else:
        items = read_folder(args.directory, problems, notes) if has_pairs(args.directory) else []
        read = folder_reader(args.directory)
        notes = [*seen_as(args.directory), *notes]
        notes += unnamed(args.directory, items)
        items = without_broken(items, args.directory, problems)
        judge_conversations(args, problems)
        judge_documents(args, problems)
    if items:
        processor = choose_processor(args, items)
        splits = {split: choose_split(items, split, args.directory) for split in available(items)}
        show_splits(splits)
        own = {split: [item.image for item in found] for split, (found, told) in splits.items() if not stands_in(told)}
        notes += shared_images(args.directory, own, most=None)
        print("\n".join(notes), end="\n" if notes else "")
        show_classes(items)
        show_captions(items, processor)
        samples = choose_samples(next(iter(splits.values()))[0], args.samples, args.seed)
        show_samples(samples, processor)
        if args.save:
            save_sheet(draw_sheet(samples, read, processor, args.seed), args.save)
    print(f"\nproblems: {len(problems)}" if problems else "\nno problems")
    for problem in problems:
        print(f"  {problem}")
    sys.exit(1 if problems else 0)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m minivlm.datasets.check", description=__doc__.split("\n")[0])
    parser.add_argument(
        "directory",
        type=Path,
        help="a folder with captions, questions, conversations, class sub-folders, or a shapes world",
    )
    parser.add_argument("--model", help="a trained model, whose tokeniser and sizes are used")
    parser.add_argument("--image_size", type=int, default=64, help="without --model (default: %(default)s)")
    parser.add_argument(
        "--context",
        type=int,
        help=f"tokens, without --model (default: {SHORT_CONTEXT} for a caption, {CONTEXT} for a conversation)",
    )
    parser.add_argument(
        "--samples", type=int, default=4, help="how many training images to show (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the samples and their augmentation")
    parser.add_argument("--save", type=Path, metavar="PNG", help="write an image of the samples")
    add_options(parser, "image_key", "caption_key", "class_names")
    args = parser.parse_args(argv)
    args.directory = source_of(args.directory, args)
    return args


def seen_as(directory: Source) -> list[str]:
    """Sentences on what form the folder is taken for, and which keys are used."""
    if found := recognised(directory):
        alike: dict[tuple, Found] = {}
        for one in found:  # a file for each split
            key = (one.gives, one.form, one.keys)
            alike[key] = replace(one, files=(*(alike[key].files if key in alike else ()), *one.files))
        return [f"read as {one}" for one in alike.values()]
    return [] if is_interleaved(directory) else ["read as classes: sub-folders of images, one a class"]


def has_pairs(directory: Source) -> bool:
    """Whether there are images with texts; conversations and documents may do without."""
    if is_interleaved(directory) and not has_conversations(directory):
        return False
    if not has_questions(directory) or has_captions(directory):
        return True
    return any(len(entry.images) == 1 for entry in read_entries(directory, []))


def unnamed(directory: Source, items: list[Item]) -> list[str]:
    """A sentence on images that lie in the folder without a line about them; those beside class folders are in their notes."""
    if is_interleaved(directory) or not recognised(directory):
        return []
    entries = read_entries(directory, []) if has_questions(directory) else []
    named = {image for one in (*items, *entries) for image in one.images}
    left = [name for name in list_folder(directory.path).images if name not in named]
    shown = ", ".join(map(readable, left[:3])) + (" …" if len(left) > 3 else "")
    return [f"Images that no line names, and that are not used: {len(left)} ({shown})."] if left else []


def judge_conversations(args: argparse.Namespace, problems: list[str]) -> None:
    """Adds what keeps questions and conversations from being learned from, or judged by, to `problems`."""
    if not has_questions(args.directory):
        return
    found: list[str] = []
    entries = read_entries(args.directory, found)
    problems += [problem for problem in found if problem not in problems]
    if not entries:
        return
    context, processor = choose_reader(args, [text for entry in entries for text in entry.texts()])
    learn = conversation_problem(processor)
    for split in available(entries):
        chosen = choose_split(entries, split, args.directory)[0]
        if split == "train":
            reasons = [
                f"{entry.name}: {why} Training leaves it out." for entry in chosen for why in entry.judged(learn)[1]
            ]
        else:
            asked = [(entry, q.text) for entry in chosen for q in entry.questions()]
            whys = [question_problem(text, len(entry.images), processor, context=context) for entry, text in asked]
            reasons = [f"{entry.name} ({split}): {why}" for (entry, _), why in zip(asked, whys, strict=True) if why]
        problems += reasons
    images = sum(len(entry.images) for entry in entries)
    print(f"{len(entries)} conversations, about {images} images\n")


def judge_documents(args: argparse.Namespace, problems: list[str]) -> None:
    """Adds the documents of interleaved.jsonl without a text behind the first image to `problems`."""
    if not is_interleaved(args.directory):
        return
    documents, without = read_documents(args.directory.path)
    texts = ["".join(document.pieces) for document in documents]
    _, processor = choose_reader(args, texts)
    broken = [Item(image, []) for image in dict.fromkeys(image for one in documents for image in one.images)]
    without_broken(broken, args.directory, problems)
    reasons = map(document_problem(processor), texts)
    problems += [
        f"{document.name}: {why} Training leaves it out."
        for document, why in zip(documents, reasons, strict=True)
        if why
    ]
    print(f"{len(documents)} documents with images; {without} have none and are skipped\n")


def choose_reader(args: argparse.Namespace, texts: list[str]) -> tuple:
    """The context for a question with its answer (None: answers are chosen) and a processor: the model's, or as
    `train.py llava` would make them. What is assumed is printed."""
    if args.model:
        model, processor = load_model(args.model)
        where, how = args.model, ""
    else:
        from minivlm.processor import Processor

        context = args.context or CONTEXT
        model, made = None, Processor.train(texts, vocab_size=4096, image_size=args.image_size, context=context)
        processor = Processor(made.tokenizer, replace(made.config, image_tokens=IMAGE_TOKENS))
        where, how = "a model as `train.py llava` makes", "; --model takes one of your own, --context another context"
    tokens = processor.config.image_tokens
    print(f"judged for {where}: a context of {processor.context} tokens, {tokens} of them for each image{how}")
    chosen = isinstance(getattr(getattr(model, "config", None), "answers", None), tuple)
    return None if chosen else processor.context, processor


def load_model(directory: str) -> tuple:
    """A model and its processor; UserError where it has none."""
    import minivlm

    model, processor = minivlm.load(directory)
    if processor is None:
        raise UserError(f"{directory} has no tokeniser and image sizes to check against: leave out --model.")
    return model, processor


def folder_reader(directory: Source) -> Reader:
    return lambda item, shorter_side: np.array(read_image(directory / item.image, shorter_side))


def read_world(directory: Source) -> tuple[list[Item], Reader]:
    """The shapes world as items; its images are all of one size."""
    from minivlm.datasets.shapes import ShapesWorld

    worlds = {split: ShapesWorld(directory, split) for split in SPLITS}
    items, where = [], {}
    for split, world in worlds.items():
        for i in range(len(world)):
            label = world.classes[world.labels[i]] if world.labels is not None and world.labels[i] >= 0 else None
            items.append(Item(world.key(i), world.all_captions(i), label, split))
            where[world.key(i)] = (world, i)

    def read(item: Item, shorter_side: int | None) -> np.ndarray:
        world, i = where[item.image]
        return world.images([i])[0]

    return items, read


def without_broken(items: list[Item], directory: Source, problems: list[str]) -> list[Item]:
    """Decode every image, whatever its split; the items that can be read. The others are added to `problems`."""

    def attempt(item: Item) -> str | None:
        try:
            read_image(directory / item.image)
        except UserError as error:
            return str(error)
        return None

    errors = list(in_parallel(attempt, items, "decoding images"))
    problems.extend(error for error in errors if error)
    return [item for item, error in zip(items, errors, strict=True) if not error]


def choose_processor(args: argparse.Namespace, items: list[Item]):
    """The model's processor, or one whose byte-level BPE is trained on the folder's own captions."""
    if args.model:
        return load_model(args.model)[1]
    from minivlm.processor import Processor

    texts = dict.fromkeys(caption for item in items for caption in item.captions)
    return Processor.train(list(texts), image_size=args.image_size, context=args.context or SHORT_CONTEXT)


# ------------------------------------------------------------------------------------------------------------- printing


def show_splits(splits: dict[str, tuple[list[Item], list[str]]]) -> None:
    print(f"{'split':8}{'images':>8}{'captions':>10}{'classes':>9}")
    for split, (items, _) in splits.items():
        captions = sum(len(item.captions) for item in items)
        classes = len({item.label for item in items} - {None})
        print(f"{split:8}{len(items):8}{captions:10}{classes or '-':>9}")
    notes = dict.fromkeys(note for _, notes in splits.values() for note in notes)
    if not any("split" in note for note in notes):
        print("The splits are those that the files give.")
    for note in notes:
        print(note)


def show_classes(items: list[Item]) -> None:
    counts = Counter(item.label for item in items if item.label is not None).most_common()
    if not counts:
        return
    some = [f"{name} {count}" for name, count in (counts if len(counts) <= 8 else counts[:4] + counts[-4:])]
    if len(counts) > 8:
        some.insert(4, "…")
    print(f"\nimages a class: {', '.join(some)}")
    if without := sum(item.label is None for item in items):
        print(f"{without} images have no label")


def show_captions(items: list[Item], processor) -> None:
    """Lengths in tokens, and what the captions forbid the augmentation to do."""
    from minivlm.datasets.english import is_english
    from minivlm.datasets.transforms import COLOURS, GUARDED, PLACES, SIDES, SIGNS, words

    texts = [caption for item in items for caption in item.captions]
    lengths = np.array([len(ids) for ids in processor.encode(texts)])
    print(
        f"\ncaption length in tokens: median {int(np.median(lengths))}, 95 % up to {int(np.quantile(lengths, 0.95))}, "
        f"longest {lengths.max()}; context {processor.context}, exceeded by {(lengths > processor.context).sum()} "
        f"of {len(texts)} captions"
    )
    named_words = [words(text) for text in texts]
    if unread := sum(not is_english(text, GUARDED) for text in texts):
        print(
            f"{unread} captions are not recognised as English: their images are neither mirrored, cropped nor recoloured"
        )
    for named, forbidden, kind in ((SIDES | SIGNS, "mirrored", "side or sign"), (PLACES, "cropped", "place")):
        print(f"{sum(bool(s & named) for s in named_words)} captions name a {kind}: their images are not {forbidden}")
    print(f"{sum(bool(s & COLOURS) for s in named_words)} captions name a colour: saturation and hue stay as they are")


def choose_samples(items: list[Item], count: int, seed: int) -> list[tuple[Item, str]]:
    """Items with one of their captions each, drawn by `seed`."""
    rng = np.random.default_rng(seed)
    chosen = [items[i] for i in rng.permutation(len(items))[:count]]
    return [(item, item.captions[rng.integers(len(item.captions))]) for item in chosen]


def show_samples(samples: list[tuple[Item, str]], processor) -> None:
    print("\nsamples, as the model gets them:")
    for item, caption in samples:
        label = f"   label: {item.label}" if item.label is not None else ""
        print(f"\n  {item.image}{label}\n    caption  {caption}")
        tokens, mask = processor.text([caption], cut=True)
        ids = tokens[0][mask[0]].tolist()
        pieces = [processor.tokenizer.id_to_token(i) for i in ids]
        print(f"    tokens   {' '.join(pieces)}\n    ids      {' '.join(map(str, ids))}")


if __name__ == "__main__":
    run_command_line(main)
