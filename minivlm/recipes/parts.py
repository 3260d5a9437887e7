"""What models are put together from: the vision tower of one model, and the language model of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from minivlm import pretrained
from minivlm.checkpoint import load
from minivlm.config import shown, value_at, with_value
from minivlm.conversation import template_of, with_chat
from minivlm.errors import UserError
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.layers.perceiver import PerceiverConfig
from minivlm.layers.t5 import T5
from minivlm.layers.tower import TowerConfig, features_of, learned_positions
from minivlm.layers.vit import VisionConfig, VisionTransformer, fitted
from minivlm.layers.vocabulary import with_vocabulary
from minivlm.loading import read_ours
from minivlm.origins import copy_marks
from minivlm.precision import cast, main_dtype
from minivlm.pretrained.hub import is_hub_id, locate
from minivlm.processor import Processor
from minivlm.recipes.job import CHOSEN_ANEW
from minivlm.recipes.rates import Rate
from minivlm.recipes.recipe import Recipe

LATENTS = PerceiverConfig(width=128, depth=2, heads=4, latents=16)  # of a small resampler


def load_vision_tower(source: str) -> tuple[nn.Module, Processor]:
    """The vision tower of a model (CLIP, SigLIP, BLIP, LLaVA …) or one that stands alone (DINOv2, ViT), and the processor
    that prepares its images.

    The tower's config is that of the images that come out of the processor: a position table that was made for others
    (DINOv2: 518 pixels, shown 224) is interpolated to them. The processor has the tokeniser of a model that compares images
    with texts, and otherwise none. UserError where there is no such tower.
    """
    model, processor = load(source)
    tower = model if isinstance(model, VisionTransformer) else getattr(model, "vision", None)
    if not isinstance(getattr(tower, "config", None), TowerConfig):
        raise UserError(
            f"--vision_from {source} holds a {type(model).__name__}, which has no vision tower: a CLIP, a SigLIP, a BLIP or "
            "a tower alone (DINOv2, ViT) is wanted."
        )
    if processor is None:
        raise UserError(f"--vision_from {source} has no processor, so nobody knows how its images are prepared.")
    compares = hasattr(model, "encode_text")
    config = replace(processor.config, tiles=1, image_tokens=0, image_fence=None)
    return fitted(tower, processor.image_size), Processor(processor.source if compares else None, config)


def load_language_model(
    source: str, *, chat: str | None = None, system: str | None = None
) -> tuple[LanguageModel, Processor]:
    """A language model that knows the mark `<image>`, and a way to write conversations (see `with_chat`)."""
    model, processor = load(source)
    if not isinstance(model, LanguageModel):
        raise UserError(f"--language_from {source} holds a {type(model).__name__}, no language model.")
    processor = with_chat(processor, chat, system)
    template_of(processor)  # known before anything is trained
    return with_image_token(model, processor)


def opened(
    recipe: Recipe, kind: type[nn.Module] | tuple[type[nn.Module], ...], checkpoint: Path | None = None
) -> tuple[nn.Module, Processor] | None:
    """The model and processor of a checkpoint, or of --starts_from; None where neither is given, and a new one is to be built.

    UserError for a model that is no `kind`, and for an option --model.X that says otherwise than the model.
    """
    if checkpoint is not None:
        return load(checkpoint)
    if not recipe.starts_from:
        return None
    model, processor = load(recipe.starts_from)
    if not isinstance(model, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(f"{'an' if one.__name__[0] in 'AEI' else 'a'} {one.__name__}" for one in kinds)
        found = f"--starts_from {recipe.starts_from} holds a {type(model).__name__}"
        raise UserError(f"{found}, but {wanted} is wanted.")
    if processor is None:
        raise UserError(f"--starts_from {recipe.starts_from} has no processor beside its weights: save it with one.")
    return as_chosen(model, recipe), with_chat(
        processor, getattr(recipe, "chat", None), getattr(recipe, "system", None)
    )


def holds(source: str, kind: type[nn.Module]) -> bool:
    """Whether a model is there, or on the hub, and of a `kind` by its config."""
    there = is_hub_id(source) or (Path(source).expanduser() / "config.json").is_file()
    return there and issubclass(described(source).model_class, kind)


def described(source: str) -> pretrained.Published:
    """The model in a directory or on the hub, without its tensors."""
    directory = locate(source, pretrained.weight_patterns)
    kind = pretrained.recognise(directory)
    return read_ours(directory) if kind == "minivlm" else pretrained.read(directory, kind)


def as_chosen(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model that a recipe starts from, with what the user chose by --model.X: of that only what leaves its weights as they
    are, such as dropout, can be another."""
    config = model.config
    for name in (name for name in recipe.given if name.startswith("model.")):
        field = name.removeprefix("model.")
        wanted, has = value_at(recipe, name), value_at(config, field)
        if wanted != has and (has is None or field.rpartition(".")[2] not in CHOSEN_ANEW):
            raise UserError(
                f"--{name} is {shown(wanted)}, but {shown(has)} in the model of --starts_from {recipe.starts_from}, which "
                "stays as it is: leave one of the two out."
            )
        config = config if wanted == has else with_value(config, field, wanted)
    if config == model.config:
        return model
    made = build(type(model), config, seed=recipe.seed)
    take(made, model)
    return made.eval()


def take(part: nn.Module, source: nn.Module) -> None:
    """The weights of `source`, in the precision in which it has them, become those of a part."""
    cast(part, main_dtype(source.parameters()))
    part.load_state_dict(source.state_dict())
    copy_marks(source, part)


def with_image_token(model: LanguageModel | T5, processor: Processor) -> tuple[LanguageModel | T5, Processor]:
    """The tokeniser knows the mark `<image>`; the language model has a (never read) row for it."""
    if processor.image_token_id is None:
        processor.tokenizer.add_special_tokens([processor.config.image_token])
        processor = Processor(processor.tokenizer, processor.config)
    return with_vocabulary(model, processor.image_token_id + 1), processor


def join_processors(of_images: Processor, of_texts: Processor, **fields) -> Processor:
    """Images as `of_images` prepares them, texts and conversations as `of_texts` does. fields: of the config
    that follow from neither, such as image_tokens and context."""
    names = ("pad_token", "answer_end", "chat", "chat_format", "system", "image_token")
    of_language = {name: getattr(of_texts.config, name) for name in names}
    config = replace(of_images.config, pad_to_context=False, **of_language, **fields)
    return Processor(of_texts.tokenizer, config)


def reading(vision: TowerConfig, layers: tuple[int, ...]) -> dict[str, Any]:
    """The fields of a `VisionFeaturesConfig` for these layers of a tower: its patches, before the last norm, as LLaVA reads
    CLIP (Liu et al. 2023) and Prismatic DINOv2 (Karamcheti et al. 2024, §4.2). A ResNet's features, which come out of no
    norm, are standardised."""
    standardise = not isinstance(vision, VisionConfig)
    return dict(vision=vision, vision_layers=layers, class_token=False, vision_norm=False, standardise=standardise)


def resampling(resampler: PerceiverConfig, vision: TowerConfig, layers: tuple[int, ...]) -> PerceiverConfig:
    """A resampler of what these layers of a tower see."""
    return replace(resampler, context_width=features_of(vision, layers)[1], positions=learned_positions(vision, layers))


def build(model_class: type[nn.Module], config: Any, *, seed: int) -> nn.Module:
    """The model of a config; sizes that do not fit each other are a UserError."""
    try:
        return model_class(config, seed=seed)
    except ValueError as error:
        raise UserError(f"the model cannot be built: {error}.") from None


def speaking(config: LanguageModelConfig, processor: Processor) -> LanguageModelConfig:
    """The config with what follows from the tokeniser."""
    return replace(
        config, vocab_size=processor.vocab_size, end_tokens=(processor.end_token,), pad_token=processor.pad_token
    )


def parts_table(model: nn.Module, rates: Mapping[nn.Parameter, Rate], origins: dict[str, str]) -> str:
    """part | parameters | frozen or trained | learning rate | starts from, read from the parameters themselves."""
    rows, seen = [], set()
    for name, part in model.named_children():
        adapters = {id(p) for key, p in part.named_parameters() if "lora_" in key}
        own = [p for p in part.parameters() if id(p) not in adapters | seen]  # a tied head is counted once
        seen |= {id(p) for p in own}
        rows.append((name, own))
        if adapters:
            rows.append((f"{name} LoRA", [p for p in part.parameters() if id(p) in adapters]))
    lines = [("part", "parameters", "frozen or trained", "learning rate", "starts from")]
    for name, parameters in rows:
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        if total:
            state = "trained" if trained == total else "frozen" if not trained else f"{trained:,} trained"
            learn_at = sorted({rates[p].rate for p in parameters if p.requires_grad})
            shown = " to ".join(
                f"{rate:g}" for rate in (learn_at if len(learn_at) < 3 else learn_at[:: len(learn_at) - 1])
            )
            lines.append((name, f"{total:,}", state, shown or "-", origins.get(name, "new")))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
