"""A model whose frozen parts are someone else's: only what is new is stored, with the names of what it was trained on.

config.json          {…, "base": {"language_model": {"source": "out/lm", "fingerprint": 2837465928}, …}}
model.safetensors    the tensors of all other parts
"""

from __future__ import annotations

import zlib
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.errors import UserError
from minivlm.layers.vit import VisionConfig, VisionTransformer, fitted
from minivlm.layers.vocabulary import with_vocabulary
from minivlm.pretrained import comparable

MOST_PLACEHOLDERS = 1024  # tokens such as <image> that may have been added to a language model
CONFIGS = {"vision": "vision", "language_model": "language"}  # part → the field that describes it


def leave_out(
    tensors: Mapping[str, Tensor], model: nn.Module, base: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors without those of the parts that `base` names by where they come from, and what to write about these.

    Raises ValueError for a part that learns: it is no longer what it came from.
    """
    for part in base:
        if any(p.requires_grad for p in model.get_submodule(part).parameters()):
            raise ValueError(
                f"{part} is trained, so it cannot be stored as that of {base[part]}: freeze it, or store it"
            )
    kept = {name: t for name, t in tensors.items() if not name.startswith(tuple(f"{part}." for part in base))}
    about = {
        part: {"source": str(source), "fingerprint": fingerprint(model.get_submodule(part))}
        for part, source in base.items()
    }
    return kept, about


def sources(base: Any, given: Any, where: str) -> dict[str, dict[str, Any]]:
    """The base of each part, from config.json, or from the user where `given` names another. "asked": whether it does."""
    if not isinstance(base, dict) or not base:
        raise UserError(f"{where} names the base {base!r} in a way that cannot be read: write it again.")
    for part, about in base.items():
        if part not in CONFIGS or not isinstance(about, dict) or about.keys() != {"source", "fingerprint"}:
            raise UserError(f"{where} names the base {part!r} in a way that cannot be read: write it again.")
        if not isinstance(about["source"], str):
            raise UserError(f"{where} names {about['source']!r} as the base {part!r}: write it again.")
    if given is not None and not isinstance(given, Mapping):
        if len(base) > 1:
            raise UserError(f"{where} has the bases {' and '.join(base)}: say which of them {given} is.")
        given = dict.fromkeys(base, given)
    if unknown := [part for part in given or {} if part not in base]:
        raise UserError(f"{where} has no base {unknown[0]!r}; it has {' and '.join(base)}.")
    return {
        part: {**about, "asked": part in (given or {}), **({"source": given[part]} if part in (given or {}) else {})}
        for part, about in base.items()
    }


def bring_back(
    weights: Mapping[str, Tensor],
    base: dict[str, dict[str, Any]],
    config: Any,
    where: str,
    open_base: Callable[[str, bool], nn.Module],
) -> Mapping[str, Tensor]:
    """The stored tensors, and those of the parts that the model was trained on, as `sources` names them.

    open_base(source, asked): loads the model in a directory, or on the hub. UserError for a part that is missing or is not
    the same any more.
    """
    parts = []
    for part, about in base.items():
        wanted = getattr(config, CONFIGS[part], None)
        if wanted is None:
            raise UserError(f"{where} names the base {part!r}, but its model has no such part.")
        found = find_part(open_base(about["source"], about["asked"]), part, where, about["source"])
        if part == "language_model" and wanted.vocab_size - found.config.vocab_size <= MOST_PLACEHOLDERS:
            found = with_vocabulary(found, wanted.vocab_size)  # such as the placeholder of an image
        if part == "vision" and isinstance(wanted, VisionConfig):
            found = fitted(found, wanted.image_size)  # as `load_vision_tower` did
        refuse_another(found, wanted, about, part, where)
        parts.append({f"{part}.{name}": tensor for name, tensor in found.state_dict().items()})
    return ChainMap(dict(weights), *parts)


def find_part(model: nn.Module, part: str, where: str, source: str) -> nn.Module:
    """The vision tower or the language model of `model`, which may be one itself."""
    is_itself = isinstance(model, VisionTransformer) if part == "vision" else hasattr(model, "token_embedding")
    found = getattr(model, part, model if is_itself else None)
    if not isinstance(found, nn.Module):
        raise UserError(
            f"{where} was trained on the {part} of {source}, but there is a {type(model).__name__} without one."
        )
    return found


def refuse_another(found: nn.Module, wanted: Any, about: Mapping[str, Any], part: str, where: str) -> None:
    """UserError if the base is not what was trained on."""
    has, needs = comparable(found.config), comparable(wanted)
    differs = [
        f"{name} = {has.get(name)!r} instead of {value!r}" for name, value in needs.items() if has.get(name) != value
    ]
    if not differs and fingerprint(found) == about["fingerprint"]:
        return
    how = f"has {', '.join(differs[:3])}" if differs else "has other weights"
    raise UserError(
        f"{where} was trained on the {part} of {about['source']}, but what is there now {how}: "
        "put back what it was trained on, or train it again."
    )


def fingerprint(module: nn.Module) -> int:
    """A number made of a few values of every tensor, the same in half precision."""
    crc = 0
    for name, tensor in sorted(module.state_dict().items()):
        few = tensor.detach().flatten()[:1024].to("cpu", torch.bfloat16)
        crc = zlib.crc32(few.view(torch.uint8).numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return crc
