"""Flickr8k as a folder with captions.jsonl: 8,000 photographs with five captions each, 6,000 of them to train on.

python data/flickr8k/prepare.py TEXT --images IMAGES [--out data/flickr8k] [--copy]

TEXT holds Flickr8k.token.txt and Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt, Flickr_8k.testImages.txt (the
archive Flickr8k_text), IMAGES the photographs (Flicker8k_Dataset). Photographs in none of the three lists are left out.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # so that a checkout works without being installed

from minivlm.datasets.official import command_line, place, require_images, write_lines  # noqa: E402, RUF100
from minivlm.errors import UserError, run_command_line  # noqa: E402, RUF100
from minivlm.files import read_bytes  # noqa: E402, RUF100

LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}


def main(argv: list[str]) -> None:
    parser = command_line(__doc__, HERE)
    parser.add_argument("text", type=Path, metavar="TEXT", help="the folder with Flickr8k.token.txt")
    parser.add_argument("--images", type=Path, required=True, metavar="IMAGES", help="the folder with the photographs")
    options = parser.parse_args(argv)
    captions = read_captions(options.text / "Flickr8k.token.txt")
    rows = []
    for split, name in LISTS.items():
        for image in read_text(options.text / name).split():
            if image not in captions:
                raise UserError(f"{options.text / name} names {image}, of which Flickr8k.token.txt has no caption.")
            rows.append({"image": image, "captions": captions[image], "split": split})
    require_images((row["image"] for row in rows), options.images)
    place(options.images, options.out / "images", copy=options.copy)
    write_lines(options.out / "captions.jsonl", rows)
    print(f"{options.out}: {len(rows)} images. Next: python train.py captioner --data {options.out}")


def read_captions(file: Path) -> dict[str, list[str]]:
    """From lines like "1000268201_693b08cb0e.jpg#0 <tab> A child in a pink dress is climbing up a set of stairs ." """
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        name, tab, caption = line.partition("\t")
        if line.strip() and not (tab and "#" in name and caption.strip()):
            raise UserError(f"{file}, line {number} is not an image, #, a number, a tab and a caption.")
        if line.strip():
            captions.setdefault(name.rpartition("#")[0], []).append(caption.strip())
    return captions


def read_text(file: Path) -> str:
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text.") from None


if __name__ == "__main__":
    run_command_line(main)
