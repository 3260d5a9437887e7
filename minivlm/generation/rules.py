"""Rules that change the scores of tokens before one is chosen, and stop strings.

Repetition penalty: Keskar et al. 2019 (CTRL), §4.1; no n-gram twice: Paulus et al. 2018, §2.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minivlm.generation.options import Options

Decode = Callable[[Sequence[Sequence[int]]], list[str]]  # rows of ids → their texts, as Processor.decode


class Rules:
    """Changes the scores of a row's next token by its earlier tokens and their number. Rows (B,), in this order: repetition
    penalty, no n-gram twice, bad words, no end too early, forced tokens, suppressed tokens.

    history (B, S): each row's prompt, −1 in front of it where others are longer, and its answer so far. lengths (B,): of the
    prompts, 1 where there is none: then a start token alone precedes the answer.
    """

    def __init__(self, options: Options, prompt: Tensor | None, prompt_mask: Tensor | None, logits: Tensor):
        o, B = options, len(logits)
        self.options, self.phrases = o, [word for word in o.bad_words_ids if len(word) > 1]
        ends = [[end] for end in o.end_tokens]  # an answer may always end
        self.never = [word[0] for word in o.bad_words_ids if len(word) == 1 and list(word) not in ends]
        self.needs_history = o.repetition_penalty != 1 or o.no_repeat_ngram_size > 0 or bool(self.phrases)
        self.history = torch.empty(B, 0, dtype=torch.int64, device=logits.device)
        self.lengths = torch.ones(B, dtype=torch.int64, device=logits.device)
        if prompt is not None:
            real = torch.ones_like(prompt, dtype=torch.bool) if prompt_mask is None else prompt_mask
            self.lengths = real.sum(dim=1)
            order = real.long().argsort(dim=1, stable=True)
            self.history = prompt.masked_fill(~real, -1).gather(1, order)

    def append(self, tokens: Tensor) -> None:
        """tokens (B,) were generated."""
        if self.needs_history:
            self.history = torch.cat([self.history, tokens[:, None]], dim=1)

    def reorder(self, rows: Tensor) -> None:
        """Row i continues as row rows[i] did."""
        self.history, self.lengths = self.history[rows], self.lengths[rows]

    def __call__(self, scores: Tensor, i: int) -> Tensor:
        """scores (B, V) of token i of the answer → the same, −∞ for what the rules forbid."""
        o = self.options
        if o.repetition_penalty != 1:
            scores = penalise(scores, one_of(scores, self.history), o.repetition_penalty)
        if o.no_repeat_ngram_size > 0:
            scores = scores.masked_fill(one_of(scores, self.repeating(o.no_repeat_ngram_size)), -torch.inf)
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
        if o.begin_suppress_tokens and i < 2:  # a forced token does not count as the answer's first
            starts = i == ((self.lengths == 1).long() if o.forced_bos_token_id is not None else 0)
            starts = torch.as_tensor(starts, device=scores.device).expand(len(scores))
            scores = torch.where(starts[:, None], suppress(scores, o.begin_suppress_tokens), scores)
        return scores

    def repeating(self, n: int) -> Tensor:
        """(B, ·): the tokens that would complete an n-gram which the history has already, −1 elsewhere."""
        if self.history.shape[1] < n:
            return self.history[:, :0]
        windows = self.history.unfold(1, n, 1)  # (B, S − n + 1, n)
        latest = self.history[:, self.history.shape[1] - n + 1 :]
        again = (windows[..., :-1] == latest[:, None]).all(dim=-1)
        return windows[..., -1].masked_fill(~again, -1)

    def without_bad_words(self, scores: Tensor) -> Tensor:
        if self.never:
            scores = suppress(scores, self.never)
        for *prefix, last in self.phrases:
            if self.history.shape[1] < len(prefix):
                continue
            matches = (self.history[:, -len(prefix) :] == torch.tensor(prefix, device=scores.device)).all(dim=1)
            scores = torch.where(matches[:, None], suppress(scores, [last]), scores)
        return scores


def one_of(scores: Tensor, tokens: Tensor) -> Tensor:
    """(B, V), (B, n) → (B, V) bool: is the token one of its row's n? Ids beyond the vocabulary are ignored."""
    V = scores.shape[1]
    found = torch.zeros(len(scores), V + 1, dtype=torch.bool, device=scores.device)
    return found.scatter_(1, tokens.masked_fill((tokens < 0) | (tokens >= V), V), True)[:, :V]


def only(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """(B, V) → the same shape, −∞ for all but these tokens, which are certain."""
    certain = torch.full_like(scores, -torch.inf)
    return certain.index_fill_(1, torch.tensor(list(tokens), dtype=torch.int64, device=scores.device), 0.0)


def penalise(scores: Tensor, occurred: Tensor, penalty: float) -> Tensor:
    """Lower the scores of tokens that have occurred: a positive one is divided by the penalty, a negative one multiplied.

    (B, V), occurred (B, V) bool → (B, V)
    """
    return torch.where(occurred, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def suppress(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """(B, V) → the same, −∞ for these tokens."""
    return scores.index_fill(1, torch.tensor(list(tokens), dtype=torch.int64, device=scores.device), -torch.inf)


def contain_stop(tokens: Tensor, stop: Sequence[str], decode: Decode) -> Tensor:
    """(B, T) → (B,) bool: whether the row's text contains a stop string."""
    found = [any(s in text for s in stop) for text in decode(tokens.tolist())]
    return torch.tensor(found, device=tokens.device)
