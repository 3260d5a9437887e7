"""Scores as lines of text."""

from __future__ import annotations

from collections.abc import Mapping

from minivlm.metrics import Score

Scores = Mapping[str, Score]


def table(scores: Scores, before: Scores | None = None) -> str:
    """What, its value, what guessing gets. before: the scores of what was fine-tuned, which stand in front."""
    return side_by_side({"score": scores} if before is None else {"before": before, "after": scores})


def side_by_side(columns: Mapping[str, Scores]) -> str:
    """A column of scores for each model, by what it is called, and what guessing gets; rows are those of the last."""
    *_, last = columns.values()
    width, widths = max(map(len, last)), [max(6, len(name)) for name in columns]
    heads = "".join(f"  {name:>{wide}}" for name, wide in zip(columns, widths, strict=True))
    lines = [f"{'':{width}}{heads}   chance"]
    for name, score in last.items():
        values = [s[name].text(s[name].value) if name in s else "" for s in columns.values()]
        row = "".join(f"  {value:>{wide}}" for value, wide in zip(values, widths, strict=True))
        lines.append(f"{name:{width}}{row}  {score.text(score.chance)}")
    return "\n".join(lines)
