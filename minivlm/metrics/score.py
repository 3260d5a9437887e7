"""A measured number, how sure it is, and what guessing would have got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from minivlm.metrics.samples import Samples


@dataclass(frozen=True)
class Score:
    """A share between 0 and 1, higher is better; or, with `share` false, a number in a unit of its own (a perplexity).

    chance: what can be had without looking, e.g. the expectation under uniformly random answers; None: nothing is meant.
    samples: what it is made of, from which `n` and `interval` follow.
    """

    value: float
    chance: float | None
    share: bool = True
    samples: Samples | None = field(default=None, compare=False, repr=False)
    recorded: tuple[int, float, float] | None = field(default=None, compare=False, repr=False)  # n, low, high

    @classmethod
    def of(cls, samples: Samples, chance: float | None, *, share: bool = True) -> Score:
        return cls(samples.value, chance, share, samples)

    @cached_property
    def n(self) -> int | None:
        """How many samples were judged."""
        return self.samples.n if self.samples else self.recorded[0] if self.recorded else None

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the bootstrap over samples."""
        if self.samples and len(self.samples.statistics):
            return self.samples.interval()
        return self.recorded[1:] if self.recorded else None

    def text(self, number: float | None) -> str:
        if number is None:
            return "     –"
        return f"{number:6.1%}" if self.share else f"{number:6.2f}"

    def interval_text(self) -> str:
        """ "95.4 to 97.9%"; nothing where it is not known."""
        if self.interval is None:
            return ""
        low, high = self.interval
        return f"{100 * low:.1f} to {high:.1%}" if self.share else f"{low:.2f} to {high:.2f}"

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        low, high = self.interval or (None, None)
        sure = {} if self.n is None else {"n": self.n, "low": low, "high": high}
        return {"value": self.value, "chance": self.chance, "share": self.share, **sure}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Score:
        """From what `record` gives; that of an earlier version has no n and no interval."""
        known = (record["n"], record["low"], record["high"]) if record.get("low") is not None else None
        return cls(record["value"], record["chance"], record.get("share", True), recorded=known)
