"""A CLIP training step, beside open_clip and transformers; and loading a CLIP, beside transformers."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minivlm.bench.contest import compare, import_peer, matrix_ceiling, precisions, print_ratios, training_step

SIZES = {  # vision and text: width, depth, heads
    "64px": dict(image=64, patch=8, vision=(192, 6, 3), text=(192, 4, 3), context=32, vocab=1000, embed=128, batch=128),
    "ViT-B/32": dict(
        image=224, patch=32, vision=(768, 12, 12), text=(512, 12, 8), context=77, vocab=49408, embed=512, batch=16
    ),
}


def clip_inputs(size: dict) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size["batch"], 3, size["image"], size["image"], generator=generator)
    tokens = torch.randint(1, size["vocab"] - 2, (size["batch"], size["context"]), generator=generator)
    tokens[:, -1] = size["vocab"] - 1
    return images, tokens


def clip_minivlm(size: dict, precision: str) -> Callable[[], float]:
    from minivlm.layers import TextConfig, VisionConfig
    from minivlm.models.clip import CLIP, CLIPConfig

    (vw, vd, vh), (tw, td, th) = size["vision"], size["text"]
    vision = VisionConfig(image_size=size["image"], patch_size=size["patch"], width=vw, depth=vd, heads=vh)
    end = size["vocab"] - 1
    text = TextConfig(width=tw, depth=td, heads=th, vocab_size=size["vocab"], context=size["context"], end_token=end)
    model = CLIP(CLIPConfig(vision=vision, text=text, embed_width=size["embed"]))
    images, tokens = clip_inputs(size)
    return training_step(model, lambda: model.losses(images, tokens)["contrast"], precision)


def clip_open_clip(size: dict, precision: str) -> Callable[[], float]:
    import_peer("open_clip")
    import open_clip

    (vw, vd, vh), (tw, td, th) = size["vision"], size["text"]
    vision = dict(layers=vd, width=vw, head_width=vw // vh, patch_size=size["patch"], image_size=size["image"])
    text = dict(context_length=size["context"], vocab_size=size["vocab"], width=tw, heads=th, layers=td)
    model = open_clip.model.CLIP(embed_dim=size["embed"], vision_cfg=vision, text_cfg=text)
    criterion = open_clip.ClipLoss()
    images, tokens = clip_inputs(size)

    def loss() -> Tensor:
        image_features, text_features, scale = model(images, tokens)[:3]
        return criterion(image_features.float(), text_features.float(), scale)

    return training_step(model, loss, precision)


def clip_transformers(size: dict, precision: str) -> Callable[[], float]:
    import_peer("transformers")
    from transformers import CLIPConfig, CLIPModel

    (vw, vd, vh), (tw, td, th) = size["vision"], size["text"]
    end = size["vocab"] - 1
    config = CLIPConfig(
        projection_dim=size["embed"],
        text_config=dict(
            **widths(tw, td, th),
            vocab_size=size["vocab"],
            max_position_embeddings=size["context"],
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=0,
        ),
        vision_config=dict(**widths(vw, vd, vh), image_size=size["image"], patch_size=size["patch"]),
    )
    config._attn_implementation = "eager" if precision == "bf16" else "sdpa"  # the faster one on a CPU
    model = CLIPModel(config)
    images, tokens = clip_inputs(size)
    return training_step(model, lambda: model(input_ids=tokens, pixel_values=images, return_loss=True).loss, precision)


def widths(width: int, depth: int, heads: int) -> dict:
    return dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        hidden_act="gelu",
    )


def clip_flops(size: dict) -> float:
    """Matrix products of a training step in full (three times forward), as a plain implementation does them."""

    def tower(n: int, width: int, depth: int) -> int:
        return depth * (2 * n * 12 * width * width + 4 * n * n * width)

    (vw, vd, _), (tw, td, _) = size["vision"], size["text"]
    patches = (size["image"] // size["patch"]) ** 2
    stem = 2 * patches * 3 * size["patch"] ** 2 * vw
    return 3 * size["batch"] * (tower(patches + 1, vw, vd) + stem + tower(size["context"], tw, td))


def bench_clip(options: argparse.Namespace) -> None:
    peers = {"minivlm": clip_minivlm, "open_clip": clip_open_clip, "transformers": clip_transformers}
    for precision, _ in precisions(options.precision):
        size = SIZES[options.size]
        ceiling = matrix_ceiling(precision)
        print(
            f"\nCLIP training step, {options.size}, batch {size['batch']}, {precision}, {torch.get_num_threads()} threads"
        )
        rows = compare({name: (build, (size, precision)) for name, build in peers.items()}, options.rounds)
        print(f"{'':14} samples/s  (quartiles)        of the ceiling of {ceiling / 1e9:.0f} GFLOP/s   peak memory")
        for name, row in rows.items():
            low, middle, high = (size["batch"] / row[q] for q in ("high", "median", "low"))
            share = clip_flops(size) / row["median"] / ceiling
            print(
                f"{name:14} {middle:8.1f}  ({low:.1f} to {high:.1f})  {share:18.0%}  {row['memory'] / 2**20:26.0f} MB"
            )
        print_ratios({name: row["median"] for name, row in rows.items()})


# ---- loading a checkpoint --------------------------------------------------------------------------------------------


def load_minivlm(directory: str) -> Callable[[], float]:
    from minivlm import checkpoint

    return lambda: float(checkpoint.load(directory)[0].config.embed_width)


def load_transformers(directory: str) -> Callable[[], float]:
    import_peer("transformers")
    from transformers import CLIPModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return lambda: float(CLIPModel.from_pretrained(directory).config.projection_dim)


def bench_load(options: argparse.Namespace) -> None:
    from minivlm.models.clip import CLIP, clip_size

    with tempfile.TemporaryDirectory() as directory:
        CLIP(clip_size("ViT-B/32")).save_pretrained(directory, layout="hf")
        size = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
        print(f"\nloading CLIP ViT-B/32 in the published layout, {size / 1e6:.0f} MB, warm cache")
        peers = {"minivlm": (load_minivlm, (directory,)), "transformers": (load_transformers, (directory,))}
        rows = compare(peers, options.rounds)
        for name, row in rows.items():
            print(f"{name:14} {row['median'] * 1e3:6.0f} ms")
        print_ratios({name: row["median"] for name, row in rows.items()})
