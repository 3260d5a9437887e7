"""One engine for every model that speaks: greedy, sampled or by beam search, as a whole or token by token.

    begin(prompt) ─→ logits (B, V) ─→ repetition penalty ─→ temperature, top-k, top-p ─→ tokens (B,) ─→ the answer
                        ▲                                                                     │
                        └────────────────────────── decoding.step(tokens) ────────────────────┘

A model gives it a `Decoding`, which has read the prompt and keeps a cache. Rows are independent: each gets exactly the
tokens that it would get alone. The loop draws no random number, and asks the device for nothing that it can do without.
Nucleus sampling: Holtzman et al. 2020, §3.1; repetition penalty: Keskar et al. 2019 (CTRL), §4.1; beam search with
length penalty: Wu et al. 2016, §7, with length^p in place of their formula, as is usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minivlm.errors import UserError

Decode = Callable[[Sequence[Sequence[int]]], list[str]]  # rows of ids → their texts, as Processor.decode


class Decoding(Protocol):
    """A model that has read a prompt of B rows, and what it expects to come next."""

    logits: Tensor  # (B, V) float, for the token that comes next
    room: int  # how many tokens may still be appended

    def step(self, tokens: Tensor) -> None:
        """tokens (B,) int64 are appended; afterwards, logits are those of what follows."""

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on as row rows[i] did; rows (B',) int64 may be more or fewer than B."""


@dataclass(frozen=True)
class Options:
    """How to choose among what a model finds likely. A value that makes no sense is a UserError."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # logits are divided by it; 0: always the likeliest token
    top_k: int | None = None  # sample among the k likeliest tokens
    top_p: float | None = None  # sample among the fewest tokens that together have this probability
    repetition_penalty: float = 1.0  # > 1: tokens that have occurred, in the prompt as well, become less likely
    num_beams: int = 1  # > 1: beam search, which looks for the likeliest answer
    length_penalty: float = 1.0  # beam search compares log p(answer) / length^penalty; > 0 favours long answers
    seed: int | Sequence[int] = 0  # one for each row, or one from which those of the rows are made
    end_tokens: Sequence[int] = ()  # a row ends with any of these
    pad_token: int = 0  # what stands after a row's end
    stop: Sequence[str] = ()  # a row ends where its text contains any of these
    suppress_tokens: Sequence[int] = ()  # are never said

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise TypeError(f"stop is a sequence of strings, as in stop=({self.stop!r},), not one string")
        for fine, sentence in (
            (self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}, but must be at least 1."),
            (0 <= self.temperature < math.inf, f"temperature is {self.temperature}, but must be 0 (greedy) or more."),
            (self.top_k is None or self.top_k >= 1, f"top_k is {self.top_k}, but must be at least 1 token."),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p is {self.top_p}, but must be above 0 and at most 1."),
            (
                0 < self.repetition_penalty < math.inf,
                f"repetition_penalty is {self.repetition_penalty}, but must be above 0; 1 changes nothing.",
            ),
            (self.num_beams >= 1, f"num_beams is {self.num_beams}, but must be at least 1."),
            (
                self.num_beams == 1 or self.temperature == 0,
                f"num_beams is {self.num_beams} and temperature {self.temperature}, "
                "but beam search does not sample: set num_beams to 1 or temperature to 0.",
            ),
            ("" not in self.stop, "A stop string is empty, which every text contains: leave it out."),
        ):
            if not fine:
                raise UserError(sentence)


def generate(
    decoding: Decoding,
    options: Options,
    *,
    prompt: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    decode: Decode | None = None,
) -> Tensor:
    """The answers: (B, ≤ max_new_tokens) int64, each with the end token that ended it, then pad_token.

    prompt (B, T) int64 and prompt_mask (B, T) bool, True = a real token, are for the repetition penalty, decode for the
    stop strings: a row ends with the token that completes one, and TextStream cuts the text in front of it.
    """
    check(decoding, options, prompt, decode)
    # Looking whether all rows have ended waits for a GPU to catch up. To speak up to 7 tokens too many costs less.
    look = 8 if decoding.logits.is_cuda and not options.stop else 1
    if options.num_beams > 1:
        return beam_search(decoding, options, prompt, prompt_mask, decode, look).clone()
    tokens = torch.stack(list(speak(decoding, options, prompt, prompt_mask, decode, look)), dim=1)
    return tokens if look == 1 else trim(tokens, options.end_tokens)


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
    return (tokens.clone() for tokens in speak(decoding, options, prompt, prompt_mask, decode, look=1))


@torch.inference_mode()  # 0.5 ms of 18 faster than no_grad; callers get copies made outside, on which one can train
def speak(
    decoding: Decoding,
    options: Options,
    prompt: Tensor | None,
    prompt_mask: Tensor | None,
    decode: Decode | None,
    look: int,
) -> Iterator[Tensor]:
    """Token after token, (B,) each, until all rows have ended, which is looked at after every `look` tokens."""
    B, device = len(decoding.logits), decoding.logits.device
    ends = torch.tensor(options.end_tokens, dtype=torch.int64, device=device)
    uniform = draw(options.seed, B, options.max_new_tokens).to(device) if options.temperature > 0 else None
    seen = None if options.repetition_penalty == 1 else occurring(decoding.logits, prompt, prompt_mask)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    said: list[Tensor] = []
    for i in range(options.max_new_tokens):
        if i > 0:
            decoding.step(said[-1])
        logits = decoding.logits.float()  # the argmax of bfloat16 is 4 times as slow on a CPU
        if options.suppress_tokens:
            logits = suppress(logits, options.suppress_tokens)
        if seen is not None:
            logits = penalise(logits, seen, options.repetition_penalty)
        tokens = logits.argmax(dim=-1) if uniform is None else sample(logits, uniform[:, i], options)
        tokens = tokens.masked_fill(done, options.pad_token)
        said.append(tokens)
        yield tokens
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        done = done | torch.isin(tokens, ends)
        if options.stop:
            done = done | contain_stop(torch.stack(said, dim=1), options.stop, decode)
        if (i + 1) % look == 0 and done.all():
            return


# ---- choosing a token ------------------------------------------------------------------------------------------------


def sample(logits: Tensor, uniform: Tensor, options: Options) -> Tensor:
    """The token at which the cumulated probability reaches the row's uniform number.  (B, V), (B,) in (0, 1] → (B,)"""
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / options.temperature  # at most 0: no temperature overflows
    order = None  # of the vocabulary, likeliest token first
    if options.top_k is not None:
        logits, order = logits.topk(min(options.top_k, logits.shape[-1]))
    elif options.top_p is not None:
        logits, order = logits.sort(dim=-1, descending=True)  # costs 2 ms for 32,000 tokens, the rest 0.1
    cumulated = logits.softmax(dim=-1).cumsum(dim=-1)
    mass = cumulated[:, -1:]  # 1 but for rounding
    if options.top_p is not None:  # the nucleus ends with the token that reaches top_p
        mass = cumulated.gather(1, torch.searchsorted(cumulated, options.top_p * mass))
    chosen = torch.searchsorted(cumulated, uniform[:, None] * mass)  # > 0 and ≤ mass: never a token of probability 0
    return (chosen if order is None else order.gather(1, chosen)).squeeze(1)


def draw(seed: int | Sequence[int], B: int, n: int) -> Tensor:
    """(B, n) numbers in (0, 1], on the CPU. A row's seed alone decides on its numbers, n only on how many there are."""
    if not isinstance(seed, Sequence):
        # Row 0 has the seed itself, the others lie far apart: torch's generator takes the lower 32 bits of a seed, and
        # seed + row would give row 1 of seed 0 the numbers of row 0 of seed 1.
        seed = [(seed + row * 0x9E3779B1) % 2**32 for row in range(B)]
    if len(seed) != B:
        raise ValueError(f"there are {len(seed)} seeds for {B} rows; give one for each, or a single number")
    return torch.stack([1 - torch.rand(n, generator=torch.Generator().manual_seed(s)) for s in seed])


def occurring(logits: Tensor, prompt: Tensor | None, prompt_mask: Tensor | None) -> Tensor:
    """(B, V) bool: which tokens of the vocabulary occur in each row's prompt; padding does not."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    if prompt is not None:
        real = torch.ones_like(prompt, dtype=torch.bool) if prompt_mask is None else prompt_mask
        rows = torch.arange(len(prompt), device=prompt.device)[:, None].expand_as(prompt)
        seen[rows[real], prompt[real]] = True
    return seen


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Seen tokens lose: a positive score is divided by the penalty, a negative one multiplied.  (B, V) → (B, V)"""
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def suppress(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """(B, V) → the same, −∞ for these tokens."""
    return scores.index_fill(1, torch.tensor(tokens, dtype=torch.int64, device=scores.device), -torch.inf)


# ---- where an answer ends --------------------------------------------------------------------------------------------


def contain_stop(tokens: Tensor, stop: Sequence[str], decode: Decode) -> Tensor:
    """(B, T) → (B,) bool: does the row's text contain a stop string?"""
    found = [any(s in text for s in stop) for text in decode(tokens.tolist())]
    return torch.tensor(found, device=tokens.device)


def trim(tokens: Tensor, end_tokens: Sequence[int]) -> Tensor:
    """(B, T) → (B, ≤ T): without the columns after the end of the longest row."""
    ended = torch.isin(tokens, torch.tensor(end_tokens, dtype=torch.int64, device=tokens.device)).cumsum(dim=1) > 0
    return tokens[:, : int((~ended).sum(dim=1).max()) + 1]


def check(decoding: Decoding, options: Options, prompt: Tensor | None, decode: Decode | None) -> None:
    if decoding.room < options.max_new_tokens:
        raise ValueError(f"max_new_tokens is {options.max_new_tokens}, but the decoding has room for {decoding.room}")
    if options.stop and decode is None:
        raise ValueError("stop strings are looked for in the text: give decode, as processor.decode")
    if prompt is not None and (prompt.ndim != 2 or len(prompt) != len(decoding.logits)):
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}, but the decoding has {len(decoding.logits)} rows")


# ---- beam search -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def beam_search(
    decoding: Decoding,
    options: Options,
    prompt: Tensor | None,
    prompt_mask: Tensor | None,
    decode: Decode | None,
    look: int,
) -> Tensor:
    """The best answers that are found by following the N likeliest beginnings at once, as `generate` returns them."""
    (B, _), N, device = decoding.logits.shape, options.num_beams, decoding.logits.device
    seen = None
    if options.repetition_penalty != 1:
        seen = occurring(decoding.logits, prompt, prompt_mask).repeat_interleave(N, dim=0)
    decoding.reorder(torch.arange(B, device=device).repeat_interleave(N))
    beams = Beams(B, options, decode, device)
    for i in range(options.max_new_tokens):
        log_p = decoding.logits.float().log_softmax(dim=-1)
        if options.suppress_tokens:
            log_p = suppress(log_p, options.suppress_tokens)
        if seen is not None:
            log_p = penalise(log_p, seen, options.repetition_penalty)
        rows, tokens = beams.extend(log_p, i)
        if i + 1 == options.max_new_tokens or ((i + 1) % look == 0 and not beams.hopeful.any()):
            break
        decoding.reorder(rows)
        decoding.step(tokens)
        if seen is not None:
            seen = seen[rows].scatter_(1, tokens[:, None], True)
    return beams.best_answers()


class Beams:
    """Of each sample, N beams that go on and N answers that have ended, best first; beam n of sample b is row b·N + n.

    A sample is done when its N answers are better than what its best beam is worth as it stands (transformers calls it
    early_stopping=False; with a length penalty above 0, a longer answer might still have become better).
    """

    def __init__(self, B: int, options: Options, decode: Decode | None, device: torch.device):
        N = options.num_beams
        self.options, self.decode = options, decode
        self.ends = torch.tensor(options.end_tokens, dtype=torch.int64, device=device)
        self.sample = torch.arange(B, device=device)[:, None]
        self.beams = self.answers = torch.full((B, N, options.max_new_tokens), -1, device=device)
        self.values = torch.full((B, N), -torch.inf, device=device)  # of the answers: log p / length^penalty
        self.scores = self.values.clone()  # of the beams: log p
        self.scores[:, 0] = 0  # at first all beams are alike, so one alone may speak
        self.hopeful = torch.ones(B, 1, dtype=torch.bool, device=device)

    def extend(self, log_p: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """log_p (B·N, V) of token i → which row each new beam continues, and with which token; (B·N,) each."""
        B, N, T = self.beams.shape
        V = log_p.shape[1]
        every = (self.scores[..., None] + log_p.view(B, N, V)).flatten(1)
        # A beam can end in len(ends) ways, so that among this many there are N that go on.
        scores, chosen = every.topk(min(max(2, 1 + len(self.ends)) * N, N * V))  # (B, M), best first
        parents, tokens = chosen // V, chosen % V
        longer = self.beams[self.sample, parents]  # (B, M, T)
        longer[..., i] = tokens
        over = torch.isin(tokens, self.ends) | (i + 1 == T)
        if self.options.stop:
            over |= contain_stop(longer[..., : i + 1].flatten(0, 1), self.options.stop, self.decode).view_as(over)

        length = (i + 1) ** self.options.length_penalty
        values = (scores / length).masked_fill(~(over & self.hopeful), -torch.inf)[:, :N]
        self.values, best = torch.cat([self.values, values], dim=1).topk(N)
        self.answers = torch.cat([self.answers, longer[:, :N]], dim=1)[self.sample, best]

        self.scores, best = scores.masked_fill(over, -torch.inf).topk(N)
        self.beams = longer[self.sample, best]
        self.hopeful = self.hopeful & (self.scores[:, :1] / length > self.values[:, -1:])
        return (self.sample * N + parents.gather(1, best)).flatten(), tokens.gather(1, best).flatten()

    def best_answers(self) -> Tensor:
        answers = self.answers[:, 0]
        longest = int((answers >= 0).sum(dim=1).max())
        return answers.masked_fill(answers < 0, self.options.pad_token)[:, :longest]
