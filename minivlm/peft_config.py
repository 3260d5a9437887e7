"""Reads peft's adapter_config.json: which layers have LoRA, of which rank and weight. What is not followed is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minivlm import config as configs
from minivlm.errors import UserError
from minivlm.files import read_json
from minivlm.layers.lora import LoRAConfig

FOLLOWED = (
    *("peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "bias", "init_lora_weights"),
)
# How it was trained or is stored elsewhere; what it computes does not depend on it. peft itself sees to fan_in_fan_out.
OF_NO_MATTER = (
    *("task_type", "inference_mode", "auto_mapping", "peft_version", "fan_in_fan_out", "ensure_weight_tying"),
    *("megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # how it began, see `CHANGES_THE_BASE`
)
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights

# What one pattern may cost: a quantified group can take for ever, and each further * a factor of the length of a name.
LONGEST, MOST_STARS = 500, 3


@dataclass(frozen=True)
class PeftConfig:
    """lora: rank, alpha and dropout of the layers of which rank_pattern and alpha_pattern say nothing."""

    lora: LoRAConfig
    values: dict[str, Any]
    where: str

    def layer(self, paths: Iterable[str]) -> LoRAConfig:
        """The LoRA of the layer that goes by these names."""
        rank, alpha = self.patterned("rank_pattern", paths), self.patterned("alpha_pattern", paths)
        return self.make(self.lora.rank if rank is None else rank, alpha)

    def make(self, rank: int, alpha: float | None = None) -> LoRAConfig:
        values = {"lora_alpha": 8, **self.values} | ({} if alpha is None else {"lora_alpha": alpha})
        return make_lora(values | {"r": rank}, self.where)

    def patterned(self, field: str, paths: Iterable[str]) -> Any:
        """The value that a pattern gives to a layer: the first that fits, as peft has it."""
        for pattern, value in (self.values.get(field) or {}).items():
            if any(ends_with(path, pattern, f"{self.where}: {field}") for path in paths):
                return value
        return None

    def promises(self, path: str) -> bool:
        """Whether a layer of this name must be in the file. Where that is not told in plain words, it is not held to it."""
        v = self.values
        targets = v.get("target_modules") or ()
        if v.get("layers_to_transform") is not None or v.get("exclude_modules") or targets == "all-linear":
            return False
        if isinstance(targets, str):
            return is_cheap(targets) and re.fullmatch(targets, path) is not None
        return any(path == target or path.endswith(f".{target}") for target in targets)


def is_cheap(pattern: str) -> bool:
    """Can this regular expression be tried on a name without taking for ever?"""
    stars = len(re.findall(r"[*+{]", pattern))
    return len(pattern) <= LONGEST and stars <= MOST_STARS and not re.search(r"\)\s*[*+{]", pattern)


def ends_with(path: str, pattern: str, where: str) -> bool:
    """peft's rule for rank_pattern and alpha_pattern."""
    if not is_cheap(pattern):
        raise UserError(f"{where} has the pattern {pattern[:80]!r}, which could take for ever: name the layers.")
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error as error:
        raise UserError(f"{where} has the pattern {pattern[:80]!r}, which is none: {error}.") from None


def read_config(path: Path) -> PeftConfig:
    """UserError for a kind of adapter that is more than A and B beside a weight."""
    values, where = read_json(path), str(path)
    if (kind := values.get("peft_type")) != "LORA":
        raise UserError(f"{path} describes an adapter of type {configs.shown(kind)}; only LORA is supported.")
    asked = [name for name in values if values[name] and name not in (*FOLLOWED, *OF_NO_MATTER)]
    if str(values.get("init_lora_weights")).startswith(CHANGES_THE_BASE):
        asked.append("init_lora_weights")
    if asked:
        what = ", ".join(f"{name} = {str(values[name])[:80]!r}" for name in asked)
        raise UserError(f"{path} asks for {what}, which is not supported.")
    check_types(values, where)
    config = PeftConfig(make_lora(values, where), values, where)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in values.get(field) or {}:
            ends_with("a.name", pattern, f"{where}: {field}")
    return config


def check_types(values: dict[str, Any], where: str) -> None:
    """UserError for a field that is of another type than peft gives it."""
    words = tuple[str, ...]
    kinds = {
        "base_model_name_or_path": str | None,
        "revision": str | None,
        "target_modules": str | words | None,
        "exclude_modules": str | words | None,
        "modules_to_save": words | None,
        "layers_to_transform": int | tuple[int, ...] | None,
        "layers_pattern": str | words | None,
        "bias": Literal["none", "all", "lora_only"],
        "use_rslora": bool,
    }
    for name, kind in kinds.items():
        if name in values:
            configs.coerce(kind, values[name], f"{where}: {name}")
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        if not isinstance(pattern := values.get(name) or {}, dict):
            raise UserError(f"{where}: {name} is {configs.shown(pattern)}, but must be an object in braces.")
        for key, value in pattern.items():
            configs.coerce(kind, value, f"{where}: {name}.{key}")
    targets = values.get("target_modules")
    if isinstance(targets, str) and is_cheap(targets):
        try:
            re.compile(targets)
        except re.error as error:
            raise UserError(f"{where}: target_modules is {targets!r}, which is no pattern: {error}.") from None


def make_lora(values: dict[str, Any], where: str) -> LoRAConfig:
    """peft's names → those of LoRAConfig; which layers, the tensors say. use_rslora: the update counts alpha / √rank times
    (Kalajdzievski 2023)."""
    theirs = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    fields = {"rank": 8, "alpha": 8.0, **{ours: values[name] for ours, name in theirs.items() if name in values}}
    config = configs.from_dict(LoRAConfig, {"dropout": 0.0, **fields, "targets": []}, f"{where}: LoRA")
    if not values.get("use_rslora"):
        return config
    return LoRAConfig(config.rank, config.alpha * config.rank**0.5, config.dropout, ())
