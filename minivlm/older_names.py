"""The names of tensors and of configs' classes in what an earlier version saved. Fields: see `config.complete`."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")

TENSORS = {  # pattern of the older name → the name now
    r"(^|\.)places$": r"\1image_position_embedding",  # before a Q-Former, a resampler or BLIP
    r"^feature_(mean|deviation)$": r"standardise.\1",
}

TYPES = {  # older name of a config's class → the name now
    "TalkConfig": "ConversationsConfig",
}


def current_type(name: Any) -> Any:
    """The name that a config's class has now; what is no name is returned as it is."""
    return TYPES.get(name, name) if isinstance(name, str) else name


def current_names(tensors: Mapping[str, Value], known: Container[str]) -> Mapping[str, Value]:
    """The tensors by the names that a model knows; one that it knows by no name keeps its own."""
    names = {name: current_name(name, known) for name in tensors}
    if all(name == now for name, now in names.items()):
        return tensors
    return {now: tensors[name] for name, now in names.items()}


def current_name(name: str, known: Container[str]) -> str:
    if name not in known:
        for pattern, now in TENSORS.items():
            if (found := re.sub(pattern, now, name)) in known:
                return found
    return name
