"""Images and texts as unit vectors, computed a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.errors import UserError
from minivlm.layers.tower import ImageFeatures, Images
from minivlm.processes import each


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Without gradients, and in eval mode (batch norm, dropout); afterwards the model is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def encode_images(images: Sequence[Any], model, processor, *, batch_size: int = 64) -> Tensor:
    """N images (PIL, path or (H, W, 3) uint8) → (N, D) float32, unit length, on the model's device."""
    encode = lambda i: encode_pixels(processor.images(images[i : i + batch_size]), model)
    with inference(model):
        return torch.cat(each(encode, range(0, len(images), batch_size))).to(model.device)


def encode_texts(texts: Sequence[str], model, processor, *, batch_size: int = 256, cut: bool = False) -> Tensor:
    """N strings → (N, D) float32, unit length, on the model's device. One beyond the context is an error, or cut."""

    def encode(i: int) -> Tensor:
        tokens, mask = to_tokens(texts[i : i + batch_size], processor, cut=cut)
        return finite(model.encode_text(tokens.to(model.device), mask.to(model.device)).float(), model)

    with inference(model):
        return torch.cat(each(encode, range(0, len(texts), batch_size))).to(model.device)


def to_tokens(texts: Sequence[str], processor, *, cut: bool = False) -> tuple[Tensor, Tensor]:
    """N strings → tokens, mask (N, T). One beyond the context is an error, or cut."""
    tokens, mask = processor.text(texts, cut=cut)
    if tokens.shape[1] > processor.context:
        longest = int(mask.sum(dim=1).argmax())
        text, length = texts[longest], int(mask[longest].sum())
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise UserError(
            f"the text {shown!r} has {length} tokens, but the model takes {processor.context}; make it shorter."
        )
    return tokens, mask


def encode_pixels(pixels: Tensor, model) -> Tensor:
    """(B, 3, H, W) as the processor made it → (B, D) float32, for weights of any precision on any device."""
    return finite(model.encode_image(pixels.to(model.device, model.dtype)).float(), model)


def image_inputs(images: Sequence[Any], model, processor) -> Images:
    """M images as the model takes them, on its device: pixels, or where an image occurs several times (the same object), its
    features, computed once."""
    distinct = {id(image): image for image in images}
    pixels = processor.images(list(distinct.values())).to(model.device, model.dtype)
    if len(distinct) == len(images):
        return pixels
    place = {key: i for i, key in enumerate(distinct)}
    features = model.image_features(pixels).unflatten(0, (len(distinct), -1))  # (m, views, N, C)
    return ImageFeatures(features[[place[id(image)] for image in images]].flatten(0, 1))


def finite(numbers: Tensor, model) -> Tensor:
    """The same numbers. UserError if some are NaN or infinite, which would make a choice by chance."""
    if not numbers.isfinite().all():
        raise UserError(
            f"the output of this {type(model).__name__} is NaN or infinite: its weights are damaged, or its activations "
            f"overflow in {str(model.dtype).removeprefix('torch.')}."
        )
    return numbers
