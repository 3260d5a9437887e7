"""How fast a model generates a text about an image, in minivlm and in transformers with the same weights, and whether the
text is the same: a LLaVA, a BLIP-2 with an OPT or a T5, an IDEFICS, each untrained, in its published layout."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from minivlm.bench.contest import compare, import_peer, precisions, print_ratios, quartiles
from minivlm.layers import GatedConfig, LanguageModelConfig, PerceiverConfig, QFormerConfig, T5Config, VisionConfig
from minivlm.model import Model
from minivlm.models.blip2 import BLIP2, BLIP2Config
from minivlm.models.flamingo import Flamingo, FlamingoConfig
from minivlm.models.llava import LLaVA, LLaVAConfig

VOCABULARY, IMAGE_TOKEN = 8000, 7999
WORDS, NEW_TOKENS = 32, 64  # of the prompt beside the image, and of the answer

# ---- the models ------------------------------------------------------------------------------------------------------


def vision(**changes) -> VisionConfig:
    """A vision tower of 384 × 6, of 256 patches."""
    return VisionConfig(**{**dict(image_size=224, patch_size=14, width=384, depth=6, heads=6), **changes})


def llama(**changes) -> LanguageModelConfig:
    """A LLaMA of 512 × 12."""
    bare = dict(qkv_bias=False, out_bias=False, mlp_bias=False)
    kind = dict(rope_theta=1e4, positions="none", norm="rmsnorm", activation="silu", gated_mlp=True, **bare)
    sizes = dict(width=512, depth=12, heads=8, mlp_width=1376, vocab_size=VOCABULARY, context=2048)
    return LanguageModelConfig(**{**sizes, **kind, **changes})


def opt(**changes) -> LanguageModelConfig:
    """An OPT of 512 × 12."""
    sizes = dict(width=512, depth=12, heads=8, vocab_size=VOCABULARY, context=512)
    return LanguageModelConfig(**{**sizes, "activation": "relu", "position_offset": 2, **changes})


def t5(**changes) -> T5Config:
    """A Flan-T5 of 512 × (6 + 6)."""
    sizes = dict(width=512, depth=6, heads=8, mlp_width=1376, vocab_size=VOCABULARY)
    return T5Config(**{**sizes, "activation": "gelu_tanh", "gated_mlp": True, "tie_head": False, **changes})


LANGUAGE_MODELS = {"opt": opt, "t5": t5}
PLACEHOLDERS = {"llava": 256, "opt": 32, "t5": 32, "idefics": 1}  # of an image in the prompt, by model


def build(kind: str, *, tower: VisionConfig | None = None, language=None) -> Model:
    """One of the `PLACEHOLDERS`. tower, language: in place of those above."""
    if kind == "llava":
        tower = tower or vision(activation="quick_gelu")
        return LLaVA(LLaVAConfig(vision=tower, language=language or llama(), image_token=IMAGE_TOKEN))
    if kind in LANGUAGE_MODELS:
        tower = tower or vision(embedding_norm=False, patch_bias=True)
        queries = dict(queries=PLACEHOLDERS[kind], width=384, depth=6, heads=6, context_width=tower.width)
        language = language or LANGUAGE_MODELS[kind]()
        parts = dict(vision=tower, qformer=QFormerConfig(**queries), language=language)
        return BLIP2(BLIP2Config(**parts, image_token=IMAGE_TOKEN))
    tower = tower or vision(activation="quick_gelu")
    resampler = PerceiverConfig(width=tower.width, depth=2, heads=6, latents=64, activation="relu")
    gated = GatedConfig(norm="rmsnorm", activation="silu", gated_mlp=True, gate="channel")
    language = replace(language or llama(), tie_head=False)
    parts = dict(vision=tower, vision_norm=False, language=language, resampler=resampler, gated=gated, every=4)
    model = Flamingo(FlamingoConfig(**parts, image_token=IMAGE_TOKEN))
    for block in model.gated:
        for gate in (block.attention_gate, block.mlp_gate):
            nn.init.constant_(gate, 0.5)  # half open
    return model


def bench_generation(kind: str, rows: tuple[int, ...], options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = build(kind)
        model.save_pretrained(directory, layout="hf")
        for precision, dtype in precisions(options.precision):
            for B in (options.batch,) if options.batch else rows:
                print(
                    f"\n{type(model).__name__} ({kind}) generates: {PLACEHOLDERS[kind]} image and {WORDS} text tokens, "
                    f"{NEW_TOKENS} new ones, greedy, batch {B}, {precision}, {torch.get_num_threads()} threads"
                )
                peers = contestants(generate_minivlm, generate_transformers, precision, directory, dtype, B, kind)
                print_generation(compare(peers, options.rounds, 0.0), B)


# ---- a turn ----------------------------------------------------------------------------------------------------------


def inputs(B: int, words: int, image_tokens: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 224, 224), and tokens (B, image_tokens + words): a word, the image, more words."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, IMAGE_TOKEN, (B, words), generator=generator)
    tokens = torch.cat([text[:, :1], torch.full((B, image_tokens), IMAGE_TOKEN), text[:, 1:]], dim=1)
    return torch.randn(B, 3, 224, 224, generator=generator), tokens


def load_minivlm(directory: str, dtype: torch.dtype) -> nn.Module:
    from minivlm import checkpoint

    return checkpoint.load(directory, dtype=dtype)[0]


def load_transformers(directory: str, dtype: torch.dtype, attention: str) -> nn.Module:
    """Whatever class its config.json names."""
    import_peer("transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    [kind] = transformers.AutoConfig.from_pretrained(directory).architectures
    return getattr(transformers, kind).from_pretrained(directory, dtype=dtype, attn_implementation=attention)


def contestants(minivlm: Callable, transformers: Callable, precision: str, *arguments) -> dict[str, tuple]:
    """transformers' attention: sdpa is the better one in fp32 on a CPU; in bf16 it depends, so both take part."""
    peers = {"minivlm": (minivlm, arguments), "transformers": (transformers, (*arguments, "sdpa"))}
    if precision == "bf16":
        peers["transformers, eager"] = (transformers, (*arguments, "eager"))
    return peers


def generate_minivlm(directory: str, dtype: torch.dtype, B: int, kind: str) -> Callable[[], dict]:
    images, tokens = inputs(B, WORDS, PLACEHOLDERS[kind])
    images = images[:, None] if kind == "idefics" else images
    return generator(load_minivlm(directory, dtype), images.to(dtype), tokens, NEW_TOKENS)


def generator(model: nn.Module, images: Tensor, tokens: Tensor, new_tokens: int) -> Callable[[], dict]:
    """One turn of a model of ours: `new_tokens` a row, none of which ends it."""

    def turn() -> dict:
        times, new = [time.perf_counter()], []
        for token in model.stream(images, tokens, max_new_tokens=new_tokens, end_tokens=()):
            times.append(time.perf_counter())
            new.append(token)
        return timed(times, torch.stack(new, dim=1))

    return turn


def generate_transformers(directory: str, dtype: torch.dtype, B: int, kind: str, attention: str) -> Callable[[], dict]:
    """One turn of a model of theirs: NEW_TOKENS a row, none of which ends it."""
    model = load_transformers(directory, dtype, attention).eval()
    times: list[float] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: times.append(time.perf_counter()))
    images, tokens = inputs(B, WORDS, PLACEHOLDERS[kind])
    length, more = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS), {}
    if kind == "idefics":
        images, more = images[:, None], dict(image_attention_mask=(tokens == IMAGE_TOKEN).cumsum(dim=1)[..., None])

    def turn() -> dict:
        times[:] = [time.perf_counter()]
        y = model.generate(
            input_ids=tokens,
            pixel_values=images.to(dtype),
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            pad_token_id=0,
            **length,
            **more,
        )
        return timed(times, y[:, -NEW_TOKENS:])

    return turn


def timed(times: list[float], tokens: Tensor) -> dict:
    """Seconds to the first token, then for each further one; and the tokens."""
    return dict(first=times[1] - times[0], step=(times[-1] - times[1]) / (len(times) - 2), tokens=tokens.tolist())


def turns(row: dict, what: str) -> tuple[float, float, float]:
    """Quartiles over a contestant's turns of the seconds to the "first" token, or of those of a further "step"."""
    return quartiles([value[what] for value in row["values"]])


def print_generation(rows: dict[str, dict], B: int) -> None:
    print(f"{'':20} tokens/s  (quartiles)          ms/token   ms to the first token")
    first, step = {}, {}
    for name, row in rows.items():
        _, first[name], _ = turns(row, "first")
        fast, step[name], slow = turns(row, "step")
        told = f"({B / slow:.1f} to {B / fast:.1f})"
        print(f"{name:20} {B / step[name]:8.1f}  {told:20} {step[name] * 1e3:7.2f}   {first[name] * 1e3:21.0f}")
    print_ratios(step, "a token")
    print_ratios(first, "the first token")
    if "minivlm" not in rows:
        return
    ours = rows["minivlm"]["values"][-1]["tokens"]
    for name in rows.keys() - {"minivlm"}:
        theirs = rows[name]["values"][-1]["tokens"]
        same = sum(a == b for mine, its in zip(ours, theirs, strict=True) for a, b in zip(mine, its, strict=True))
        print(f"{same} of {B * len(ours[0])} tokens are those of {name}")
