"""A LLaVA, with the same weights as transformers' beside it: how fast it speaks, and a step of its training."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minivlm.bench.contest import compare, import_peer, precisions, print_ratios, training_step

IMAGE_TOKEN, IMAGE_TOKENS, NEW_TOKENS = 7999, 256, 64


def save_model(directory: str) -> None:
    """A vision tower of 384 × 6, a language model of 512 × 12, untrained, in the published layout."""
    from minivlm.layers import LanguageModelConfig, VisionConfig
    from minivlm.models.llava import LLaVA, LLaVAConfig

    vision = VisionConfig(image_size=224, patch_size=14, width=384, depth=6, heads=6, activation="quick_gelu")
    language = LanguageModelConfig(
        width=512,
        depth=12,
        heads=8,
        mlp_width=1376,
        vocab_size=8000,
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
    model = LLaVA(LLaVAConfig(vision=vision, language=language, image_token=IMAGE_TOKEN))
    model.save_pretrained(directory, layout="hf")


def inputs(B: int, words: int) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, 224, 224), and tokens (B, 256 + words): a word, the picture, more words."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, IMAGE_TOKEN, (B, words), generator=generator)
    tokens = torch.cat([text[:, :1], torch.full((B, IMAGE_TOKENS), IMAGE_TOKEN), text[:, 1:]], dim=1)
    return torch.randn(B, 3, 224, 224, generator=generator), tokens


def load_minivlm(directory: str, dtype: torch.dtype) -> nn.Module:
    from minivlm import checkpoint

    return checkpoint.load(directory, dtype=dtype)[0]


def load_transformers(directory: str, dtype: torch.dtype, attention: str) -> nn.Module:
    import_peer("transformers")
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return LlavaForConditionalGeneration.from_pretrained(directory, dtype=dtype, attn_implementation=attention)


def contestants(minivlm: Callable, transformers: Callable, precision: str, *arguments) -> dict[str, tuple]:
    """transformers' attention: sdpa is the better one in fp32 on a CPU; in bf16 it depends, so both take part."""
    peers = {"minivlm": (minivlm, arguments), "transformers": (transformers, (*arguments, "sdpa"))}
    if precision == "bf16":
        peers["transformers, eager"] = (transformers, (*arguments, "eager"))
    return peers


# ---- speaking --------------------------------------------------------------------------------------------------------


def decode_minivlm(directory: str, dtype: torch.dtype, B: int) -> Callable[[], dict]:
    model = load_minivlm(directory, dtype)
    images, tokens = inputs(B, 32)

    def speak() -> dict:
        times, said = [time.perf_counter()], []
        for token in model.stream(images.to(dtype), tokens, max_new_tokens=NEW_TOKENS, end_tokens=()):
            times.append(time.perf_counter())
            said.append(token)
        return spoken(times, torch.stack(said, dim=1))

    return speak


def decode_transformers(directory: str, dtype: torch.dtype, B: int, attention: str) -> Callable[[], dict]:
    model = load_transformers(directory, dtype, attention).eval()
    images, tokens = inputs(B, 32)
    times: list[float] = []
    model.lm_head.register_forward_hook(lambda *_: times.append(time.perf_counter()))
    length = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)

    def speak() -> dict:
        times[:] = [time.perf_counter()]
        mask = torch.ones_like(tokens)
        y = model.generate(
            input_ids=tokens,
            pixel_values=images.to(dtype),
            attention_mask=mask,
            do_sample=False,
            pad_token_id=0,
            **length,
        )
        return spoken(times, y[:, -NEW_TOKENS:])

    return speak


def spoken(times: list[float], tokens: Tensor) -> dict:
    """Seconds to the first token, then for each further one; and what was said."""
    return dict(first=times[1] - times[0], step=(times[-1] - times[1]) / (len(times) - 2), tokens=tokens.tolist())


def bench_decode(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        save_model(directory)
        for precision, dtype in precisions(options.precision):
            for B in (options.batch,) if options.batch else (1, 8):
                print(
                    f"\nLLaVA speaks: a picture of {IMAGE_TOKENS} tokens, 32 of text, {NEW_TOKENS} new ones, greedy, "
                    f"batch {B}, {precision}, {torch.get_num_threads()} threads"
                )
                peers = contestants(decode_minivlm, decode_transformers, precision, directory, dtype, B)
                print_decoding(compare(peers, options.rounds, 0.0), B)


def print_decoding(rows: dict[str, dict], B: int) -> None:
    print(f"{'':20} tokens/s   ms/token   ms to the first token")
    first, step = {}, {}
    for name, row in rows.items():
        first[name] = statistics.median(value["first"] for value in row["values"])
        step[name] = statistics.median(value["step"] for value in row["values"])
        print(f"{name:20} {B / step[name]:8.1f}   {step[name] * 1e3:8.2f}   {first[name] * 1e3:21.0f}")
    print_ratios(step, "a token")
    print_ratios(first, "the first token")
    ours = rows["minivlm"]["values"][-1]["tokens"]
    for name in rows.keys() - {"minivlm"}:
        theirs = rows[name]["values"][-1]["tokens"]
        same = sum(a == b for mine, its in zip(ours, theirs, strict=True) for a, b in zip(mine, its, strict=True))
        print(f"{same} of {B * NEW_TOKENS} tokens are those of {name}")


# ---- training --------------------------------------------------------------------------------------------------------


def llava_inputs(B: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, tokens, and labels on the words alone."""
    images, tokens = inputs(B, 64)
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
