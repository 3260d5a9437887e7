"""A GGUF file, llama.cpp's: its metadata by name, and its tensors, dequantised by the `gguf` package when they are asked for.

    magic, version │ number of tensors, of values │ key, type, value … │ name, shape, type, offset … │ padding │ tensors

The header is read here, in a tenth of a second where the package takes seven. Floating-point tensors are mapped into memory
as they are; quantised ones become float32, which holds their values exactly.
"""

from __future__ import annotations

import importlib
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.files import open_regular
from minivlm.pretrained.files import Lazy

NUMBERS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4"))) | {
    10: "<u8",
    11: "<i8",
    12: "<f8",
}  # type → numpy's
BOOL, STRING, ARRAY = 7, 8, 9
FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # types of tensors that need no dequantising
VERSIONS = (2, 3)
HINT = "pip install gguf"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file. shape: as PyTorch has it."""

    shape: tuple[int, ...]
    kind: int
    start: int


class GGUF(Lazy):
    """The tensors of a file by its own names; metadata: its values by their keys. UserError for a file that is none, or cut.

    turned: parts, such as attn_q, whose heads (so many) have the channels of a rotary pair side by side, (0, K/2, 1, K/2 + 1
    …): they come in the order of the published weights.
    """

    def __init__(self, path: Path):
        with open_regular(path) as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise UserError(f"{path} is no GGUF file: it does not begin with GGUF.")
        self.path = path
        self.data = np.memmap(path, dtype=np.uint8, mode="c").view(np.ndarray)  # what is written never reaches the file
        self.turned: dict[str, int] = {}
        try:
            self.metadata, self.names = read_header(Cursor(self.data))
        except (ArithmeticError, LookupError, RecursionError, ValueError, struct.error) as error:
            raise UserError(f"{path} is cut off or broken: its header cannot be read ({error}).") from None

    def __getitem__(self, name: str) -> Tensor:
        tensor, heads = self.dequantised(name), self.turned.get(name.split(".")[-2] if "." in name else name)
        return tensor if heads is None else tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def sizes(self) -> dict[str, int]:
        """Type → bytes of the tensors stored so."""
        found: Counter[str] = Counter()
        for name, stored in self.names.items():
            size, kind = self.size(name, stored)
            found[str(FLOATS[stored.kind]).removeprefix("torch.") if kind is None else kind.name] += size
        return found

    def dequantised(self, name: str) -> Tensor:
        stored = self.names[name]
        size, kind = self.size(name, stored)
        data = self.data[stored.start : stored.start + size]
        if len(data) < size:
            raise UserError(f"{self.path} is cut off within {name}: copy or download it again.")
        if kind is None:
            return torch.from_numpy(data).view(FLOATS[stored.kind]).view(stored.shape)
        gguf = package(self.path)
        try:
            rows = data.reshape(*stored.shape[:-1], -1)
            return torch.from_numpy(np.asarray(gguf.dequantize(rows, kind), dtype=np.float32)).view(stored.shape)
        except NotImplementedError:
            raise UserError(
                f"{self.path} holds {name} quantised as {kind.name}, which the gguf package cannot dequantise: take a file "
                "of another quantisation, such as Q8_0 or Q4_K_M."
            ) from None

    def size(self, name: str, stored: Stored) -> tuple[int, Any]:
        """(bytes, gguf's type); the type is None for plain numbers."""
        count = math.prod(stored.shape)
        if stored.kind in FLOATS:
            return count * FLOATS[stored.kind].itemsize, None
        gguf = package(self.path)
        try:
            kind = gguf.GGMLQuantizationType(stored.kind)
            block, size = gguf.GGML_QUANT_SIZES[kind]
        except (KeyError, ValueError):
            raise UserError(
                f"{self.path} holds {name} in the type {stored.kind}, which the installed gguf package does not know: "
                f"a newer one may ({HINT} --upgrade)."
            ) from None
        return count // block * size, kind


def package(path: Path) -> Any:
    """The `gguf` package. UserError where it is missing."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UserError(f"{path} is quantised, and the gguf package dequantises it: {HINT}.") from None


class Cursor:
    """A place in the file, which reading moves on."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = memoryview(data), 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size} bytes are wanted at {self.at} of {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return bytes(self.take(self.number("Q"))).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == BOOL:
            return bool(self.number("B"))
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind in NUMBERS:
                return self.numbers(kind, count).tolist()
            if count > len(self.data):
                raise ValueError(f"an array of {count} values")
            return [self.value(kind) for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"a value of the unknown type {kind}")
        return self.numbers(kind, 1)[0].item()

    def numbers(self, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def read_header(file: Cursor) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The metadata, and where each tensor lies."""
    file.take(4)
    if (version := file.number("I")) not in VERSIONS:
        raise ValueError(f"version {version}, supported are {' and '.join(map(str, VERSIONS))}, little-endian")
    tensors, values = file.number("Q"), file.number("Q")
    metadata = {file.string(): file.value(file.number("I")) for _ in range(values)}
    found = {}
    for _ in range(tensors):
        name, dims = file.string(), file.number("I")
        shape = tuple(file.number("Q") for _ in range(dims))[::-1]
        found[name] = Stored(shape, file.number("I"), file.number("Q"))
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-file.at // alignment) * alignment
    return metadata, {name: Stored(s.shape, s.kind, start + s.start) for name, s in found.items()}
