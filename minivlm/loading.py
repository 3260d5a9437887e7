"""`load`: the model in a directory, its tensors read without a second copy. Nothing that is loaded can run code."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import minivlm
from minivlm import config as configs
from minivlm import pretrained
from minivlm.atomic_writing import finish_writing
from minivlm.empty_model import empty_model, fill, skeleton
from minivlm.errors import UserError, nearest
from minivlm.files import read_bytes, read_json
from minivlm.layers.lora import LoRAParts
from minivlm.models import own_modules
from minivlm.older_names import current_names
from minivlm.origins import mark_published
from minivlm.precision import FLOATS, dtype_called, main_dtype
from minivlm.pretrained import generation_config
from minivlm.pretrained.hub import locate
from minivlm.pretrained.names import listed, to_ours
from minivlm.processor import Processor, ProcessorConfig

Base = str | Path | Mapping[str, str] | None


def is_model(value: Any) -> bool:
    """A class that is built from a config, such as `CLIP`."""
    return isinstance(value, type) and issubclass(value, nn.Module) and hasattr(value, "config_class")


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    base: Base = None,
    **modules: nn.Module,
) -> tuple[nn.Module, Processor | None]:
    """The model in `source`, in eval mode, and its processor, if there is one.

    source: a directory of ours, a published one (transformers' CLIP, SigLIP, ALIGN, GPT-2, GPT-NeoX, OPT, LLaMA, Mistral,
    Qwen2, MPT, T5, BERT, VisualBERT, LLaVA, BLIP, BLIP-2, IDEFICS, DINOv2, ViT; open_clip; OpenFlamingo with its base beside
    it), a GGUF file of the LLaMA family, or the id of such a one on the Hugging Face hub, which is
    downloaded behind a progress bar.
    A directory that holds an adapter alone: the base that it names, with the adapter on it. dtype None: as stored; where a
    file has several precisions, the one that its config names, or that most of its numbers have.
    base: a directory or hub id in place of the base that `source` names; of several parts: {"language_model": "out/lm"}.
    What is only named, and is on the hub, is not downloaded.
    modules: those of your own that the model was saved with, such as vision=my_tower (see models/own_modules.py).
    Parameters are views of the file, mapped into memory: training them does not write to it.
    Raises UserError for everything that is missing, broken or does not fit, tensors by their names.
    """
    return open_model(source, (), device=device, dtype=dtype, base=base, modules=modules)


def open_model(
    source: str | Path, above: tuple[Path, ...], *, base: Base = None, asked: bool = True, **where: Any
) -> tuple[nn.Module, Processor | None]:
    """`load`, for what the directories `above`, each the base of the one before, are being loaded with. asked: by the user,
    who may mean the hub; not by a directory."""
    directory = locate(source, pretrained.weight_patterns, named_by=None if asked else above[-1])
    if directory.resolve() in above:
        chain = " → ".join(map(str, (*above[above.index(directory.resolve()) :], directory.resolve())))
        raise UserError(f"{directory} belongs to itself ({chain}): name the base that it was trained on.")
    above = (*above, directory.resolve())
    finish_writing(directory)
    if (directory / "adapter_config.json").exists():
        return open_adapter(directory, above, base, **where)
    kind = pretrained.recognise(directory)
    described = read_ours(directory, above, base) if kind == "minivlm" else pretrained.read(directory, kind)
    if base is not None and not described.needs_base:
        raise UserError(f"{directory} is whole: leave out the base {base}.")
    with garbage_collector_paused():
        return build(directory, described, binding=kind == "minivlm", **where), described.processor


def build(
    directory: Path,
    described: pretrained.Published,
    *,
    binding: bool,
    device: str | torch.device,
    dtype: torch.dtype | None,
    modules: Mapping[str, nn.Module] = MappingProxyType({}),
) -> nn.Module:
    """The model with its tensors."""
    opened = lambda: pretrained.open_tensors(directory, described)
    described = replace(described, config=own_modules.fit(described.config, modules, str(directory)))
    model = skeleton(directory, described, lambda: len(described.prepare(opened()[1])), **modules)
    path, weights = opened()
    weights = described.prepare(weights)
    if (config := pretrained.settle(described, weights)) != described.config:
        model = empty_model(described.model_class, config, described.lora, **modules)
    state = model.state_dict(keep_vars=True)
    weights = current_names(weights, state) if binding else weights
    tensors = to_ours(weights, state, described.rows, where=str(path))
    stored = stored_dtype(tensors.values(), described.dtype, str(path), binding=binding)
    refuse_no_numbers(tensors, str(path))
    fill(model, tensors, device=device, dtype=dtype or stored)
    for module in modules.values():
        module.to(device)  # buffers that are not saved as well
    if described.defaults:
        model.defaults = described.defaults
    mark_published(model, described.pretrained if binding else None)
    return model.eval()


def open_adapter(
    directory: Path, above: tuple[Path, ...], base: Base, **where: Any
) -> tuple[nn.Module, Processor | None]:
    """The base that an adapter names, a path or a hub id, and the adapter's layers in it (see `minivlm.adapters`)."""
    from minivlm.adapters import load_adapter

    path = directory / "adapter_config.json"
    values = read_json(path)
    named = values.get("base_model_name_or_path") if base is None else base
    if not isinstance(named, (str, Path)) or not str(named):
        raise UserError(f"{path} does not name the base that the adapter belongs to: say where it is, by base.")
    if base is None and values.get("revision") not in (None, "main"):
        raise UserError(f"{path} belongs to revision {values['revision']!r} of {named}: say where that is, by base.")
    model, processor = open_model(named, above, asked=base is not None, **where)
    load_adapter(directory, model)
    return model.to(where["device"]).eval(), processor


@contextmanager
def garbage_collector_paused() -> Iterator[None]:
    """So many new objects make it search through all that was ever imported: 80 ms, twice what loading takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_ours(directory: Path, above: tuple[Path, ...] = (), base: Base = None) -> pretrained.Published:
    """Everything but the tensors of a directory that `save` wrote. above, base: see `open_model`."""
    path = directory / "config.json"
    values = read_json(path)
    if missing := {"minivlm", "model", "config", "processor"} - values.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}.")
    model_class = getattr(minivlm, name, None) if isinstance(name := values["model"], str) else None
    if not is_model(model_class):
        known = [one for one in minivlm.__all__ if is_model(getattr(minivlm, one))]
        raise UserError(f"{path} asks for the model {name!r}.{nearest(str(name), known)}")
    if values["minivlm"] != minivlm.__version__:
        values["config"] = configs.complete(model_class.config_class, values["config"])
        values["processor"] = configs.complete(ProcessorConfig, values["processor"])
    config = from_dict(model_class.config_class, values["config"], f"{path}: config")
    processor = None
    if values["processor"] is not None:
        processor_config = from_dict(ProcessorConfig, values["processor"], f"{path}: processor")
        tokenizer = directory / "tokenizer.json"
        processor = Processor(read_bytes(tokenizer) if tokenizer.exists() else None, processor_config)
    refuse_unknown_tokens(config, str(path))
    if not isinstance(how := values.get("generation", {}), dict):
        raise UserError(f"{path}: generation is {how!r}, but must be an object in braces.")
    given = {"dtype": dtype_called(values.get("dtype")), "defaults": generation_config.read(path, how)}
    given["pretrained"] = configs.coerce(tuple[str, ...], values.get("pretrained", []), f"{path}: pretrained")
    if "lora" in values:
        given["lora"] = from_dict(LoRAParts, values["lora"], f"{path}: lora")
    described = pretrained.Published(model_class, config, None, ("model.safetensors",), processor, **given)
    if "base" not in values:
        return described
    from minivlm.external_weights import bring_back, sources

    parts = sources(values["base"], base, str(directory))
    open_base = lambda source, asked: open_model(source, above, asked=asked, device="cpu", dtype=None)[0]
    prepare = lambda weights: bring_back(weights, parts, config, str(directory), open_base)
    return replace(described, prepare=prepare, needs_base=True)


def refuse_unknown_tokens(config: Any, where: str) -> None:
    """UserError for the number of a token, such as the one that ends an answer, that the model has no embedding for."""
    if not is_dataclass(config):
        return
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    parts = (getattr(values.get(name), "vocab_size", None) for name in ("language", "text"))
    if (size := values.get("vocab_size") or next(filter(None, parts), None)) is not None:
        named = {name: value for name, value in values.items() if name.endswith(("_token", "_tokens"))}
        for name, tokens in named.items():
            for token in tokens if isinstance(tokens, tuple) else (tokens,):
                if isinstance(token, int) and not -1 <= token < size:  # −1: none
                    raise UserError(f"{where}: {name} is {token}, but the model knows tokens 0 to {size - 1}.")
    for value in values.values():
        refuse_unknown_tokens(value, where)


def from_dict(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r}, but must be an object in braces.")
    return configs.from_dict(cls, values, where)


def refuse_no_numbers(tensors: Mapping[str, Tensor], where: str, few: int = 16) -> None:
    """UserError for weights that are NaN or infinite. It checks the ends of each tensor: to check all is to read the file."""
    floats = {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}
    floats = {n: (t.T if t.ndim == 2 and not t.is_contiguous() else t).flatten() for n, t in floats.items()}
    broken = [n for n, t in floats.items() if not (t[:few].isfinite().all() and t[-few:].isfinite().all())]
    if broken:
        raise UserError(
            f"{where} holds NaN or infinity in {len(broken)} tensors ({listed(broken)}): copy or download it again."
        )


def stored_dtype(tensors: Iterable[Tensor], declared: torch.dtype | None, where: str, *, binding: bool) -> torch.dtype:
    """The one precision in which a model is used whose file may have several. binding: is what is declared meant so even
    where the file has one? (What learns is kept in fp32 until the end.)"""
    tensors = list(tensors)
    found = dict.fromkeys(t.dtype for t in tensors if t.is_floating_point())
    if odd := [str(dtype).removeprefix("torch.") for dtype in found if dtype not in FLOATS]:
        raise UserError(
            f"{where} holds weights in {', '.join(odd)}, which is not supported: save them as floating-point."
        )
    chosen = declared if binding or (len(found) > 1 and declared in [*found, torch.float32]) else None
    return chosen or main_dtype(tensors)
