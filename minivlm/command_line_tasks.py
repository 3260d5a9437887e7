"""The tasks of sample.py, and how one is started: `python sample.py TASK MODEL …`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from minivlm.command_line import Argument, Parser
from minivlm.errors import UserError, as_started, nearest


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
    parser.set_defaults(task=name)
    TASKS[name].run(parser.parse_args(argv[1:]))


def overview() -> str:
    lines = ["usage: python sample.py TASK MODEL …      python sample.py TASK --help", ""]
    for name, entry in TASKS.items():
        lines += [f"{name:10} {entry.summary}", f"{'':10} {entry.example}", ""]
    return as_started("\n".join(lines[:-1]))
