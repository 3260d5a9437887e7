"""Scores as lines of text."""

from __future__ import annotations

from minivlm.metrics import Score


def table(scores: dict[str, Score]) -> str:
    """What, its value, what guessing gets."""
    width = max(map(len, scores))
    lines = [f"{'':{width}}   score   chance"]
    lines += [f"{name:{width}}  {s.text(s.value)}  {s.text(s.chance)}" for name, s in scores.items()]
    return "\n".join(lines)
