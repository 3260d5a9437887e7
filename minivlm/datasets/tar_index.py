"""Where the members of a tar file lie, so that one is read without unpacking any.

    photos/shard-000.tar/000012.jpg   a member is named like a file below the tar file
                                      its bytes are those of shard-000.tar from 1,536 on

One pass over the headers makes the index, which is kept beside the pixels that are cached, as `tars/shard-000.tar.npz`, and
holds while size and time of the tar file stay. Texts (captions, classes) are short and wanted at once: they are in it whole.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minivlm.atomic_writing import write_atomically
from minivlm.errors import UserError
from minivlm.files import cache_folder, is_own_file, open_regular, readable

VERSION = 1
TEXTS = (".txt", ".text", ".caption", ".json", ".cls", ".cls2", ".index", ".id")  # kept whole
MOST_TEXT, MOST_BYTES = 2**22, 2**30  # of a text, of an image
PACKED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The regular members of one tar file, in its order. names end to end; offsets, sizes and ends of names (n,) int64.

    notes: sentences on what is passed over. texts: those of TEXTS end to end, ends (n,); a member without has none.
    """

    names: bytes
    name_ends: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    text_ends: np.ndarray
    notes: tuple[str, ...] = ()
    texts: bytes | None = None  # None: in `file`
    file: Path | None = None
    order: np.ndarray = field(init=False)  # by checksum, which a name is looked up by
    checksums: np.ndarray = field(init=False)

    def __post_init__(self):
        sums = np.array([zlib.crc32(name) for name in self.raw_names()], dtype=np.uint32)
        object.__setattr__(self, "order", np.argsort(sums, kind="stable").astype(np.uint32))
        object.__setattr__(self, "checksums", sums[self.order])

    def __len__(self) -> int:
        return len(self.offsets)

    def raw_names(self) -> Iterator[bytes]:
        start = 0
        for end in self.name_ends.tolist():
            yield self.names[start:end]
            start = end

    def all_names(self) -> list[str]:
        return [name.decode("utf-8", "surrogateescape") for name in self.raw_names()]

    def find(self, name: str) -> int | None:
        """The position of the member; None: there is none of this name."""
        raw = name.encode("utf-8", "surrogateescape")
        first, last = (np.searchsorted(self.checksums, zlib.crc32(raw), side) for side in ("left", "right"))
        for i in self.order[first:last].tolist():
            if self.names[self.name_ends[i - 1] if i else 0 : self.name_ends[i]] == raw:
                return i
        return None

    def all_bytes(self) -> bytes:
        """Of all texts, end to end."""
        return self.texts if self.texts is not None else load_array(self.file, "texts").tobytes()

    def summary(self) -> bytes:
        """Names, places, sizes and texts: what is another where the file is."""
        numbers = np.stack([self.name_ends, self.offsets, self.sizes]).astype("<i8")
        return b"".join([self.names, numbers.tobytes(), self.all_bytes()])

    def all_texts(self) -> list[bytes | None]:
        """Of each member its text; None where it is none that is kept."""
        texts = self.all_bytes()
        ends = self.text_ends.tolist()
        return [texts[start:end] if end > start else None for start, end in zip([0, *ends], ends, strict=False)]


# ------------------------------------------------------------------------------------------------------ one tar file


def split_member(path: str | os.PathLike) -> tuple[str, str] | None:
    """`photos/shard-000.tar/a.jpg` → tar file and name; None for what lies in no tar file."""
    text = os.fspath(path)
    for match in re.finditer(r"\.tar[/\\]", text, re.IGNORECASE) if ".tar" in text.lower() else ():
        if os.path.isfile(text[: match.end() - 1]):
            name = text[match.end() :]
            return text[: match.end() - 1], name.replace("\\", "/") if os.sep == "\\" else name
    return None


def member(path: str | os.PathLike) -> tuple[Path, int, int, int] | None:
    """The tar file that `path` leads into, offset and size there, and the tar file's time (ns). None: `path` is no member.

    UserError where the tar file has no such member.
    """
    if (parts := split_member(path)) is None:
        return None
    tar, name = Path(parts[0]), parts[1]
    index = open_tar(tar)
    if (i := index.find(name)) is None:
        raise UserError(f"{path} is missing: {tar.name} holds no such member.")
    return tar, int(index.offsets[i]), int(index.sizes[i]), os.stat(tar).st_mtime_ns


def members_below(tar: Path) -> dict[str, tuple[int, int]]:
    """The members of a tar file: name → size and the tar file's time (ns). Nothing where it is no file."""
    if not tar.is_file():
        return {}
    index, modified = open_tar(tar), tar.stat().st_mtime_ns
    return {name: (size, modified) for name, size in zip(index.all_names(), index.sizes.tolist(), strict=True)}


def is_member(path: str | os.PathLike) -> bool:
    parts = split_member(path)
    return parts is not None and open_tar(Path(parts[0])).find(parts[1]) is not None


@contextmanager
def open_anywhere(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A regular file, or the member of a tar file; UserError as of `open_regular`."""
    if (found := member(path)) is None:
        with open_regular(path) as file:
            yield file
        return
    tar, offset, size, _ = found
    if size > MOST_BYTES:
        raise UserError(f"{path} has {size / 2**30:.1f} GiB, more than an image can have.")
    with open_regular(tar) as file:
        file.seek(offset)
        content = file.read(size)
    yield io.BytesIO(content)


def open_tar(tar: Path) -> TarIndex:
    """The index of a tar file, made where there is none that holds. UserError: no tar file, one that is cut off, or compressed,
    or whose names lead elsewhere."""
    try:
        status = os.stat(tar)
    except FileNotFoundError:
        raise UserError(f"{tar} is missing.") from None
    return indexed(os.fspath(tar), status.st_size, status.st_mtime_ns)


@cache
def indexed(tar: str, size: int, modified: int) -> TarIndex:
    path = Path(tar)
    kept = cache_folder(path.parent) / "tars" / f"{path.name}.npz"
    if (index := load(kept, size, modified)) is None:
        index = read_headers(path)
        try:
            write_atomically(kept, lambda temporary: save(index, temporary, size, modified))
        except UserError as error:
            object.__setattr__(index, "notes", (*index.notes, f"The index of {tar} is made at every start: {error}"))
    return index


# ----------------------------------------------------------------------------------------------------------- reading it


def read_headers(tar: Path) -> TarIndex:
    """One pass over the headers, and the texts."""
    names, numbers, texts, seen, passed_over = [], [], [], set(), []
    with open_regular(tar) as file:
        refuse_packed(tar, file)
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
                while (one := archive.next()) is not None:
                    archive.members = []  # tarfile keeps them all
                    if not one.isreg() or one.issparse():
                        passed_over += [] if one.isdir() else [one.name]
                        continue
                    name = safe_name(one.name, tar)
                    if name in seen:
                        raise UserError(
                            f"{tar} holds two members named {name!r}: which is meant is not known; pack it anew."
                        )
                    seen.add(name)
                    text = text_of(archive, one, name) if name.lower().endswith(TEXTS) else b""
                    names.append(name.encode("utf-8", "surrogateescape"))
                    texts.append(text)
                    numbers.append((one.offset_data, one.size, len(names[-1]), len(text)))
                end = archive.offset
        except (tarfile.TarError, OSError, ValueError) as error:
            raise refusal(tar, names, error) from None
        notes = notes_on(tar, passed_over, names, rest=block_at(file, end))
    table = np.array(numbers, dtype=np.int64).reshape(-1, 4)
    ends = table[:, 2:].cumsum(axis=0)
    return TarIndex(b"".join(names), ends[:, 0], table[:, 0], table[:, 1], ends[:, 1], notes, b"".join(texts))


def refuse_packed(tar: Path, file: BinaryIO) -> None:
    start = file.read(6)
    file.seek(0)
    for mark, remedy in PACKED.items():
        if start.startswith(mark):
            raise UserError(
                f"{tar} is compressed, and the members of such a tar file cannot be read where they lie: "
                f"decompress it ({remedy} {tar.name}); the images in it are compressed already."
            )
    if not start:
        raise UserError(f"{tar} is empty: it has no bytes; fetch it again, or remove it.")


def safe_name(name: str, tar: Path) -> str:
    """`./a.jpg` → `a.jpg`."""
    inside = posixpath.normpath(name)
    if inside.startswith(("/", "../")) or inside in ("..", ".") or re.match(r"[A-Za-z]:[\\/]|\\", name):
        raise UserError(
            f"{tar} holds a member named {name[:80]!r}, which leads out of the folder that it is unpacked into: such a tar "
            "file is not read; pack it anew with names below one folder."
        )
    return inside


def text_of(archive: tarfile.TarFile, one: tarfile.TarInfo, name: str) -> bytes:
    if one.size > MOST_TEXT:
        raise ValueError(f"the text {name} has {one.size} bytes")
    return archive.extractfile(one).read()


def refusal(tar: Path, names: list[bytes], error: Exception | str) -> UserError:
    keys = dict.fromkeys(key_of(os.fsdecode(name))[0] for name in names)
    if "unexpected end of data" in str(error):  # of the member that was read last
        return UserError(
            f"{tar} is cut off: it ends within a file, behind {max(0, len(keys) - 1)} whole samples; fetch it again, or "
            "remove it."
        )
    return UserError(
        f"{tar} is damaged behind {len(keys)} samples ({error}); fetch it again, or remove it."
        if names
        else f"{tar} is no tar file ({error})."
    )


def block_at(file: BinaryIO, end: int) -> bytes:
    file.seek(end)
    return file.read(tarfile.BLOCKSIZE)


def notes_on(tar: Path, passed_over: list[str], names: list[bytes], *, rest: bytes) -> tuple[str, ...]:
    """rest: the block behind the last member, of zeros in all tar files that were written to their end."""
    if 0 < len(rest) < tarfile.BLOCKSIZE:
        raise refusal(tar, [*names, b"the next"], "unexpected end of data")
    if any(rest):
        raise refusal(tar, names, "what follows is no header of a file")
    notes = []
    if passed_over:
        shown = ", ".join(map(readable, passed_over[:3])) + (", …" if len(passed_over) > 3 else "")
        notes.append(f"{tar}: {len(passed_over)} members that are links or sparse files are passed over ({shown}).")
    if not rest:
        keys = {key_of(os.fsdecode(name))[0] for name in names}
        notes.append(
            f"{tar} lacks the mark that ends a tar file: if it should have more than {len(keys)} samples, it is cut off."
        )
    return tuple(notes)


def key_of(name: str) -> tuple[str, str]:
    """`a/b.seg.png` → (`a/b`, `seg.png`), WebDataset's convention: the key goes up to the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


# ------------------------------------------------------------------------------------------------------------ the index


def save(index: TarIndex, path: Path, size: int, modified: int) -> None:
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            about=np.array([VERSION, size, modified, len(index.texts or b"")], dtype=np.int64),
            names=np.frombuffer(index.names, dtype=np.uint8),
            numbers=np.stack([index.name_ends, index.offsets, index.sizes, index.text_ends]),
            notes=np.frombuffer("\n".join(index.notes).encode("utf-8", "surrogateescape"), dtype=np.uint8),
            texts=np.frombuffer(index.texts or b"", dtype=np.uint8),
        )


def load_array(path: Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[name]


def load(path: Path, size: int, modified: int) -> TarIndex | None:
    """None where there is none, it is of another state of the tar file, or was not written by `save`: folders come from
    anywhere, with what is in them."""
    if not is_own_file(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            *about, texts = arrays["about"].tolist()
            if about != [VERSION, size, modified]:
                return None
            names, notes = arrays["names"].tobytes(), arrays["notes"].tobytes()
            name_ends, offsets, sizes, text_ends = arrays["numbers"].astype(np.int64, casting="safe")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    inside = (offsets >= 0).all() and (sizes >= 0).all() and (sizes <= size).all() and (offsets <= size - sizes).all()
    for ends, total in ((name_ends, len(names)), (text_ends, texts)):
        inside = inside and (np.diff(ends, prepend=0) >= 0).all() and (ends[-1] if len(ends) else 0) == total
    told = tuple(notes.decode("utf-8", "surrogateescape").splitlines())
    return TarIndex(names, name_ends, offsets, sizes, text_ends, told, None, path) if inside else None
