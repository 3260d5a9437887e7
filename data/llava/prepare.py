"""LLaVA's training data as a folder with conversations.json.

python data/llava/prepare.py FILE --images IMAGES [--out data/llava] [--skip_missing] [--copy]

FILE is llava_instruct_150k.json, llava_v1_5_mix665k.json or blip_laion_cc_sbu_558k.json (LLaVA-CC3M-Pretrain's
chat.json has the same form); IMAGES is the folder that its image paths begin in. A first turn of the assistant's is
dropped, as LLaVA's own code does; conversations that cannot be learnt from are left out and counted.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # so that a checkout works without being installed

from minivlm.atomic_writing import write_atomically  # noqa: E402, RUF100
from minivlm.datasets.official import as_json, command_line, place, read_official  # noqa: E402, RUF100
from minivlm.datasets.rows import read_conversation  # noqa: E402, RUF100
from minivlm.errors import UserError, run_command_line  # noqa: E402, RUF100


def main(argv: list[str]) -> None:
    parser = command_line(__doc__, HERE)
    parser.add_argument("file", type=Path, metavar="FILE", help="the official JSON file")
    parser.add_argument("--images", type=Path, required=True, metavar="IMAGES", help="the folder with the images")
    parser.add_argument("--skip_missing", action="store_true", help="leave out entries whose image is missing")
    options = parser.parse_args(argv)
    entries, broken = usable(read_official(options.file))
    if not options.images.is_dir():
        raise UserError(f"there is no folder {options.images} with the images.")
    there = [all((options.images / image).is_file() for image in images_of(entry)) for entry in entries]
    if not all(there) and not options.skip_missing:
        first = next(
            image for image in images_of(entries[there.index(False)]) if not (options.images / image).is_file()
        )
        raise UserError(
            f"the images of {there.count(False)} of {len(entries)} entries are missing in {options.images}; the first is "
            f"{first}: get them, or leave such entries out with --skip_missing."
        )
    entries = [entry for entry, ok in zip(entries, there, strict=True) if ok]
    if not entries:
        raise UserError(f"{options.file} has no entry that can be used{': ' + broken[0] if broken else ''}.")
    place(options.images, options.out / "images", copy=options.copy)
    text = as_json(entries)
    write_atomically(options.out / "conversations.json", lambda path: path.write_text(text, encoding="utf-8"))
    print(f"{options.out}: {len(entries)} conversations. Next: python train.py llava --data {options.out}")
    if broken:
        print(f"{len(broken)} entries cannot be learnt from and are left out; the first: {broken[0]}")
    if not all(there):
        print(f"{there.count(False)} entries are left out because their image is missing")


def images_of(entry: dict) -> list[str]:
    images = entry.get("image") or []
    return images if isinstance(images, list) else [images]


def usable(values: list[dict]) -> tuple[list[dict], list[str]]:
    """The entries that are conversations, and sentences on the others."""
    entries, broken = [], []
    for number, value in enumerate(values, 1):
        entry = {name: value[name] for name in ("id", "image", "conversations") if name in value}
        turns = entry.get("conversations")
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and turns[0].get("from") == "gpt":
            entry["conversations"] = turns[1:]
        try:
            read_conversation(entry, str, f"entry {number}")
            entries.append(entry)
        except (ValueError, UserError) as error:
            broken.append(f"entry {number}: {str(error).rstrip('.')}")
    return entries, broken


if __name__ == "__main__":
    run_command_line(main)
