"""The directory that `--out` names: judged before anything is loaded, held by one process, an earlier run moved aside.

Only what a run wrote is ever moved, and nothing is deleted: out/clip becomes out/clip.previous, or out/clip.previous-2 …
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator, Mapping
from itertools import chain, count, islice
from pathlib import Path
from typing import IO

from minivlm.errors import UserError
from minivlm.files import hold, open_lock, parse_json, read_bytes

LOCK = ".lock"
MODEL = r"\.?(config\.json|tokenizer\.json|model\.safetensors|unfinished\.json)(\.\d+\.tmp)?"
OWN = re.compile(  # every path inside a run's directory
    rf"{re.escape(LOCK)}|\.DS_Store|\.?(log\.jsonl|metrics\.json|samples\.npz|curves\.png)(\.\d+\.tmp)?|(picture|few-shot)\.png|{MODEL}"
    r"|\.features\.\d+\.tmp|(tensorboard|wandb)(/.*)?"  # of train.py --log
    r"|adapter(/\.?(adapter_config\.json|adapter_model\.safetensors|unfinished\.json)(\.\d+\.tmp)?)?"
    r"|index(/[0-9a-f]{16}(/[^/]+)?)?"  # of sample.py search
    rf"|checkpoints(/\.?step-\d+(\.\d+(\.old)?)?(/({MODEL}|training\.json|training\.safetensors))?)?"
)


def check_out(out: str, reads: Mapping[str, str], *, resume: bool = False) -> None:
    """UserError, before anything is done, if a run cannot be written to `out`, or would do harm there.

    reads: what the run reads, by the option that names it; a hub id is no place on this disk, and is passed over.
    """
    if not out:
        raise UserError("--out is empty: name a directory, such as out/clip.")
    try:
        check_place(Path(out))
        if resume:  # the run began there, and nothing will be moved
            return
        for option, path in reads.items():
            check_apart(out, option, path)
        if strangers := foreign(Path(out)):
            raise UserError(
                f"--out {out} holds what no run wrote ({strangers}), and it is not touched: choose another --out, a "
                "directory that is new or empty."
            )
    except OSError as error:
        raise UserError(f"--out {shown(out)} cannot be used: {error.strerror}.") from None


def check_place(path: Path) -> None:
    """UserError unless a directory can be at `path`."""
    longest = path / "checkpoints" / ".step-0000000.0000000000" / ".model.safetensors.0000000000.tmp"
    try:
        str(path).encode("utf-8")
        longest.exists()  # false in some versions of Python, an error in others
        os.lstat(longest)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            raise UserError(f"--out {shown(str(path))} is no name that a directory can have.") from None
    for place in (path, *path.parents):
        if os.path.islink(place) and not os.path.exists(place):
            raise UserError(f"--out {path}: {place} is a link that leads nowhere.")
        if os.path.exists(place):
            break
    if not os.path.isdir(place):
        where = "is a file" if place == path else f"would lie under {place}, which is a file"
        raise UserError(f"--out {path} {where}: name a directory.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--out {path} cannot be written: {place} is read-only.")


def check_apart(out: str, option: str, path: str) -> None:
    """UserError if `out` is, holds or lies inside what the run reads, by whatever links and spellings."""
    inside, holds = is_inside(out, path), is_inside(path, out)
    if inside or holds:
        how = "is" if inside and holds else "lies inside" if inside else "holds"
        raise UserError(
            f"--out {out} {how} what the run reads ({option} {path}): choose an --out apart from it, and nothing is lost."
        )


def is_inside(inner: str, outer: str) -> bool:
    """Whether `inner` is `outer` or below it; compared by what is on the disk, so that case and links do not deceive."""
    place, whole = Path(os.path.realpath(inner)), os.path.realpath(outer)
    same = lambda one: str(one) == whole or (one.exists() and os.path.exists(whole) and os.path.samefile(one, whole))
    return any(same(one) for one in (place, *place.parents))


def foreign(directory: Path, most: int = 3) -> str:
    """What lies in `directory` and was not written by a run, some of it by name; all counts, if no run has left its marks.
    An empty string: nothing."""
    own = OWN.fullmatch if has_marks(directory) else lambda place: None
    # No more than are shown, and one: a home is not walked through.
    found = [*islice((place for place in everything(directory) if not own(place)), most + 1)]
    return ", ".join(found[:most]) + (" …" if found[most:] else "")


def everything(directory: Path) -> Iterator[str]:
    """The paths in `directory` by which one would miss it; a run that ended before its first step has none."""
    for folder, folders, files in os.walk(directory):
        for name in [*folders, *files]:
            place = Path(folder, name).relative_to(directory).as_posix()
            empty = place == "log.jsonl" and not os.path.getsize(directory / place)
            empty |= place.endswith(".tmp") and OWN.fullmatch(place) is not None  # killed before its first line
            if place not in (LOCK, ".DS_Store", "checkpoints") and not empty:
                yield place


def has_marks(directory: Path) -> bool:
    """Whether a log, a checkpoint or a model of ours is there."""
    return (
        begins_with(directory / "log.jsonl", "step")
        or any(begins_with(path, "recipe") for path in directory.glob("checkpoints/step-*/training.json"))
        or begins_with(directory / "config.json", "minivlm")
    )


def begins_with(path: Path, key: str) -> bool:
    """Whether a JSON object with `key` is in the file, or on the first line of a log."""
    try:
        data = read_bytes(path)
        values = parse_json(data.partition(b"\n")[0] if path.suffix == ".jsonl" else data)
    except (UserError, ValueError):  # it is not there, or none of ours
        return False
    return isinstance(values, dict) and key in values


def set_aside(directory: Path) -> Path | None:
    """Rename an earlier run that stands in the way, so that no slip of the fingers costs a training. None: there is none."""
    if not any(everything(directory)):
        return None
    if strangers := foreign(directory):
        raise UserError(f"{directory} holds what no run wrote ({strangers}): choose another --out.")
    real = Path(os.path.realpath(directory))  # a link stays, and what it leads to moves
    names = chain([f"{real.name}.previous"], (f"{real.name}.previous-{i}" for i in count(2)))
    previous = next(place for name in names if not os.path.lexists(place := real.with_name(name)))
    try:
        if is_inside(os.getcwd(), str(real)):
            raise OSError(errno.EBUSY, "it is the directory that you are in")
        real.rename(previous)
        real.mkdir()
    except OSError as error:
        raise UserError(
            f"the earlier run in {directory} cannot be moved to {previous}: {error.strerror}. Choose another --out."
        ) from None
    return Path(directory).with_name(previous.name) if real.name == Path(directory).name else previous


def take_lock(directory: Path) -> IO[str]:
    """The open file that holds `directory` for this process until it is closed, however the process ends.

    UserError where another process holds it, or where nothing can be written.
    """
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open_lock(path)
        # Another file may be there: the owner of this one ended just now and removed it, and a third made a new one.
        if hold(file) and is_at(file, path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            if os.name == "nt":  # where an open file cannot be moved or removed
                file.close()
            return file
        who = file.read().strip() or "it has only just begun"
        file.close()
    except OSError as error:
        raise UserError(f"--out {directory} cannot be written: {error.strerror or error}.") from None
    raise UserError(
        f"another process is writing to {directory} ({who}): wait until it has ended, or choose another --out."
    )


def is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file, or one that was closed, is the one at `path`."""
    try:
        return file.closed or os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def shown(name: str) -> str:
    return name if len(name) < 80 else f"{name[:60]}…"
