"""Omniglot as folders of drawings, one a character, for lessons in which every character gets a made-up name.

python data/omniglot/prepare.py ARCHIVE … [--out data/omniglot] [--val ALPHABET …] [--test ALPHABET …]

ARCHIVE is images_background.zip, images_evaluation.zip, or one of the small ones. Whole alphabets are held out: without
--val and --test the last two by name. The others are learnt from, their drawings also turned by a quarter, a half and
three quarters, each a character of its own (Vinyals et al. 2016, "Matching Networks for One Shot Learning", §4.1).
All is written into a hidden folder first, so a script that is killed leaves nothing that could be taken for the data.
"""

import argparse
import io
import sys
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # so that a checkout works without being installed

from minivlm.datasets.official import written_whole  # noqa: E402, RUF100
from minivlm.errors import UserError, run_command_line  # noqa: E402, RUF100

TURNS = (0, 90, 180, 270)  # degrees
Drawings = dict[str, dict[str, dict[str, bytes]]]  # alphabet → character → file name → PNG


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path, nargs="+", metavar="ARCHIVE", help="zip files of Omniglot's images")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to make (default: data/omniglot)")
    for split in ("val", "test"):
        parser.add_argument(f"--{split}", nargs="+", metavar="ALPHABET", help=f"alphabets of the {split} split")
    options = parser.parse_args(argv)
    drawings = read(options.archives)
    held_out = choose(sorted(drawings), options.val, options.test)
    counts = defaultdict(int)
    with written_whole(options.out, ("val", "test", "train")) as out:
        for alphabet, characters in drawings.items():
            split = next((name for name, some in held_out.items() if alphabet in some), "train")
            for character, pictures in characters.items():
                for turn in TURNS if split == "train" else (0,):
                    write(out / split / (f"{alphabet}_{character}" + (f"_{turn}" if turn else "")), pictures, turn)
                    counts[split] += 1
    told = ", ".join(f"{counts[split]} in {split}/" for split in ("train", "val", "test"))
    print(f"{options.out}: characters: {told}. Next: python train.py clip-resnet --data {options.out}")


def read(archives: Sequence[Path]) -> Drawings:
    """Each drawing once: the small archives overlap."""
    drawings: Drawings = defaultdict(lambda: defaultdict(dict))
    for archive in archives:
        try:
            with zipfile.ZipFile(archive) as file:
                for name in map(PurePosixPath, file.namelist()):
                    if name.suffix == ".png" and len(name.parts) == 4 and name.parts[0].startswith("images_"):
                        _, alphabet, character, picture = name.parts
                        drawings[alphabet.replace("(", "").replace(")", "")][character][picture] = file.read(str(name))
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{archive} cannot be read as a zip file ({error}).") from None
    if not drawings:
        raise UserError(f"{', '.join(map(str, archives))}: no images_…/ALPHABET/CHARACTER/*.png, as in Omniglot.")
    return drawings


def choose(alphabets: list[str], val: list[str] | None, test: list[str] | None) -> dict[str, list[str]]:
    """The alphabets that are held out, by split."""
    for split, some in (("val", val), ("test", test)):
        if unknown := [name for name in some or [] if name not in alphabets]:
            raise UserError(f"--{split}: there is no alphabet {unknown[0]}; there are {', '.join(alphabets)}.")
    free = [name for name in alphabets if name not in (val or []) + (test or [])]
    if len(free) <= (val is None) + (test is None):
        raise UserError(
            f"train, val and test need an alphabet each, but there are {len(alphabets)}, of which {len(free)} are neither "
            "for --val nor for --test: give more archives, or hold fewer out."
        )
    test = test or [free.pop()]
    return {"val": val or [free.pop()], "test": test}


def write(folder: Path, pictures: dict[str, bytes], turn: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        if turn:
            Image.open(io.BytesIO(png), formats=["PNG"]).rotate(turn).save(folder / name)
        else:
            (folder / name).write_bytes(png)


if __name__ == "__main__":
    run_command_line(main)
