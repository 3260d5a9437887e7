"""Published checkpoints ⇄ our models: a module for each publisher, with its table of names and its reading of configs.

out/clip/config.json        {"minivlm": …}              ours, see `minivlm.checkpoint`
         config.json        {"model_type": "clip", …}   transformers' → hf_clip, siglip, gpt2, opt, …
         open_clip_config.json                          open_clip's   → open_clip
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from minivlm import config as configs
from minivlm.errors import Note, UserError
from minivlm.files import read_json
from minivlm.precision import dtype_called, main_dtype
from minivlm.pretrained import generation_config, names
from minivlm.pretrained.fields import DERIVED, Known, check_config
from minivlm.pretrained.files import WEIGHTS, open_weights

# A module here has: model_class; read_config(values) → our config; rows, its table of names, or rows(config) → this table;
# read_processor(directory, values, config) → Processor; known, the fields that a config may have (see `fields`), or
# known(values) → these. To write layout="hf": write_config(config) → values, and, if it takes images,
# write_processor(processor, config) → values by file name. Where tensors have to be put together before a table of names
# can be read: prepare(weights) → weights.
MODULES = {  # model_type → module; or an architecture, where one type has several
    "clip": "hf_clip",
    "siglip": "siglip",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "vit": "vit",
    "clip_vision_model": "clip_vision",
    "siglip_vision_model": "clip_vision",
    "align": "align",
    "open_clip": "open_clip",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "opt": "opt",
    "t5": "t5",
    "bert": "bert",
    "visual_bert": "visualbert",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "llava": "llava",
    "blip": "blip",
    "blip-2": "blip2",
    "Blip2ForImageTextRetrieval": "blip2_itm",
    "mpt": "mpt",
    "mosaic_gpt": "mpt",
    "idefics": "idefics",
    "openflamingo": "openflamingo",
    "gguf": "gguf",
}

REFUSED = {  # model_type → why, and what to take in its place
    "siglip2": "is a SigLIP 2 with NaFlex, which reads images in their own shapes; the SigLIP 2 for images of one size is "
    "supported, such as google/siglip2-base-patch16-224",
}
MOST_LAYERS = 10_000
# What comes of files that someone else wrote, or broke, where they are read without checking each field.
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Published:
    """The content of a published directory, but for its tensors."""

    model_class: type
    config: Any
    rows: list[names.Row]
    weights: tuple[str, ...]  # files that may hold the tensors
    processor: Any
    prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda weights: weights
    dtype: torch.dtype | None = None  # that the weights are said to be of
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of `generate`
    needs_base: bool = False  # are there parts that lie elsewhere?
    file: tuple[Path, Mapping[str, Tensor]] | None = (
        None  # the tensors, where what describes them lies in the same file
    )
    lora: Any = (
        None  # of a directory of ours: `LoRAParts` of adapters that its config does not tell of (see `Model.lora`)
    )
    pretrained: tuple[str, ...] = ()  # likewise, its parts that are published (see minivlm/origins.py)


def recognise(directory: Path) -> str:
    """The kind of a directory: "minivlm" if it is one of ours, a model_type, "open_clip", or "gguf", also of a file."""
    if directory.is_file():
        return "gguf"
    path = directory / "config.json"
    values = read_json(path) if path.exists() else {}
    if "minivlm" in values:
        return "minivlm"
    kind, classes = values.get("model_type"), values.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(word, str) for word in (*classes, kind) if word is not None):
        raise UserError(
            f"{path} names its kind by model_type {kind!r} and architectures {classes!r}, which are no names."
        )
    for word in (*classes, kind):
        if word in MODULES:
            return word
    if (directory / "open_clip_config.json").exists():
        return "open_clip"
    if (directory / "checkpoint.pt").exists():
        return "openflamingo"
    if not path.exists() and any(directory.glob("*.gguf")):
        return "gguf"
    known = ", ".join(sorted(MODULES))
    if kind in REFUSED:
        raise UserError(f"{directory} {REFUSED[kind]}.")
    if kind:
        raise UserError(f"{directory} holds a model of type {kind!r}, which is not supported; there are {known}.")
    raise UserError(f"{directory} is no model directory: it has no config.json that says what it is ({known}).")


def open_tensors(directory: Path, described: Published) -> tuple[Path, Mapping[str, Tensor]]:
    """The file that holds the tensors, and these by its names."""
    return described.file or open_weights(directory, described.weights)


def weight_patterns(directory: Path) -> tuple[str, ...]:
    """Which files hold the tensors, as patterns to download by, best first."""
    if (directory / "adapter_config.json").exists():
        return ("adapter_model*",)
    if recognise(directory) == "open_clip":
        return OPEN_CLIP_WEIGHTS
    return ("model*.safetensors", "pytorch_model*.bin")


def module_of(kind: str) -> ModuleType:
    return importlib.import_module(f"minivlm.pretrained.{MODULES[kind]}")


def rows_of(kind: str, config: Any) -> list[names.Row]:
    """A publisher's table of names for such a model."""
    rows = module_of(kind).rows
    return rows(config) if callable(rows) else rows


def known_fields(kind: str, values: Mapping[str, Any]) -> dict[str, Known]:
    """The fields that a config may have, by its parts; none: the module looks at all of them itself."""
    known = getattr(module_of(kind), "known", {})
    return known(values) if callable(known) else known


def read(directory: Path, kind: str) -> Published:
    """Everything but the tensors. Raises UserError for a config that cannot be followed exactly."""
    module = module_of(kind)
    if kind in ("openflamingo", "gguf"):  # they have no config
        return module.read(directory)
    path = directory / ("open_clip_config.json" if kind == "open_clip" else "config.json")
    values = read_json(path)
    path_of_defaults, how = generation_config.read_values(directory, values)
    values |= generation_config.tokens(how)
    if known := known_fields(kind, values):
        check_config(values, str(path), known)
    try:
        config = module.read_config(values)
    except UNREADABLE as error:
        raise UserError(f"{path} describes no model that can be built: {error}.") from error
    config = configs.from_dict(type(config), configs.to_dict(config), where=str(path))  # are the types right as well?
    if (depth := depth_of(config)) > MOST_LAYERS:
        raise UserError(f"{path} asks for {depth} layers: no file has so many.")
    try:
        processor, rows = module.read_processor(directory, values, config), rows_of(kind, config)
    except UNREADABLE as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(
            f"the processor or tokeniser in {directory} is described in a way that cannot be read ({why})."
        ) from error
    weights = OPEN_CLIP_WEIGHTS if kind == "open_clip" else WEIGHTS
    prepare = getattr(module, "prepare", Published.prepare)
    dtype, defaults = dtype_called(values.get("dtype") or values.get("torch_dtype")), {}
    if kind in generation_config.READERS:
        defaults = generation_config.read(path_of_defaults, how)
        if ignored := generation_config.not_followed(how):
            warnings.warn(
                f"{path_of_defaults} asks for {', '.join(ignored)}, which is not followed.", Note, stacklevel=3
            )
    return Published(module.model_class, config, rows, weights, processor, prepare, dtype, defaults)


def depth_of(config: Any) -> int:
    """The number of layers of a config, in all its parts."""
    if isinstance(config, (tuple, list)):
        return sum(map(depth_of, config))
    if not is_dataclass(config):
        return 0
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    layers = getattr(config, "depths", values.get("blocks", ()))  # of stages
    layers = sum(layers) + sum(values.get(name) or 0 for name in ("depth", "decoder_depth"))
    return layers + sum(map(depth_of, values.values()))


def settle(described: Published, weights: Mapping[str, Tensor]) -> Any:
    """The config, but for what the file knows better: a language model may have a head of its own."""
    from minivlm.pretrained.language import has_own_head

    config = described.config
    language = getattr(config, "language", config)
    if described.rows is None or not getattr(language, "tie_head", False):
        return config
    if not has_own_head(weights, described.rows, "" if language is config else "language_model."):
        return config
    free = replace(language, tie_head=False)
    return free if language is config else replace(config, language=free)


def write(
    config: Any, tensors: dict[str, Tensor], processor: Any, defaults: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A model in transformers' form: texts by file name, config.json last, and tensors by their names.

    Raises UserError that names what transformers' class cannot express.
    """
    from minivlm.pretrained.chat_template import write_chat_template
    from minivlm.pretrained.preprocessing import tokenizer_files

    module = module_of(kind_of(config))
    values = module.write_config(config)
    try:
        given, kept = comparable(config), comparable(module.read_config(values))
        lost = ", ".join(f"{name} = {value!r}" for name, value in given.items() if kept.get(name) != value)
    except ValueError as error:  # what is left of the config no longer fits together
        lost = f"this model ({error})"
    if lost:
        architecture = values["architectures"][0]
        raise UserError(f"transformers' {architecture} cannot express {lost}; save without layout='hf'.")
    dtype = str(main_dtype(tensors.values())).removeprefix("torch.")
    files = {}
    if processor is not None:
        ends = getattr(getattr(config, "language", config), "end_tokens", ())
        files |= tokenizer_files(processor, ends[0] if ends else None)
        about = module.write_processor(processor, config) if hasattr(module, "write_processor") else {}
        files |= {name: json.dumps(what, indent=2) for name, what in about.items()}
        if type(config).__name__ in ("LanguageModelConfig", "LLaVAConfig"):
            files |= write_chat_template(processor)
    if kind_of(config) in generation_config.READERS:
        files[generation_config.NAME] = json.dumps(generation_config.write(values, defaults), indent=2)
    files["config.json"] = json.dumps({**values, "torch_dtype": dtype}, indent=2)
    return files, names.to_theirs(tensors, rows_of(kind_of(config), config))


WRITTEN = {  # config of ours → model_type, or architecture, in which layout="hf" writes it; see also `kind_of`
    "T5Config": "t5",
    "BERTConfig": "bert",
    "BLIPConfig": "blip",
    "BLIP2Config": "blip-2",
    "BLIP2Stage1Config": "Blip2ForImageTextRetrieval",
    "FlamingoConfig": "idefics",
    "LLaVAConfig": "llava",
    "VisualBERTConfig": "visual_bert",
}


def kind_of(config: Any) -> str:
    """The model_type that comes nearest to a config of ours."""
    from minivlm.pretrained import language

    name = type(config).__name__
    if name == "CLIPConfig":
        contrast = "siglip" if config.loss == "sigmoid" else "clip"
        return "align" if type(config.text).__name__ == "BERTConfig" else contrast
    if name == "LanguageModelConfig":
        return language.kind_of(config)
    if name == "VisionConfig":
        dinov2 = "dinov2_with_registers" if config.registers else "dinov2"
        clip = "siglip_vision_model" if config.pool == "attention" else "clip_vision_model"
        plain = clip if config.embedding_norm or config.pool == "attention" else "vit"
        return plain if config.layer_scale is None else dinov2
    if name not in WRITTEN:
        raise UserError(
            f"layout='hf' writes CLIP, SigLIP, ALIGN, DINOv2, ViT, language models, T5, BERT, VisualBERT, LLaVA, BLIP, "
            f"BLIP-2 and IDEFICS; a {name} has no published form here."
        )
    return WRITTEN[name]


UNCOMPARED = ("dropout", "loss_chunk", "label_smoothing", "initial_temperature", "answer_loss")  # of training alone


def comparable(config: Any) -> dict[str, Any]:
    """Every field that changes what the trained model computes, by its dotted name, derived values spelt out."""
    flat = flatten(configs.to_dict(config))
    for part in [
        name.removesuffix("depth") for name in flat if name.endswith("depth") and f"{name[:-5]}mlp_width" in flat
    ]:
        sizes = [flat[f"{part}{name}"] for name in ("width", "heads", "depth")]
        derived = {name: value(*sizes) for name, value in DERIVED.items()}
        if not flat.get(f"{part}cross_attention_every"):
            del derived["context_width"]
        flat |= {part + name: v for name, v in derived.items() if flat.get(part + name, v) is None}
    like = {"gated.heads": flat.get("language.heads"), "gated.mlp_width": flat.get("language.mlp_width")}
    flat |= {name: value for name, value in like.items() if name in flat and flat[name] is None}
    if flat.get("text.causal"):
        flat.pop("text.use_mask")  # padding on the right is out of sight anyway
    if flat.get("text.pool", "end") != "end":
        flat.pop("text.end_token")
    return {name: value for name, value in flat.items() if not name.endswith(UNCOMPARED)}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
