"""Speed, beside others in the same run: `python -m minivlm.bench clip | loss | load | decode | llava | blip2 |
flamingo`; and what connectors cost, and how well they answer: `python -m minivlm.bench connectors [--models …]`.

Every contestant lives in a process of its own (so that its memory can be told apart) and they take turns, round after
round, so that a machine that slows down slows all of them. What counts is the ratio within one run.
open_clip and transformers take part where they are installed; each is given its best setting for the machine.
"""

from __future__ import annotations

from functools import partial

from minivlm.bench.clip import SIZES, bench_clip, bench_load
from minivlm.bench.connectors import bench_connectors
from minivlm.bench.generation import LANGUAGE_MODELS, bench_generation
from minivlm.bench.llava import bench_llava
from minivlm.bench.loss import bench_loss
from minivlm.command_line import Parser
from minivlm.errors import UserError

BENCHES = {
    "clip": bench_clip,
    "loss": bench_loss,
    "load": bench_load,
    "decode": partial(bench_generation, "llava", (1, 8)),
    "llava": bench_llava,
    "blip2": lambda options: bench_generation(options.lm, (1,), options),
    "flamingo": partial(bench_generation, "idefics", (1,)),
    "connectors": bench_connectors,
}


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m minivlm.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--size", choices=SIZES, default="64px", help="clip: which model")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "both"), default="both", help="all but loss and load: which arithmetic"
    )
    parser.add_argument(
        "--batch",
        type=int,
        help="loss: how many pairs (8192); decode: how many rows (1 and 8); blip2, flamingo: likewise (1); "
        "connectors: samples of a training step (8)",
    )
    parser.add_argument("--lm", choices=LANGUAGE_MODELS, default="opt", help="blip2: its language model (opt)")
    parser.add_argument("--models", nargs="+", help="connectors: trained models, in place of untrained connectors")
    parser.add_argument("--data", default="data/shapes", help="connectors: what judges --models (data/shapes)")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    for name in ("rounds", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} is {value}; at least one is needed.")
    BENCHES[options.bench](options)
