"""Make the shapes world, in seconds and without a download.

python data/shapes/prepare.py [--out data/shapes] [--seed 0] [--train 30000] [--image_size 64] [--shrink 1]
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # so that a checkout works without being installed

from minivlm.datasets import make_shapes  # noqa: E402, RUF100
from minivlm.errors import run_command_line  # noqa: E402, RUF100


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="the directory (default: data/shapes of this checkout)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes on every machine")
    parser.add_argument("--train", type=int, default=30_000, help="number of training images")
    parser.add_argument("--image_size", type=int, default=64, help="side of the pictures in pixels, 32 to 512")
    parser.add_argument("--shrink", type=int, default=1, help="objects of 1, 1/2, … 1/SHRINK of the usual size (1)")
    options = parser.parse_args(argv)
    how = {name: getattr(options, name) for name in ("seed", "train", "image_size", "shrink")}
    make_shapes(options.out, **how)
    print(f"{options.out}: {options.train} training images and test/ with 500 PNG files. Next: python train.py")


if __name__ == "__main__":
    run_command_line(main)
