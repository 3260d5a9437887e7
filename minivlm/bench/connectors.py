"""Connectors of a vision tower and a language model: what each kind costs, and, once trained, how well it answers.

    vision tower, the same ─→ connector ─→ image tokens ─→ language model, the same

A connector gives many tokens (linear, MLP: one for each patch) or few (resampler: its latents; Q-Former: its queries).
Every token costs time when an answer is generated and when the language model is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minivlm import checkpoint
from minivlm.bench.contest import compare, precisions, training_step
from minivlm.bench.generation import IMAGE_TOKEN, NEW_TOKENS, WORDS, generator, llama, turns
from minivlm.bench.generation import vision as small_tower
from minivlm.errors import UserError
from minivlm.layers import T5, ImageFeatures, PerceiverConfig, QFormerConfig
from minivlm.metrics import Score
from minivlm.model import Model
from minivlm.models.blip2 import BLIP2, BLIP2Config
from minivlm.models.llava import LLaVA, LLaVAConfig

SAMPLES = 8  # of a training step

# ---- the rows: a name, a function, and what it is called with, which gives a model -----------------------------------


def projected(kind: str, resampler: PerceiverConfig | None = None) -> LLaVA:
    vision, language = small_tower(activation="quick_gelu"), llama()
    connector = dict(projector=kind, resampler=resampler)
    return LLaVA(LLaVAConfig(vision=vision, language=language, image_token=IMAGE_TOKEN, **connector))


def queried(queries: int) -> BLIP2:
    vision, language = small_tower(activation="quick_gelu"), llama()
    qformer = QFormerConfig(queries=queries, width=384, depth=6, heads=6, context_width=vision.width)
    layer = dict(vision_layers=(-2,), class_token=False, vision_norm=False)  # as a LLaVA
    return BLIP2(BLIP2Config(vision=vision, qformer=qformer, language=language, image_token=IMAGE_TOKEN, **layer))


def resampled(latents: int) -> LLaVA:
    vision = small_tower()
    sizes = dict(width=384, depth=3, heads=6, context_width=vision.width)
    return projected("resampler", PerceiverConfig(latents=latents, **sizes))


def trained(directory: str) -> Model:
    return checkpoint.load(directory)[0].float()


CONNECTORS: dict[str, tuple[Callable, tuple]] = {
    "linear": (projected, ("linear",)),
    "MLP": (projected, ("mlp",)),
    "resampler, 16 latents": (resampled, (16,)),
    "Q-Former, 8 queries": (queried, (8,)),
    "Q-Former, 16 queries": (queried, (16,)),
}

# ---- what they are shown ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Of a row that is not timed: what it has, and what it can do."""

    image_tokens: int
    parameters: int  # of the connector
    room: int  # tokens of text that its language model can have beside an image
    parts: tuple  # configs of its tower and of its language model
    accuracy: Score | None = None

    @classmethod
    def of(cls, model: Model, accuracy: Score | None = None) -> Sizes:
        c = model.config
        around = ("vision.", "language_model.")
        parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(around))
        room = c.language.context - c.image_tokens
        return cls(c.image_tokens, parameters, room, (c.vision, c.language), accuracy)


def prompt(model: Model, B: int, words: int) -> tuple[Tensor, Tensor]:
    """Images (B, [views,] 3, H, W), and tokens (B, T): the placeholders of the image, if it has any, and text."""
    c, generator = model.config, torch.Generator().manual_seed(0)
    views, side = getattr(c, "views", 1), c.vision.image_size
    images = torch.randn(B, *([views] if views > 1 else []), 3, side, side, generator=generator)
    text = torch.randint(3, c.language.vocab_size - 1, (B, words), generator=generator)
    if c.image_token is None:
        return images, text
    text[text == c.image_token] = c.language.vocab_size - 1
    return images, torch.cat([torch.full((B, c.image_tokens), c.image_token), text], dim=1)


def train(build: Callable, arguments: tuple, precision: str, B: int, words: int) -> Callable[[], float]:
    """A step in which all but the vision tower is trained; whose features are given."""
    model = build(*arguments)
    model.freeze("vision")
    images, tokens = prompt(model, B, words)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        features = ImageFeatures(model.image_features(images))
    labels = tokens.clone()
    labels[:, :-words] = -100  # the placeholders
    if isinstance(model.language_model, T5):
        labels = labels[:, -words:]
    return training_step(model, lambda: model.losses(tokens, labels, features)["next token"], precision)


def generate(build: Callable, arguments: tuple, dtype: torch.dtype, words: int, new_tokens: int) -> Callable[[], dict]:
    model = build(*arguments).to(dtype).eval()
    images, tokens = prompt(model, 1, words)
    return generator(model, images.to(dtype), tokens, new_tokens)


# ---- trained models --------------------------------------------------------------------------------------------------


def examine(directory: str, data: str) -> Sizes:
    """A trained model's sizes, and how many of the held-out questions it answers rightly.

    UserError: a model that answers no questions about images, and data without questions.
    """
    from minivlm.datasets.conversations import open_conversations
    from minivlm.evaluate import ask
    from minivlm.metrics import vqa_accuracy
    from minivlm.tasks.abilities import require_answers

    model, processor = checkpoint.load(directory)
    require_answers(model, processor, images=1)
    conversations = open_conversations(data, "test", image_size=processor.image_size)
    if not (questions := conversations.questions()):
        raise UserError(f"{data} holds no questions to judge by; give --data with a folder that has some.")
    return Sizes.of(model, vqa_accuracy(questions, ask(model, processor, conversations, questions))["accuracy"])


def note_other_differences(rows: dict[str, Sizes]) -> None:
    """Print a note where it is not the connectors alone that differ."""
    (first, known), *others = rows.items()
    for name, row in others:
        unlike = [
            what for what, a, b in zip(("tower", "language model"), known.parts, row.parts, strict=True) if a != b
        ]
        if unlike:
            print(
                f"note: {name} and {first} differ in their {' and '.join(unlike)} as well, not in the connector alone"
            )


# ---- the table -------------------------------------------------------------------------------------------------------


def bench_connectors(options: argparse.Namespace) -> None:
    if options.models:
        builders = {directory: (trained, (directory,)) for directory in options.models}
        rows = {directory: examine(directory, options.data) for directory in builders}
    else:
        builders = CONNECTORS
        rows = {name: Sizes.of(build(*arguments)) for name, (build, arguments) in builders.items()}
    note_other_differences(rows)
    words, new_tokens = lengths([row.room for row in rows.values()])
    B = options.batch or SAMPLES
    for precision, dtype in precisions(options.precision):
        print(
            f"\nconnectors, {words} tokens of text, {precision}, {torch.get_num_threads()} threads. A training step has "
            f"{B} samples; all but the vision tower learns, whose features are given.\n{new_tokens} tokens are generated, "
            "greedily, batch 1. Memory: at its peak, beyond that of the weights."
        )
        steps = compare({name: (train, (*b, precision, B, words)) for name, b in builders.items()}, options.rounds)
        contestants = {name: (generate, (*b, dtype, words, new_tokens)) for name, b in builders.items()}
        print_connectors(rows, steps, compare(contestants, options.rounds, 0.0), B)


def lengths(rooms: Sequence[int]) -> tuple[int, int]:
    """Tokens of the question and of the answer: as many as every model has room for. UserError: hardly any."""
    room = min(rooms)
    words = min(WORDS, room // 3)
    new_tokens = min(NEW_TOKENS, room - words)
    if words < 1 or new_tokens < 3:
        raise UserError(
            f"a language model has room for {room} tokens beside an image, which is too few to measure with."
        )
    return words, new_tokens


HEADER = ("", "image tokens", "parameters", "training", "generation", "first token", "MB training", "MB generation")


def print_connectors(rows: dict[str, Sizes], steps: dict[str, dict], generated: dict[str, dict], B: int) -> None:
    """steps, generated: what `compare` gives for `train` and `generate`, by row."""
    judged = any(row.accuracy for row in rows.values())
    lines = [[*HEADER, "accuracy", "chance"] if judged else [*HEADER]]
    for name, row in rows.items():
        lines.append(
            [
                name,
                f"{row.image_tokens}",
                f"{row.parameters:,}",
                f"{B / steps[name]['median']:.1f} samples/s",
                f"{1 / turns(generated[name], 'step')[1]:.1f} tokens/s",
                f"{1e3 * turns(generated[name], 'first')[1]:.1f} ms",
                f"{steps[name]['memory'] / 2**20:.0f}",
                f"{generated[name]['memory'] / 2**20:.0f}",
            ]
        )
        if row.accuracy is not None:
            lines[-1] += [row.accuracy.text(row.accuracy.value), row.accuracy.text(row.accuracy.chance)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *cells in lines:
        print(f"{first:{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(cells, widths[1:], strict=True)), sep="  ")
