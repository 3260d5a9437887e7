"""python -m minivlm.info DIR: what a model directory or hub id holds, told from its configs and the header of its weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minivlm import pretrained
from minivlm.atomic_writing import finish_writing
from minivlm.command_line import Parser
from minivlm.conversation import template_of
from minivlm.empty_model import skeleton
from minivlm.errors import UserError, run_command_line
from minivlm.files import read_json
from minivlm.loading import read_ours
from minivlm.metrics import Score
from minivlm.models.own_modules import brought
from minivlm.older_names import current_name
from minivlm.peft_config import read_config
from minivlm.pretrained.files import open_weights
from minivlm.pretrained.gguf_file import GGUF
from minivlm.pretrained.hub import locate
from minivlm.run import Run, open_tensors, read_record

MOMENT = "optimiser."  # how the name of a tensor begins that belongs to a parameter that was trained


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m minivlm.info", description="What a model directory holds.")
    parser.add_argument("model", help="a directory of ours, a published one, an adapter, or a hub id")
    print(info(parser.parse_args(argv).model))


def info(source: str | Path, above: tuple[Path, ...] = ()) -> str:
    """Family, parts, precision, sizes, abilities, run and score, a line or a table each. Of a hub id only the texts are
    downloaded. above: the adapters that belong to it. UserError where there is no model."""
    directory = locate(source, lambda directory: (), named_by=above[-1] if above else None)
    finish_writing(directory)
    if (directory / "adapter_config.json").exists():
        return adapter(directory, above)
    run = Run(directory)
    if not (directory / "config.json").exists() and run.all():
        return f"{directory} holds a run that is not finished; its latest checkpoint:\n{info(run.latest())}"
    kind = pretrained.recognise(directory)
    ours = kind == "minivlm"
    described = read_ours(directory) if ours else pretrained.read(directory, kind)
    try:
        file, weights = pretrained.open_tensors(directory, described)
    except UserError as error:  # what the configs tell is told all the same
        file, weights, missing = None, {}, str(error) if Path(source).is_dir() else "not downloaded"
    config = pretrained.settle(described, weights) if not described.needs_base else described.config
    described = replace(described, config=config)
    model = skeleton(directory, described, lambda: len(weights) or pretrained.MOST_LAYERS)
    values = read_json(directory / "config.json") if ours else {}
    how = f"saved by minivlm {values['minivlm']}" if ours else f"published, {kind}"
    about = {
        "weights": missing if file is None else precisions(weights, file),
        **{f"your {name}": f"{own.module}, to be given as {name}=…" for name, own in brought(config).items()},
        **reading(model, described.processor),
        "can": ", ".join(sorted(model.abilities)) or "nothing by itself",
        **history(directory, run),
    }
    table = parts(model, values.get("base", {}), learnt(directory, run, dict(model.named_parameters())))
    return "\n".join([f"{directory}: {type(model).__name__}, {how}", "", *table, "", *lines(about)])


def lines(about: Mapping[str, str]) -> list[str]:
    return [f"{name:14}  {text}" for name, text in about.items()]


def parts(model: nn.Module, external: Mapping[str, Any], trained: set[str] | None) -> list[str]:
    """part | parameters | trained or not. trained: the names of the parameters that were; None: nobody knows."""
    sizes: dict[str, list[int]] = {}  # part → parameters, those of them that were trained
    for name, parameter in model.named_parameters():
        size = sizes.setdefault(name.partition(".")[0], [0, 0])
        size[0] += parameter.numel()
        size[1] += parameter.numel() if name in (trained or ()) else 0
    rows = [("part", "parameters", "")]
    for part, (total, learnt) in sizes.items():
        state = {0: "not trained", total: "trained"}.get(learnt, f"{learnt:,} trained") if trained is not None else ""
        rows.append(
            (part, f"{total:,}", f"not here: that of {external[part]['source']}" if part in external else state)
        )
    rows.append(("all", f"{sum(total for total, _ in sizes.values()):,}", ""))
    width, digits = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"{name:{width}}  {size:>{digits}}  {state}".rstrip() for name, size, state in rows]


def precisions(weights: Mapping[str, Tensor], file: Path) -> str:
    """float32, 9.2 MB in model.safetensors; of several precisions each with its share."""
    sizes: Counter[str] = Counter(weights.sizes() if isinstance(weights, GGUF) else {})
    for tensor in () if isinstance(weights, GGUF) else weights.values():
        if tensor.is_floating_point():
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    of = lambda size: f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
    return f"{' and '.join(f'{name}, {of(size)}' for name, size in sizes.most_common())} in {file.name}"


def reading(model: nn.Module, processor) -> dict[str, str]:
    """What the processor makes of images and texts."""
    if processor is None:
        return {"processor": "none: it cannot be shown images or texts"}
    config, about = processor.config, {}
    if model.takes_images and model.abilities:
        tokens = config.image_tokens or getattr(model.config, "image_tokens", 0)
        about["images"] = f"{config.image_size} × {config.image_size} pixels"
        about |= {"image tokens": f"{tokens} in the text for each"} if tokens else {}
    if processor.source is not None or not model.takes_images:
        about["context"] = f"{config.context} tokens"
    if processor.source is not None:
        about["vocabulary"] = f"{processor.vocab_size:,} tokens"
    if model.abilities & {"answer", "chat"}:
        about["chat template"] = config.chat
        if config.chat != "unknown":
            template = template_of(processor)
            about["chat template"] += f": {json.dumps(template.user + template.answer, ensure_ascii=False)}"
    return about


def learnt(directory: Path, run: Run, known: Container[str]) -> set[str] | None:
    """The names of the parameters that the run in `directory` trained: those with a state of the optimiser."""
    states = [path / "training.safetensors" for path in (*run.all()[-1:], directory)]
    if not (found := [path for path in states if path.exists()]):
        return None
    names = [name for name in open_tensors(found[0]).keys() if name.startswith(MOMENT)]  # noqa: SIM118
    return {current_name(name.removeprefix(MOMENT).rpartition(".")[0], known) for name in names}


def history(directory: Path, run: Run) -> dict[str, str]:
    """The run that left the model here, and its first score on held-out data."""
    about = {}
    found = [path for path in (*run.all()[-1:], directory) if (path / "training.json").exists()]
    if found:
        record = read_record(found[0])
        told = f"{record.get('name', 'a recipe')}, step {record['step']} of {record['recipe'].get('steps', '?')}"
        about["run"] = f"{told}, {record['score']:.1%} on the validation split"
        if record.get("seconds"):
            about["run"] += f", {record['seconds'] / 60:.1f} minutes of training"
    if (directory / "metrics.json").exists() and (scores := read_json(directory / "metrics.json")):
        name, score = next(iter(scores.items()))
        more = f"; {len(scores) - 1} more in metrics.json" if len(scores) > 1 else ""
        score = Score.from_record(score)
        about["score"] = f"{name} {score.text(score.value).strip()} (chance {score.text(score.chance).strip()}){more}"
    return about


def adapter(directory: Path, above: tuple[Path, ...]) -> str:
    """What an adapter holds, and the base that it names."""
    from minivlm.adapters import CONFIG, WEIGHTS

    config = read_config(directory / CONFIG)
    file, weights = open_weights(directory, WEIGHTS)
    base, v = config.values.get("base_model_name_or_path"), config.values
    about = {
        "parameters": f"{sum(tensor.numel() for tensor in weights.values()):,}",
        "weights": precisions(weights, file),
        "layers": f"{v.get('target_modules')}",
        "trained whole": ", ".join(v.get("modules_to_save") or ()) or "nothing",
    }
    head = f"{directory}: a LoRA adapter of rank {config.lora.rank}, alpha {config.lora.alpha:g}, for {base}"
    try:
        if directory.resolve() in above:
            raise UserError(f"{directory} belongs to itself: name the base that it was trained on.")
        below = info(base, (*above, directory.resolve()))
    except UserError as error:
        below = f"its base is not here: {error}"
    return "\n".join([head, "", *lines(about), "", below])


if __name__ == "__main__":
    run_command_line(main)
