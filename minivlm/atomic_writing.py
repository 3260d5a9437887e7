"""Files change whole or not at all: temporary names, flushed to the disk, then renamed together."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from minivlm.errors import UserError
from minivlm.files import read_json

UNFINISHED = ".unfinished.json"  # what is written and not yet in place: name → temporary name, None: to be removed


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """write(temporary path), then rename: `path` holds the old content or the new one, whole, at every instant.

    Raises UserError if it cannot be written (a full disk, no permission); then the old content is still there.
    """
    path = Path(path)
    write_all(path.parent, {path.name: write})


def write_all(directory: Path, files: Mapping[str, Callable[[Path], None] | None]) -> None:
    """`write_atomically` for several files of one directory, which change all at once; those with None go.

    When all are safe on the disk under temporary names, a list of them is written: up to that instant the old files count,
    and from then on the new ones. If the program ends before it has renamed them all, whoever opens the directory next does.
    """
    temporary = {name: directory / f".{name}.{os.getpid()}.tmp" for name in files}
    plan = directory / UNFINISHED
    try:
        directory.mkdir(parents=True, exist_ok=True)
        finish_writing(directory)
        for name, write in files.items():
            if (directory / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{name} is a directory")
            if write is not None:
                write_and_flush(temporary[name], write)
        flush_to_disk(directory)
        if len(files) == 1:  # the renaming is all there is
            os.replace(temporary[name], directory / name)
        else:
            temporary[UNFINISHED] = plan.with_name(f"{UNFINISHED}.{os.getpid()}.tmp")
            renamed = {name: temporary[name].name if write else None for name, write in files.items()}
            write_and_flush(temporary[UNFINISHED], lambda path: path.write_text(json.dumps(renamed), encoding="utf-8"))
            os.replace(temporary[UNFINISHED], plan)
            finish_writing(directory)
        flush_to_disk(directory)
    except OSError as error:
        what = ", ".join(files)
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise UserError(
            f"{what} could not be written to {directory}: {why}. What was there before is untouched."
        ) from error
    finally:
        for path in temporary.values():
            if path.exists() and not plan.exists():
                path.unlink()


def finish_writing(directory: Path) -> None:
    """Rename what an interrupted `write_all` had written. UserError where that cannot be done."""
    plan = directory / UNFINISHED
    if not os.path.lexists(plan):
        return
    renamed = read_json(plan)
    for name, temporary in renamed.items():
        ours = temporary is None or re.fullmatch(rf"\.{re.escape(name)}\.\d+\.tmp", str(temporary))
        if not ours or Path(name).name != name:
            raise UserError(f"{plan} is not a list of files to be renamed: remove it.")
    try:
        flush_to_disk(directory)
        for name, temporary in renamed.items():
            if temporary is None:
                (directory / name).unlink(missing_ok=True)
            elif (directory / temporary).exists():  # else it is in place
                with suppress(FileNotFoundError):  # by another process, just now
                    os.replace(directory / temporary, directory / name)
        flush_to_disk(directory)
        plan.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"the program that wrote {directory} was interrupted, and its files cannot be renamed now: "
            f"{error.strerror or error}. Make {directory} writable once, or save the model again."
        ) from error


def write_and_flush(path: Path, write: Callable[[Path], None]) -> None:
    path.touch()
    mode = path.stat().st_mode  # some writers make files that only their owner may read
    write(path)
    path.chmod(mode)
    flush_to_disk(path)


def flush_to_disk(path: Path) -> None:
    """Wait until the file, or a directory's list of names, would survive a power cut."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories, and needs no flush of theirs
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its only class, with the operating system's number in the text
        full = f"os error {errno.ENOSPC}" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
