"""Frozen dataclasses ⇄ JSON, nested the way the model is nested, strict in both directions.

    CLIPConfig(vision=VisionConfig(…), text=TextConfig(…))  ⇄  {"type": "CLIPConfig", "vision": {"type": "VisionConfig", …}, …}

"type" says which class a nested dictionary becomes, so that a field may hold one of several (a ViT or a ResNet).
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from typing import Any

from minivlm.errors import UserError, nearest
from minivlm.older_names import current_type


def to_dict(config: Any) -> Any:
    """A config, with all it contains, as plain JSON values."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": type(config).__name__, **fields}
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    return config


def from_dict(cls: type, values: dict, where: str = "config") -> Any:
    """The config of class `cls` that `to_dict` wrote. Unknown and missing fields are errors that name them."""
    values = dict(values)
    kind = values.pop("type", cls.__name__)
    if kind != cls.__name__:
        raise UserError(f"{where}.type is {kind!r}, but a {cls.__name__} belongs there.")
    hints = field_types(cls)
    for name in values:
        if name not in hints:
            raise UserError(f"{where} has an unknown field {name!r} for {cls.__name__}.{nearest(name, hints)}")
    if missing := [name for name in hints if name not in values]:
        raise UserError(f"{where} lacks {', '.join(missing)}, which {cls.__name__} needs.")
    fields = {name: read_field(name, hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**fields)
    except (ValueError, ArithmeticError) as error:  # fields that are right one by one but not together
        raise UserError(f"{where}: {error}.") from None


def complete(cls: type, values: Any) -> Any:
    """Bring what an older version of `to_dict` wrote up to date.

    A class whose name has changed has its older one in `older_names.TYPES`, a field in its metadata:
    field(metadata={"was": "places"}). A field that did not exist then gets its default or, where that is not what was
    done before there was a choice, the "before" of its metadata.
    """
    if not isinstance(values, dict):
        return values
    new = dict(values)
    if "type" in new:
        new["type"] = current_type(new["type"])
    hints = field_types(cls)
    for field in dataclasses.fields(cls):
        if field.name not in new and (was := field.metadata.get("was")) in new:
            new[field.name] = new.pop(was)
        if field.name in new:
            inner = new[field.name]
            for kind in alternatives(hints[field.name]):
                if isinstance(inner, dict) and current_type(inner.get("type")) == kind.__name__:
                    new[field.name] = complete(kind, inner)
        elif field.default is not dataclasses.MISSING:
            new[field.name] = to_dict(field.metadata.get("before", field.default))
        elif field.default_factory is dict:
            new[field.name] = {}
    return new


def field_types(cls: type) -> dict[str, Any]:
    """Field name → its type, for the dataclass `cls`."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def value_at(config: Any, dotted: str) -> Any:
    """The value of "vision.depth"; None below a part that is left out."""
    for part in dotted.split("."):
        config = getattr(config, part, None)
    return config


def with_value(config: Any, dotted: str, value: Any) -> Any:
    """A copy in which "vision.depth" has another value."""
    name, _, rest = dotted.partition(".")
    return dataclasses.replace(config, **{name: with_value(getattr(config, name), rest, value) if rest else value})


def alternatives(hint: Any) -> tuple:
    """(int, NoneType) for `int | None`, (int,) for `int`."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


SIZES = re.compile(  # names of fields of which there is at least one
    r"((mlp|head|embed|output|pooled|embedding|context|joint)_)?width|(decoder_)?depth|((kv|joint)_)?heads"
    r"|vocab_size|context|image_size|patch_size|resize_to|stem_channels|queries|latents|tiles|rank"
)


def read_field(name: str, hint: Any, value: Any, where: str) -> Any:
    """The value of a field called so, as `coerce` reads it. UserError for a size below 1."""
    value = coerce(hint, value, where)
    if SIZES.fullmatch(name) and isinstance(value, int) and value < 1:
        raise UserError(f"{where} is {value}, but must be at least 1.")
    return value


def coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as read from JSON, turned into what the annotation `hint` says; anything else is an error that names it."""
    options = alternatives(hint)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            if len(options) == 1 or value.get("type") == option.__name__:
                return from_dict(option, value, where)
        elif typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            args = typing.get_args(option)
            if args[-1] is Ellipsis or len(args) == len(value):
                inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
                return tuple(coerce(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(inner, value, strict=True)))
        elif typing.get_origin(option) is dict and isinstance(value, dict):
            kind = typing.get_args(option)[1]
            return {key: coerce(kind, inner, f"{where}.{key}") for key, inner in value.items()}
        elif typing.get_origin(option) is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif option is float and type(value) in (int, float) and is_reasonable(value):
            return float(value)
        elif isinstance(option, type) and type(value) is option and is_reasonable(value):
            return value
    finite = "a finite number" if isinstance(value, float) and not math.isfinite(value) else describe(hint)
    raise UserError(f"{where} is {shown(value)}, but must be {finite}.")


def is_reasonable(value: Any) -> bool:
    """A whole number that a size can be, and no NaN or infinity."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < 2**63


def shown(value: Any) -> str:
    """A value for a message, which stays one line."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    return text if len(text := repr(value)) <= 80 else f"{text[:80]}…"


def describe(hint: Any) -> str:
    """An annotation in words: 'int or None', 'one of pre, post'."""
    options = alternatives(hint)
    if len(options) > 1:
        return " or ".join(describe(o) for o in options)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))
