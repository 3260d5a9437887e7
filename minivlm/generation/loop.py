"""The loop that generates text with every model: greedy, sampled or by beam search, as a whole or token by token.

    prefill(prompt) ─→ logits (B, V) ─→ rules ─→ temperature, top-k, top-p, min-p ─→ tokens (B,) ─→ the answer
                          ▲                                                              │
                          └───────────────────────── decoding.step(tokens) ──────────────┘

A model gives it a `Decoding`, which has processed the prompt and keeps a cache. Rows are independent: each gets exactly the
tokens that it would get alone. The loop draws no random number, and asks the device for nothing that it can do without.
Nucleus sampling: Holtzman et al. 2020, §3.1; min-p: Nguyen et al. 2024. Options, rules and beam search have files of their
own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.generation.beam_search import beam_search
from minivlm.generation.decoding import Decoding
from minivlm.generation.options import Options
from minivlm.generation.rules import Decode, Rules, contain_stop


def generate(
    decoding: Decoding,
    options: Options,
    *,
    prompt: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    decode: Decode | None = None,
) -> Tensor:
    """The answers: (B, ≤ max_new_tokens) int64, each with the end token that ended it, then pad_token.

    prompt (B, T) int64 and prompt_mask (B, T) bool, True = a real token, are for rules that depend on earlier tokens, decode
    for the stop strings: a row ends with the token that completes one, and TextStream cuts the text in front of it.
    """
    check(decoding, options, prompt, decode)
    # To check whether all rows have ended waits for a GPU to catch up. To generate up to 7 tokens too many costs less.
    every = 8 if decoding.logits.is_cuda and not options.stop else 1
    if options.num_beams > 1:
        return beam_search(decoding, options, prompt, prompt_mask, decode, every).clone()
    columns = list(generate_tokens(decoding, options, prompt, prompt_mask, decode, every))
    tokens = torch.stack(columns, dim=1)
    return tokens if every == 1 else trim(tokens, options.end_tokens)


def stream(
    decoding: Decoding,
    options: Options,
    *,
    prompt: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    decode: Decode | None = None,
) -> Iterator[Tensor]:
    """The columns of `generate` one by one, each (B,) int64, as soon as they are known."""
    check(decoding, options, prompt, decode)
    if options.num_beams > 1:
        raise UserError("Beam search knows its answer at the end only and cannot be streamed: set num_beams to 1.")
    return (tokens.clone() for tokens in generate_tokens(decoding, options, prompt, prompt_mask, decode, every=1))


@torch.inference_mode()  # 0.5 ms of 18 faster than no_grad; callers get copies made outside, on which one can train
def generate_tokens(
    decoding: Decoding,
    options: Options,
    prompt: Tensor | None,
    prompt_mask: Tensor | None,
    decode: Decode | None,
    every: int,
) -> Iterator[Tensor]:
    """Yields one token a row, (B,), until all rows have ended, which is checked after every `every` tokens."""
    B, device = len(decoding.logits), decoding.logits.device
    ends = torch.tensor(options.end_tokens, dtype=torch.int64, device=device)
    uniform = draw(options.seed, B, options.max_new_tokens).to(device) if options.temperature > 0 else None
    rules = Rules(options, prompt, prompt_mask, decoding.logits)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    generated: list[Tensor] = []
    for i in range(options.max_new_tokens):
        if i > 0:
            decoding.step(generated[-1])
        logits = decoding.logits.float()  # the argmax of bfloat16 is 4 times as slow on a CPU
        logits = rules(logits, i)
        tokens = logits.argmax(dim=-1) if uniform is None else sample(logits, uniform[:, i], options)
        tokens = tokens.masked_fill(done, options.pad_token)
        generated.append(tokens)
        yield tokens
        rules.append(tokens)
        done = done | torch.isin(tokens, ends)
        if options.stop:
            done = done | contain_stop(torch.stack(generated, dim=1), options.stop, decode)
        if (i + 1) % every == 0 and done.all():
            return


def sample(logits: Tensor, uniform: Tensor, options: Options) -> Tensor:
    """The token at which the cumulated probability reaches the row's uniform number.  (B, V), (B,) in (0, 1] → (B,)"""
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / options.temperature  # at most 0: no temperature overflows
    order = None  # of the vocabulary, likeliest token first
    if options.top_k is not None:
        logits, order = logits.topk(min(options.top_k, logits.shape[-1]))
    elif options.top_p is not None or options.min_p > 0:
        logits, order = logits.sort(dim=-1, descending=True)  # costs 2 ms for 32,000 tokens, the rest 0.1
    cumulated = logits.softmax(dim=-1).cumsum(dim=-1)
    mass = cumulated[:, -1:]  # 1 but for rounding
    if options.top_p is not None:  # the nucleus ends with the token that reaches top_p
        mass = cumulated.gather(1, torch.searchsorted(cumulated, options.top_p * mass))
    if options.min_p > 0:  # the likeliest is at 0
        likely = (logits >= math.log(options.min_p)).sum(dim=-1, keepdim=True)
        mass = torch.minimum(mass, cumulated.gather(1, likely - 1))
    chosen = torch.searchsorted(cumulated, uniform[:, None] * mass)  # > 0 and ≤ mass: never a token of probability 0
    return (chosen if order is None else order.gather(1, chosen)).squeeze(1)


def draw(seed: int | Sequence[int], B: int, n: int) -> Tensor:
    """(B, n) numbers in (0, 1], on the CPU. A row's seed alone decides on its numbers, n only on how many there are."""
    return torch.stack([1 - torch.rand(n, generator=torch.Generator().manual_seed(s)) for s in row_seeds(seed, B)])


def row_seeds(seed: int | Sequence[int], B: int) -> Sequence[int]:
    """The seed of each row.

    Row 0 has the seed itself, the others lie far apart: torch's generator takes the lower 32 bits of a seed, and
    seed + row would give row 1 of seed 0 the numbers of row 0 of seed 1.
    """
    if not isinstance(seed, Sequence):
        return [(seed + row * 0x9E3779B1) % 2**32 for row in range(B)]
    if len(seed) != B:
        raise ValueError(f"there are {len(seed)} seeds for {B} rows; give one for each, or a single number")
    return seed


def trim(tokens: Tensor, end_tokens: Sequence[int]) -> Tensor:
    """(B, T) → (B, ≤ T): without the columns after the end of the longest row."""
    ended = torch.isin(tokens, torch.tensor(end_tokens, dtype=torch.int64, device=tokens.device)).cumsum(dim=1) > 0
    return tokens[:, : int((~ended).sum(dim=1).max()) + 1]


def check(decoding: Decoding, options: Options, prompt: Tensor | None, decode: Decode | None) -> None:
    if decoding.room < options.max_new_tokens:
        raise ValueError(f"max_new_tokens is {options.max_new_tokens}, but the decoding has room for {decoding.room}")
    if options.stop and decode is None:
        raise ValueError("stop strings are matched in the text: give decode, as processor.decode")
    if prompt is not None and (prompt.ndim != 2 or len(prompt) != len(decoding.logits)):
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}, but the decoding has {len(decoding.logits)} rows")
    if decoding.logits.isnan().any():
        raise UserError(
            "the logits of the model are NaN: its weights are damaged, or its activations overflow in float16."
        )
