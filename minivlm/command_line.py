"""What command lines share: a parser whose complaints are one sentence, types and groups of arguments, the model that they
name, bars, sheets, what is skipped, and a conversation line by line."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

from minivlm.chat_templates import CHOICES, check_chat_name
from minivlm.errors import UserError, as_started, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, and which knows the option that a misspelt one was meant to be."""

    def __init__(self, **texts: str):
        super().__init__(allow_abbrev=False, **{name: as_started(text) for name, text in texts.items()})

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        for word in argv:
            option = word.partition("=")[0]
            if word.startswith("--") and " " not in option and option not in self._option_string_actions:
                raise UserError(f"unknown option {option}.{nearest(option, self._option_string_actions)}")
        return super().parse_args(argv)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help.")


Argument = tuple[tuple[str, ...], dict[str, Any]]  # what `Parser.add_argument` is called with


def argument(*names: str, **settings) -> Argument:
    return names, settings


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 upwards")
    return int(text)


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 upwards")
    return int(text)


def names_among(known: Iterable[str], *, option: str, what: str) -> Callable[[str], tuple[str, ...]]:
    """The type of an option that takes some of these, separated by commas: "knn,linear" → the names, each once. UserError for
    one that is none, with the nearest. what: they are, in the message."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in known:
                raise UserError(f"{option} {text}: there is no {what} {name!r}.{nearest(name, known)}")
        return names

    return read


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def check_place(path: str, option: str) -> None:
    """UserError, before the work rather than after it, unless a file can be written there."""
    place = Path(path)
    if place.is_dir():
        raise UserError(f"{option} {path}: that is a folder; name a file.")
    if not place.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: the folder {place.parent} does not exist; make it first.")
    if not os.access(place.absolute().parent, os.W_OK) or (place.exists() and not os.access(place, os.W_OK)):
        raise UserError(f"{option} {path}: there is no permission to write there; choose another place.")


# ---- images and sheets ------------------------------------------------------------------------------------------------


def check_sheet_name(path: str, option: str = "--save") -> None:
    """UserError, before the work rather than after it, unless an image can be written there."""
    from PIL import Image

    if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE:
        raise UserError(f"{option} {path}: the name has to end in .png, .jpg or the like.")
    check_place(path, option)


def save_sheet(path: str, query: str, found: list[tuple[Path, str]]) -> None:
    """Draw images with their scores on one sheet."""
    from minivlm.datasets.images import read_image
    from minivlm.pictures import Row, sheet

    images = [read_image(file, shorter_side=256) for file, _ in found]
    notes = [f"{scores.strip()}\n{file.name}" for file, scores in found]
    write_sheet(sheet([Row("", images, notes=notes)], title=query, columns=4, tile=160), path)


def check_images(paths: list[str]) -> None:
    """UserError, before the model is loaded, unless each of them is an image."""
    from minivlm.datasets.images import check_header

    for path in paths:
        check_header(path)


def write_sheet(page, path: str) -> None:
    """Write a PIL image to a file, and print its name."""
    try:
        page.save(path)
    except OSError as error:
        raise UserError(f"--save {path}: the image could not be written ({error.strerror or error}).") from None
    print(f"wrote {path}")


def report_passed_over(note: str | None) -> None:
    if note:
        print(f"note: {note}", file=sys.stderr)


def report_skipped(skipped: dict[str, str], shown: int = 5) -> None:
    if skipped:
        print(f"skipped, because they cannot be read ({len(skipped)}):", file=sys.stderr)
        for why in list(skipped.values())[:shown]:
            print(f"  {why}", file=sys.stderr)
        if len(skipped) > shown:
            print(f"  … and {len(skipped) - shown} more", file=sys.stderr)


def bar(share: float, width: int = 24) -> str:
    """A bar of eighths of a character, or of # where the terminal has no blocks."""
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        return ("#" * round(share * width)).ljust(width)
    whole, part = divmod(round(share * width * 8), 8)
    return ("█" * whole + " ▏▎▍▌▋▊▉"[part]).ljust(width)[:width]


# ---- generation -------------------------------------------------------------------------------------------------------

GENERATION = {  # option → its type and what it does; the defaults are those of generation.Options
    "temperature": (float, "how freely to choose among likely words: 0 always takes the likeliest (0)"),
    "top_k": (int, "choose among the K likeliest tokens alone"),
    "top_p": (float, "choose among the fewest tokens that together have this probability"),
    "num_beams": (int, "follow so many beginnings at once and give the likeliest answer (1)"),
    "repetition_penalty": (float, "above 1: make tokens that occurred before less likely (1)"),
    "max_new_tokens": (int, "the longest answer (64, or what the context has room for)"),
    "seed": (int, "the same seed chooses the same words (0)"),
}
GENERATION_ARGUMENTS = [
    argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), type=kind, help=meaning)
    for name, (kind, meaning) in GENERATION.items()
] + [
    argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (as stored; of a small model on a CPU float32)",
    )
]
CHAT_ARGUMENTS = [
    argument("--chat", metavar="NAME", help=f"how turns are written: {', '.join(CHOICES)} (as published)"),
    argument("--system", metavar="TEXT", help='the text of the system, "" for none (as published)'),
]


def check_generation(options: argparse.Namespace) -> dict:
    """The options for `generate`; what can be refused without the model is refused before it is loaded."""
    from minivlm.generation import Options

    how = {name: value for name in GENERATION if (value := getattr(options, name)) is not None}
    Options(**how)
    check_chat_name(getattr(options, "chat", None))
    return how


# ---- the model --------------------------------------------------------------------------------------------------------

SMALL = 10**9  # parameters: 4 GB in fp32


def load_model(options: argparse.Namespace, **settings) -> tuple:
    """The model and its processor, on the device asked for."""
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


def load_generator(options: argparse.Namespace) -> tuple:
    """The same, in the precision and with the chat template asked for.

    On a CPU a small model generates in fp32 unless another precision is asked for: it costs little there, and in half
    precision the two likeliest words may come out equal, so that rounding chooses the answer.
    """
    import torch

    model, processor = load_model(options, dtype=getattr(torch, options.dtype) if options.dtype else None)
    if options.dtype is None and model.device.type == "cpu" and sum(p.numel() for p in model.parameters()) <= SMALL:
        model.float()
    chat, system = getattr(options, "chat", None), getattr(options, "system", None)
    if chat is not None or system is not None:
        from minivlm.conversation import with_chat
        from minivlm.tasks.abilities import require_answers

        require_answers(model, processor)  # a model that answers nothing has no turns
        processor = with_chat(processor, chat, system)
    return model, processor


# ---- a conversation ----------------------------------------------------------------------------------------------------


def converse(conversation) -> None:
    """A line is a question; its answer is printed as it comes. Ctrl-C stops an answer, at the prompt it leaves."""
    someone = sys.stdin.isatty()  # rather than a pipe
    if someone:
        print("Ask something. /image FILE adds an image, /quit leaves, Ctrl-C stops an answer.")
    try:
        while (line := input("> " if someone else "").strip()) != "/quit":
            respond(conversation, line)
    except (EOFError, KeyboardInterrupt):
        print()


def respond(conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    try:
        if command == "/image":
            conversation.see(rest.strip())
        elif command.startswith("/"):
            raise UserError(f"unknown command {command}; there are /image FILE and /quit.")
        elif line:
            print_answer(conversation, line)
    except UserError as error:  # the next line may do better
        print(f"error: {error}", file=sys.stderr)


def print_answer(conversation, line: str) -> None:
    try:
        with closing(conversation.say(line)) as pieces:
            if conversation.dropped:
                print(f"(no room for more: the first {conversation.dropped} answers are dropped)", file=sys.stderr)
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" …", end="")
    print(flush=True)
