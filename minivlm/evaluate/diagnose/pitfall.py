"""A pitfall of a vision-language model, as it is diagnosed: its symptom, the figures that show it, a remedy, and what the
remedy did to the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from minivlm.evaluate.table import side_by_side, table
from minivlm.metrics import Score

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Pitfall:
    """name: as --diagnose takes it. symptom: what to look for in the figures, a sentence. verdict: a sentence that begins with
    "found" or "not found". remedy: sentences that say what was
    tried, and which command trains what cannot be tried without training. effect: what was tried and the figure that it is
    to move, "mean-shift: distance of the centroids" → that score before and after, of the same samples. image: drawn from
    the figures, or None. left_out: why this model cannot have the pitfall; nothing else is given then."""

    name: str
    symptom: str = ""
    verdict: str = ""
    figures: Mapping[str, Score] = field(default_factory=dict)
    remedy: str = ""
    effect: Mapping[str, tuple[Score, Score]] = field(default_factory=dict)
    image: Image | None = None
    left_out: str = ""

    def text(self) -> str:
        """As a terminal shows it."""
        if self.left_out:
            return f"{self.name}: left out, because {self.left_out}"
        parts = [f"{self.name}: {self.symptom}", table(self.figures), self.verdict, f"remedy: {self.remedy}"]
        if self.effect:
            before, after = ({name: pair[i] for name, pair in self.effect.items()} for i in (0, 1))
            parts.append(side_by_side({"before": before, "after": after}))
        return "\n\n".join(parts)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        if self.left_out:
            return {"left_out": self.left_out}
        effect = {
            name: {
                "before": before.record(),
                "after": after.record(),
                "difference": asdict(after.samples.paired(before.samples)),
            }
            for name, (before, after) in self.effect.items()
        }
        figures = {name: score.record() for name, score in self.figures.items()}
        told = {"symptom": self.symptom, "verdict": self.verdict, "remedy": self.remedy}
        return {**told, "figures": figures, "effect": effect}
