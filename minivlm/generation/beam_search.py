"""Beam search: continues the N likeliest prefixes at once, to find the likeliest answer.

With length penalty: Wu et al. 2016, §7, with length^p in place of their formula, as is usual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivlm.generation.decoding import Decoding
from minivlm.generation.options import Options
from minivlm.generation.rules import Decode, Rules, contain_stop


@torch.inference_mode()
def beam_search(
    decoding: Decoding,
    options: Options,
    prompt: Tensor | None,
    prompt_mask: Tensor | None,
    decode: Decode | None,
    every: int,
) -> Tensor:
    """The best answers found, as `generate` returns them. Whether all are done is checked after every `every` tokens."""
    (B, _), N, device = decoding.logits.shape, options.num_beams, decoding.logits.device
    rules, rows = Rules(options, prompt, prompt_mask, decoding.logits), torch.arange(B, device=device)
    decoding.reorder(rows.repeat_interleave(N))
    rules.reorder(rows.repeat_interleave(N))
    beams = Beams(B, options, decode, device)
    for i in range(options.max_new_tokens):
        log_p = rules(decoding.logits.float().log_softmax(dim=-1), i)
        rows, tokens = beams.extend(log_p, i)
        if i + 1 == options.max_new_tokens or ((i + 1) % every == 0 and not beams.unfinished.any()):
            break
        decoding.reorder(rows)
        decoding.step(tokens)
        rules.reorder(rows)
        rules.append(tokens)
    return beams.best_answers()


class Beams:
    """N beams of each sample that continue and N answers that have ended, best first; beam n of sample b is row b·N + n.

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
        self.scores[:, 0] = 0  # at first all beams are alike, so one alone may continue
        self.unfinished = torch.ones(B, 1, dtype=torch.bool, device=device)

    def extend(self, log_p: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """log_p (B·N, V) of token i → which row each new beam continues, and with which token; (B·N,) each."""
        B, N, T = self.beams.shape
        V = log_p.shape[1]
        every = (self.scores[..., None] + log_p.view(B, N, V)).flatten(1)
        # A beam can end in len(ends) ways, so that among this many there are N that continue.
        scores, chosen = every.topk(min(max(2, 1 + len(self.ends)) * N, N * V))  # (B, M), best first
        parents, tokens = chosen // V, chosen % V
        longer = self.beams[self.sample, parents]  # (B, M, T)
        longer[..., i] = tokens
        over = torch.isin(tokens, self.ends) | (i + 1 == T)
        if self.options.stop:
            over |= contain_stop(longer[..., : i + 1].flatten(0, 1), self.options.stop, self.decode).view_as(over)

        length = (i + 1) ** self.options.length_penalty
        values = (scores / length).masked_fill(~(over & self.unfinished), -torch.inf)[:, :N]
        self.values, best = torch.cat([self.values, values], dim=1).topk(N)
        self.answers = torch.cat([self.answers, longer[:, :N]], dim=1)[self.sample, best]

        self.scores, best = scores.masked_fill(over, -torch.inf).topk(N)
        self.beams = longer[self.sample, best]
        if self.options.early_stopping == "never" and self.options.length_penalty > 0:
            length = T**self.options.length_penalty
        self.unfinished = self.unfinished & (self.scores[:, :1] / length > self.values[:, -1:])
        if self.options.early_stopping is True:
            self.unfinished = self.unfinished & self.values[:, -1:].isinf()
        return (self.sample * N + parents.gather(1, best)).flatten(), tokens.gather(1, best).flatten()

    def best_answers(self) -> Tensor:
        answers = self.answers[:, 0]
        longest = int((answers >= 0).sum(dim=1).max())
        return answers.masked_fill(answers < 0, self.options.pad_token)[:, :longest]
