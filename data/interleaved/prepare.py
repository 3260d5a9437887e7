"""Web pages with pictures between their texts as a folder with interleaved.jsonl.

python data/interleaved/prepare.py FILE … --images IMAGES [--out data/interleaved] [--skip_missing] [--copy]

FILE holds a document a line: MMC4's docs_*.jsonl, or OBELICS written with `to_json`. Both name pictures by their
address on the web; IMAGES is the folder to which you have downloaded them, under their own names, or with img2dataset, which
notes the address in a .json beside each. Documents that have no picture are left out and counted.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # so that a checkout works without being installed

from minivlm.datasets.images import extensions  # noqa: E402, RUF100
from minivlm.datasets.interleaved import FILE, PLACEHOLDER  # noqa: E402, RUF100
from minivlm.datasets.official import command_line, place, write_lines  # noqa: E402, RUF100
from minivlm.datasets.own_files import read_lines  # noqa: E402, RUF100
from minivlm.errors import UserError, run_command_line  # noqa: E402, RUF100
from minivlm.files import parse_json, read_bytes  # noqa: E402, RUF100

EXAMPLE = '{"text_list": […], "image_info": […]} (MMC4) or {"texts": […], "images": […]} (OBELICS)'


def main(argv: list[str]) -> None:
    parser = command_line(__doc__, HERE)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="documents, one a line")
    parser.add_argument("--images", type=Path, required=True, metavar="IMAGES", help="the folder with the images")
    parser.add_argument("--skip_missing", action="store_true", help="leave out images that are missing")
    options = parser.parse_args(argv)
    documents: list[list[dict]] = []
    for file in options.files:
        if not file.is_file():
            raise UserError(f"there is no file {file}.")
        read_lines(file, lambda values: documents.append(read_document(values)), EXAMPLE)
    if not options.images.is_dir():
        raise UserError(f"there is no folder {options.images} with the images.")
    known = known_pictures(options.images)
    missing = [
        name
        for document in documents
        for s in document
        if "image" in s
        for name in s["image"][:1]
        if not find(s, known)
    ]
    if missing and not options.skip_missing:
        raise UserError(
            f"{len(missing)} images are missing in {options.images}; the first is {missing[0]}: get them, or leave "
            "such images out with --skip_missing."
        )
    found = [[located(s, known) for s in document if "text" in s or find(s, known)] for document in documents]
    shown = [
        document for document in found if any("image" in s for s in document) and any("text" in s for s in document)
    ]
    if not shown:
        raise UserError(f"none of the {len(documents)} documents has a text and an image that is there.")
    place(options.images, options.out / "images", copy=options.copy)
    write_lines(options.out / FILE, shown)
    print(f"{options.out}: {len(shown)} documents with {sum('image' in s for d in shown for s in d)} images")
    if len(shown) < len(found):
        print(f"{len(found) - len(shown)} of {len(found)} documents have no image, or no text, and are left out")
    if missing:
        print(f"{len(missing)} images are left out because they are missing")


def read_document(values) -> list[dict]:
    """ValueError says what is wrong."""
    try:
        return list(segments(values))
    except KeyError as error:
        raise ValueError(f"one of its images has no {error}") from None


def segments(values) -> Iterator[dict]:
    """{"image": all names it may have} and {"text": …} in their order. ValueError: neither of the two layouts."""
    if not isinstance(values, dict) or not (
        {"text_list", "image_info"} <= {*values} or {"texts", "images"} <= {*values}
    ):
        raise ValueError(f"it is a document of neither kind: {EXAMPLE}")
    if "text_list" in values:  # MMC4: each image belongs to a sentence, and stands before it
        before = defaultdict(list)
        for info in values["image_info"]:
            before[info["matched_text_index"]].append([info["image_name"], info.get("raw_url")])
        for i, text in enumerate(values["text_list"]):
            yield from ({"image": names} for names in before[i])
            yield from as_text(text)
        return
    if len(values["texts"]) != len(values["images"]):
        raise ValueError(
            f"it has {len(values['texts'])} texts, but {len(values['images'])} images: null fills either's gaps"
        )
    for text, image in zip(values["texts"], values["images"], strict=True):  # OBELICS: of each pair one is null
        if image is not None:
            yield {"image": [image, unquote(Path(urlparse(image).path).name)]}
        yield from as_text(text)


def as_text(text: str | None) -> list[dict]:
    """A web page may hold our mark as words; there it stands for no picture."""
    words = (text or "").replace(PLACEHOLDER, " ").strip()
    return [{"text": words}] if words else []


def known_pictures(folder: Path) -> dict[str, str]:
    """What a document may call a picture → its path: the file's own name, and the address noted beside it."""
    known = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in extensions():
            continue
        known.setdefault(path.name, path.relative_to(folder).as_posix())
        if (note := path.with_suffix(".json")).is_file():
            try:
                known[parse_json(read_bytes(note))["url"]] = path.relative_to(folder).as_posix()
            except (ValueError, LookupError, TypeError):
                raise UserError(f"{note} notes no address of its picture, as img2dataset does.") from None
    return known


def find(segment: dict, known: dict[str, str]) -> str | None:
    return next((known[name] for name in segment["image"] if name in known), None)


def located(segment: dict, known: dict[str, str]) -> dict:
    return segment if "text" in segment else {"image": f"images/{find(segment, known)}"}


if __name__ == "__main__":
    run_command_line(main)
