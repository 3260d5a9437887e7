"""A measured number, and what guessing would have got."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Both between 0 and 1, higher is better; chance is the expectation under uniformly random answers."""

    value: float
    chance: float
