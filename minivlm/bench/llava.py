"""A training step of a LLaVA, with the same weights as transformers' beside it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from minivlm.bench.contest import compare, precisions, print_ratios, training_step
from minivlm.bench.generation import (
    IMAGE_TOKEN,
    PLACEHOLDERS,
    build,
    contestants,
    inputs,
    load_minivlm,
    load_transformers,
)

IMAGE_TOKENS = PLACEHOLDERS["llava"]


def llava_inputs(B: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Images, tokens, and labels on the text alone."""
    images, tokens = inputs(B, 64, IMAGE_TOKENS)
    return images, tokens, tokens.masked_fill(tokens == IMAGE_TOKEN, -100)


def llava_minivlm(directory: str, precision: str) -> Callable[[], float]:
    from minivlm.losses import labelled

    model = load_minivlm(directory, torch.float32)
    model.freeze("vision")
    images, tokens, labels = llava_inputs()
    where = labelled(labels)
    return training_step(model, lambda: model.losses(tokens, labels, images, where=where)["next token"], precision)


def llava_transformers(directory: str, precision: str, attention: str) -> Callable[[], float]:
    model = load_transformers(directory, torch.float32, attention)
    model.model.vision_tower.requires_grad_(False)
    images, tokens, labels = llava_inputs()
    batch = dict(input_ids=tokens, pixel_values=images, attention_mask=torch.ones_like(tokens), labels=labels)
    return training_step(model, lambda: model(**batch).loss, precision)


def bench_llava(options: argparse.Namespace) -> None:
    tokens = llava_inputs()[1].numel()
    with tempfile.TemporaryDirectory() as directory:
        build("llava").save_pretrained(directory, layout="hf")
        for precision, _ in precisions(options.precision):
            print(
                f"\nLLaVA training step, batch 8, {IMAGE_TOKENS} image and 64 text tokens, vision frozen, {precision}, "
                f"{torch.get_num_threads()} threads"
            )
            rows = compare(
                contestants(llava_minivlm, llava_transformers, precision, directory, precision), options.rounds
            )
            print(f"{'':20} tokens/s  (quartiles)         peak memory   loss")
            for name, row in rows.items():
                low, middle, high = (tokens / row[q] for q in ("high", "median", "low"))
                memory = f"{row['memory'] / 2**20:.0f} MB"
                print(f"{name:20} {middle:8.0f}  ({low:.0f} to {high:.0f}) {memory:>15}   {row['value']:.4f}")
            print_ratios({name: row["median"] for name, row in rows.items()})
