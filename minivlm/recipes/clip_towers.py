"""A CLIP of towers that are there: a vision tower, a text tower with its tokeniser, or both; what is between them is new.

With a frozen vision tower this is LiT (Zhai et al. 2022, "LiT: Zero-Shot Transfer with Locked-image text Tuning").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from minivlm.checkpoint import load
from minivlm.datasets.pairs import Pairs
from minivlm.errors import UserError
from minivlm.layers.bert import BERT
from minivlm.layers.text import TextConfig, TextTransformer
from minivlm.layers.vit import VisionTransformer
from minivlm.models.clip import CLIP
from minivlm.processor import Processor
from minivlm.recipes.parts import build, load_vision_tower, take

OF_IMAGES = ("image_size", "pad_color", "resize", "resize_to", "resample", "crop", "rescale", "mean", "std")


def check_given(recipe: Any) -> None:
    """UserError for options that contradict each other: a part is described, or taken from where it is."""
    for part, source in (("vision", recipe.vision_from), ("text", recipe.text_from)):
        if source and recipe.starts_from:
            raise UserError(
                f"--starts_from names a whole model, and --{part}_from a part of one: leave one of them out."
            )
        described = next((name for name in recipe.given if name.startswith(f"model.{part}.")), None)
        if source and described:
            raise UserError(
                f"--{described}: the tower of --{part}_from {source} stays as it is; leave one of the two out."
            )


@dataclass(frozen=True)
class Towers:
    """vision, text: the towers that are there, each with the processor of its model; None: it is to be a new one."""

    vision: tuple[nn.Module, Processor] | None
    text: tuple[nn.Module, Processor] | None

    @classmethod
    def of(cls, recipe: Any) -> Towers:
        vision = load_vision_tower(recipe.vision_from) if recipe.vision_from else None
        return cls(vision, load_text_tower(recipe.text_from) if recipe.text_from else None)

    @property
    def image_size(self) -> int | None:
        return self.vision and self.vision[1].image_size

    def compose(self, recipe: Any, pairs: Pairs) -> tuple[CLIP, Processor]:
        """The model and its processor. Where the text tower is new, its tokeniser is trained on the texts of `pairs`."""
        config, size = recipe.model, self.image_size or recipe.model.vision.image_size
        if self.text is None:
            sizes = dict(vocab_size=recipe.data.vocab_size, image_size=size, context=config.text.context)
            processor = Processor.train(list(pairs.texts()), **sizes)
            text = replace(config.text, vocab_size=processor.vocab_size)
            if isinstance(text, TextConfig):
                text = replace(text, end_token=processor.end_token)
        else:
            processor, text = self.text[1], self.text[0].config
            processor = Processor(processor.tokenizer, replace(processor.config, image_size=size))
        config = replace(config, text=text)
        if self.vision is not None:
            tower, images = self.vision
            processor = images_as(images, processor)
            reads = "model.patch_mean" not in recipe.given and has_class_token(tower)
            config = replace(config, vision=tower.config, image_projection=True, patch_mean=config.patch_mean or reads)
        model = build(CLIP, config, seed=recipe.seed)
        for part, source in ((model.vision, self.vision), (model.text, self.text)):
            if source is not None:
                take(part, source[0])
        return model, processor


def has_class_token(tower: nn.Module) -> bool:
    return isinstance(tower, VisionTransformer) and tower.config.pool == "class"


def images_as(images: Processor, texts: Processor) -> Processor:
    """Images as the one prepares them, texts as the other does."""
    prepared = {name: getattr(images.config, name) for name in OF_IMAGES}
    return Processor(texts.tokenizer, replace(texts.config, **prepared))


def load_text_tower(source: str) -> tuple[nn.Module, Processor]:
    """The text tower of a CLIP, or a BERT, and its tokeniser. UserError where there is none."""
    model, processor = load(source)
    tower = model if isinstance(model, BERT) else getattr(model, "text", None)
    if not isinstance(model, (BERT, CLIP)) or not isinstance(tower, (BERT, TextTransformer)):
        raise UserError(f"--text_from {source} holds a {type(model).__name__}, but a BERT or a CLIP is wanted.")
    if processor is None:
        raise UserError(f"--text_from {source} has no tokeniser beside its weights: save it with one.")
    return tower, processor
