"""Flamingo's own layers, forward and backward, beside those of OpenFlamingo, flamingo-pytorch and transformers; and how
fast an IDEFICS speaks, with the same weights as transformers' beside it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from minivlm.bench import llava
from minivlm.bench.contest import compare, import_peer, precisions, print_ratios
from minivlm.bench.generation import (
    IMAGE_TOKEN,
    NEW_TOKENS,
    WORDS,
    contestants,
    inputs,
    load_minivlm,
    load_transformers,
    print_speaking,
    speaker,
    speaker_of_transformers,
)
from minivlm.layers import GatedConfig, GatedCrossAttention, PerceiverConfig, PerceiverResampler, image_mask
from minivlm.models.flamingo import Flamingo, FlamingoConfig

B, IMAGES, N, T, D = 8, 4, 64, 128, 512  # batch, images of N tokens, text, width
HEADS, DEPTH, LATENTS = 8, 6, 64

# ---- the layers alone ------------------------------------------------------------------------------------------------


def layer_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """What a tower sees (B, I, N, D), text (B, T, D), and its marks (B, T): each image has its share."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(B, IMAGES, N, D, generator=generator)
    x = torch.randn(B, T, D, generator=generator).requires_grad_()
    marks = torch.zeros(B, T, dtype=torch.bool)
    marks[:, :: T // IMAGES] = True
    return features, x, marks


def layers_step(layers: nn.Module, forward: Callable[[], Tensor], precision: str) -> Callable[[], float]:
    """Forward and backward, gates open."""
    for name, parameter in layers.named_parameters():
        if "gate" in name.split(".")[-1] or "alpha" in name:
            nn.init.ones_(parameter)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = forward()
        y.float().sum().backward()
        layers.zero_grad(set_to_none=True)
        return y.float().mean().item()

    return step


def layers_minivlm(precision: str) -> Callable[[], float]:
    features, x, marks = layer_inputs()
    resampler = PerceiverResampler(
        PerceiverConfig(width=D, depth=DEPTH, heads=HEADS, latents=LATENTS, activation="gelu")
    )
    block = GatedCrossAttention(D, HEADS, config=GatedConfig(activation="gelu"))
    visible = image_mask(marks.long(), 1, IMAGES, latents=LATENTS)
    read = lambda: resampler(features.flatten(0, 1)).view(B, IMAGES * LATENTS, D)
    return layers_step(nn.ModuleList([resampler, block]), lambda: block(x, read(), visible), precision)


def layers_open_flamingo(precision: str) -> Callable[[], float]:
    import_peer("open_flamingo")
    from open_flamingo.src.helpers import GatedCrossAttentionBlock, PerceiverResampler

    features, x, marks = layer_inputs()
    resampler = PerceiverResampler(dim=D, depth=DEPTH, num_latents=LATENTS)
    block = GatedCrossAttentionBlock(dim=D, dim_visual=D)
    read = lambda: resampler(features[:, :, None])
    return layers_step(nn.ModuleList([resampler, block]), lambda: block(x, read(), marks), precision)


def layers_flamingo_pytorch(precision: str) -> Callable[[], float]:
    from flamingo_pytorch import GatedCrossAttentionBlock, PerceiverResampler

    features, x, marks = layer_inputs()
    resampler = PerceiverResampler(dim=D, depth=DEPTH, num_latents=LATENTS)
    block = GatedCrossAttentionBlock(dim=D)
    forward = lambda: block(x, resampler(features), media_locations=marks)
    return layers_step(nn.ModuleList([resampler, block]), forward, precision)


def layers_transformers(precision: str, attention: str) -> Callable[[], float]:
    import_peer("transformers")
    from transformers import IdeficsConfig
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    features, x, marks = layer_inputs()
    sizes = dict(hidden_size=D, intermediate_size=4 * D * 2 // 3, num_attention_heads=HEADS, vocab_size=100)
    config = IdeficsConfig(**sizes, dropout=0.0, vision_config=dict(embed_dim=D))
    config._attn_implementation = attention
    resampler = IdeficsPerceiverResampler(config, D, DEPTH, HEADS, D // HEADS, LATENTS)
    block = IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    visible = image_mask(marks.long(), 1, IMAGES, latents=LATENTS)
    added = torch.zeros(B, 1, T, IMAGES * LATENTS).masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    seen = dict(image_attention_mask=added, cross_attention_gate=visible.any(dim=-1).float())
    read = lambda: resampler(features.flatten(0, 1)).reshape(B, IMAGES * LATENTS, D).float()
    forward = lambda: block(x, image_hidden_states=read(), **seen)
    return layers_step(nn.ModuleList([resampler, block]), forward, precision)


def bench_layers(options: argparse.Namespace, precision: str) -> None:
    print(
        f"\nresampler ({DEPTH} blocks, {LATENTS} latents) and gated block, forward and backward, width {D}, batch {B}, "
        f"{IMAGES} images of {N} tokens, {T} of text, {precision}, {torch.get_num_threads()} threads"
    )
    peers = {
        "minivlm": (layers_minivlm, (precision,)),
        "OpenFlamingo": (layers_open_flamingo, (precision,)),
        "flamingo-pytorch": (layers_flamingo_pytorch, (precision,)),
        "transformers": (layers_transformers, (precision, "sdpa")),
        "transformers, eager": (layers_transformers, (precision, "eager")),
    }
    rows = compare(peers, options.rounds)
    print(f"{'':20} ms a step  (quartiles)         peak memory")
    for name, row in rows.items():
        low, middle, high = (1e3 * row[quartile] for quartile in ("low", "median", "high"))
        print(f"{name:20} {middle:9.0f}  ({low:.0f} to {high:.0f}) {row['memory'] / 2**20:17.0f} MB")
    print_ratios({name: row["median"] for name, row in rows.items()})


# ---- speaking --------------------------------------------------------------------------------------------------------


def save_model(directory: str) -> None:
    """An IDEFICS of a vision tower of 384 × 6 and a LLaMA of 512 × 12, gates half open, in the published layout."""
    vision, language = llava.sizes()
    config = FlamingoConfig(
        vision=vision,
        vision_norm=False,
        language=replace(language, tie_head=False),
        resampler=PerceiverConfig(width=vision.width, depth=2, heads=6, latents=LATENTS, activation="relu"),
        image_token=IMAGE_TOKEN,
        gated=GatedConfig(norm="rmsnorm", activation="silu", gated_mlp=True, gate="channel"),
        every=4,
    )
    model = Flamingo(config)
    for block in model.gated:
        for gate in (block.attention_gate, block.mlp_gate):
            nn.init.constant_(gate, 0.5)
    model.save_pretrained(directory, layout="hf")


def speak_minivlm(directory: str, dtype: torch.dtype, rows: int) -> Callable[[], dict]:
    images, tokens = inputs(rows, WORDS, 1)
    return speaker(load_minivlm(directory, dtype), images[:, None].to(dtype), tokens, NEW_TOKENS)


def speak_transformers(directory: str, dtype: torch.dtype, rows: int, attention: str) -> Callable[[], dict]:
    images, tokens = inputs(rows, WORDS, 1)
    seen = (tokens == IMAGE_TOKEN).cumsum(dim=1)[..., None]  # (B, T, 1)
    model = load_transformers(directory, dtype, attention)
    return speaker_of_transformers(model, images[:, None].to(dtype), tokens, image_attention_mask=seen)


def bench_flamingo(options: argparse.Namespace) -> None:
    rows = options.batch or 1
    for precision, _ in precisions(options.precision):
        bench_layers(options, precision)
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory)
        for precision, dtype in precisions(options.precision):
            print(
                f"\nIDEFICS speaks: a picture of {LATENTS} tokens, {WORDS} of text, {NEW_TOKENS} new ones, greedy, "
                f"batch {rows}, {precision}, {torch.get_num_threads()} threads"
            )
            peers = contestants(speak_minivlm, speak_transformers, precision, directory, dtype, rows)
            print_speaking(compare(peers, options.rounds, 0.0), rows)
