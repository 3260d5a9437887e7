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
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minivlm import pretrained
from minivlm.atomic_writing import finish_writing, write_all, write_tensors
from minivlm.empty_model import config_describes_lora
from minivlm.errors import UserError
from minivlm.layers.lora import LoRAConfig, LoRALinear, lora_layers, lora_parameters, shared_weights
from minivlm.peft_config import PeftConfig, read_config
from minivlm.pretrained.files import open_weights
from minivlm.pretrained.names import Row, find, listed, to_theirs

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
# For any other model none: peft's plain wrapper.
TASK_TYPES = {"LanguageModel": "CAUSAL_LM", "LLaVA": "CAUSAL_LM", "T5": "SEQ_2_SEQ_LM"}

# ---- writing ---------------------------------------------------------------------------------------------------------


def save_adapter(directory: str | Path, model: nn.Module, *, base: str, config: LoRAConfig) -> None:
    """Write what was trained of `model`, and nothing else, atomically. base: what it was trained on, a path or a hub id.

    Raises ValueError if the model has no LoRA, or one of another rank or alpha than `config`.
    """
    layers, learns = lora_layers(model), [name for name, p in model.named_parameters() if p.requires_grad]
    if any(".base." in name for name in learns):
        raise ValueError(
            "biases of layers with LoRA are trained too, which an adapter of ours cannot store: merge_lora, and save the model"
        )
    if not layers or any(layer.lora_a.out_features != config.rank for layer in layers.values()):
        raise ValueError(f"the model has no LoRA layers of rank {config.rank} to save")
    if any(layer.scale != config.alpha / config.rank for layer in layers.values()):
        raise ValueError(f"the model's LoRA was not made with alpha {config.alpha}")
    rows = published_rows(model)
    if any(not module_paths(name, rows) or row_of(name, rows).parts > 1 for name in layers):
        rows = None
    paths = {name: next(iter(module_paths(name, rows)), name) for name in linears(model)}
    trained = trained_parameters(model, rows)
    values = describe(model, base, config, paths, rows, trained)
    tensors = {PREFIX + name: parameter.detach() for name, parameter in trained.items()}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{paths[name]}.lora_A.weight"] = layer.lora_a.weight.detach()
        tensors[f"{PREFIX}{paths[name]}.lora_B.weight"] = layer.lora_b.weight.detach()
    files = {
        WEIGHTS[0]: lambda path: write_tensors(path, tensors),
        CONFIG: lambda path: path.write_text(json.dumps(values, indent=2), encoding="utf-8"),
    }
    write_all(Path(directory), files)


def describe(
    model: nn.Module,
    base: str,
    config: LoRAConfig,
    paths: Mapping[str, str],
    rows: list[Row] | None,
    trained: Mapping[str, Tensor],
) -> dict[str, Any]:
    """The values of adapter_config.json. paths: our linear layer → its name in the file."""
    layers = lora_layers(model)
    others = {path for name, path in paths.items() if name not in layers}
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(type(model).__name__),
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        # Two words of our own names: one may be another module's in transformers' model, and peft would not say so.
        "target_modules": shortest({paths[name] for name in layers}, others, words=2 if rows is None else 1),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in trained if "." in name}) or None,
        "bias": "none",
        "fan_in_fan_out": any(row_of(name, rows).how == "transpose" for name in layers),
        "inference_mode": True,
    }


def trained_parameters(model: nn.Module, rows: list[Row] | None) -> dict[str, Tensor]:
    """The parameters that learn besides LoRA, by their names in the file."""
    lora = {id(p) for p in lora_parameters(model)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in lora}
    return trained if rows is None else to_theirs(trained, rows)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers, adapted or not, by their names."""
    inside = {id(part) for layer in lora_layers(model).values() for part in layer.children()}
    kinds = (nn.Linear, LoRALinear)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and id(m) not in inside}


def shortest(paths: set[str], others: set[str], *, words: int) -> list[str]:
    """q_proj instead of model.layers.0.self_attn.q_proj …, unless other modules go by that name as well."""
    last = lambda names: {".".join(name.split(".")[-words:]) for name in names}
    return sorted(paths if last(paths) & last(others) else last(paths))


# ---- names -----------------------------------------------------------------------------------------------------------


def published_rows(model: nn.Module) -> list[Row] | None:
    """The names that transformers has for such a model, if it has one that computes the same (but for LoRA)."""
    config = replace(model.config, lora=None) if hasattr(model.config, "lora") else model.config
    try:
        module = pretrained.module_of(pretrained.kind_of(config))
        back = module.read_config(module.write_config(config))
    except (UserError, ValueError):  # it says what it cannot express
        return None
    same = pretrained.comparable(back) == pretrained.comparable(config)
    return rows_of(pretrained.kind_of(config), config) if same else None


def tables_to_read(model: nn.Module) -> list[list[Row] | None]:
    """Our names, and those of each published layout of such models, even if it cannot express every field of the config."""
    kinds = ["open_clip"] if type(model.config).__name__ == "CLIPConfig" else []
    try:
        nearest = published_rows(model) or rows_of(pretrained.kind_of(model.config), model.config)
    except UserError:  # no publisher has such a model
        nearest = None
    return [None, *(rows for rows in (nearest, *(rows_of(kind, model.config) for kind in kinds)) if rows is not None)]


def rows_of(kind: str, config: Any) -> list[Row] | None:
    try:
        rows = pretrained.rows_of(kind, config)
    except (AttributeError, KeyError, ValueError):  # a table for other configs of this class
        return None
    return modern(rows) if kind == "llava" else rows


def modern(rows: list[Row]) -> list[Row]:
    """LLaVA's files keep the names of its first release, but an adapter goes by those that its modules have now."""
    tower = lambda name: re.sub(r"^(vision_tower|multi_modal_projector)", r"model.\1", name)
    rename = lambda name: tower(re.sub(r"^language_model\.model", "model.language_model", name))
    return [replace(row, theirs=tuple(dict.fromkeys([*map(rename, row.theirs), *row.theirs]))) for row in rows]


def file_names(parameter: str, rows: list[Row] | None) -> tuple[list[str], Row | None]:
    """The names that a file may have for our parameter, and the row of the table that says so; ([], None): it has none."""
    try:
        return find(rows, parameter)
    except KeyError:
        return [], None


def module_paths(name: str, rows: list[Row] | None) -> list[str]:
    """The names that a file may have for our module; none if its weight is not a module's own there."""
    theirs, _ = file_names(f"{name}.weight", rows)
    return [path.removesuffix(".weight") for path in theirs if path.endswith(".weight")]


def row_of(name: str, rows: list[Row] | None) -> Row:
    return find(rows, f"{name}.weight")[1]


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_adapter(directory: str | Path, model: nn.Module, *, base: str | None = None) -> LoRAConfig:
    """Put the adapter in `directory`, written by `save_adapter` or by peft, on `model`; one that is there already goes.

    What the adapter holds can be trained further, everything else is frozen. base: what `model` was loaded from; it must
    bear the name that the adapter recorded. Raises UserError, and leaves the model as it is, if anything does not fit.
    """
    directory = Path(directory)
    finish_writing(directory)
    config = read_config(directory / CONFIG)
    recorded = config.values.get("base_model_name_or_path")
    if base is not None and recorded and Path(recorded).name != Path(base).name:
        raise UserError(
            f"{directory} is an adapter for {recorded}, not for {base}: load it on the base it was made for."
        )
    path, weights = open_weights(directory, WEIGHTS)
    found, layers = fit(weights, model, config, str(path))
    adapted = sorted(layers)
    targets = tuple(sorted({name.rpartition(".")[2] for name in adapted}))

    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.base)
    model.requires_grad_(False)
    with torch.no_grad():
        others = [(model.get_parameter(name), tensor) for (name, kind), tensor in found.items() if not kind]
        for name in adapted:
            layer = LoRALinear(model.get_submodule(name), layers[name], generator=torch.Generator())
            layer.lora_a.weight.copy_(found[name, "A"])
            layer.lora_b.weight.copy_(found[name, "B"])
            model.set_submodule(name, layer)
        for parameter, tensor in others:
            parameter.copy_(tensor)
            parameter.requires_grad_(True)
    lora = replace(next(iter(layers.values())), targets=targets)
    if hasattr(model.config, "lora"):  # so that the whole can be saved as it is now, if its config can tell
        model.config = replace(model.config, lora=lora)
        if not config_describes_lora(model):
            model.config = replace(model.config, lora=None)
    return lora


class Slot(NamedTuple):
    """The module or parameter that one tensor of an adapter belongs to."""

    name: str  # of our module, or parameter
    kind: str  # A, B, or empty for a parameter that was trained as a whole
    row: Row
    shape: tuple[int, ...]  # of the tensor in the file

    def read(self, tensor: Tensor) -> Tensor:
        if not self.kind:
            return self.row.to_ours(tensor)
        # The parts of a fused layer share its A, and each has its own rows of B.
        return self.row.own_rows(tensor) if self.kind == "B" else tensor


def slots(
    model: nn.Module, rows: list[Row] | None, config: PeftConfig
) -> tuple[dict[str, list[Slot]], dict[str, LoRAConfig]]:
    """The slots of every name that a tensor of an adapter for `model` may have (several for a fused one), and the LoRA of
    every layer by the config."""
    slots_by_name, layers = defaultdict(list), {}
    for name, layer in linears(model).items():
        paths = module_paths(name, rows)
        layers[name] = config.layer(paths)
        for path in paths:
            row, rank = row_of(name, rows), layers[name].rank
            slots_by_name[f"{path}.lora_A.weight"].append(Slot(name, "A", row, (rank, layer.in_features)))
            slots_by_name[f"{path}.lora_B.weight"].append(Slot(name, "B", row, (layer.out_features * row.parts, rank)))
    adapted = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_a.weight, layer.lora_b.weight)}
    for name, parameter in model.named_parameters():
        if id(parameter) in adapted:
            continue
        name = name.replace(".base.", ".")  # of a layer with LoRA
        paths, row = file_names(name, rows)
        for path in dict.fromkeys(paths):
            slots_by_name[path].append(Slot(name, "", row, row.their_shape(parameter.shape)))
    return slots_by_name, layers


def fit(
    weights: Mapping[str, Tensor], model: nn.Module, config: PeftConfig, where: str
) -> tuple[dict[tuple[str, str], Tensor], dict[str, LoRAConfig]]:
    """Every tensor of the file by (our name, A or B or nothing), and for every layer that gets LoRA its config. UserError
    that names all that does not fit."""
    weights = {name.removeprefix(PREFIX).replace(".base_layer.", "."): tensor for name, tensor in weights.items()}
    spelt = [slots(model, rows, config) for rows in tables_to_read(model)]
    slots_by_name, layers = max(spelt, key=lambda read: sum(name in read[0] for name in weights))
    found, unknown, misshapen = {}, [], []
    for name, tensor in weights.items():
        if name not in slots_by_name:
            unknown.append(name)
        for slot in slots_by_name.get(name, ()):
            if tensor.shape != slot.shape:
                misshapen.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(slot.shape)}")
            found[slot.name, slot.kind] = slot.read(tensor) if tensor.shape == slot.shape else tensor
    adapted = dict.fromkeys(name for name, kind in found if kind)
    wanted = {(name, kind): f"{name}.lora_{kind}" for name in adapted for kind in "AB"}
    wanted |= promised(slots_by_name, config)
    if config.values.get("bias", "none") != "none":
        wanted |= {(f"{n}.bias", ""): f"{n}.bias" for n in adapted if linears(model)[n].bias is not None}
    problems = {
        "unknown here": unknown,
        "of another shape": list(dict.fromkeys(misshapen)),
        "missing": [name for place, name in wanted.items() if place not in found],
        "for a weight that other modules share": [*shared_weights(model, adapted), *shared_parameters(model, found)],
    }
    parts = [f"{len(names)} {what} ({listed(names)})" for what, names in problems.items() if names]
    if parts or not adapted:
        raise UserError(f"{where} does not fit this model: of its tensors, {'; '.join(parts) or 'none is of LoRA'}.")
    return found, {name: layers[name] for name in adapted}


def promised(slots_by_name: Mapping[str, list[Slot]], config: PeftConfig) -> dict[tuple[str, str], str]:
    """The tensors that must be in the file by adapter_config.json: (our name, A or B) → its name there."""
    of_lora = re.compile(r"(.*)\.lora_[AB]\.weight")
    paths = {name: match[1] for name in slots_by_name if (match := of_lora.fullmatch(name))}
    return {
        (slot.name, slot.kind): n for n, path in paths.items() if config.promises(path) for slot in slots_by_name[n]
    }


def shared_parameters(model: nn.Module, found: Mapping[tuple[str, str], Tensor]) -> list[str]:
    """Parameters that are trained whole and are shared by several modules: peft trains a copy for one module alone."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    named = {name.replace(".base.", "."): id(p) for name, p in model.named_parameters()}
    return [name for name, kind in found if not kind and uses[named[name]] > 1]
