"""What all models with pictures in front of, or inside, a language model's text have in common when they speak."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm import generation
from minivlm.layers.language_model import LanguageModelConfig
from minivlm.layers.tower import ImageFeatures, Images, leading_axes
from minivlm.model import Batch, Model, Speaks


class SpeakingModel(Speaks, Model):
    """It has a `language_model`, and a `prefill(images, tokens, mask, room=…)` that gives a `generation.Decoding`."""

    def generate(self, images: Images | None, tokens: Tensor, mask: Tensor | None = None, **options) -> Tensor:
        """tokens (B, T) → (B, ≤ max_new_tokens); options: see `speak`."""
        return self.speak(generation.generate, images, tokens, mask, **options)

    def stream(self, images: Images | None, tokens: Tensor, mask: Tensor | None = None, **options) -> Iterator[Tensor]:
        """`generate`, token by token: each (B,)."""
        return self.speak(generation.stream, images, tokens, mask, **{"num_beams": 1, **options})

    def cut(self, batch: Batch, size: int) -> Iterator[Batch]:
        """See `Model.cut`. Pictures in reading order, or their features, go with the row in which their placeholders are."""
        tokens = batch["tokens"]
        listed = {name: batch[name] for name in ("images", "features") if is_listed(batch.get(name), name)}
        counts = torch.ones_like(tokens[:, 0])
        if (mark := getattr(self.config, "image_token", None)) is not None:
            counts = (tokens == mark).sum(dim=1)
        ends = [0, *counts.cumsum(dim=0).tolist()]
        for first, part in zip(range(0, len(tokens), size), super().cut(batch, size), strict=True):
            rows = ends[first], ends[min(first + size, len(tokens))]
            for name, pictures in listed.items():
                begin, end = (len(pictures) * row // max(1, ends[-1]) for row in rows)
                part[name] = pictures[begin:end]
            yield {name: tensor for name, tensor in part.items() if len(tensor)}

    @property
    def endings(self) -> dict[str, Any]:
        """As the language model's config says."""
        return self.language_model.endings


def is_listed(images: Images | None, name: str) -> bool:
    """Are these all images of a batch one after the other, or their features?"""
    if images is None:
        return False
    return len(leading_axes(ImageFeatures(images) if name == "features" else images)) == 1


class SpeaksItself:
    """For a `SpeakingModel` whose text side is its own: its config says end_token and pad_token."""

    @property
    def endings(self) -> dict[str, Any]:
        return {"end_tokens": (self.config.end_token,), "pad_token": self.config.pad_token}

    @staticmethod
    def beginnings(tokens: Tensor, mask: Tensor | None, *, room: int, context: int) -> tuple[Tensor, Tensor]:
        """tokens, mask (B, T) → the same with all padding on the left, so that all rows go on together.

        Raises ValueError if these and `room` more tokens do not fit the context.
        """
        if (T := tokens.shape[1]) + room > context:
            raise ValueError(f"a beginning of {T} tokens and {room} new ones do not fit the context of {context}")
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        order = mask.long().argsort(dim=1, stable=True)
        return tokens.gather(1, order), mask.gather(1, order)


class KeepingDecoding:
    """A model in the middle of a text (see `generation.Decoding`) that keeps what it needs of what was read so far.

    mask (B, S): True = a real token. A subclass defines `predict` and `reorder_kept`.
    """

    def __init__(self, model: nn.Module, mask: Tensor, *, room: int):
        self.model, self.mask, self.room = model, mask, room
        self.logits: Tensor

    def predict(self, tokens: Tensor) -> Tensor:
        """tokens (B, T), the last that `mask` counts, are read and kept → logits (B, V) of what follows."""
        raise NotImplementedError

    def reorder_kept(self, rows: Tensor) -> None:
        """What is kept, where row i goes on as row rows[i] did."""
        raise NotImplementedError

    def step(self, tokens: Tensor) -> None:
        if self.room < 1:
            raise ValueError("there is no room for another token; begin with more")
        self.mask = F.pad(self.mask, (0, 1), value=True)
        self.logits, self.room = self.predict(tokens[:, None]), self.room - 1

    def reorder(self, rows: Tensor) -> None:
        self.mask, self.logits = self.mask[rows], self.logits[rows]
        self.reorder_kept(rows)


def check_decoder(language: Any, who: str) -> None:
    """ValueError for a language model that is more than a decoder."""
    if not isinstance(language, LanguageModelConfig):
        raise ValueError(
            f"{who} shows pictures to a decoder that goes on from what stands before; a {type(language).__name__} has an "
            "encoder to read them with, as BLIP-2 lets it"
        )


def fill(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """x (B, T, D) with the True positions of places (B, T) replaced, in reading order, by values (M, D).

    Raises ValueError unless there are M of them (looked at on the CPU alone; a GPU would be waited for).
    """
    if x.device.type == "cpu" and (count := int(places.sum())) != len(values):
        raise ValueError(f"the text has places for {count} image features, but the images have {len(values)}")
    return x.masked_scatter(places[..., None], values.to(x.dtype))


def make_room(
    tokens: Tensor, mask: Tensor | None, pictures: int, *, mark: int, copies: int, pad: int
) -> tuple[Tensor, Tensor | None]:
    """tokens, mask (B, T) with one mark a picture → the same, right-padded, with a placeholder for each of its features.

    Texts whose marks are not as many as the pictures, since they have all their placeholders, come back as they are.
    """
    if copies == 1 or (tokens == mark).sum() != pictures:
        return tokens, mask
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    times = torch.where(tokens == mark, copies, 1) * mask
    rows = [row.repeat_interleave(n) for row, n in zip(tokens, times, strict=True)]
    lengths = times.sum(dim=1, keepdim=True)
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device) < lengths
