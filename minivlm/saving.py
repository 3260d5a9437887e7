"""`save`: a model and its processor into a directory, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import minivlm
from minivlm import config as configs
from minivlm import pretrained
from minivlm.atomic_writing import write_all, write_tensors
from minivlm.empty_model import config_describes_lora
from minivlm.errors import UserError
from minivlm.models import own_modules
from minivlm.origins import published_parts
from minivlm.precision import HALF
from minivlm.pretrained import generation_config
from minivlm.pretrained.names import tied
from minivlm.processor import Processor


def save(
    directory: str | Path,
    model: nn.Module,
    processor: Processor | None = None,
    *,
    layout: str = "minivlm",
    base: Mapping[str, str] | None = None,
) -> None:
    """Write model and processor into `directory`. Other files in it stay.

    All files change at once: whenever this is broken off, the old model is there or the new one (see `write_all`).
    layout="hf": what transformers reads.
    base: frozen parts that are not stored, and where they come from (see `minivlm.external_weights`).
    Raises UserError on a full disk, and for a model that the layout cannot express.
    """
    if not config_describes_lora(model):
        raise UserError(
            "the model has LoRA layers that its config does not describe: call save_adapter, or merge_lora before."
        )
    tensors, about = plain_tensors(model), None
    if base:
        from minivlm.external_weights import leave_out

        if layout != "minivlm":
            raise UserError(f"layout={layout!r} stores a model whole: leave out its base.")
        tensors, about = leave_out(tensors, model, base)
    if layout == "hf":
        if getattr(model, "lora", None) is not None:
            raise UserError(f"layout={layout!r} has no place for adapters: call merge_lora() before saving the model.")
        if own := own_modules.brought(model.config):
            raise UserError(
                f"layout={layout!r} has no place for {', '.join(o.module for o in own.values())}: leave it out."
            )
        texts, tensors = pretrained.write(model.config, tensors, processor, getattr(model, "defaults", {}))
    elif layout == "minivlm":
        texts = our_files(model, processor, about)
    else:
        raise UserError(f"unknown layout {layout!r}; there are minivlm and hf.")
    files = {"model.safetensors": lambda path: write_tensors(path, tensors)}
    files |= {name: lambda path, text=text: path.write_text(text, encoding="utf-8") for name, text in texts.items()}
    if layout == "minivlm" and processor is not None and processor.source is None:
        files = {"tokenizer.json": None} | files  # an earlier model's would be taken for its own
    write_all(Path(directory), files)


def our_files(model: nn.Module, processor: Processor | None, base: dict[str, Any] | None = None) -> dict[str, str]:
    """Texts by file name, config.json last."""
    values = {
        "minivlm": minivlm.__version__,
        "model": type(model).__name__,
        "config": configs.to_dict(model.config),
        "processor": configs.to_dict(processor.config) if processor else None,
        **({"dtype": str(model.stored).removeprefix("torch.")} if getattr(model, "stored", None) in HALF else {}),
        **({"base": base} if base else {}),
        **({"lora": configs.to_dict(lora)} if (lora := getattr(model, "lora", None)) else {}),
        **({"pretrained": sorted(parts)} if (parts := published_parts(model)) else {}),
    }
    if defaults := getattr(model, "defaults", {}):
        values["generation"] = generation_config.write({}, defaults)
    tokenizer = {"tokenizer.json": processor.tokenizer.to_str()} if processor and processor.source is not None else {}
    return {**tokenizer, "config.json": json.dumps(values, indent=2, ensure_ascii=False)}


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, each tied tensor once, each tensor with a memory of its own, as safetensors wants it."""
    state = model.state_dict(keep_vars=True)
    tensors, memory = {}, set()
    for name, *_ in tied(state):
        tensor = state[name].detach().contiguous()
        start = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if start in memory else tensor
        memory.add(start)
    return tensors
