"""The base of every model: a config that it is built from, parts that can be frozen, gradients in parts, generation, and the
two verbs that read and write a directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from minivlm import generation
from minivlm.errors import UserError
from minivlm.generation.options import Options, with_defaults
from minivlm.generation.rules import Decode
from minivlm.losses import alone, backward, per_process
from minivlm.origins import mark_published, published_parts

Batch = dict[str, Any]  # what `losses` takes, by name: tensors, and `ImageFeatures` in place of images


class Model(nn.Module):
    """A module built from one frozen dataclass."""

    config_class: ClassVar[type]
    # Fields of `generation.Options` that hold where the caller names none, as a generation_config.json gives them.
    lora: Any = None  # `LoRAParts` of adapters that were put on parts of it, and of which its config does not tell
    defaults: Mapping[str, Any] = MappingProxyType({})
    # True: it continues the prompt, whose tokens count as the beginning of the text. False: it answers in a text of its own,
    # which begins with decoder_start_token.
    continues_prompt: bool = True
    decoder_start_token: int | None = None
    # What else `tasks/` needs to know.
    takes_images: bool = True  # False: text alone, or the features of regions that a detector has found
    one_image: bool = False  # with each text it takes exactly one
    predicts_text: bool = False  # `losses(tokens, labels, images)` is the mean surprise (nats) of the labelled tokens
    image_placeholders: int | None = None  # tokens of a text that stand for an image; None: an image has no place in it
    caption_token: int | None = None  # what a caption begins with; None: the start token of the tokeniser
    # Whose attention over an image is drawn: "pooling", "queries", "answer", or the names of the modules in which the text
    # attends to the image, as a pattern.
    image_attention: str | None = None

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.frozen: tuple[str, ...] = ()
        self.stored: torch.dtype | None = None  # in training: the precision it will be saved in (`minivlm.precision`)

    @property
    def abilities(self) -> frozenset[str]:
        """What the model can do. `tasks/` reads this alone; each word promises a way to call the model:

        | word     | promises                                                                                           |
        |----------|----------------------------------------------------------------------------------------------------|
        | encode   | `encode_image(images)`, `encode_text(tokens, mask)`: unit vectors, which `probabilities` compares  |
        | compare  | `encode_image(images)` alone, of a vision tower                                                    |
        | match    | `match(images, tokens, mask)` → (B, 2), logits of no and yes: does the text describe the image?    |
        | caption  | `generate(images, tokens, mask)` describes an image                                                |
        | answer   | `generate([images,] tokens, mask)` answers a question in words of its own                          |
        | choose   | `answer(images, tokens, mask)` → (B, A), logits of the answers in `config.answers`                 |
        | rank     | `rank(images, tokens, mask, answers, answers_mask)` → (B, A), log p of answers that are given      |
        | chat     | `generate` and `stream` answer the last turn of a conversation                                     |
        | complete | `generate([None,] tokens, mask)` continues a text without any image                                |
        | attend   | its attention over the patches of an image can be recorded (see `tasks/attend.py`)                 |
        | few-shot | its images stand anywhere in the text, so that examples may precede a query                        |
        """
        return frozenset()

    @property
    def pretrained(self) -> frozenset[str]:
        """The parts (dotted names) whose weights come from a published checkpoint, directly or over runs of ours."""
        return published_parts(self)

    @pretrained.setter
    def pretrained(self, parts: Iterable[str]) -> None:
        for name in published_parts(self):
            self.get_submodule(name).published = False
        mark_published(self, parts)

    @property
    def language_config(self) -> Any:
        """The config that has the `vocab_size` and the `context` of the texts that it generates."""
        return self.config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def freeze(self, *parts: str) -> None:
        """These parts (dotted names of modules) get no gradients any more, and stay in eval mode while others train."""
        self.frozen = tuple(dict.fromkeys([*self.frozen, *parts]))
        for part in parts:
            self.get_submodule(part).requires_grad_(False).eval()

    def merge_lora(self) -> None:
        """Add the adapters to the weights that they are on."""
        from minivlm.layers.lora import merge_lora

        merge_lora(self)
        self.lora = None
        if getattr(self.config, "lora", None) is not None:
            self.config = replace(self.config, lora=None)

    def train(self, mode: bool = True) -> Model:
        super().train(mode)
        for part in self.frozen:
            self.get_submodule(part).eval()
        return self

    def backward_in_parts(self, batch: Batch, size: int) -> dict[str, Tensor]:
        """The gradients of `losses` of the whole batch, from `size` samples at a time (gradient accumulation).

        Each loss is a sum over the whole batch, of all processes, by the count of the whole batch; the mean over a part
        adds to it by the share that the part has in the count. Returns the losses, detached. UserError for batch norm.
        """
        self.check_parts(len(first_of(batch)), size)
        counts = self.counts(batch)
        whole = dict(zip(counts, per_process(torch.stack([*counts.values()])), strict=True))
        total: dict[str, Tensor] = {}
        for part in self.cut(batch, size):
            counts = self.counts(part)
            with alone():
                losses = self.losses(**part)
            for name, loss in losses.items():
                by = name if name in counts else "samples"
                losses[name] = loss * (counts[by] / whole[by].clamp(min=1e-6))
            total = {name: total.get(name, 0) + loss for name, loss in backward(losses).items()}
        return total

    def check_parts(self, samples: int, size: int) -> None:
        """UserError if batch norm that is trained would normalise over a part of the samples."""
        if size < samples and (norms := batch_norms(self)):
            raise UserError(
                f"{norms} normalises over the whole batch, but sees a part of it with --micro_batch {size}: leave out "
                "--micro_batch, or take a model without batch norm, such as clip."
            )

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """How many terms each of the `losses` is a mean over, by name. "samples" holds for all others."""
        first = first_of(batch)
        counts = {"samples": torch.full((), len(first), device=first.device)}
        if "labels" in batch:
            counts["next token"] = (batch["labels"][:, 1:] != -100).sum()
        return counts

    def cut(self, batch: Batch, size: int) -> Iterator[Batch]:
        """Yields a batch in parts of `size` samples, without `where`, whose indices are those of the whole batch."""
        for i in range(0, len(first_of(batch)), size):
            yield {name: tensor[i : i + size] for name, tensor in batch.items() if name != "where"}

    def pooled_features(self, features: Tensor) -> Tensor:
        """`image_features` (M, N, C) → (M, C): what stands for an image where it has one vector. The mean, if a model has
        nothing better; of a CLIP it is the vector that its projection reads."""
        return features.mean(dim=1)

    # ---- generation, by a model that defines `prefill` --------------------------------------------------------------

    def generate(self, *inputs: Any, decode: Decode | None = None, **options) -> Tensor:
        """Generate text: (images, tokens (B, T), mask (B, T)), or the two without images → (B, ≤ max_new_tokens).

        Inputs are those of `prefill`, by position or by name. options: fields of `generation.Options`; decode: for stop
        strings. UserError for a model that generates no text.
        """
        return generation.generate(**self.start(inputs, options), decode=decode)

    def stream(self, *inputs: Any, decode: Decode | None = None, **options) -> Iterator[Tensor]:
        """Yield the tokens of `generate` one by one, each (B,). Without beam search, whose answer is known only at the end."""
        return generation.stream(**self.start(inputs, {"num_beams": 1, **options}), decode=decode)

    def start(self, inputs: tuple, options: dict[str, Any]) -> dict[str, Any]:
        """Process the prompt → what `generation.generate` takes."""
        if not hasattr(self, "prefill"):
            raise UserError(f"a {type(self).__name__} generates no text.")
        named = {name: options.pop(name) for name in ("images", "tokens", "mask") if name in options}
        inputs = signature(self.prefill).bind_partial(*inputs, **named).arguments
        if inputs.get("tokens") is None:
            inputs["tokens"] = self.start_tokens(inputs.get("images"))
        tokens, mask = inputs["tokens"], inputs.get("mask")
        if not self.continues_prompt:
            tokens, mask = tokens.new_full((len(tokens), 1), self.decoder_start_token), None
        options = self.options(**options)
        options = replace(options, max_new_tokens=options.room(tokens.shape[1]))
        decoding = self.prefill(**inputs, room=options.max_new_tokens)
        return {"decoding": decoding, "options": options, "prompt": tokens, "prompt_mask": mask}

    def start_tokens(self, images: Any) -> Tensor:
        """The prompt (B, 1) where none is given: the first token of a caption."""
        if self.caption_token is None:
            name = type(self).__name__
            raise UserError(f"{name} has no prompt to start from: give tokens, as processor.text makes them.")
        return torch.full((len(images), 1), self.caption_token, device=images.device)

    def options(self, **given) -> Options:
        """The options given; the others are as `defaults` or the model's own end and padding tokens have them."""
        return Options(**{**self.endings, **with_defaults(given, self.defaults)})

    @property
    def endings(self) -> dict[str, Any]:
        """Options: the tokens that end an answer, and the one that fills its row afterwards."""
        return {}

    # ---- directories ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None, **modules: nn.Module
    ) -> Model:
        """The model in a directory of ours, a published one, or a hub id; dtype None: as stored. modules: those of your own
        that it was saved with, such as vision=my_tower."""
        import minivlm

        model, _ = minivlm.load(source, device=device, dtype=dtype, **modules)
        if not isinstance(model, cls):
            raise TypeError(f"{source} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def save_pretrained(
        self, directory: str | Path, *, processor=None, layout: str = "minivlm", base: dict[str, str] | None = None
    ) -> None:
        """Write config.json and model.safetensors (and the processor's files). layout="hf": the published form.

        base: frozen parts to be left out, and where they come from, as {"language_model": "out/lm"}."""
        import minivlm

        minivlm.save(directory, self, processor, layout=layout, base=base)


def batch_norms(model: nn.Module) -> str:
    """The batch norm layers that are trained, in words; an empty string if there are none."""
    found = [name for name, part in model.named_modules() if isinstance(part, _BatchNorm) and part.training]
    return f"batch norm ({found[0]}{f' and {len(found) - 1} more' if found[1:] else ''})" if found else ""


def first_of(batch: Batch) -> Any:
    """What has a row for each sample: the tokens, or without tokens the first value."""
    return batch["tokens"] if "tokens" in batch else next(iter(batch.values()))
