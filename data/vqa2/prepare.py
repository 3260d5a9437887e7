"""VQA v2 as a folder with vqa.jsonl: questions about COCO's photographs, each answered by ten people.

python data/vqa2/prepare.py VQA --images COCO [--out data/vqa2] [--copy]

VQA holds v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json and the same for val2014,
COCO holds train2014/ and val2014/ with the images. One of the two splits is enough.
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
    parser.add_argument("vqa", type=Path, metavar="VQA", help="the folder with the questions and annotations")
    parser.add_argument("--images", type=Path, required=True, metavar="COCO", help="has train2014/ and val2014/")
    options = parser.parse_args(argv)
    rows = []
    for split in ("train", "val"):
        images = f"{split}2014"
        if (options.images / images).is_dir():
            rows += read_split(options.vqa, options.images, images, split)
            place(options.images / images, options.out / "images" / images, copy=options.copy)
        else:
            print(f"{options.images / images} is not there: no {split} split")
    if not rows:
        raise UserError(f"{options.images} has neither train2014/ nor val2014/ with COCO's images.")
    write_lines(options.out / "vqa.jsonl", rows)
    count = len({row["image"] for row in rows})
    print(
        f"{options.out}: {len(rows)} questions about {count} images. Next: python train.py llava --data {options.out}"
    )


def read_split(vqa: Path, coco: Path, images: str, split: str) -> list[dict]:
    """The rows of vqa.jsonl: what most people answered is learnt, and all ten answers are kept to judge by."""
    file = vqa / f"v2_mscoco_{images}_annotations.json"
    (annotations,) = read_official(file, "annotations")
    (questions,) = read_official(vqa / f"v2_OpenEnded_mscoco_{images}_questions.json", "questions")
    rows = []
    try:
        asked = {question["question_id"]: question["question"] for question in questions}
        for annotation in annotations:
            rows.append(
                {
                    "image": f"COCO_{images}_{annotation['image_id']:012d}.jpg",
                    "question": asked[annotation["question_id"]],
                    "answer": annotation["multiple_choice_answer"],
                    "answers": [person["answer"] for person in annotation["answers"]],
                    "answer_type": annotation["answer_type"],
                    "question_type": annotation["question_type"],
                    "split": split,
                }
            )
    except KeyError as error:
        raise UserError(f"{file} does not fit its questions, or is another file than expected: no {error}.") from None
    require_images((row["image"] for row in rows), coco / images)
    return [{**row, "image": f"{images}/{row['image']}"} for row in rows]


if __name__ == "__main__":
    run_command_line(main)
