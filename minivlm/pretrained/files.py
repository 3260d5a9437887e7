"""Files of weights, as mappings from names to tensors that are read when they are asked for.

safetensors files are memory-mapped, privately: a tensor costs nothing until it is used, writing to it never reaches the
file. Pickled weights are read with PyTorch's restricted reader, which builds tensors and refuses everything else.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.files import open_regular, read_json

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def open_weights(directory: Path, names: tuple[str, ...] = WEIGHTS) -> tuple[Path, Mapping[str, Tensor]]:
    """The first of the files `names` that is there, and the tensors in it (of an index: in all its shards)."""
    path = next((directory / name for name in names if (directory / name).exists()), None)
    if path is None:
        plain = [name for name in names if not name.endswith("index.json")]
        raise UserError(f"{directory} holds no weights: {' or '.join(plain)} should be there.")
    if path.suffix != ".json":
        return path, open_file(path)
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{path} has no weight_map that says which tensor is in which file.")
    files = {}
    for name in sorted(set(shards.values())):
        beside = name.removeprefix("./")
        if Path(beside).name != beside or Path(beside).suffix not in (".safetensors", ".bin"):
            raise UserError(f"{path} names {name!r}, which is no file of weights beside it.")
        if not (directory / beside).exists():
            raise UserError(f"{directory / beside} is missing, although the index beside it names it.")
        files[name] = open_file(directory / beside)
    return path, Shards(files, shards)


def open_file(path: Path) -> Mapping[str, Tensor]:
    with open_regular(path):
        pass  # a pipe would be waited for
    return Safetensors(path) if path.suffix == ".safetensors" else unpickle_tensors(path)


class Lazy(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for; to look for a name, or to list all, reads none."""

    names: Mapping[str, object]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


class Shards(Lazy):
    """The tensors of several files; of one that is in two of them, the one that the index names."""

    def __init__(self, files: dict[str, Mapping[str, Tensor]], index: dict[str, str]):
        self.names = {name: file for file in reversed(files.values()) for name in file}
        self.names |= {name: files[file] for name, file in index.items() if name in files[file]}

    def __getitem__(self, name: str) -> Tensor:
        return self.names[name][name]


class Safetensors(Lazy):
    """A safetensors file, memory-mapped."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            self.file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            hint = "It is a pickle, which could run code. " if begins_like_pickle(path) else ""
            raise UserError(
                f"{path} is no whole safetensors file ({error}). {hint}Copy or download it again."
            ) from None
        self.path, self.names = path, dict.fromkeys(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        try:
            return self.file.get_tensor(name)
        except Exception as error:  # a header may promise what the file has not, in a type that torch has not
            raise UserError(f"{self.path} holds {name} in a way that cannot be read ({error}).") from None


def begins_like_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    return start[:1] == b"\x80" or start == b"PK\x03\x04"


def unpickle_tensors(path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors that torch.save wrote. Whatever else a pickle holds is refused, and never run."""
    try:
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # arbitrary bytes fail in arbitrary ways, and all mean the same
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is refused: it is not a plain dictionary of tensors, or broken ({why}).") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("model_state_dict"), dict):  # a training state
        tensors = tensors["model_state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path} is refused: it must be a plain dictionary of tensors.")
    return tensors
