"""COCO captions as a folder with captions.jsonl: five captions for each photograph.

python data/coco/prepare.py COCO [--year 2017] [--out data/coco] [--copy]

COCO holds what the official archives unpack to: annotations/captions_train2017.json and captions_val2017.json, and
train2017/ and val2017/ with the images. One of the two splits is enough.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # so that a checkout works without being installed

from minivlm.datasets.official import (  # noqa: E402, RUF100
    command_line,
    place,
    read_official,
    require_images,
    write_lines,
)
from minivlm.errors import UserError, run_command_line  # noqa: E402, RUF100


def main(argv: list[str]) -> None:
    parser = command_line(__doc__, HERE)
    parser.add_argument("coco", type=Path, metavar="COCO", help="the folder with annotations/, train2017/, val2017/")
    parser.add_argument("--year", default="2017", choices=("2014", "2017"))
    options = parser.parse_args(argv)
    rows = []
    for split in ("train", "val"):
        images = f"{split}{options.year}"
        if (options.coco / images).is_dir():
            rows += read_split(options.coco, images, split)
            place(options.coco / images, options.out / "images" / images, copy=options.copy)
        else:
            print(f"{options.coco / images} is not there: no {split} split")
    if not rows:
        raise UserError(f"{options.coco} has neither train{options.year}/ nor val{options.year}/ with COCO's images.")
    write_lines(options.out / "captions.jsonl", rows)
    captions = sum(len(row["captions"]) for row in rows)
    print(f"{options.out}: {len(rows)} images, {captions} captions. Next: python train.py clip --data {options.out}")


def read_split(coco: Path, images: str, split: str) -> list[dict]:
    """The rows of captions.jsonl, in the order of the official file."""
    file = coco / "annotations" / f"captions_{images}.json"
    known, annotations = read_official(file, "images", "annotations")
    try:
        rows = {value["id"]: {"image": value["file_name"], "captions": [], "split": split} for value in known}
        for annotation in annotations:
            rows[annotation["image_id"]]["captions"].append(" ".join(annotation["caption"].split()))
    except KeyError as error:
        raise UserError(f"{file} is another file than expected: it has no {error}.") from None
    captioned = [row for row in rows.values() if row["captions"]]
    require_images((row["image"] for row in captioned), coco / images)
    return [{**row, "image": f"{images}/{row['image']}"} for row in captioned]


if __name__ == "__main__":
    run_command_line(main)
