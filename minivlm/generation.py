"""One engine for every model that speaks: greedy, sampled or by beam search, as a whole or token by token.

    begin(prompt) ─→ logits (B, V) ─→ rules ─→ temperature, top-k, top-p, min-p ─→ tokens (B,) ─→ the answer
                        ▲                                                              │
                        └───────────────────────── decoding.step(tokens) ──────────────┘

A model gives it a `Decoding`, which has read the prompt and keeps a cache. Rows are independent: each gets exactly the
tokens that it would get alone. The loop draws no random number, and asks the device for nothing that it can do without.
Nucleus sampling: Holtzman et al. 2020, §3.1; min-p: Nguyen et al. 2024; repetition penalty: Keskar et al. 2019 (CTRL),
§4.1; no n-gram twice: Paulus et al. 2018, §2.5; beam search with length penalty: Wu et al. 2016, §7, with length^p in place
of their formula, as is usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

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
    min_p: float = 0.0  # sample among those that are at least this likely, as a share of the likeliest
    repetition_penalty: float = 1.0  # > 1: tokens that have occurred, in the prompt as well, become less likely
    num_beams: int = 1  # > 1: beam search, which looks for the likeliest answer
    length_penalty: float = 1.0  # beam search compares log p(answer) / length^penalty; > 0 favours long answers
    early_stopping: bool | Literal["never"] = False  # of beam search, see `Beams`
    no_repeat_ngram_size: int = 0  # so many tokens in a row are never said twice, nor what the prompt says; 0: no rule
    seed: int | Sequence[int] = 0  # one for each row, or one from which those of the rows are made
    end_tokens: Sequence[int] = ()  # a row ends with any of these
    pad_token: int = 0  # what stands after a row's end
    stop: Sequence[str] = ()  # a row ends where its text contains any of these
    suppress_tokens: Sequence[int] = ()  # are never said
    begin_suppress_tokens: Sequence[int] = ()  # are not what an answer begins with
    bad_words_ids: Sequence[Sequence[int]] = ()  # sequences of tokens that are never said
    min_new_tokens: int = 0  # no answer ends before
    min_length: int = 0  # likewise, with the prompt counted
    max_length: int | None = None  # an upper bound on prompt and answer together, besides that on the answer
    forced_bos_token_id: int | None = None  # what a text of one token, such as T5's start token, goes on with
    forced_eos_token_id: Sequence[int] = ()  # what the last of max_new_tokens is, if the answer has not ended before

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise TypeError(f"stop is a sequence of strings, as in stop=({self.stop!r},), not one string")
        for fine, sentence in (
            (self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}, but must be at least 1."),
            (0 <= self.temperature < math.inf, f"temperature is {self.temperature}, but must be 0 (greedy) or more."),
            (self.top_k is None or self.top_k >= 1, f"top_k is {self.top_k}, but must be at least 1 token."),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p is {self.top_p}, but must be above 0 and at most 1."),
            (0 <= self.min_p <= 1, f"min_p is {self.min_p}, but must be from 0 to 1."),
            (
                self.no_repeat_ngram_size >= 0,
                f"no_repeat_ngram_size is {self.no_repeat_ngram_size}, but must be 0 (no rule) or more.",
            ),
            (all(self.bad_words_ids), "One of bad_words_ids is empty: leave it out."),
            (
                self.early_stopping in (True, False, "never"),
                f"early_stopping is {self.early_stopping!r}, but must be True, False or 'never'.",
            ),
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

    def room(self, taken: int) -> int:
        """How many tokens may follow a prompt of so many, at least one."""
        left = self.max_new_tokens if self.max_length is None else self.max_length - taken
        return max(1, min(self.max_new_tokens, left))


def with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and of the defaults what does not contradict it: a length or a way of choosing that is given goes
    before one that is not."""
    left = dict(defaults)
    if "max_new_tokens" in given:
        left.pop("max_length", None)
    if given.get("num_beams", 1) > 1:
        left.pop("temperature", None)
    if given.get("temperature", 0) > 0:
        left.pop("num_beams", None)
    return {**left, **given}


def generate(
    decoding: Decoding,
    options: Options,
    *,
    prompt: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    decode: Decode | None = None,
) -> Tensor:
    """The answers: (B, ≤ max_new_tokens) int64, each with the end token that ended it, then pad_token.

    prompt (B, T) int64 and prompt_mask (B, T) bool, True = a real token, are for rules that look back, decode for the stop
    strings: a row ends with the token that completes one, and TextStream cuts the text in front of it.
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
    """Token after token, (B,) each, until all rows have ended, which is looked at after every `image_features` tokens."""
    B, device = len(decoding.logits), decoding.logits.device
    ends = torch.tensor(options.end_tokens, dtype=torch.int64, device=device)
    uniform = draw(options.seed, B, options.max_new_tokens).to(device) if options.temperature > 0 else None
    rules = Rules(options, prompt, prompt_mask, decoding.logits)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    said: list[Tensor] = []
    for i in range(options.max_new_tokens):
        if i > 0:
            decoding.step(said[-1])
        logits = decoding.logits.float()  # the argmax of bfloat16 is 4 times as slow on a CPU
        logits = rules(logits, i)
        tokens = logits.argmax(dim=-1) if uniform is None else sample(logits, uniform[:, i], options)
        tokens = tokens.masked_fill(done, options.pad_token)
        said.append(tokens)
        yield tokens
        rules.hear(tokens)
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
    if not isinstance(seed, Sequence):
        # Row 0 has the seed itself, the others lie far apart: torch's generator takes the lower 32 bits of a seed, and
        # seed + row would give row 1 of seed 0 the numbers of row 0 of seed 1.
        seed = [(seed + row * 0x9E3779B1) % 2**32 for row in range(B)]
    if len(seed) != B:
        raise ValueError(f"there are {len(seed)} seeds for {B} rows; give one for each, or a single number")
    return torch.stack([1 - torch.rand(n, generator=torch.Generator().manual_seed(s)) for s in seed])


# ---- what may be said ------------------------------------------------------------------------------------------------


class Rules:
    """What a token's score has to do with the tokens before it, and with how many these are. Rows (B,), in this order:
    repetition penalty, no n-gram twice, bad words, no end too early, forced tokens, suppressed tokens.

    said (B, S): each row's prompt, −1 before it where others are longer, and its answer so far. lengths (B,): of the
    prompts, 1 where there is none: then a start token alone is what stands before the answer.
    """

    def __init__(self, options: Options, prompt: Tensor | None, prompt_mask: Tensor | None, logits: Tensor):
        o, B = options, len(logits)
        self.options, self.words = o, [word for word in o.bad_words_ids if len(word) > 1]
        ends = [[end] for end in o.end_tokens]  # an answer may always end
        self.never = [word[0] for word in o.bad_words_ids if len(word) == 1 and list(word) not in ends]
        self.looks_back = o.repetition_penalty != 1 or o.no_repeat_ngram_size > 0 or bool(self.words)
        self.said = torch.empty(B, 0, dtype=torch.int64, device=logits.device)
        self.lengths = torch.ones(B, dtype=torch.int64, device=logits.device)
        if prompt is not None:
            real = torch.ones_like(prompt, dtype=torch.bool) if prompt_mask is None else prompt_mask
            self.lengths = real.sum(dim=1)
            order = real.long().argsort(dim=1, stable=True)
            self.said = prompt.masked_fill(~real, -1).gather(1, order)

    def hear(self, tokens: Tensor) -> None:
        """tokens (B,) were said."""
        if self.looks_back:
            self.said = torch.cat([self.said, tokens[:, None]], dim=1)

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on as row rows[i] did."""
        self.said, self.lengths = self.said[rows], self.lengths[rows]

    def __call__(self, scores: Tensor, i: int) -> Tensor:
        """scores (B, V) of token i of the answer → what is left of them."""
        o = self.options
        if o.repetition_penalty != 1:
            scores = penalise(scores, self.marked(scores, self.said), o.repetition_penalty)
        if o.no_repeat_ngram_size > 0:
            scores = scores.masked_fill(self.marked(scores, self.completing(o.no_repeat_ngram_size)), -torch.inf)
        scores = self.without_bad_words(scores)
        if o.end_tokens and (i < o.min_new_tokens or o.min_length > 0):
            early = self.lengths + i < o.min_length
            early = early | (i < o.min_new_tokens)
            scores = torch.where(early[:, None], suppress(scores, o.end_tokens), scores)
        if o.forced_bos_token_id is not None and i < 2:
            first = (self.lengths + i == 1)[:, None]
            scores = torch.where(first, only(scores, [o.forced_bos_token_id]), scores)
        if o.forced_eos_token_id and i + 1 == o.max_new_tokens:
            scores = only(scores, o.forced_eos_token_id)
        if o.suppress_tokens:
            scores = suppress(scores, o.suppress_tokens)
        if o.begin_suppress_tokens and i < 2:  # what is forced is not what the answer begins with
            begins = i == ((self.lengths == 1).long() if o.forced_bos_token_id is not None else 0)
            begins = torch.as_tensor(begins, device=scores.device).expand(len(scores))
            scores = torch.where(begins[:, None], suppress(scores, o.begin_suppress_tokens), scores)
        return scores

    @staticmethod
    def marked(scores: Tensor, tokens: Tensor) -> Tensor:
        """(B, V), (B, n) → (B, V) bool: is it one of these? What is no token of the vocabulary is none."""
        V = scores.shape[1]
        marks = torch.zeros(len(scores), V + 1, dtype=torch.bool, device=scores.device)
        return marks.scatter_(1, tokens.masked_fill((tokens < 0) | (tokens >= V), V), True)[:, :V]

    def completing(self, n: int) -> Tensor:
        """(B, ·): the tokens with which an n-gram that was said would be said again, −1 elsewhere."""
        if self.said.shape[1] < n:
            return self.said[:, :0]
        windows = self.said.unfold(1, n, 1)  # (B, S − n + 1, n)
        beginning = self.said[:, self.said.shape[1] - n + 1 :]
        again = (windows[..., :-1] == beginning[:, None]).all(dim=-1)
        return windows[..., -1].masked_fill(~again, -1)

    def without_bad_words(self, scores: Tensor) -> Tensor:
        if self.never:
            scores = suppress(scores, self.never)
        for *beginning, last in self.words:
            begun = torch.tensor(beginning, device=scores.device)
            if self.said.shape[1] < len(beginning):
                continue
            said = (self.said[:, -len(beginning) :] == begun).all(dim=1)
            scores = torch.where(said[:, None], suppress(scores, [last]), scores)
        return scores


def only(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """(B, V) → the same, −∞ for all but these tokens, which are sure."""
    sure = torch.full_like(scores, -torch.inf)
    return sure.index_fill_(1, torch.tensor(list(tokens), dtype=torch.int64, device=scores.device), 0.0)


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Seen tokens lose: a positive score is divided by the penalty, a negative one multiplied.  (B, V) → (B, V)"""
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def suppress(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """(B, V) → the same, −∞ for these tokens."""
    return scores.index_fill(1, torch.tensor(list(tokens), dtype=torch.int64, device=scores.device), -torch.inf)


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
    if decoding.logits.isnan().any():
        raise UserError(
            "the logits of the model are NaN: its weights are damaged, or its activations overflow in float16."
        )


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
    rules, every = Rules(options, prompt, prompt_mask, decoding.logits), torch.arange(B, device=device)
    decoding.reorder(every.repeat_interleave(N))
    rules.reorder(every.repeat_interleave(N))
    beams = Beams(B, options, decode, device)
    for i in range(options.max_new_tokens):
        log_p = rules(decoding.logits.float().log_softmax(dim=-1), i)
        rows, tokens = beams.extend(log_p, i)
        if i + 1 == options.max_new_tokens or ((i + 1) % look == 0 and not beams.hopeful.any()):
            break
        decoding.reorder(rows)
        decoding.step(tokens)
        rules.reorder(rows)
        rules.hear(tokens)
    return beams.best_answers()


class Beams:
    """Of each sample, N beams that go on and N answers that have ended, best first; beam n of sample b is row b·N + n.

    A sample is done when its N answers are better than what its best beam is worth as it stands (early_stopping False; with
    a length penalty above 0, a longer answer might still have become better), or would be worth if it were as long as it
    may become ("never"), or as soon as there are N (True).
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
        if self.options.early_stopping == "never" and self.options.length_penalty > 0:
            length = T**self.options.length_penalty
        self.hopeful = self.hopeful & (self.scores[:, :1] / length > self.values[:, -1:])
        if self.options.early_stopping is True:
            self.hopeful = self.hopeful & self.values[:, -1:].isinf()
        return (self.sample * N + parents.gather(1, best)).flatten(), tokens.gather(1, best).flatten()

    def best_answers(self) -> Tensor:
        answers = self.answers[:, 0]
        longest = int((answers >= 0).sum(dim=1).max())
        return answers.masked_fill(answers < 0, self.options.pad_token)[:, :longest]
