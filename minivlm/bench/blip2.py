"""How fast a BLIP-2 speaks, with the same weights as transformers' beside it, on an OPT or on a T5."""

from __future__ import annotations

import argparse
import tempfile

import torch

from minivlm.bench.contest import compare, precisions
from minivlm.bench.generation import (
    IMAGE_TOKEN,
    NEW_TOKENS,
    VOCABULARY,
    WORDS,
    contestants,
    print_speaking,
    speak_minivlm,
    speak_transformers,
)
from minivlm.layers import LanguageModelConfig, QFormerConfig, T5Config, VisionConfig
from minivlm.models.blip2 import BLIP2, BLIP2Config

QUERIES = 32


def opt() -> LanguageModelConfig:
    """An OPT of 512 × 12."""
    sizes = dict(width=512, depth=12, heads=8, vocab_size=VOCABULARY, context=512)
    return LanguageModelConfig(**sizes, activation="relu", position_offset=2)


def t5() -> T5Config:
    """A Flan-T5 of 512 × (6 + 6)."""
    sizes = dict(width=512, depth=6, heads=8, mlp_width=1376, vocab_size=VOCABULARY)
    return T5Config(**sizes, activation="gelu_tanh", gated_mlp=True, tie_head=False)


LANGUAGE_MODELS = {"opt": opt, "t5": t5}


def save_model(directory: str, language: LanguageModelConfig | T5Config) -> None:
    """Vision tower and Q-Former of 384 × 6, untrained, in front of a language model, in the published layout."""
    sizes = dict(width=384, depth=6, heads=6)
    vision = VisionConfig(image_size=224, patch_size=14, embedding_norm=False, patch_bias=True, **sizes)
    qformer = QFormerConfig(queries=QUERIES, context_width=vision.width, **sizes)
    model = BLIP2(BLIP2Config(vision=vision, qformer=qformer, language=language, image_token=IMAGE_TOKEN))
    model.save_pretrained(directory, layout="hf")


def bench_blip2(options: argparse.Namespace) -> None:
    B = options.batch or 1
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory, LANGUAGE_MODELS[options.lm]())
        for precision, dtype in precisions(options.precision):
            print(
                f"\nBLIP-2 speaks with {options.lm}: a picture of {QUERIES} tokens, {WORDS} of text, {NEW_TOKENS} new "
                f"ones, greedy, batch {B}, {precision}, {torch.get_num_threads()} threads"
            )
            peers = contestants(speak_minivlm, speak_transformers, precision, directory, dtype, B, QUERIES)
            print_speaking(compare(peers, options.rounds, 0.0), B)
