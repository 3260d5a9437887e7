"""LoRA adapters in a directory of their own, without the model they belong to, as the `peft` library keeps them.

    adapter_config.json          {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "out/llava", …}
    adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ….lora_B.weight, …

Where the model has a published layout, modules go by the names that `transformers` gives them, and `peft` loads the
directory onto the same base. Otherwise, and where that layout fuses what is apart here (GPT-2's c_attn), by ours.
What else was trained beside LoRA (LLaVA's projector) is stored with it: peft's modules_to_save.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minivlm import config as configs
from minivlm import pretrained
from minivlm.checkpoint import write_all, write_tensors
from minivlm.errors import UserError
from minivlm.layers.lora import LoRAConfig, LoRALinear, lora_layers, lora_parameters, shared_weights
from minivlm.pretrained.files import open_weights, read_json
from minivlm.pretrained.names import Row, find, listed, to_theirs

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."

# What peft can do besides, and would change the numbers: none of it may be switched on.
UNSUPPORTED = (
    *("alora_invocation_tokens", "alpha_pattern", "layer_replication", "lora_bias", "rank_pattern"),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora"),
)

# ---- writing ---------------------------------------------------------------------------------------------------------


def save_adapter(directory: str | Path, model: nn.Module, *, base: str, config: LoRAConfig) -> None:
    """Write what was trained of `model`, and nothing else, atomically. base: what it was trained on, a path or a hub id.

    Raises ValueError if the model has no LoRA, or one of another rank or alpha than `config`.
    """
    layers = lora_layers(model)
    if not layers or any(layer.lora_a.out_features != config.rank for layer in layers.values()):
        raise ValueError(f"the model has no LoRA layers of rank {config.rank} to save")
    if any(layer.scale != config.alpha / config.rank for layer in layers.values()):
        raise ValueError(f"the model's LoRA was not made with alpha {config.alpha}")
    rows = published_rows(model)
    if any(find(rows, name)[1].parts > 1 for name in layers):
        rows = None
    paths = {name: module_path(name, rows) for name in layers}
    trained = trained_parameters(model, rows)
    others = {module_path(name, rows) for name in linears(model) if name not in layers}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": shortest(set(paths.values()), others),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in trained}) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {PREFIX + name: parameter.detach() for name, parameter in trained.items()}
    for name, path in paths.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layers[name].lora_a.weight.detach()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layers[name].lora_b.weight.detach()
    files = {
        WEIGHTS[0]: lambda path: write_tensors(path, tensors),
        CONFIG: lambda path: path.write_text(json.dumps(values, indent=2), encoding="utf-8"),
    }
    write_all(Path(directory), files)


def trained_parameters(model: nn.Module, rows: list[Row] | None) -> dict[str, Tensor]:
    """What learns besides LoRA, under the names of the file."""
    lora = {id(p) for p in lora_parameters(model)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in lora}
    return trained if rows is None else to_theirs(trained, rows)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers, adapted or not, by their names."""
    inside = {id(part) for layer in lora_layers(model).values() for part in layer.children()}
    kinds = (nn.Linear, LoRALinear)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and id(m) not in inside}


def shortest(paths: set[str], others: set[str]) -> list[str]:
    """q_proj instead of model.layers.0.self_attn.q_proj …, unless other modules go by that name as well."""
    last = lambda names: {name.rpartition(".")[2] for name in names}
    return sorted(paths if last(paths) & last(others) else last(paths))


# ---- names -----------------------------------------------------------------------------------------------------------


def published_rows(model: nn.Module) -> list[Row] | None:
    """The names that transformers has for such a model, if it has one that computes the same."""
    config = model.config
    for kind in pretrained.MODULES:
        module = pretrained.module_of(kind)
        if module.model_class is not type(model) or not hasattr(module, "write_config"):
            continue
        try:
            back = module.read_config(module.write_config(config))
        except (UserError, ValueError):  # it says what it cannot express, and another may
            continue
        if pretrained.comparable(back) == pretrained.comparable(config):
            return modern(module.rows(config)) if kind == "llava" else module.rows(config)
    return None


def modern(rows: list[Row]) -> list[Row]:
    """LLaVA's files keep the names of its first release, but an adapter goes by those that its modules have now."""
    tower = lambda name: re.sub(r"^(vision_tower|multi_modal_projector)", r"model.\1", name)
    rename = lambda name: tower(re.sub(r"^language_model\.model", "model.language_model", name))
    return [replace(row, theirs=tuple(dict.fromkeys([*map(rename, row.theirs), *row.theirs]))) for row in rows]


def module_path(name: str, rows: list[Row] | None) -> str:
    """Where transformers' model has what ours has under `name`."""
    return find(rows, name)[0][0]


def spellings(name: str, rows: list[Row] | None) -> dict[str, Row]:
    """Every path under which an adapter may know what is `name` here, and how it is stored under it."""
    theirs, row = find(rows, name)
    return {name: Row((name,), name), **dict.fromkeys(theirs, row)}


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_adapter(directory: str | Path, model: nn.Module, *, base: str | None = None) -> LoRAConfig:
    """Put the adapter in `directory`, written by `save_adapter` or by peft, on `model`; one that is there already goes.

    What the adapter holds can be trained further, everything else is frozen. base: what `model` was loaded from; it must
    bear the name that the adapter recorded. Raises UserError, and leaves the model as it is, if anything does not fit.
    """
    directory = Path(directory)
    values = read_config(directory / CONFIG)
    recorded = values.get("base_model_name_or_path")
    if base is not None and recorded and Path(recorded).name != Path(base).name:
        raise UserError(
            f"{directory} is an adapter for {recorded}, not for {base}: load it on the base it was made for."
        )
    config = configs.from_dict(LoRAConfig, fields(values), str(directory / CONFIG))
    path, weights = open_weights(directory, WEIGHTS)
    found = fit(weights, model, config.rank, values, str(path))
    adapted = sorted({name for name, kind in found if kind})
    config = replace(config, targets=tuple(sorted({name.rpartition(".")[2] for name in adapted})))

    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.base)
    model.requires_grad_(False)
    with torch.no_grad():
        for name in adapted:
            layer = LoRALinear(model.get_submodule(name), config, generator=torch.Generator())
            layer.lora_a.weight.copy_(found[name, "A"])
            layer.lora_b.weight.copy_(found[name, "B"])
            model.set_submodule(name, layer)
        for parameter, tensor in [(model.get_parameter(name), t) for (name, kind), t in found.items() if not kind]:
            parameter.copy_(tensor)
            parameter.requires_grad_(True)
    if hasattr(model.config, "lora"):  # so that the whole can be saved as it is now
        model.config = replace(model.config, lora=config)
    return config


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json; UserError for a kind of adapter that is more than A and B beside a weight."""
    values = read_json(path)
    if (kind := values.get("peft_type")) != "LORA":
        raise UserError(f"{path} describes an adapter of type {kind!r}; only LORA is supported.")
    asked = [name for name in UNSUPPORTED if values.get(name)]
    if values.get("bias", "none") != "none":
        asked.append("bias")
    if str(values.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        asked.append("init_lora_weights")  # these change the base as well
    if asked:
        what = ", ".join(f"{name} = {values[name]!r}" for name in asked)
        raise UserError(f"{path} asks for {what}, which is not supported.")
    return values


def fields(values: dict[str, Any]) -> dict[str, Any]:
    """peft's names → those of LoRAConfig; which layers, the tensors say."""
    theirs = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    return {**{ours: values[name] for ours, name in theirs.items() if name in values}, "targets": ()}


class Slot(NamedTuple):
    """Where one tensor of an adapter belongs."""

    name: str  # of our module, or parameter
    kind: str  # A, B, or empty for a parameter that was trained as a whole
    row: Row
    shape: tuple[int, ...]  # of the tensor in the file

    def read(self, tensor: Tensor) -> Tensor:
        if not self.kind:
            return self.row.to_ours(tensor)
        # The parts of a fused layer share its A, and each has its own rows of B.
        return tensor.chunk(self.row.parts)[self.row.part] if self.kind == "B" else tensor


def slots(model: nn.Module, rank: int) -> dict[str, list[Slot]]:
    """For every name that a tensor of an adapter for `model` may have, where it belongs (a fused one: in several places)."""
    rows, places = published_rows(model), defaultdict(list)
    for name, layer in linears(model).items():
        for path, row in spellings(name, rows).items():
            places[f"{path}.lora_A.weight"].append(Slot(name, "A", row, (rank, layer.in_features)))
            places[f"{path}.lora_B.weight"].append(Slot(name, "B", row, (layer.out_features * row.parts, rank)))
    adapted = {id(p) for layer in lora_layers(model).values() for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in adapted:
            continue
        for path, row in spellings(name, rows).items():
            places[path].append(Slot(name, "", row, row.their_shape(parameter.shape)))
    return places


def fit(
    weights: Mapping[str, Tensor], model: nn.Module, rank: int, values: dict[str, Any], where: str
) -> dict[tuple[str, str], Tensor]:
    """Every tensor of the file by (our name, A or B or nothing). UserError that names all that does not fit."""
    places, found, unknown, misshapen = slots(model, rank), {}, [], []
    for name, tensor in weights.items():
        name = name.removeprefix(PREFIX)
        if name not in places:
            unknown.append(name)
        for slot in places.get(name, ()):
            if tensor.shape != slot.shape:
                misshapen.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(slot.shape)}")
            found[slot.name, slot.kind] = slot.read(tensor) if tensor.shape == slot.shape else tensor
    wanted = {(slot.name, slot.kind): name for name in places if is_target(name, values) for slot in places[name]}
    adapted = dict.fromkeys(name for name, kind in found if kind)
    wanted |= {(name, kind): f"{name}.lora_{kind}" for name in adapted for kind in "AB"}
    problems = {
        "unknown here": unknown,
        "of another shape": list(dict.fromkeys(misshapen)),
        "missing": [name for place, name in wanted.items() if place not in found],
        "for a weight that other modules share": shared_weights(model, adapted),
    }
    parts = [f"{len(names)} {what} ({listed(names)})" for what, names in problems.items() if names]
    if parts or not adapted:
        raise UserError(f"{where} does not fit this model: of its tensors, {'; '.join(parts) or 'none is of LoRA'}.")
    return found


def is_target(name: str, values: dict[str, Any]) -> bool:
    """Whether adapter_config.json promises this tensor. Where it speaks of layers by number, it is not held to it."""
    targets = values.get("target_modules") or ()
    path = name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
    if path == name or values.get("layers_to_transform") or values.get("exclude_modules"):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)
