"""Judges whether a sample can be learned from: `datasets.check` reports it, and training follows it.

A training sample from which a model could learn nothing (no answer fits its context) is left out, counted and named. In a
held-out split the same is an error, which is raised before the first step.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from minivlm.atomic_writing import write_atomically
from minivlm.conversation import PLACEHOLDER, Turn, encode_conversation, template_of, with_images
from minivlm.datasets.images import VERSION, check_header, read_image
from minivlm.datasets.parallel import in_parallel
from minivlm.datasets.stamps import stamp_all
from minivlm.errors import UserError
from minivlm.files import cache_folder, is_own_file
from minivlm.special_tokens import without_placeholders

# Tokens, and what a chat template writes: a text that is so much shorter than its room need not be tokenised.
FRAME = 64
ANSWER = 16  # tokens that an answer is given
SHOWN = 5  # of what is left out

Problem = Callable[[Sequence[Turn]], str | None]  # a conversation → why nothing can be learned from it


def conversation_problem(processor, *, alone: bool = False) -> Problem:
    """Judges a conversation: why nothing can be learned from it, or None.

    alone: every question is asked by itself, with all images (a T5), and so has to fit with its answer.
    """
    context, template = processor.context, template_of(processor)
    frame = FRAME + len(template.default_system or "") + len(template.markup)

    def whole(turns: Sequence[Turn]) -> str | None:
        first = next((i for i, turn in enumerate(turns) if turn.role == "assistant"), len(turns))
        read = "".join(turn.text for turn in (turns if template.framed else turns[: first + 1]))
        images = sum(turn.text.count(PLACEHOLDER) for turn in turns) * (processor.config.image_tokens + 2)
        if read.isascii() and len(read) + images + frame <= context:  # no tokeniser makes more of it than its letters
            return None
        try:
            encode_conversation(turns, processor, context=context)
        except UserError as error:
            return str(error)
        return None

    return (lambda turns: next(filter(None, map(whole, exchanges(turns))), None)) if alone else whole


def exchanges(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Every question with its answer, and all images of the conversation."""
    images = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    dialogue = [turn for turn in turns if turn.role != "system"]
    pairs = zip(dialogue[::2], dialogue[1::2], strict=False)
    return [[Turn("user", with_images(without_placeholders(q.text), images)), answer] for q, answer in pairs]


def question_problem(text: str, images: int, processor, *, context: int | None) -> str | None:
    """Why a question about so many images cannot be judged by. context: which has room for an answer as well; None: for a model
    that chooses its answers, and reads the question alone."""
    if context is None:
        length, room = len(processor.encode([text])[0]), processor.context
    else:
        asked = text if PLACEHOLDER in text else with_images(text, images)
        try:
            length = len(encode_conversation([Turn("user", asked)], processor, images=images, prompt=True).tokens)
        except UserError as error:
            return str(error)
        room = context - ANSWER
    if length <= room:
        return None
    return f"the question has {length} tokens, of which {room} fit" + (" with an answer." if context else ".")


def leave_out(entries: Sequence, judge: Callable, notes: list[str]) -> list:
    """The training entries from which something can be learned; `notes` gets a sentence on the others.

    judge: an entry → what is left of it (None: nothing), and a sentence for each thing that is not.
    """
    kept, reasons = [], []
    for entry in entries:
        left, problems = judge(entry)
        kept += [] if left is None else [left]
        reasons += [f"{entry.name}: {problem}" for problem in problems]
    if not kept:
        raise UserError(f"none of the {len(entries)} training samples can be learned from; the first: {reasons[0]}")
    if reasons:
        shown = " ".join(reasons[:SHOWN]) + (" …" if len(reasons) > SHOWN else "")
        notes.append(f"{len(reasons)} of {len(entries)} training samples are left out. {shown}")
    return kept


def check_images(directory, images: Sequence[str], split: str) -> None:
    """UserError unless every image of a held-out split can be decoded: a score is of all of them.

    That it can is kept beside the cached pixels, and not looked into again before a file changes.
    """
    directory, images = Path(directory), list(dict.fromkeys(images))
    if was_readable(directory, images, split):
        return
    read = lambda image: why_not(read_image, directory / image)
    refuse_unreadable(in_parallel(read, images, f"decoding {split} images"), split)
    with suppress(UserError):  # of a disk that is full, or may only be read: they are decoded again next time
        path, content = readable_file(directory, split), state_of(directory, images)
        write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def check_headers(directory, images: Iterable[str], split: str) -> None:
    """UserError unless the headers of the files can be read, which is quick."""
    directory, images = Path(directory), list(dict.fromkeys(images))
    if not was_readable(directory, images, split):
        refuse_unreadable((why_not(check_header, directory / image) for image in images), split)


def readable_file(directory: Path, split: str) -> Path:
    return cache_folder(directory) / f"readable-{split}.txt"


def state_of(directory: Path, images: Sequence[str]) -> str:
    """Names, sizes and times of files in short."""
    names = zlib.crc32("\n".join(images).encode("utf-8", "surrogateescape"))
    return f"{VERSION} {len(images)} {names:08x} {zlib.crc32(stamp_all(directory, images).tobytes()):08x}\n"


def was_readable(directory: Path, images: Sequence[str], split: str) -> bool:
    """Whether all of them could be decoded, and none has changed since."""
    path = readable_file(directory, split)
    if not is_own_file(path):
        return False
    try:
        return path.read_bytes() == state_of(directory, images).encode()
    except (UserError, OSError):  # one is missing, which whoever looks at it reports
        return False


def why_not(read: Callable, path) -> str | None:
    try:
        read(path)
    except UserError as error:
        return str(error)
    return None


def refuse_unreadable(problems: Iterable[str | None], split: str) -> None:
    if found := [problem for problem in problems if problem]:
        raise UserError(
            f"{len(found)} of the {split} images cannot be read, and a score is of all of them: mend them or leave "
            f"them out. {' '.join(found[:SHOWN])}"
        )
