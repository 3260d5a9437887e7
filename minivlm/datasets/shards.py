"""WebDataset's tar shards as a form of data: the members of one key are a sample, and each lies where the tar file has it.

    shard-000.tar   000012.jpg   000012.txt or .text, .caption: the caption
                                 000012.json: captions, a question, a conversation, as in a row of a table
                                 000012.cls: the class, a name or a number
    key 000012, the name up to its first dot; --data.image_key png and --data.caption_key title choose among several

Nothing is unpacked: an image is called shard-000.tar/000012.jpg, and opened by the index of its tar file (tar_index.py).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from minivlm.datasets.class_folders import SPLIT_VALUES
from minivlm.datasets.class_names import names_file, read_names
from minivlm.datasets.images import extensions
from minivlm.datasets.keys import CAPTION, IMAGE, Keys, NoTable, find_keys, matching
from minivlm.datasets.shard_names import gaps, shards_of, some
from minivlm.datasets.source import Source
from minivlm.datasets.table_rows import CaptionRows, ConversationRows, QuestionRows
from minivlm.datasets.tar_index import key_of, open_tar
from minivlm.errors import UserError
from minivlm.files import check_text, check_texts, parse_json, read_text

CAPTIONS = ("txt", "text", "caption")  # endings of texts that are captions as they are
CLASS = ("cls", "cls2", "index")
SPLIT = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_VALUES)})(?![a-z])")
ROWS = {"captions": CaptionRows, "questions": QuestionRows, "conversations": ConversationRows}
FIRST = 20  # samples whose fields tell the keys


@dataclass
class Sample:
    """The members of one key: endings of images → their paths, endings of texts → what they hold."""

    name: str
    split: str | None
    images: dict[str, str] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Shards:
    """What a folder of tar files holds. keys: how its samples are read; names: label → the name of its class."""

    source: Source
    files: tuple[str, ...]
    keys: Keys

    def read(self, problems: list[str] | None, notes: list[str]) -> list:
        stamps = tuple(os.stat(self.source.path / name)[6::2] for name in self.files)  # size and time
        samples, told, wrong = read_samples(self, stamps)
        if wrong and problems is None:
            raise UserError(wrong[0])
        if problems is not None:
            problems += wrong
        notes += told
        # A command reads them several times. Captions are added to questions and conversations, which are therefore its own.
        return list(samples) if self.keys.gives == "captions" else [copy(sample) for sample in samples]


def find(source: str | os.PathLike) -> Shards | None:
    """The tar shards of a folder; None: it has none. NoTable: their samples hold nothing to learn from, or several things."""
    source = Source.of(source)
    if not (files := shards_of(source.path, source.shards)):
        return None
    rows, endings, wrong = [], set(), ""
    for sample in samples_of(source, files):
        if sample.images and sample.texts:
            try:
                rows.append(fields_of(sample))
            except ValueError as error:  # the others tell the keys, and whoever reads them all tells of this one
                wrong = wrong or f"{source.path / sample.name}: {error}."
            endings |= sample.texts.keys()
        if len(rows) == FIRST:
            break
    if not rows:
        reason = f"its samples ({files[0]}, …) have no text beside an image: 000012.jpg and 000012.txt or .json"
        raise UserError(wrong) if wrong else NoTable(reason)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = next((name for name in CAPTIONS if name in endings), None)
    return Shards(source, tuple(files), keys_of(columns, text, rows[0], replace(source, image_key=None)))


def keys_of(columns: list[str], text: str | None, row: dict[str, Any], source: Source) -> Keys:
    """As of a table; but a text is the caption that is meant, whatever a .json beside it repeats or tells of the image."""
    find = lambda names, source: find_keys(["image", *names], {"image": "", **row}, source, lambda _: True)
    if text is None or source.caption_key is not None:
        return find(columns, source)
    others = [name for name in columns if name != text and name not in matching(columns, CAPTION)]
    try:
        if (keys := find(others, source)).gives != "captions":
            return keys
    except NoTable:  # they hold no questions and no conversations
        pass
    return find([text, *others], replace(source, caption_key=text))


# ------------------------------------------------------------------------------------------------------------- samples


def samples_of(source: Source, files: list[str] | tuple[str, ...]) -> Iterator[Sample]:
    """Every sample, shard after shard."""
    several = len({split_in(name) for name in files} - {None}) > 0
    for file in files:
        index = open_tar(source.path / file)
        split, samples = split_in(file) if several else None, {}
        for name, text in zip(index.all_names(), index.all_texts(), strict=True):
            if not (kind := extension_of(name)):
                continue
            key, ending = kind
            sample = samples.get(key)
            if sample is None:
                sample = samples[key] = Sample(f"{file}/{key}", split)
            if is_image(ending):
                sample.images[ending] = f"{file}/{name}"
            elif text is not None:
                sample.texts[ending] = text
        yield from samples.values()


def extension_of(name: str) -> tuple[str, str] | None:
    """Key and ending, for what is not hidden, has an ending, and is none of WebDataset's own notes (__meta__)."""
    last = name.rpartition("/")[2]
    if last.startswith(".") or "." not in last or (last.startswith("__") and "__" in last[2:]):
        return None
    return key_of(name)


@lru_cache(maxsize=1024)
def is_image(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in extensions()


def split_in(name: str) -> str | None:
    """The split in the name of a tar file or of its folder: train/000.tar, imagenet-val-{000..006}.tar."""
    folder, _, file = name.lower().rpartition("/")
    if folder in SPLIT_VALUES:
        return SPLIT_VALUES[folder]
    splits = {SPLIT_VALUES[word] for word in SPLIT.findall(file)}
    return splits.pop() if len(splits) == 1 else None


@lru_cache(maxsize=1024)
def names_the_image(field: str) -> bool:
    """Which is known: it is the member beside the text."""
    return bool(matching([field], IMAGE))


def fields_of(sample: Sample, keys: Keys | None = None) -> dict[str, Any]:
    """Its texts as one row. ValueError: one of them cannot be read. keys: those that are wanted."""
    row: dict[str, Any] = {}
    wanted = None if keys is None or keys.gives != "captions" else {*keys.captions, keys.label, keys.split} - {None}
    at_hand = {*sample.texts} | ({"label"} if sample.texts.keys() & {*CLASS} else set())
    plain = wanted is not None and wanted <= at_hand  # nothing of a .json is wanted
    for ending, content in sample.texts.items():
        if plain and ending.rpartition(".")[2] == "json":
            continue
        try:
            if ending.rpartition(".")[2] == "json":
                values = parse_json(content, texts=False)
                if not isinstance(values, dict):
                    raise ValueError("it holds no object in braces")
                row |= {name: value for name, value in values.items() if not names_the_image(name)}
            elif (text := content.decode("utf-8-sig").strip()) and ending in CLASS:
                row["label"] = text
            elif text:
                row[ending] = text
        except UnicodeDecodeError:
            raise ValueError(f"its .{ending} is not UTF-8 text") from None
        except ValueError as error:
            raise ValueError(f"its .{ending} is not JSON that can be read ({error})") from None
    return row


@lru_cache(maxsize=2)
def read_samples(shards: Shards, _: tuple) -> tuple[list, list[str], list[str]]:
    """The samples, notes on what is passed over, and what is wrong."""
    source, keys = shards.source, shards.keys
    reader = ROWS[keys.gives](keys, lambda image: image, None, {})
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    problems: list[str] = []
    names = class_names(source) if keys.label else []

    def passed_over(why: str, sample: Sample) -> None:
        counts[why] += 1
        first.setdefault(why, sample.name)

    for sample in samples_of(source, shards.files):
        image = chosen_image(sample, source)
        if image is None:
            passed_over("have no image", sample)
            continue
        if len(sample.images) > 1 and source.image_key is None:
            passed_over(f"have several images ({', '.join(sample.images)}), of which the first is taken", sample)
        try:
            row = fields_of(sample, keys)
            if keys.gives == "captions" and not any(row.get(key) for key in (*keys.captions, keys.label) if key):
                passed_over(f"have no {' or '.join(keys.captions) or 'class'}", sample)
                continue
            check_row(row)
            if names and keys.label:
                row[keys.label] = named(row.get(keys.label), names, source)
            reader.split = sample.split
            reader.add({"image": image, **row}, sample.name)
        except (ValueError, UserError) as error:
            problems.append(f"{source.path / sample.name}: {str(error).rstrip('.')}.")
    samples = reader.samples()
    notes = [note for file in shards.files for note in open_tar(source.path / file).notes]
    notes += [f"{n} samples {why}: {first[why]}" + (", …." if n > 1 else ".") for why, n in counts.items()]
    if source.shards is None and (absent := gaps(list(shards.files))):
        notes.append(f"By their numbers {len(absent)} tar files are missing: {some(absent)}.")
    if not samples and not problems:
        raise UserError(f"{source} holds no sample with an image and {keys}: {' '.join(notes)}")
    return forget_numbers(samples, keys, names, source, notes), notes, problems


def chosen_image(sample: Sample, source: Source) -> str | None:
    if source.image_key is None:
        return next(iter(sample.images.values()), None)
    wanted = re.split(r"[;,]", source.image_key.lower().lstrip("."))
    known = {front_of(ending): path for ending, path in reversed(sample.images.items())} | sample.images
    return next((known[ending] for ending in wanted if ending in known), None)


def front_of(ending: str) -> str:
    """`mask` of `mask.png`: the column of which hub_data.py made the member."""
    return ending.rpartition(".")[0]


def check_row(row: dict[str, Any]) -> None:
    for value in row.values():
        check_text(value) if isinstance(value, str) else check_texts(value)


# ------------------------------------------------------------------------------------------------------------- classes


def class_names(source: Source) -> list[str] | dict[str, str]:
    """Names by label, or in the order of their numbers; nothing where there is no file of them."""
    if source.class_names is None:
        known = (source.path / name for name in ("classnames.txt", "classes.txt", "class_names.txt"))
        if (path := next((path for path in known if path.is_file()), None)) is None:
            return []
    else:
        path = names_file(source)
    if path.suffix == ".json":
        return read_names(replace(source, class_names=str(path)))
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if lines and all(re.match(r"(\d+|n\d{8})[\s:,]+\S", line) for line in lines):
        return dict(re.split(r"[\s:,]+", line, maxsplit=1) for line in lines)
    return lines


def named(label: Any, names: list[str] | dict[str, str], source: Source) -> Any:
    """The name of a class. ValueError: the file has none for it."""
    text = str(label).strip()
    if isinstance(names, dict):
        if text in names:
            return names[text]
    elif text.isdigit() and int(text) < len(names):
        return names[int(text)]
    elif text in names:
        return text
    if label is None:
        return None
    raise ValueError(f"its class is {text!r}, for which the file of class names has no name among {len(names)}")


def forget_numbers(samples: list, keys: Keys, names: Any, source: Source, notes: list[str]) -> list:
    """Classes that are numbers are no words. UserError where there is nothing else to learn from."""
    if not keys.label or names or not all(s.label is None or s.label.isdigit() for s in samples):
        return samples
    if not keys.captions:
        raise UserError(
            f"the classes of {source} are numbers ({samples[0].label}), of which a model learns no words: give "
            "--data.class_names a file with a name on each line, from class 0 on."
        )
    notes.append("The classes are numbers, and are left out: --data.class_names gives them names.")
    for sample in samples:
        sample.label = None
    return samples
