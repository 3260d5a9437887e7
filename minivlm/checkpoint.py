"""A model in a directory: written whole or not at all, read without a second copy.

    config.json          {"minivlm": version, "model": "CLIP", "config": {…}, "processor": {…}}
    model.safetensors    every tensor under the name it has in the model
    tokenizer.json       as the `tokenizers` library writes it

`load` reads published directories and hub ids as well (see `minivlm.pretrained`). Nothing that is loaded can run code.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minivlm
from minivlm import config as configs
from minivlm import pretrained
from minivlm.errors import UserError, nearest
from minivlm.files import read_bytes
from minivlm.layers.lora import lora_layers
from minivlm.older_names import current_names
from minivlm.precision import FLOATS, HALF, dtype_called, kept_in_fp32, main_dtype
from minivlm.pretrained import generation_config
from minivlm.pretrained.files import open_weights, read_json
from minivlm.pretrained.hub import locate
from minivlm.pretrained.names import listed, tied, to_ours
from minivlm.processor import Processor, ProcessorConfig

DEEP = 100  # layers that are built without a look whether the file has so many
Base = str | Path | Mapping[str, str] | None

MODELS = {  # class name → the module it lives in
    "BERT": "minivlm.layers.bert",
    "BLIP": "minivlm.models.blip",
    "BLIP2": "minivlm.models.blip2",
    "BLIP2Stage1": "minivlm.models.blip2_stage1",
    "CLIP": "minivlm.models.clip",
    "Flamingo": "minivlm.models.flamingo",
    "ImageCaptioningModel": "minivlm.models.captioner",
    "LLaVA": "minivlm.models.llava",
    "LanguageModel": "minivlm.layers.language_model",
    "MultitaskVLM": "minivlm.models.multitask",
    "T5": "minivlm.layers.t5",
    "UNITER": "minivlm.models.uniter",
    "ViLBERT": "minivlm.models.vilbert",
    "VQAModel": "minivlm.models.vqa",
    "VisualBERT": "minivlm.models.visualbert",
}

UNFINISHED = ".unfinished.json"  # what is written and not yet in place: name → temporary name, None: to be removed

# ---- writing ---------------------------------------------------------------------------------------------------------


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
    if not lora_is_told(model):
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its only class, with the operating system's number in the text
        full = f"os error {errno.ENOSPC}" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """write(temporary path), then rename: `path` holds the old content or the new one, whole, at every instant.

    Raises UserError if it cannot be written (a full disk, no permission); then the old content is still there.
    """
    path = Path(path)
    write_all(path.parent, {path.name: write})


def write_all(directory: Path, files: Mapping[str, Callable[[Path], None] | None]) -> None:
    """`write_atomically` for several files of one directory, which change all at once; those with None go.

    When all are safe on the disk under temporary names, a list of them is written: up to that instant the old files count,
    and from then on the new ones. If the program ends before it has renamed them all, whoever opens the directory next does.
    """
    temporary = {name: directory / f".{name}.{os.getpid()}.tmp" for name in files}
    plan = directory / UNFINISHED
    try:
        directory.mkdir(parents=True, exist_ok=True)
        finish_writing(directory)
        for name, write in files.items():
            if (directory / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{name} is a directory")
            if write is not None:
                write_and_flush(temporary[name], write)
        flush_to_disk(directory)
        if len(files) == 1:  # the renaming is all there is
            os.replace(temporary[name], directory / name)
        else:
            temporary[UNFINISHED] = plan.with_name(f"{UNFINISHED}.{os.getpid()}.tmp")
            renamed = {name: temporary[name].name if write else None for name, write in files.items()}
            write_and_flush(temporary[UNFINISHED], lambda path: path.write_text(json.dumps(renamed), encoding="utf-8"))
            os.replace(temporary[UNFINISHED], plan)
            finish_writing(directory)
        flush_to_disk(directory)
    except OSError as error:
        what = ", ".join(files)
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise UserError(
            f"{what} could not be written to {directory}: {why}. What was there before is untouched."
        ) from error
    finally:
        for path in temporary.values():
            if path.exists() and not plan.exists():
                path.unlink()


def finish_writing(directory: Path) -> None:
    """Rename what an interrupted `write_all` had written. UserError where that cannot be done."""
    plan = directory / UNFINISHED
    if not os.path.lexists(plan):
        return
    renamed = read_json(plan)
    for name, temporary in renamed.items():
        ours = temporary is None or re.fullmatch(rf"\.{re.escape(name)}\.\d+\.tmp", str(temporary))
        if not ours or Path(name).name != name:
            raise UserError(f"{plan} is not a list of files to be renamed: remove it.")
    try:
        flush_to_disk(directory)
        for name, temporary in renamed.items():
            if temporary is None:
                (directory / name).unlink(missing_ok=True)
            elif (directory / temporary).exists():  # else it is in place
                with suppress(FileNotFoundError):  # by another process, just now
                    os.replace(directory / temporary, directory / name)
        flush_to_disk(directory)
        plan.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"the program that wrote {directory} was interrupted, and its files cannot be renamed now: "
            f"{error.strerror or error}. Make {directory} writable once, or save the model again."
        ) from error


def write_and_flush(path: Path, write: Callable[[Path], None]) -> None:
    path.touch()
    mode = path.stat().st_mode  # some writers make files that only their owner may read
    write(path)
    path.chmod(mode)
    flush_to_disk(path)


def flush_to_disk(path: Path) -> None:
    """Wait until the file, or a directory's list of names, would survive a power cut."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories, and needs no flush of theirs
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading ---------------------------------------------------------------------------------------------------------


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    base: Base = None,
) -> tuple[nn.Module, Processor | None]:
    """The model in `source`, in eval mode, and its processor, if there is one.

    source: a directory of ours, a published one (transformers' CLIP, SigLIP, ALIGN, GPT-2, GPT-NeoX, OPT, LLaMA, Mistral,
    Qwen2, MPT, T5, BERT, VisualBERT, LLaVA, BLIP, BLIP-2, IDEFICS; open_clip; OpenFlamingo with its base beside it), or
    the id of such a one on the Hugging Face hub, which is downloaded behind a progress bar.
    A directory that holds an adapter alone: the base that it names, with the adapter on it. dtype None: as stored; where a
    file has several precisions, the one that its config names, or that most of its numbers have.
    base: a directory or hub id in place of the base that `source` names; of several parts: {"language_model": "out/lm"}.
    What is only named, and is on the hub, is not downloaded.
    Parameters are views of the file, mapped into memory: training them does not write to it.
    Raises UserError for everything that is missing, broken or does not fit, tensors by their names.
    """
    return open_model(source, (), device=device, dtype=dtype, base=base)


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
) -> nn.Module:
    """The model with its tensors."""
    opened = lambda: open_weights(directory, described.weights)
    model = skeleton(directory, described, lambda: len(described.prepare(opened()[1])))
    path, weights = opened()
    weights = described.prepare(weights)
    if (config := pretrained.settle(described, weights)) != described.config:
        model = empty_model(described.model_class, config)
    state = model.state_dict(keep_vars=True)
    weights = current_names(weights, state) if binding else weights
    tensors = to_ours(weights, state, described.rows, where=str(path))
    stored = stored_dtype(tensors.values(), described.dtype, str(path), binding=binding)
    refuse_no_numbers(tensors, str(path))
    fill(model, tensors, device=device, dtype=dtype or stored)
    if described.defaults:
        model.defaults = described.defaults
    return model.eval()


def skeleton(directory: Path, described: pretrained.Published, count: Callable[[], int]) -> nn.Module:
    """The model without its numbers. count: how many tensors there are, to judge a config by that asks for very many layers.

    UserError for a config that no model follows.
    """
    if (depth := pretrained.depth_of(described.config)) > DEEP and depth > (tensors := count()):
        raise UserError(
            f"the config in {directory} asks for {depth} layers, but the file has {tensors} tensors in all."
        )
    try:
        return empty_model(described.model_class, described.config)
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        why = str(error).partition("\n")[0]
        raise UserError(f"the config in {directory} describes no model that can be built: {why}.") from None


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
    if not isinstance(name := values["model"], str) or name not in MODELS:
        raise UserError(f"{path} asks for the model {name!r}.{nearest(str(name), MODELS)}")
    model_class = getattr(importlib.import_module(MODELS[name]), name)
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
    told = {"dtype": dtype_called(values.get("dtype")), "defaults": generation_config.read(path, how)}
    described = pretrained.Published(model_class, config, None, ("model.safetensors",), processor, **told)
    if "base" not in values:
        return described
    from minivlm.external_weights import bring_back, sources

    parts = sources(values["base"], base, str(directory))
    prepare = lambda weights: bring_back(weights, parts, config, str(directory), above)
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


def empty_model(cls: type[nn.Module], config: Any) -> nn.Module:
    """cls(config) on the meta device: all names and shapes, and no memory."""
    with torch.device("meta"), Unfilled():
        return cls(config)


def lora_is_told(model: nn.Module) -> bool:
    """Would the config alone bring back all layers of LoRA, and no others?"""
    shape = lambda model: {n: (layer.lora_a.out_features, layer.scale) for n, layer in lora_layers(model).items()}
    return not (has := shape(model)) or shape(empty_model(type(model), model.config)) == has


class Unfilled(torch.overrides.TorchFunctionMode):
    """Inside, new tensors are not given their initial values: they will be overwritten.

    On the meta device they have no values anyway, but the attempt costs a second, in which torch imports what it needs.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "fill_", "zero_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


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
    told = declared if binding or (len(found) > 1 and declared in [*found, torch.float32]) else None
    return told or main_dtype(tensors)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], *, device: str | torch.device, dtype: torch.dtype) -> None:
    """Put `tensors` where `empty_model` left nothing. Tied parameters stay one, frozen ones frozen."""
    state = model.state_dict(keep_vars=True)
    wide = kept_in_fp32(model) if dtype == torch.float16 else ()
    for names in tied(state):
        old, new = state[names[0]], tensors[names[0]]
        held = torch.float32 if id(old) in wide else dtype
        new = new.to(device=device, dtype=held if new.is_floating_point() else None)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)  # one for all its names; it will learn if the old one did
        state.update(dict.fromkeys(names, new))
    model.load_state_dict(state, assign=True)
