"""What the ratings of a sheet say: which system is preferred, how far the raters agree, and whether the side mattered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivlm.errors import UserError
from minivlm.files import read_json
from minivlm.human.sides import HIGHEST, LOWEST, WORDS, SheetRecord, swapped
from minivlm.metrics import Samples, Score
from minivlm.metrics.agreement import cohen_kappa, fleiss_kappa


class Ratings(NamedTuple):
    """Of one rater. values: id → the preferred system, 0 or 1, or "tie"; of one system, its rating."""

    rater: str
    path: Path
    values: Mapping[str, Any]
    left: Mapping[str, bool]  # id → whether the left output was preferred; no ties


class Agreement(NamedTuple):
    name: str
    value: float | None
    samples: int  # that two raters or more have rated

    def text(self) -> str:
        value = "is not defined: all gave the same one answer" if self.value is None else f"{self.value:.3f}"
        return f"{self.name} {value}, of {self.samples:,} samples"


def read_ratings(paths: Sequence[Path]) -> tuple[SheetRecord, list[Ratings]]:
    """Of one sheet, by several raters. UserError for files that are none, ratings of different sheets, a rater who comes
    twice."""
    found, first = [], None
    for path in paths:
        record = read_json(path)
        sheet = sheet_of(record, path)
        if first is not None and sheet != first:
            raise UserError(f"{path} and {paths[0]} are ratings of different sheets: give those of one sheet.")
        first = first or sheet
        ratings = ratings_of(record, sheet, path)
        for other in found:
            if other.rater.casefold() == ratings.rater.casefold():
                raise UserError(f"{other.path} and {path} are both ratings of {ratings.rater}: leave one of them out.")
        found.append(ratings)
    return first, found


def sheet_of(record: Any, path: Path) -> SheetRecord:
    try:
        given = dict(record["sheet"])
        sheet = SheetRecord(
            tuple(map(str, given["systems"])),
            given["seed"],
            tuple(given["ids"]),
            tuple(given["same"]),
            str(given["fingerprint"]),
        )
        valid = isinstance(sheet.seed, int) and len(sheet.systems) in (1, 2)
        valid = valid and all(isinstance(name, str) for name in sheet.ids + sheet.same)
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"{path} holds no ratings of a sheet that `python -m minivlm.human sheet` wrote.")
    return sheet


def ratings_of(record: Mapping[str, Any], sheet: SheetRecord, path: Path) -> Ratings:
    rater, given = record.get("rater"), record.get("ratings")
    if not isinstance(rater, str) or not rater.strip() or not isinstance(given, dict):
        raise UserError(f"{path} lacks the name of its rater, or the ratings: save the sheet again.")
    allowed = WORDS if sheet.compared else set(range(LOWEST, HIGHEST + 1))
    for name, value in given.items():
        if name not in sheet.ids:
            raise UserError(f"{path} rates {name!r}, which is not on its sheet.")
        if isinstance(value, bool) or not isinstance(value, str | int) or value not in allowed:
            raise UserError(
                f"{path} rates {name!r} as {value!r}, which is none of {', '.join(map(str, sorted(allowed)))}."
            )
    if not sheet.compared:
        return Ratings(rater.strip(), path, given, {})
    turned = swapped(sheet.ids, sheet.seed)
    values = {
        name: value if value == "tie" else int((value == "right") != (name in turned)) for name, value in given.items()
    }
    left = {name: value == "left" for name, value in given.items() if value != "tie"}
    return Ratings(rater.strip(), path, values, left)


def scores(sheet: SheetRecord, raters: Sequence[Ratings]) -> dict[str, Score]:
    """Of two systems how often each is preferred, a tie as a half, and how often there is one; and how often the left output
    won. Of one, its mean rating. A sample counts once, by the mean over those who rated it; intervals are over samples.

    UserError where nobody has rated anything.
    """
    votes = {name: [one.values[name] for one in raters if name in one.values] for name in sheet.ids}
    votes = {name: some for name, some in votes.items() if some}
    if not votes:
        raise UserError("nobody has rated anything on these sheets.")
    if not sheet.compared:
        means = [float(np.mean(some)) for some in votes.values()]
        return {f"mean rating of {sheet.systems[0]}": Score.of(per_sample(votes, means), None, share=False)}
    weight = len(votes) / len(sheet.ids)  # of samples that nobody was asked about: as many as of the others were rated

    def share(worth: Mapping[Any, float]) -> Samples:
        rows = {name: (float(np.mean([worth[vote] for vote in some])), 1.0) for name, some in votes.items()}
        rows |= dict.fromkeys(sheet.same, (worth["tie"] * weight, weight))
        return Samples("mean", np.array([*rows.values()]), tuple(rows))

    names = labels(sheet.systems)
    found = {
        f"{names[0]} preferred, ties as half": Score.of(share({0: 1.0, 1: 0.0, "tie": 0.5}), 0.5),
        f"{names[0]} better": Score.of(share({0: 1.0, 1: 0.0, "tie": 0.0}), None),
        f"{names[1]} better": Score.of(share({0: 0.0, 1: 1.0, "tie": 0.0}), None),
        "ties": Score.of(share({0: 0.0, 1: 0.0, "tie": 1.0}), None),
    }
    sides = [(name, won) for one in raters for name, won in one.left.items()]
    if sides:
        names, won = zip(*sides, strict=True)
        found["the left one won"] = Score.of(Samples.mean(won, names), 0.5)
    return found


def per_sample(votes: Mapping[str, Any], means: Sequence[float]) -> Samples:
    return Samples("mean", np.stack([means, np.ones(len(means))], axis=1), tuple(votes))


def labels(systems: Sequence[str]) -> list[str]:
    """As short as they can be told apart."""
    stems = [Path(name).stem for name in systems]
    return stems if len(set(stems)) == len(stems) else list(systems)


def agreement(sheet: SheetRecord, raters: Sequence[Ratings]) -> Agreement | None:
    """Cohen's kappa of two raters, on what both rated (of ratings from 1 to 5 weighted by squares); Fleiss' of more, on what
    two of them or more rated. None where there is no such sample."""
    common = [name for name in sheet.ids if sum(name in one.values for one in raters) >= 2]
    if not common:
        return None
    if len(raters) == 2:
        a, b = ([vote(one.values[name]) for name in common] for one in raters)
        weighted = not sheet.compared
        name = "Cohen's kappa" + (", quadratic weights," if weighted else "")
        return Agreement(name, cohen_kappa(a, b, ordered=weighted), len(common))
    kinds = sorted({vote(value) for one in raters for value in one.values.values()})
    counts = np.zeros((len(common), len(kinds)))
    for i, name in enumerate(common):
        for value, count in Counter(vote(one.values[name]) for one in raters if name in one.values).items():
            counts[i, kinds.index(value)] = count
    return Agreement("Fleiss' kappa", fleiss_kappa(counts), len(common))


def vote(value: Any) -> int:
    """A number for each answer, so that they can be sorted."""
    return -1 if value == "tie" else value


def told(sheet: SheetRecord, raters: Sequence[Ratings]) -> Iterator[str]:
    """What a reader of the scores has to know."""
    for one in raters:
        if len(one.values) < len(sheet.ids):
            yield f"{one.rater} has rated {len(one.values):,} of {len(sheet.ids):,} samples; the others do not count."
    if sheet.same:
        yield f"in {len(sheet.same):,} samples both texts are the same: nobody was asked, and they count as ties."


def record(sheet: SheetRecord, raters: Sequence[Ratings]) -> dict[str, Any]:
    """As JSON values."""
    agreed = agreement(sheet, raters)
    return {
        "scores": {name: score.record() for name, score in scores(sheet, raters).items()},
        "agreement": None if agreed is None else agreed._asdict(),
        "raters": {one.rater: len(one.values) for one in raters},
        "samples": len(sheet.ids),
        "same": len(sheet.same),
        "systems": list(sheet.systems),
    }


def write_record(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
