"""What options were called in earlier versions: for those who still write them so, and for runs that were begun with them."""

from __future__ import annotations

from typing import Any

from minivlm import config
from minivlm.errors import UserError

DATA = (
    "directory",
    "vocab_size",
    "questions",
    "false_captions",
    "lessons",
    "holes",
    "most_answers",
    "captions_every",
    "hide",
)
MODEL = (
    *("vision", "vision_layers", "text", "embed_width", "momentum", "label_smoothing", "qformer", "resampler", "gated"),
    *("every", "projector", "tiles"),
)
MOVED = {  # an option of some recipes, with all below it → where every recipe has it now
    **{name: f"data.{name}" for name in (*DATA, "threshold", "top_p")},
    **{name: f"model.{name}" for name in MODEL},
    "wrong": "data.wrong_captions",
    "pictures": "data.proposed",
}
# Fields that a recipe had and did not read.
UNREAD = (
    *(
        "stage",
        "starts_from",
        "vision_from",
        "language_from",
        "lora",
        "data.vocab_size",
        "data.questions",
        "data.captions_every",
        "data.hide",
    ),
    *(MOVED[name] for name in MODEL),
)
# Options that are gone → what they did: the value with which a recorded run does not differ from one of now.
GONE = {"data.pack": (False, "packed several texts into a row")}
TYPES = {"ContrastRecipe": "CLIPRecipe", "FusionRecipe": "FuseRecipe"}


def current_option(name: str) -> str | None:
    """ "qformer.depth" → "model.qformer.depth"; None: it never was an option of another name."""
    first, dot, rest = name.partition(".")
    rest = "positions" if rest == "places" else rest
    return f"{MOVED[first]}{dot}{rest}" if first in MOVED else None


def current_type(recorded: dict) -> str:
    """The class of a recipe that a checkpoint records."""
    if recorded.get("stage") == "align":
        return "LLaVAStage1Recipe"
    return TYPES.get(recorded.get("type"), recorded.get("type"))


def directory_of(recorded: dict) -> str:
    return recorded["data"]["directory"] if "data" in recorded else recorded["directory"]


def read_recipe(recipe: Any, recorded: dict, where: str) -> Any:
    """The recipe that a checkpoint records. recipe: the one of that name as it is now, whose classes it has."""
    cls = type(recipe)
    hints = config.field_types(cls)
    values = {**recorded, "type": cls.__name__}
    parts: dict[str, dict] = {part: dict(values.get(part) or {}) for part in ("model", "data")}
    for old, new in MOVED.items():
        if old in values and old not in hints:
            part, _, name = new.partition(".")
            parts[part][name] = values.pop(old)
    for option, (plain, did) in GONE.items():
        part, _, name = option.partition(".")
        if parts[part].pop(name, plain) != plain:
            raise UserError(
                f"{where}: this run {did}, which no longer exists (--{option}): train it anew, without --resume."
            )
    if recorded.get("stage") == "align" or values.get("starts_from", "") is None:
        values.pop("starts_from", None)  # not read, or none
    if isinstance(lora := values.get("lora"), dict):
        values["lora"] = {**lora, "type": "LoRAParts"}
    for part, fields in parts.items():
        if part not in hints:
            values.pop(part, None)
            continue
        kind = type(getattr(recipe, part))
        known = config.field_types(kind)
        kept = {name: value for name, value in fields.items() if name in known or f"{part}.{name}" not in UNREAD}
        values[part] = {**kept, "type": kind.__name__}
    values = {name: value for name, value in values.items() if name in hints or name not in UNREAD}
    return config.from_dict(cls, config.complete(cls, values), where)
