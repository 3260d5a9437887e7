"""Published checkpoints ⇄ our models: a module for each publisher, with its table of names and its reading of configs.

out/clip/config.json        {"minivlm": …}              ours, see `minivlm.checkpoint`
         config.json        {"model_type": "clip", …}   transformers' → hf_clip, siglip
         open_clip_config.json                          open_clip's   → open_clip
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from minivlm import config as configs
from minivlm.errors import UserError
from minivlm.pretrained import names
from minivlm.pretrained.files import WEIGHTS, read_json

# A module here has: model_class, read_config(values) → our config, rows(config) → its table of names,
# read_processor(directory, values, config) → Processor; and to write layout="hf": write_config, IMAGE_PROCESSOR.
MODULES = {"clip": "hf_clip", "siglip": "siglip", "open_clip": "open_clip"}  # model_type → module

OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Published:
    """What a published directory describes."""

    model_class: type
    config: Any
    rows: list[names.Row]
    weights: tuple[str, ...]  # files that may hold the tensors
    processor: Any


def recognise(directory: Path) -> str:
    """What a directory holds: "minivlm" if it is one of ours, a model_type, or "open_clip"."""
    path = directory / "config.json"
    values = read_json(path) if path.exists() else {}
    if "minivlm" in values:
        return "minivlm"
    if (kind := values.get("model_type")) in MODULES:
        return kind
    if (directory / "open_clip_config.json").exists():
        return "open_clip"
    known = ", ".join(sorted(MODULES))
    if kind:
        raise UserError(f"{directory} holds a model of type {kind!r}, which is not supported; there are {known}.")
    raise UserError(f"{directory} is no model directory: it has no config.json that says what it is ({known}).")


def weight_patterns(directory: Path) -> tuple[str, ...]:
    """Which files hold the tensors, as patterns to download by, best first."""
    if recognise(directory) == "open_clip":
        return OPEN_CLIP_WEIGHTS
    return ("model*.safetensors", "pytorch_model*.bin")


def module_of(kind: str) -> ModuleType:
    return importlib.import_module(f"minivlm.pretrained.{MODULES[kind]}")


def read(directory: Path, kind: str) -> Published:
    """Everything but the tensors. Raises UserError for a config that cannot be followed exactly."""
    module = module_of(kind)
    path = directory / ("open_clip_config.json" if kind == "open_clip" else "config.json")
    values = read_json(path)
    try:
        config = module.read_config(values)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} describes no model that can be built: {error}.") from error
    config = configs.from_dict(type(config), configs.to_dict(config), where=str(path))  # are the types right as well?
    processor = module.read_processor(directory, values, config)
    weights = OPEN_CLIP_WEIGHTS if kind == "open_clip" else WEIGHTS
    return Published(module.model_class, config, module.rows(config), weights, processor)


def write(config: Any, tensors: dict[str, Tensor], processor: Any) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A CLIP in transformers' form: texts by file name, config.json last, and tensors by their names.

    Raises UserError that names what transformers' class cannot express.
    """
    from minivlm.pretrained.preprocessing import tokenizer_files, write_images

    kind = "siglip" if getattr(config, "loss", None) == "sigmoid" else "clip"
    module = module_of(kind)
    if type(config) is not module.model_class.config_class:
        raise UserError(f"layout='hf' writes CLIP and SigLIP; a {type(config).__name__} has no published form here.")
    values = module.write_config(config)
    try:
        given, kept = comparable(config), comparable(module.read_config(values))
        lost = ", ".join(f"{name} = {value!r}" for name, value in given.items() if kept.get(name) != value)
    except ValueError as error:  # what is left of the config no longer fits together
        lost = f"this model ({error})"
    if lost:
        architecture = values["architectures"][0]
        raise UserError(f"transformers' {architecture} cannot express {lost}; save without layout='hf'.")
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    files = {}
    if processor is not None:
        files |= tokenizer_files(processor)
        images = write_images(processor.config, module.IMAGE_PROCESSOR)
        files["preprocessor_config.json"] = json.dumps(images, indent=2)
    files["config.json"] = json.dumps({**values, "torch_dtype": dtype}, indent=2)
    return files, names.to_theirs(tensors, module.rows(config))


def comparable(config: Any) -> dict[str, Any]:
    """Every field that changes what the trained model computes, by its dotted name, derived values spelt out."""
    flat = flatten(configs.to_dict(config))
    for tower in ("vision", "text"):
        width, heads = flat[f"{tower}.width"], flat[f"{tower}.heads"]
        derived = {"mlp_width": 4 * width, "head_width": width // heads, "kv_heads": heads}
        flat |= {f"{tower}.{name}": v for name, v in derived.items() if flat.get(f"{tower}.{name}", v) is None}
    if flat["text.causal"]:
        flat.pop("text.use_mask")  # padding on the right is out of sight anyway
    if flat["text.pool"] != "end":
        flat.pop("text.end_token")
    return {name: value for name, value in flat.items() if not name.endswith(("dropout", "loss_chunk"))}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
