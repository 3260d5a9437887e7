"""Make a folder of shapes in which every shape has its usual colour, to see a model fall for it (docs/pitfalls.md).

python data/shapes/usual.py --out DIR [--usual 0.9 | --balanced] [--train 4000] [--held_out 500] [--seed 0] [--image_size 64]
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # so that a checkout works without being installed

from minivlm.command_line import share  # noqa: E402, RUF100
from minivlm.datasets.shapes.usual import BALANCED, make_usual  # noqa: E402, RUF100
from minivlm.errors import run_command_line  # noqa: E402, RUF100


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--usual", type=share, default=0.9, help="share of a shape's objects that have its usual colour")
    how.add_argument("--balanced", action="store_true", help="all seven colours of a shape are equally frequent")
    parser.add_argument("--train", type=int, default=4000, help="number of training images")
    parser.add_argument("--held_out", type=int, default=500, help="number of images in val, and in test")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images on every machine")
    parser.add_argument("--image_size", type=int, default=64, help="side of the images in pixels, 32 to 512")
    options = parser.parse_args(argv)
    usual = BALANCED if options.balanced else options.usual
    numbers = {name: getattr(options, name) for name in ("train", "held_out", "seed", "image_size")}
    make_usual(options.out, usual=usual, **numbers)
    print(f"{options.out}: {options.train} training images. Next: python train.py vqa --data {options.out}")


if __name__ == "__main__":
    run_command_line(main)
