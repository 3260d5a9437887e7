"""Options of `generate`: how a token is picked, which rules hold, and where an answer ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from minivlm.errors import UserError


@dataclass(frozen=True)
class Options:
    """Options for choosing tokens. A value that makes no sense is a UserError."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # logits are divided by it; 0: always the likeliest token
    top_k: int | None = None  # sample among the k likeliest tokens
    top_p: float | None = None  # sample among the fewest tokens that together have this probability
    min_p: float = 0.0  # sample among those that are at least this likely, as a share of the likeliest
    repetition_penalty: float = 1.0  # > 1: tokens that have occurred, in the prompt as well, become less likely
    num_beams: int = 1  # > 1: beam search, which finds a likelier answer than the greedy one
    length_penalty: float = 1.0  # beam search compares log p(answer) / length^penalty; > 0 favours long answers
    early_stopping: bool | Literal["never"] = False  # of beam search, see `Beams`
    no_repeat_ngram_size: int = 0  # no sequence of so many tokens occurs twice, the prompt included; 0: no rule
    seed: int | Sequence[int] = 0  # one for each row, or one from which those of the rows are made
    end_tokens: Sequence[int] = ()  # a row ends with any of these
    pad_token: int = 0  # fills a row after its end
    stop: Sequence[str] = ()  # a row ends where its text contains any of these
    suppress_tokens: Sequence[int] = ()  # are never generated
    begin_suppress_tokens: Sequence[int] = ()  # are not the first token of an answer
    bad_words_ids: Sequence[Sequence[int]] = ()  # sequences of tokens that are never generated
    min_new_tokens: int = 0  # no answer ends earlier
    min_length: int = 0  # likewise, with the prompt counted
    max_length: int | None = None  # an upper bound on prompt and answer together, besides that on the answer
    forced_bos_token_id: int | None = None  # the second token of a text of one, such as T5's start token
    forced_eos_token_id: Sequence[
        int
    ] = ()  # the last of max_new_tokens is one of these, if the answer has not ended earlier

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
        """The number of tokens that may follow a prompt of so many, at least one."""
        left = self.max_new_tokens if self.max_length is None else self.max_length - taken
        return max(1, min(self.max_new_tokens, left))


def with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The given options, and the defaults that do not contradict them: a given length or way of choosing takes precedence."""
    left = dict(defaults)
    if "max_new_tokens" in given:
        left.pop("max_length", None)
    if given.get("num_beams", 1) > 1:
        left.pop("temperature", None)
    if given.get("temperature", 0) > 0:
        left.pop("num_beams", None)
    return {**left, **given}
