"""A measured number, and what guessing would have got."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A share between 0 and 1, higher is better; or, with `share` false, a number in a unit of its own (a perplexity).

    chance: what can be had without looking, e.g. the expectation under uniformly random answers.
    """

    value: float
    chance: float
    share: bool = True

    def text(self, number: float) -> str:
        return f"{number:6.1%}" if self.share else f"{number:6.2f}"
