"""How fast, beside others in the same run: `python -m minivlm.bench clip | loss | load`.

Every contestant lives in a process of its own (so that its memory can be told apart) and they take turns, round after
round, so that a machine that slows down slows all of them. What counts is the ratio within one run.
open_clip and transformers take part where they are installed; each is given its best setting for the machine.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minivlm.errors import UserError, run_command_line
from minivlm.training import keep_freed_memory

STATUS = Path("/proc/self/status")

SIZES = {  # vision and text: width, depth, heads
    "64px": dict(image=64, patch=8, vision=(192, 6, 3), text=(192, 4, 3), context=32, vocab=1000, embed=128, batch=128),
    "ViT-B/32": dict(
        image=224, patch=32, vision=(768, 12, 12), text=(512, 12, 8), context=77, vocab=49408, embed=512, batch=16
    ),
}


# ---- a CLIP training step --------------------------------------------------------------------------------------------


def clip_inputs(size: dict) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size["batch"], 3, size["image"], size["image"], generator=generator)
    tokens = torch.randint(1, size["vocab"] - 2, (size["batch"], size["context"]), generator=generator)
    tokens[:, -1] = size["vocab"] - 1
    return images, tokens


def training_step(model: torch.nn.Module, loss: Callable[[], Tensor], precision: str) -> Callable[[], float]:
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return value.item()

    return step


def clip_minivlm(size: dict, precision: str) -> Callable[[], float]:
    from minivlm.models.clip import CLIP, CLIPConfig, TextConfig, VisionConfig

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
    for precision in ("fp32", "bf16") if options.precision == "both" else (options.precision,):
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
        print_ratios(rows)


# ---- the contrastive loss alone --------------------------------------------------------------------------------------


def loss_inputs(B: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.nn.functional.normalize(torch.randn(B, 512, generator=generator), dim=1).requires_grad_()
    return draw(), draw(), torch.tensor(14.3, requires_grad=True)


def loss_step(function: Callable[..., Tensor], B: int) -> Callable[[], float]:
    def run(inputs: tuple[Tensor, ...]) -> float:
        for tensor in inputs:
            tensor.grad = None
        value = function(*inputs)
        value.backward()
        return value.item()

    run(loss_inputs(64))  # what libraries allocate on first use is not the loss's
    inputs = loss_inputs(B)
    return lambda: run(inputs)


def loss_minivlm(B: int) -> Callable[[], float]:
    from minivlm.losses import softmax_loss

    return loss_step(lambda images, texts, scale: softmax_loss(images, texts, scale, chunk=1024), B)


def loss_open_clip(B: int) -> Callable[[], float]:
    import_peer("open_clip")
    import open_clip

    return loss_step(open_clip.ClipLoss(), B)


def bench_loss(options: argparse.Namespace) -> None:
    peers = {"minivlm": (loss_minivlm, (options.batch,)), "open_clip": (loss_open_clip, (options.batch,))}
    print(f"\ncontrastive loss, forward and backward, B = {options.batch}, width 512, fp32")
    rows = compare(peers, options.rounds)
    for name, row in rows.items():
        print(
            f"{name:14} {row['median']:6.2f} s   {row['memory'] / 2**20:6.0f} MB beyond the inputs   loss {row['value']:.6f}"
        )
    print_ratios(rows)


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
        print_ratios(rows)


# ---- the contest -----------------------------------------------------------------------------------------------------


def compare(peers: dict[str, tuple[Callable, tuple]], rounds: int, seconds: float = 0.5) -> dict[str, dict]:
    """Each peer's seconds a call (quartiles), peak memory beyond what building took, and the last value it returned."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, (build, arguments) in peers.items():
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, build, arguments), daemon=True)
        process.start()
        problem = here.recv()
        if problem:
            print(f"{name:14} {problem}")
            process.join()
        else:
            workers[name] = (process, here)
    samples: dict[str, list[float]] = {name: [] for name in workers}
    last = {}
    for _ in range(rounds):
        for name, (_, pipe) in workers.items():
            pipe.send(seconds)
            last[name] = pipe.recv()
            samples[name].append(last[name][0])
    for process, pipe in workers.values():
        pipe.send(None)
        process.join()
    return {name: summary(samples[name], *last[name][1:]) for name in workers}


def summary(times: list[float], memory: float, value: float) -> dict:
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return dict(low=low, median=median, high=high, memory=memory, value=value)


def serve(pipe, build: Callable, arguments: tuple) -> None:
    """One contestant: builds itself, then runs for as long as it is told, again and again."""
    keep_freed_memory()  # as train.py does; it helps every contestant
    try:
        step = build(*arguments)
    except ImportError as error:
        pipe.send(f"not installed ({error.name})")
        return
    forget_peak()
    base = memory("VmRSS")
    step()
    pipe.send(None)
    while (seconds := pipe.recv()) is not None:
        calls, start = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - start < seconds:
            value = step()
            calls += 1
        pipe.send(((time.perf_counter() - start) / calls, memory("VmHWM") - base, value))


def memory(field: str) -> float:
    """Bytes of this process in memory, VmRSS now, VmHWM at most, as Linux tells it; NaN where there is no /proc."""
    if not STATUS.exists():
        return math.nan
    return 1024.0 * next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))


def forget_peak() -> None:
    """VmHWM begins anew: what imports and building took does not count."""
    if STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")


def matrix_ceiling(precision: str) -> float:
    """FLOP/s of the best of several large matrix products: what no program on this machine can pass."""
    a = torch.randn(2048, 2048).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def import_peer(name: str) -> None:
    """Import a peer; torchvision, which it brings along, needs the declarations of `minivlm._torchvision` first."""
    import importlib

    import minivlm._torchvision  # noqa: F401

    importlib.import_module(name)


def print_ratios(rows: dict[str, dict]) -> None:
    others = {name: row["median"] for name, row in rows.items() if name != "minivlm"}
    if others and "minivlm" in rows:
        fastest = min(others, key=others.get)
        print(
            f"minivlm takes 1/{others[fastest] / rows['minivlm']['median']:.2f} of the time of the fastest other, {fastest}"
        )


BENCHES = {"clip": bench_clip, "loss": bench_loss, "load": bench_load}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minivlm.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--size", choices=SIZES, default="64px", help="clip: which model")
    parser.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both", help="clip: which arithmetic")
    parser.add_argument("--batch", type=int, default=8192, help="loss: how many pairs")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}; at least one is needed.")
    BENCHES[options.bench](options)


if __name__ == "__main__":
    run_command_line(main)
