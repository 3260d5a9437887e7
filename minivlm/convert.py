"""python -m minivlm.convert MODEL DIR: a model in another layout, as `transformers` reads it or as this package does.

Adapters become part of the weights. Precision, generation settings, chat template and the preparation of images come along.
"""

from __future__ import annotations

from pathlib import Path

import torch

from minivlm.checkpoint import load, save
from minivlm.command_line import Parser
from minivlm.errors import UserError, run_command_line
from minivlm.layers.lora import lora_layers, merge_lora


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m minivlm.convert", description=__doc__)
    parser.add_argument("model", help="a directory of ours, a published one, an adapter, or a hub id")
    parser.add_argument("directory", help="a new directory for the model in its other layout")
    parser.add_argument("--layout", choices=["hf", "minivlm"], default="hf", help="hf: as transformers reads it (hf)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (as stored)")
    parser.add_argument("--base", help="what an adapter belongs to, in place of what it names")
    options = parser.parse_args(argv)
    check_new(options.directory)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model, processor = load(options.model, dtype=dtype, base=options.base)
    if lora_layers(model):
        getattr(model, "merge_lora", lambda: merge_lora(model))()
    save(options.directory, model, processor, layout=options.layout)
    reader = "transformers" if options.layout == "hf" else "minivlm.load"
    print(f"{options.directory} holds the {type(model).__name__} as {reader} reads it.")


def check_new(directory: str, option: str = "") -> None:
    """UserError unless a model can go there without touching what is there. option: that named it."""
    path = Path(directory)
    if (path.is_dir() and any(path.iterdir())) or path.is_file():
        raise UserError(f"{option} {directory} is there already, and not touched: name a new directory.".strip())


if __name__ == "__main__":
    run_command_line(main)
