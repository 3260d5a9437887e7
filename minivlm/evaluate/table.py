"""Scores as lines of text."""

from __future__ import annotations

from collections.abc import Mapping

from minivlm.metrics import Score

Scores = Mapping[str, Score]


def table(scores: Scores, before: Scores | None = None) -> str:
    """What, its value and how sure it is, what guessing gets, of how many samples. before: the scores of what was fine-tuned,
    which stand in front."""
    return side_by_side({"score": scores} if before is None else {"before": before, "after": scores})


def side_by_side(columns: Mapping[str, Scores]) -> str:
    """A column of scores for each model, by what it is called; rows are those of the last. Of one model its 95 % interval
    follows, of two the difference on the samples that both were judged on, with its interval."""
    *_, last = columns.values()
    two = len(columns) == 2
    rows = [["", *columns, *(["95 % interval"] if len(columns) == 1 else ["difference"] if two else []), "chance", "n"]]
    for name, score in last.items():
        values = [s[name].text(s[name].value) if name in s else "" for s in columns.values()]
        sure = [score.interval_text()] if len(columns) == 1 else []
        if two:
            first = next(iter(columns.values()))
            sure = [difference(score, first[name]) if name in first else ""]
        rows.append([name, *values, *sure, score.text(score.chance), "" if score.n is None else f"{score.n:,}"])
    kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i].strip() for row in rows[1:])]
    widths = {i: max(len(row[i].strip()) for row in rows) for i in kept}
    return "\n".join("  ".join(aligned(row[i], widths[i], i) for i in kept) for row in rows)


def aligned(text: str, width: int, column: int) -> str:
    return text.strip().ljust(width) if column == 0 else text.strip().rjust(width)


def difference(score: Score, other: Score) -> str:
    """ "+3.2 (+1.0 to +5.4)", in points where the scores are shares; nothing where the two are not of the same samples."""
    if score.samples is None or other.samples is None or not score.samples.comparable(other.samples):
        return ""
    found = score.samples.paired(other.samples)
    by, digits = (100, 1) if score.share else (1, 2)
    value, low, high = (f"{by * number:+.{digits}f}" for number in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"
