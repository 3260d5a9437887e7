"""Scores, what they are by kind, and pitfalls, as tables of a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from minivlm.evaluate.diagnose.pitfall import Pitfall
from minivlm.evaluate.few_shot import few_shot_lines
from minivlm.evaluate.predictions import Prediction
from minivlm.evaluate.table import Scores, difference
from minivlm.html import Content, Markup, image, table, tag
from minivlm.html_charts import bar, curves
from minivlm.metrics import Samples, Score

KINDS = 20  # rows of a table by kind; the rest is folded away
WIDE = 900  # pixels of an image that a pitfall comes with


def score_section(columns: Mapping[str, Scores]) -> Content:
    """Of one model: what is judged, then the same by kind in tables of their own. Of several: side by side."""
    if len(columns) > 1:
        return side_by_side(columns)
    [scores] = columns.values()
    parts = parents(scores)
    head = {name: score for name, score in scores.items() if name not in parts}
    found = [score_table(head), LEGEND]
    for parent in dict.fromkeys(parts.values()):
        rows = {name.removeprefix(f"{parent}, "): scores[name] for name, of in parts.items() if of == parent}
        found.append(
            tag(
                "details",
                tag("summary", f"{parent}, in parts"),
                score_table({"all": scores[parent], **rows}),
                open=True,
            )
        )
    if lines := {name: sorted(line.items()) for name, line in few_shot_lines(scores).items()}:
        found.append(
            tag("div", curves(lines, title="new words from examples in the prompt", across="examples"), class_="curves")
        )
    return found


LEGEND = tag(
    "p",
    "The bar is the value, the whisker its 95 % interval (bootstrap over samples), the dashed line chance: what is had without "
    "looking at the image.",
    class_="note",
)


def parents(scores: Iterable[str]) -> dict[str, str]:
    """ "accuracy, colour" → "accuracy", where that is a score as well. What a model gets blind stands beside what it gets."""
    names, found = list(scores), {}
    for name in names:
        words = name.split(", ")
        for n in range(len(words) - 1, 0, -1):
            parent = ", ".join(words[:n])
            if parent in names and words[-1] != "blind":
                found[name] = found.get(parent, parent)
                break
    return found


def score_table(scores: Scores) -> Markup:
    rows = []
    for name, score in scores.items():
        drawn = bar(score.value, score.interval, score.chance) if score.share else None
        n = "" if score.n is None else f"{score.n:,}"
        rows.append(
            [name, score.text(score.value).strip(), drawn, score.interval_text(), score.text(score.chance).strip(), n]
        )
    return kept_columns(["", "score", "", "95 % interval", "chance", "n"], rows)


def side_by_side(columns: Mapping[str, Scores]) -> Markup:
    """A column for each model; of two the difference on the same samples as well."""
    first, *_, last = columns.values()
    rows = []
    for name, score in last.items():
        values = [one[name].text(one[name].value).strip() if name in one else "" for one in columns.values()]
        more = [difference(score, first[name]) if name in first else ""] if len(columns) == 2 else []
        rows.append([name, *values, *more, score.text(score.chance).strip(), "" if score.n is None else f"{score.n:,}"])
    return kept_columns(["", *columns, *(["difference"] if len(columns) == 2 else []), "chance", "n"], rows)


def kept_columns(head: Sequence[Content], rows: Sequence[Sequence[Content]]) -> Markup:
    """Without columns that are empty, or have a dash alone."""
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] not in ("", "–", None) for row in rows)]
    return table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def by_kind(group: str, predictions: Sequence[Prediction]) -> Markup | None:
    """How right the model is for each kind of question, or class, and what it says most often where it is wrong: those that it
    is worst at first."""
    kinds: dict[str, list[Prediction]] = {}
    for p in predictions:
        if p.value is not None and p.kind:
            kinds.setdefault(p.kind, []).append(p)
    if len(kinds) < 2:
        return None
    scores = {kind: score_of(some) for kind, some in kinds.items()}
    worst = sorted(kinds, key=lambda kind: scores[kind].value)
    rows = []
    for kind in worst:
        score, wrong = scores[kind], Counter(p.text for p in kinds[kind] if p.value < 0.5).most_common(1)
        drawn = bar(score.value, score.interval, None)
        instead = f"{wrong[0][0]} ({wrong[0][1]})" if wrong else ""
        rows.append([kind, f"{score.value:.1%}", drawn, score.interval_text(), f"{score.n:,}", instead])
    head = ["", "right", "", "95 % interval", "n", "most often instead"]
    found = tag("h3", f"{group}, the worst kinds first") + kept_columns(head, rows[:KINDS])
    if rows[KINDS:]:
        found += tag("details", tag("summary", f"{len(rows) - KINDS} more"), kept_columns(head, rows[KINDS:]))
    return found


def score_of(predictions: Sequence[Prediction]) -> Score:
    """All predictions about one image are one sample."""
    images = [p.image or f"\0{i}" for i, p in enumerate(predictions)]
    return Score.of(Samples.mean([p.value for p in predictions], images), None)


def pitfall_section(pitfalls: Sequence[Pitfall] | None, model: bool) -> Content:
    if pitfalls is None:
        why = "nobody asked for a diagnosis: add --diagnose" if model else "a diagnosis needs a MODEL and --diagnose"
        return tag("p", f"Left out: {why}.", class_="note")
    return [pitfall_part(pitfall) for pitfall in pitfalls]


def pitfall_part(pitfall: Pitfall) -> Content:
    heading = tag("h3", pitfall.name.replace("-", " "))
    if pitfall.left_out:
        return [heading, tag("p", f"Left out: {pitfall.left_out}", class_="note")]
    found = [heading, tag("p", pitfall.symptom), score_table(pitfall.figures)]
    if pitfall.verdict:
        found.append(tag("p", tag("b", pitfall.verdict)))
    found.append(tag("p", "Remedy: ", pitfall.remedy))
    if pitfall.effect:
        before, after = ({name: pair[i] for name, pair in pitfall.effect.items()} for i in (0, 1))
        found.append(side_by_side({"before": before, "after": after}))
    if pitfall.image is not None:
        found.append(
            tag("p", image(pitfall.image, side=min(WIDE, max(pitfall.image.size)), alt="drawn from the figures above"))
        )
    return found
