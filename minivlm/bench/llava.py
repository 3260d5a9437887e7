"""A LLaVA, with the same weights as transformers' beside it: how fast it speaks, and a step of its training."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from minivlm.bench.contest import compare, precisions, print_ratios, training_step
from minivlm.bench.generation import (
    IMAGE_TOKEN,
    NEW_TOKENS,
    VOCABULARY,
    WORDS,
    contestants,
    inputs,
    load_minivlm,
    load_transformers,
    print_speaking,
    speak_minivlm,
    speak_transformers,
)
from minivlm.layers import LanguageModelConfig, VisionConfig
from minivlm.models.llava import LLaVA, LLaVAConfig

IMAGE_TOKENS = 256


def save_model(directory: str) -> None:
    """A vision tower of 384 × 6, a language model of 512 × 12, untrained, in the published layout."""
    vision, language = sizes()
    model = LLaVA(LLaVAConfig(vision=vision, language=language, image_token=IMAGE_TOKEN))
    model.save_pretrained(directory, layout="hf")


def sizes() -> tuple[VisionConfig, LanguageModelConfig]:
    vision = VisionConfig(image_size=224, patch_size=14, width=384, depth=6, heads=6, activation="quick_gelu")
    language = LanguageModelConfig(
        width=512,
        depth=12,
        heads=8,
        mlp_width=1376,
        vocab_size=VOCABULARY,
        context=2048,
        rope_theta=1e4,
        positions="none",
        norm="rmsnorm",
        activation="silu",
        gated_mlp=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    return vision, language


def bench_decode(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory)
        for precision, dtype in precisions(options.precision):
            for B in (options.batch,) if options.batch else (1, 8):
                print(
                    f"\nLLaVA speaks: a picture of {IMAGE_TOKENS} tokens, {WORDS} of text, {NEW_TOKENS} new ones, greedy, "
                    f"batch {B}, {precision}, {torch.get_num_threads()} threads"
                )
                peers = contestants(speak_minivlm, speak_transformers, precision, directory, dtype, B, IMAGE_TOKENS)
                print_speaking(compare(peers, options.rounds, 0.0), B)


# ---- training --------------------------------------------------------------------------------------------------------


def llava_inputs(B: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, tokens, and labels on the words alone."""
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
        save_model(directory)
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
