"""The command `minivlm`, from anywhere: each word hands its arguments to a program of the package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import minivlm
from minivlm.errors import UserError, nearest, run_command_line

PROGRAMS = {
    "train": "train a model of any architecture: minivlm train clip",
    "sample": "ask a model: minivlm sample caption out/llava photo.png",
    "evaluate": "score a model on held-out data: minivlm evaluate out/clip",
    "check": "read a folder of your own before training on it: minivlm check my_photos",
    "human": "have people compare two systems: minivlm human sheet --a A --b B --images DIR --out FILE",
    "info": "say what a directory or a hub id holds: minivlm info out/clip",
    "convert": "write a model as transformers reads it: minivlm convert out/clip DIR",
    "compare": "put runs side by side: minivlm compare out/a out/b",
    "bench": "measure speed beside other libraries: minivlm bench clip",
}
MODULES = {
    "evaluate": "minivlm.evaluate.command",
    "check": "minivlm.datasets.check",
    "human": "minivlm.human.command",
    "info": "minivlm.info",
    "convert": "minivlm.convert",
    "compare": "minivlm.compare",
    "bench": "minivlm.bench",
}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"minivlm {minivlm.__version__}, usage: minivlm PROGRAM …      minivlm PROGRAM --help", ""]
        print("\n".join(lines + [f"{name:10} {summary}" for name, summary in PROGRAMS.items()]))
    elif argv[0] not in PROGRAMS:
        raise UserError(f"minivlm has no program {argv[0]!r}.{nearest(argv[0], PROGRAMS)}")
    else:
        program(argv[0])(argv[1:])


def program(name: str) -> Callable[[list[str]], None]:
    """Its `main`. train.py and sample.py stand beside the package in a checkout, and inside it in a wheel."""
    if name in MODULES:
        return import_module(MODULES[name]).main
    package = Path(__file__).parent
    path = next(path for path in (package / f"_{name}.py", package.with_name(f"{name}.py")) if path.exists())
    spec = spec_from_file_location(f"minivlm._{name}", path)
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run() -> None:
    run_command_line(main)


if __name__ == "__main__":
    run()
