"""How fast a model with eyes speaks, in minivlm and in transformers with the same weights, and whether it says the same."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minivlm.bench.contest import import_peer, print_ratios, quartiles

VOCABULARY, IMAGE_TOKEN = 8000, 7999
WORDS, NEW_TOKENS = 32, 64  # of the prompt beside the picture, and of the answer


def inputs(B: int, words: int, image_tokens: int) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, 224, 224), and tokens (B, image_tokens + words): a word, the picture, more words."""
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


def speak_minivlm(directory: str, dtype: torch.dtype, B: int, image_tokens: int) -> Callable[[], dict]:
    model = load_minivlm(directory, dtype)
    images, tokens = inputs(B, WORDS, image_tokens)
    return speaker(model, images.to(dtype), tokens, NEW_TOKENS)


def speaker(model: nn.Module, images: Tensor, tokens: Tensor, new_tokens: int) -> Callable[[], dict]:
    """One turn of a model of ours: `new_tokens` a row, none of which ends it."""

    def speak() -> dict:
        times, said = [time.perf_counter()], []
        for token in model.stream(images, tokens, max_new_tokens=new_tokens, end_tokens=()):
            times.append(time.perf_counter())
            said.append(token)
        return spoken(times, torch.stack(said, dim=1))

    return speak


def speak_transformers(
    directory: str, dtype: torch.dtype, B: int, image_tokens: int, attention: str
) -> Callable[[], dict]:
    images, tokens = inputs(B, WORDS, image_tokens)
    return speaker_of_transformers(load_transformers(directory, dtype, attention), images.to(dtype), tokens)


def speaker_of_transformers(model: nn.Module, images: Tensor, tokens: Tensor, **more) -> Callable[[], dict]:
    """One turn of a model of theirs: NEW_TOKENS a row, none of which ends it. more: what its `generate` wants besides."""
    model.eval()
    times: list[float] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: times.append(time.perf_counter()))
    length = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)

    def speak() -> dict:
        times[:] = [time.perf_counter()]
        mask = torch.ones_like(tokens)
        y = model.generate(
            input_ids=tokens,
            pixel_values=images,
            attention_mask=mask,
            do_sample=False,
            pad_token_id=0,
            **length,
            **more,
        )
        return spoken(times, y[:, -NEW_TOKENS:])

    return speak


def spoken(times: list[float], tokens: Tensor) -> dict:
    """Seconds to the first token, then for each further one; and what was said."""
    return dict(first=times[1] - times[0], step=(times[-1] - times[1]) / (len(times) - 2), tokens=tokens.tolist())


def turns(row: dict, what: str) -> tuple[float, float, float]:
    """Quartiles over a contestant's turns of the seconds to the "first" token, or of those of a further "step"."""
    return quartiles([value[what] for value in row["values"]])


def print_speaking(rows: dict[str, dict], B: int) -> None:
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
